"""What a step's work cost: seconds of each stage, throughput, and each role's idle share and memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager


class Stopwatch:
    """Seconds of named stages.

    Attributes:
        seconds: of every stage that is over, by name; together where a stage comes twice.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def work_metrics(
    seconds: Mapping[str, float],
    batch_metrics: Mapping[str, float],
    statistics: Mapping[str, Sequence[Mapping[str, float]]],
    samples: int,
    update_epochs: int,
) -> dict[str, float]:
    """The metrics `time/`, `throughput/`, `memory/` and `idle/` of a step.

    Args:
        seconds: of the stages, and of the whole `step`.
        batch_metrics: have `response_length/mean`.
        statistics: of the actors of each role, as `Actor.stats` returns them.
        samples: rollouts of the step.
        update_epochs: passes over them.
    """
    generated = batch_metrics["response_length/mean"] * samples
    metrics = {f"time/{stage}_seconds": value for stage, value in seconds.items()} | {
        "throughput/samples_per_second": samples / seconds["step"],
        "throughput/generated_tokens_per_second": generated / seconds["generate"],
        "throughput/trained_tokens_per_second": generated * update_epochs / seconds["update"],
    }
    for role, actors in statistics.items():
        metrics[f"memory/{role}_gib"] = max(actor["memory_gib"] for actor in actors)
        busy = sum(actor["busy_seconds"] for actor in actors) / len(actors)
        metrics[f"idle/{role}_fraction"] = min(1.0, max(0.0, 1.0 - busy / seconds["step"]))
    return metrics
