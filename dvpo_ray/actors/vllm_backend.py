"""Rollouts by vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.sampling_params import RequestOutputKind

from dvpo_ray.actors.rollout_backend import Response
from dvpo_ray.config.schema import Config
from dvpo_ray.models.compiling import require_compiler

WeightTransferEngineFactory.register_engine("object_store", "dvpo_ray.sync.vllm_receiver", "ObjectStoreWeightTransferEngine")


class VLLMBackend:
    """One vLLM engine in this process (and in its tensor-parallel workers)."""

    def __init__(self, config: Config, stop_token_ids: frozenset[int], transport: str, max_sequence_tokens: int, loads_weights: bool = True) -> None:
        rollout = config.rollout
        on_gpu = rollout.gpus_per_actor > 0
        if not rollout.enforce_eager:
            require_compiler("rollout.enforce_eager: false")
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
            tensor_parallel_size=rollout.tensor_parallel_size,
            enforce_eager=rollout.enforce_eager,
            seed=config.seed,
            weight_transfer_config=WeightTransferConfig(backend=transport),
            disable_log_stats=True,
            **({"gpu_memory_utilization": rollout.gpu_memory_utilization} if on_gpu else {}),
        )
        self.params = SamplingParams(
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_tokens=rollout.max_response_tokens,
            min_tokens=rollout.min_response_tokens,
            stop_token_ids=sorted(stop_token_ids),
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self.greedy_params = self.params.clone()
        self.greedy_params.temperature = 0.0

    def generate(self, prompts: Sequence[Sequence[int]], seed: int, greedy: bool = False) -> Iterator[Response]:
        self.llm.collective_rpc(_seed_worker, args=(seed,))
        engine, params = self.llm.llm_engine, self.greedy_params if greedy else self.params
        for index, prompt in enumerate(prompts):
            engine.add_request(str(index), {"prompt_token_ids": list(prompt)}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    yield _response(output)

    def init_weight_transfer(self, init_info: dict) -> None:
        self.llm.collective_rpc("init_weight_transfer_engine", args=(init_info,))

    def start_weight_update(self) -> None:
        self.llm.collective_rpc("start_weight_update")

    def update_weights(self, update_info: dict) -> None:
        self.llm.collective_rpc("update_weights", args=(update_info,))

    def finish_weight_update(self) -> None:
        self.llm.collective_rpc("finish_weight_update")
        self.llm.reset_prefix_cache()  # cached keys and values were computed with the old weights


def _seed_worker(_worker, seed: int) -> None:
    from vllm.utils.torch_utils import set_random_seed

    set_random_seed(seed)


def _response(output) -> Response:
    completion = output.outputs[0]
    token_ids = list(completion.token_ids)
    log_probs = [step[token].logprob for step, token in zip(completion.logprobs, token_ids, strict=True)]
    return Response(int(output.request_id), token_ids, log_probs, completion.finish_reason == "length")
