"""The results of `dvpo bench step`: as lines for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.bench.measure import Comparison, Spread
from dvpo_ray.bench.overhead import OVERHEAD_TARGET, StepProfile


@dataclass(frozen=True)
class Workload:
    """What the comparisons worked on.

    Attributes:
        rows: prompts with one response each.
        prompt_tokens: of all rows.
        response_tokens: of all rows.
        longest_row: tokens of the longest prompt and response.
        learner_rows: how many of the rows the learner worked on.
    """

    rows: int
    prompt_tokens: int
    response_tokens: int
    longest_row: int
    learner_rows: int

    @classmethod
    def of(cls, batch: RaggedBatch, learner_rows: int) -> Workload:
        return cls(batch.num_rows, int(batch.prompt_lengths.sum()), int(batch.response_lengths.sum()), int(batch.lengths.max()), learner_rows)


@dataclass(frozen=True)
class StepResults:
    """Everything that `dvpo bench step` measured."""

    workload: Workload
    comparisons: list[Comparison]
    profile: StepProfile

    def lines(self) -> list[str]:
        """The results for people."""
        return [*_comparison_lines(self.workload, self.comparisons), "", *_profile_lines(self.profile)]

    def as_json(self) -> dict:
        """The results for programs."""
        profile = self.profile
        return {
            "workload": asdict(self.workload),
            "comparisons": [asdict(c) | {"baseline": c.baseline, "ratio": c.ratio} for c in self.comparisons],
            "step": {
                "seconds": asdict(profile.total),
                "stage_seconds": profile.stage_seconds(),
                "overhead": asdict(profile.overhead),
                "overhead_target": OVERHEAD_TARGET,
                "waiting_in_stages": profile.waiting,
                "peak_memory_gib": profile.peak_memory_gib,
                "steps": [asdict(step) for step in profile.steps],
            },
        }


def _comparison_lines(workload: Workload, comparisons: Iterable[Comparison]) -> list[str]:
    learner = "" if workload.learner_rows == workload.rows else f", the learner on {workload.learner_rows} of them"
    sizes = f"{workload.rows} rows, {workload.prompt_tokens} prompt and {workload.response_tokens} response tokens{learner}"
    lines = [f"tokens per second, median (range), on {sizes}", f"{'':<34}{'product':<26}{'bare':<26}{'ratio':<7}target"]
    for comparison in comparisons:
        bare = comparison.bare[comparison.baseline]
        columns = f"{comparison.name:<34}{_rate(comparison.product):<26}{_rate(bare):<26}{comparison.ratio:<7.3f}"
        lines.append(columns + _verdict(comparison.target, comparison.ratio))
        lines.append(f"{'':<60}{comparison.baseline}")
    return lines


def _verdict(target: float | None, ratio: float) -> str:
    if target is None:
        return "(for information)"
    return f">= {target:g}, {'met' if ratio >= target else 'MISSED'}"


def _rate(spread: Spread) -> str:
    return f"{spread.median:,.0f} ({spread.low:,.0f}-{spread.high:,.0f})"


def _profile_lines(profile: StepProfile) -> list[str]:
    total, overhead = profile.total, profile.overhead
    return [
        f"a step: median {total.median:.3f} s ({total.low:.3f}-{total.high:.3f}), peak memory {profile.peak_memory_gib:.2f} GiB",
        *(f"  {name:<12}{seconds:>9.4f} s{seconds / total.median:>8.1%}" for name, seconds in profile.stage_seconds().items()),
        f"  outside generate, score, reference, update, sync: {overhead.median:.1%} ({overhead.low:.1%}-{overhead.high:.1%}), "
        f"target <= {OVERHEAD_TARGET:.0%}, {'met' if overhead.median <= OVERHEAD_TARGET else 'MISSED'}",
        f"  inside them, engines and learner waiting for the object store and messages: {profile.waiting:.1%}",
    ]
