"""What a rollout engine needs from a generation library."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Part = Literal["weights", "cache"]
"""What of an engine can wake alone."""


@dataclass(frozen=True)
class Response:
    """One finished response.

    Attributes:
        index: of its prompt, as it was added.
        token_ids: response tokens, the stop token included when one was sampled.
        log_probs: log-probability of each token under the (tempered) distribution it was drawn from.
        truncated: the length limit ended it.
    """

    index: int
    token_ids: list[int]
    log_probs: list[float]
    truncated: bool


class RolloutBackend(ABC):
    """A generation library that holds one copy of the policy."""

    @property
    @abstractmethod
    def unfinished(self) -> int:
        """How many added prompts have no finished response yet."""

    @abstractmethod
    def add(self, indices: Sequence[int], prompts: Sequence[Sequence[int]], seed: int | Sequence[int], greedy: bool = False) -> None:
        """Take prompts that each get one response.

        Args:
            indices: names of the prompts, distinct among the unfinished ones.
            seed: of all sampling from now on; or a seed for each prompt, then its response depends on nothing else.
            greedy: take the likeliest token each time.
        """

    @abstractmethod
    def step(self) -> Iterator[Response]:
        """Go on with the added prompts; yields those that are finished now. Run it to its end."""

    def generate(self, prompts: Sequence[Sequence[int]], seed: int, greedy: bool = False) -> Iterator[Response]:
        """One response to each prompt, as they finish; their indices are the prompts' positions."""
        self.add(range(len(prompts)), prompts, seed, greedy)
        while self.unfinished:
            yield from self.step()

    @abstractmethod
    def init_weight_transfer(self, init_info: dict) -> None:
        """Open the channel that new weights arrive through; once."""

    @abstractmethod
    def start_weight_update(self) -> None:
        """Begin to replace the weights."""

    @abstractmethod
    def update_weights(self, update_info: dict) -> None:
        """Take one bucket of new weights."""

    @abstractmethod
    def finish_weight_update(self) -> None:
        """The new weights are whole: drop everything computed from the old ones."""

    @abstractmethod
    def sleep(self) -> bool:
        """Free the GPU of weights and cache. True if the weights are lost then; see `RolloutEngine.sleep`."""

    @abstractmethod
    def wake(self, part: Part) -> None:
        """Take the memory of the weights or of the cache again."""
