"""What a rollout engine needs from a generation library, and the two that provide it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from dvpo_ray.actors.memory import ModelState
from dvpo_ray.config.schema import Config


@dataclass(frozen=True)
class Response:
    """One finished response.

    Attributes:
        index: position of its prompt in the request.
        token_ids: response tokens, the stop token included when one was sampled.
        log_probs: log-probability of each token under the (tempered) distribution it was drawn from.
        truncated: the length limit ended it.
    """

    index: int
    token_ids: list[int]
    log_probs: list[float]
    truncated: bool


class RolloutBackend(Protocol):
    """A generation library that holds one copy of the policy."""

    def generate(self, prompts: Sequence[Sequence[int]], seed: int, greedy: bool = False) -> Iterator[Response]:
        """Sample one response to each prompt, or take the likeliest token each time; yields them as they finish."""

    def model_state(self) -> ModelState:
        """Weights, and the cache of keys and values where it is reserved for good."""

    def init_weight_transfer(self, init_info: dict) -> None:
        """Open the channel that new weights arrive through; once."""

    def start_weight_update(self) -> None:
        """Begin to replace the weights."""

    def update_weights(self, update_info: dict) -> None:
        """Take one bucket of new weights."""

    def finish_weight_update(self) -> None:
        """The new weights are whole: drop everything computed from the old ones."""


def make_backend(config: Config, stop_token_ids: frozenset[int], transport: str, max_sequence_tokens: int) -> RolloutBackend:
    """The backend that `rollout.backend` names, with the policy's initial weights loaded.

    Args:
        stop_token_ids: tokens that end a response.
        transport: how new weights will arrive: `object_store`, `nccl` or `ipc`.
        max_sequence_tokens: longest prompt and response together.
    """
    if config.rollout.backend == "vllm":
        from dvpo_ray.actors.vllm_backend import VLLMBackend

        return VLLMBackend(config, stop_token_ids, transport, max_sequence_tokens)
    from dvpo_ray.actors.transformers_backend import TransformersBackend

    return TransformersBackend(config, stop_token_ids)
