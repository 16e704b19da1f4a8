"""Rollouts by vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import LoraConfig as PeftLoraConfig
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from dvpo_ray.actors.rollout_backend import Part, Response, RolloutBackend
from dvpo_ray.config.schema import Config, LoraConfig, RolloutConfig
from dvpo_ray.errors import ResourceError
from dvpo_ray.models.compiling import require_compiler
from dvpo_ray.models.loading import first_line
from dvpo_ray.planning.memory import LARGEST_GRAPH
from dvpo_ray.planning.placement import adapter_rank
from dvpo_ray.sync.object_store import unpack

GIB = 2**30
_TAGS: dict[Part, str] = {"weights": "weights", "cache": "kv_cache"}


class VLLMBackend(RolloutBackend):
    """One vLLM engine in this process (and in its tensor-parallel workers).

    Args:
        stop_token_ids: tokens that end a response.
        transport: how new weights arrive. With `adapters` the engine has the weights of the checkpoint for good, and in its sleep they are
            in host memory.
        max_sequence_tokens: longest prompt and response together.
        loads_weights: take the weights of the checkpoint.
        sleeps: `sleep` is to free the GPU.

    Raises:
        ResourceError: the node has no compiler for what the config asks for, or its device can't sleep.
    """

    def __init__(
        self,
        config: Config,
        stop_token_ids: frozenset[int],
        transport: str,
        max_sequence_tokens: int,
        loads_weights: bool = True,
        sleeps: bool = False,
    ) -> None:
        rollout = config.rollout
        if not rollout.is_eager:
            require_compiler("rollout.enforce_eager: false")
        if sleeps and not current_platform.is_sleep_mode_available():
            raise ResourceError(f"rollout: an engine on a {current_platform.device_name} can't sleep; vLLM's sleep mode needs a GPU")
        self.sleeps = sleeps
        self.adapters = LoRARequest("policy", 1, "the learner sends them") if transport == "adapters" else None
        with _refusing_adapters():
            self.llm = LLM(
                model=config.model.path,
                dtype=config.model.dtype,
                load_format="auto" if loads_weights else "dummy",
                trust_remote_code=config.model.trust_remote_code,
                skip_tokenizer_init=True,  # prompts arrive as token ids and text is made elsewhere
                generation_config="vllm",  # sampling is what this config says, not what the checkpoint suggests
                logprobs_mode="processed_logprobs",  # of the distribution that is sampled: after temperature and minimum length
                max_model_len=max_sequence_tokens,
                max_num_seqs=rollout.max_concurrent_sequences,
                max_num_batched_tokens=rollout.max_batched_tokens,
                tensor_parallel_size=rollout.tensor_parallel_size,
                # Inside a placement group vLLM would choose Ray's executor, which needs a bundle for each GPU.
                distributed_executor_backend="uni" if rollout.tensor_parallel_size == 1 else "mp",
                worker_extension_cls="dvpo_ray.sync.vllm_receiver.WorkerExtension",
                enforce_eager=rollout.is_eager,
                enable_sleep_mode=sleeps,
                seed=config.seed,
                weight_transfer_config=None if self.adapters else WeightTransferConfig(backend=transport),
                disable_log_stats=True,
                **_memory(rollout),
                **_graphs(rollout),
                **(_room_for_adapters(config.policy.lora) if self.adapters else {}),
            )
        self.params = SamplingParams(
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_tokens=rollout.max_response_tokens,
            min_tokens=rollout.min_response_tokens,
            stop_token_ids=sorted(stop_token_ids),
            logprobs=0,
            flat_logprobs=True,  # otherwise vLLM makes two Python objects for each token
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self.greedy_params = self.params.clone()
        self.greedy_params.temperature = 0.0

    @property
    def unfinished(self) -> int:
        return self.llm.llm_engine.get_num_unfinished_requests()

    def add(self, indices: Sequence[int], prompts: Sequence[Sequence[int]], seed: int | Sequence[int], greedy: bool = False) -> None:
        params = self.greedy_params if greedy else self.params
        if isinstance(seed, int):
            self.llm.collective_rpc("seed_sampling", args=(seed,))
        for i, (index, prompt) in enumerate(zip(indices, prompts, strict=True)):
            own = params
            if not isinstance(seed, int):
                own = params.clone()
                own.seed = seed[i]
            self.llm.llm_engine.add_request(str(index), {"prompt_token_ids": list(prompt)}, own, lora_request=self.adapters)

    def step(self) -> Iterator[Response]:
        return (_response(output) for output in self.llm.llm_engine.step() if output.finished)

    def init_weight_transfer(self, init_info: dict) -> None:
        self.llm.collective_rpc("init_weight_transfer_engine", args=(init_info,))

    def start_weight_update(self) -> None:
        if self.adapters is None:
            self.llm.collective_rpc("start_weight_update")

    def update_weights(self, update_info: dict) -> None:
        if self.adapters is None:
            self.llm.collective_rpc("update_weights", args=(update_info,))
        else:
            self._load_adapters(**update_info)

    def finish_weight_update(self) -> None:
        if self.adapters is None:
            self.llm.collective_rpc("finish_weight_update")
        if not self.llm.reset_prefix_cache():  # cached keys and values were computed with the old weights
            raise RuntimeError("vLLM kept keys and values of the old weights: a response was unfinished when new weights came")

    def _load_adapters(self, description: PeftLoraConfig, **bucket: Any) -> None:
        with TemporaryDirectory(prefix="dvpo-adapters-") as folder:  # vLLM takes adapters from a folder only
            description.save_pretrained(folder)
            save_file(dict(unpack(**bucket)), Path(folder) / "adapter_model.safetensors")
            self.llm.llm_engine.add_lora(LoRARequest(self.adapters.lora_name, self.adapters.lora_int_id, folder, load_inplace=True))
        idle = {name for names in self.llm.collective_rpc("idle_adapters", args=(self.adapters.lora_int_id,)) for name in names}
        if idle:
            raise ResourceError(f"weight_sync.transport is adapters, but vLLM has no place for the one of {min(idle)}; set it to auto")

    def sleep(self) -> bool:
        if self.sleeps:
            self.llm.sleep(level=1 if self.adapters else 2)
        return self.sleeps and self.adapters is None

    def wake(self, part: Part) -> None:
        if self.sleeps:
            self.llm.wake_up(tags=[_TAGS[part]])


def _memory(rollout: RolloutConfig) -> dict:
    """vLLM's settings for the size of its cache."""
    if rollout.given_cache_gib is None:
        return {"gpu_memory_utilization": rollout.gpu_memory_utilization}
    given = {"kv_cache_memory_bytes": round(rollout.given_cache_gib * GIB)}
    # With a given cache the share only says how much must be free at the start, and the others on the GPU may be there first.
    return given | ({"gpu_memory_utilization": 0.01} if rollout.gpus_per_actor > 0 else {})


def _room_for_adapters(lora: LoraConfig) -> dict:
    """vLLM's settings for one set of adapters, on the matrices that the learner adapts."""
    targets = lora.target_modules if isinstance(lora.target_modules, list) else None
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": adapter_rank(lora), "lora_target_modules": targets}


@contextmanager
def _refusing_adapters() -> Iterator[None]:
    """Within this context vLLM's word that it has no adapters for a model is one line with the remedy."""
    try:
        yield
    except ValueError as error:
        if "does not support LoRA" not in str(error):
            raise
        raise ResourceError(f"weight_sync.transport is adapters, but vLLM says: {first_line(error)} Set it to auto") from error


def _graphs(rollout: RolloutConfig) -> dict:
    """vLLM's settings for CUDA graphs: one for every number of sequences that can be decoded together."""
    sequences = rollout.max_concurrent_sequences
    if rollout.gpus_per_actor == 0 or rollout.is_eager or sequences <= LARGEST_GRAPH:
        return {}
    return {"compilation_config": {"max_cudagraph_capture_size": -(-sequences // 16) * 16}}  # vLLM captures every sixteenth size


def _response(output) -> Response:
    completion = output.outputs[0]
    return Response(int(output.request_id), list(completion.token_ids), list(completion.logprobs.logprobs), completion.finish_reason == "length")
