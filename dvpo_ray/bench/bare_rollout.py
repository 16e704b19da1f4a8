"""The bare side of the rollout engine: the generation library's own offline `generate` with the same settings."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from dvpo_ray.bench.measure import Sample
from dvpo_ray.config.schema import Config
from dvpo_ray.runtime.process import Actor


class BareVLLM(Actor):
    """vLLM's `LLM.generate`, log-probs included, in a process like the rollout engine's."""

    role = "bare_rollout"

    def __init__(self, config: Config, index: int, run_folder: str, stop_token_ids: frozenset[int], max_sequence_tokens: int) -> None:
        super().__init__(index, run_folder)
        from vllm import LLM, SamplingParams

        rollout = config.rollout
        self.llm = LLM(
            model=config.model.path,
            dtype=config.model.dtype,
            trust_remote_code=config.model.trust_remote_code,
            skip_tokenizer_init=True,
            generation_config="vllm",
            max_model_len=max_sequence_tokens,
            max_num_seqs=rollout.max_concurrent_sequences,
            tensor_parallel_size=rollout.tensor_parallel_size,
            enforce_eager=rollout.enforce_eager,
            **({"gpu_memory_utilization": rollout.gpu_memory_utilization} if rollout.gpus_per_actor > 0 else {}),
        )
        self.params = SamplingParams(
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_tokens=rollout.max_response_tokens,
            min_tokens=rollout.min_response_tokens,
            stop_token_ids=sorted(stop_token_ids),
            logprobs=0,
            detokenize=False,
        )

    def generate(self, prompts: Sequence[Sequence[int]], seed: int) -> Sample:
        """Sample one response to each prompt; counts response tokens."""
        torch.manual_seed(seed)
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        started = time.perf_counter()
        outputs = self.llm.generate(requests, self.params, use_tqdm=False)
        seconds = time.perf_counter() - started
        return Sample(sum(len(output.outputs[0].token_ids) for output in outputs), seconds)


class BareTransformers(Actor):
    """transformers' `generate` on all prompts at once, in a process like the rollout engine's."""

    role = "bare_rollout"

    def __init__(self, config: Config, index: int, run_folder: str, stop_token_ids: frozenset[int], max_sequence_tokens: int) -> None:
        super().__init__(index, run_folder)
        from transformers import GenerationConfig

        from dvpo_ray.models.loading import default_device, load_policy

        rollout = config.rollout
        self.model = load_policy(config.model, default_device())
        self.stop_token_ids = torch.tensor(sorted(stop_token_ids), device=self.model.device)
        self.pad_token_id = min(stop_token_ids)
        self.batch_size = rollout.max_concurrent_sequences
        self.sampling = GenerationConfig(
            do_sample=True,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=0,
            max_new_tokens=rollout.max_response_tokens,
            min_new_tokens=rollout.min_response_tokens or None,
            eos_token_id=sorted(stop_token_ids),
            pad_token_id=self.pad_token_id,
        )

    def generate(self, prompts: Sequence[Sequence[int]], seed: int) -> Sample:
        """Sample one response to each prompt; counts response tokens."""
        torch.manual_seed(seed)
        started = time.perf_counter()
        tokens = sum(self._generate(prompts[start : start + self.batch_size]) for start in range(0, len(prompts), self.batch_size))
        return Sample(tokens, time.perf_counter() - started)

    def _generate(self, prompts: Sequence[Sequence[int]]) -> int:
        """The number of response tokens, stop tokens included."""
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        device = self.model.device
        sampled = self.model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=self.sampling)[:, width:]
        stopped = torch.isin(sampled, self.stop_token_ids).long().cumsum(-1)
        return int((stopped.cumsum(-1) <= 1).sum())
