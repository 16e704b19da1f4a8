"""Rollouts by transformers' own generation, for machines without vLLM and for runs that repeat bit by bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import GenerationConfig

from dvpo_ray.actors.rollout_backend import Response
from dvpo_ray.config.schema import Config
from dvpo_ray.errors import diverged
from dvpo_ray.models.loading import default_device, load_policy
from dvpo_ray.sync.object_store import unpack


class TransformersBackend:
    """The policy as a transformers model; sequences are decoded `rollout.max_concurrent_sequences` at a time."""

    def __init__(self, config: Config, stop_token_ids: frozenset[int]) -> None:
        self.model = load_policy(config.model, default_device())
        self.parameters = dict(self.model.named_parameters())
        self.batch_size = config.rollout.max_concurrent_sequences
        self.pad_token_id = min(stop_token_ids)  # fills rows that have ended; nothing reads it
        self.stop_token_ids = stop_token_ids
        self.max_new_tokens = config.rollout.max_response_tokens
        ends = {
            "max_new_tokens": self.max_new_tokens,
            "min_new_tokens": config.rollout.min_response_tokens or None,
            "eos_token_id": sorted(stop_token_ids),
            "pad_token_id": self.pad_token_id,
            "return_dict_in_generate": True,
            "output_scores": True,  # after temperature and minimum length: the distribution that is sampled
        }
        self.sampling = GenerationConfig(do_sample=True, temperature=config.rollout.temperature, top_p=config.rollout.top_p, top_k=0, **ends)
        self.greedy = GenerationConfig(do_sample=False, **ends)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], seed: int, greedy: bool = False) -> Iterator[Response]:
        torch.manual_seed(seed)
        settings = self.greedy if greedy else self.sampling
        for start in range(0, len(prompts), self.batch_size):
            yield from self._generate_together(prompts[start : start + self.batch_size], start, settings)

    def _generate_together(self, prompts: Sequence[Sequence[int]], first_index: int, settings: GenerationConfig) -> Iterator[Response]:
        width = max(len(prompt) for prompt in prompts)
        device = self.model.device
        padding = [width - len(prompt) for prompt in prompts]
        input_ids = torch.tensor([[self.pad_token_id] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)], device=device)
        attention_mask = torch.tensor([[0] * pad + [1] * len(prompt) for pad, prompt in zip(padding, prompts, strict=True)], device=device)
        try:
            output = self.model.generate(input_ids, attention_mask=attention_mask, generation_config=settings)
        except RuntimeError as error:
            if "probability tensor" not in str(error):  # torch's words when it cannot sample
                raise
            raise diverged("the policy's token probabilities are not finite", "policy") from error
        sampled = output.sequences[:, width:]
        log_probs = torch.stack(
            [scores.float().log_softmax(-1).gather(1, sampled[:, step : step + 1])[:, 0] for step, scores in enumerate(output.scores)],
            dim=1,
        )
        for offset, (tokens, token_log_probs) in enumerate(zip(sampled.tolist(), log_probs.tolist(), strict=True)):
            length = next((i + 1 for i, token in enumerate(tokens) if token in self.stop_token_ids), len(tokens))
            truncated = tokens[length - 1] not in self.stop_token_ids
            yield Response(first_index + offset, tokens[:length], token_log_probs[:length], truncated)

    def init_weight_transfer(self, init_info: dict) -> None:
        """Nothing to open: buckets arrive with each update."""

    def start_weight_update(self) -> None:
        """Nothing to prepare: parameters are overwritten in place."""

    @torch.no_grad()
    def update_weights(self, update_info: dict) -> None:
        for name, tensor in unpack(**update_info):
            if name not in self.parameters:
                raise KeyError(f"weight update names {name!r}, which the rollout engine's model does not have")
            self.parameters[name].copy_(tensor)

    def finish_weight_update(self) -> None:
        """Nothing is cached between generations."""
