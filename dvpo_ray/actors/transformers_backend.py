"""Rollouts by transformers' own generation, for machines without vLLM and for runs that repeat bit by bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import GenerationConfig

from dvpo_ray.actors.rollout_backend import Part, Response, RolloutBackend
from dvpo_ray.config.schema import Config
from dvpo_ray.errors import diverged
from dvpo_ray.models.loading import default_device, load_policy
from dvpo_ray.sync.object_store import unpack


class TransformersBackend(RolloutBackend):
    """The policy as a transformers model; sequences are decoded `rollout.max_concurrent_sequences` at a time.

    It has one random state for all of its rows: of several seeds it takes the first, for all prompts that are added together.
    """

    def __init__(self, config: Config, stop_token_ids: frozenset[int]) -> None:
        self.model = load_policy(config.model, default_device())
        self.parameters = dict(self.model.named_parameters())
        self.batch_size = config.rollout.max_concurrent_sequences
        self.waiting: list[tuple[int, Sequence[int]]] = []
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

    @property
    def unfinished(self) -> int:
        return len(self.waiting)

    def add(self, indices: Sequence[int], prompts: Sequence[Sequence[int]], seed: int | Sequence[int], greedy: bool = False) -> None:
        torch.manual_seed(seed if isinstance(seed, int) else seed[0])
        self.settings = self.greedy if greedy else self.sampling
        self.waiting += zip(indices, prompts, strict=True)

    @torch.no_grad()
    def step(self) -> Iterator[Response]:
        batch, self.waiting = self.waiting[: self.batch_size], self.waiting[self.batch_size :]
        indices, prompts = zip(*batch, strict=True)
        width = max(len(prompt) for prompt in prompts)
        device = self.model.device
        padding = [width - len(prompt) for prompt in prompts]
        input_ids = torch.tensor([[self.pad_token_id] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)], device=device)
        attention_mask = torch.tensor([[0] * pad + [1] * len(prompt) for pad, prompt in zip(padding, prompts, strict=True)], device=device)
        try:
            output = self.model.generate(input_ids, attention_mask=attention_mask, generation_config=self.settings)
        except RuntimeError as error:
            if "probability tensor" not in str(error):  # torch's words when it cannot sample
                raise
            raise diverged("the policy's token probabilities are not finite", "policy") from error
        sampled = output.sequences[:, width:]
        log_probs = torch.stack(
            [scores.float().log_softmax(-1).gather(1, sampled[:, step : step + 1])[:, 0] for step, scores in enumerate(output.scores)],
            dim=1,
        )
        for index, tokens, token_log_probs in zip(indices, sampled.tolist(), log_probs.tolist(), strict=True):
            length = next((i + 1 for i, token in enumerate(tokens) if token in self.stop_token_ids), len(tokens))
            truncated = tokens[length - 1] not in self.stop_token_ids
            yield Response(index, tokens[:length], token_log_probs[:length], truncated)

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

    def sleep(self) -> bool:
        return False

    def wake(self, part: Part) -> None:
        """Nothing sleeps."""
