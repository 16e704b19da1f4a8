"""What a rollout engine needs from a generation library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


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

    def init_weight_transfer(self, init_info: dict) -> None:
        """Open the channel that new weights arrive through; once."""

    def start_weight_update(self) -> None:
        """Begin to replace the weights."""

    def update_weights(self, update_info: dict) -> None:
        """Take one bucket of new weights."""

    def finish_weight_update(self) -> None:
        """The new weights are whole: drop everything computed from the old ones."""
