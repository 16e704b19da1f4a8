"""One metric of a run and what it tells."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One metric, or one for each role where the name holds `<role>`.

    Attributes:
        name: `group/name`, as in metrics.jsonl.
        unit: "" for a pure number.
        meaning: what is measured, over what.
        trouble: the observation that should worry.
        advice: what to do then.
        above, below: bounds beyond which the report raises the metric by itself; None where only a trend or a comparison tells.
    """

    name: str
    unit: str
    meaning: str
    trouble: str = ""
    advice: str = ""
    above: float | None = None
    below: float | None = None

    @property
    def group(self) -> str:
        return self.name.split("/")[0]

    def is_trouble(self, value: float) -> bool:
        """Whether a value lies beyond the metric's bounds."""
        return (self.above is not None and value > self.above) or (self.below is not None and value < self.below)
