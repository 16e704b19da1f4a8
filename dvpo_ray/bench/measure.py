"""Timing contestants in turns, and comparing their rates."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One timed piece of work.

    Attributes:
        tokens: real tokens worked on; padding doesn't count.
        seconds: wall-clock time it took.
    """

    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


Contestant = Callable[[int], Sample]
"""Does the work of a round and says how long it took. Every contestant of a round gets the same work."""


def take_turns(contestants: Mapping[str, Contestant], repeats: int, after_round: Callable[[], None] = lambda: None) -> dict[str, list[Sample]]:
    """Time contestants in turns (A B A B), so that a machine whose speed drifts favours none of them.

    Round 0 warms every contestant up and isn't kept; rounds 1 to `repeats` are.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in contestants}
    for round_ in range(repeats + 1):
        for name, contestant in contestants.items():
            sample = contestant(round_)
            if round_ > 0:
                samples[name].append(sample)
        after_round()
    return samples


@dataclass(frozen=True)
class Spread:
    """Median and range of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Comparison:
    """A part of the system against bare implementations of the same work, in tokens per second.

    Attributes:
        name: what was measured.
        target: the ratio it should reach; None where the ratio is for information only.
        product: rates of this system.
        bare: rates of each bare implementation.
        baseline: the fastest bare implementation by its median; the ratio is to this one.
        ratio: of the medians, product / baseline.
    """

    name: str
    target: float | None
    product: Spread
    bare: dict[str, Spread]

    @property
    def baseline(self) -> str:
        return max(self.bare, key=lambda name: self.bare[name].median)

    @property
    def ratio(self) -> float:
        return self.product.median / self.bare[self.baseline].median


def compare(name: str, target: float | None, product: Sequence[Sample], bare: Mapping[str, Sequence[Sample]]) -> Comparison:
    """The comparison of samples that were taken in turns."""
    return Comparison(name, target, _rates(product), {bare_name: _rates(samples) for bare_name, samples in bare.items()})


def _rates(samples: Sequence[Sample]) -> Spread:
    return Spread.of([sample.rate for sample in samples])
