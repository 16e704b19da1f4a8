"""Looks metrics up, and writes docs/metrics.md:

python -m dvpo_ray.monitoring.catalogue > docs/metrics.md
"""

from __future__ import annotations

import re
import textwrap
from functools import lru_cache

from dvpo_ray.monitoring.metric_list import GROUPS, METRICS, Metric

_HEAD = """\
# Metrics

<!-- Generated: python -m dvpo_ray.monitoring.catalogue > docs/metrics.md -->

`metrics.jsonl` in the run folder has one object per step: `step`, `time` (Unix seconds) and these metrics. A value that
is not finite is `null`. TensorBoard, Weights & Biases and MLflow get the same names (`train.trackers`), and
`report.html` draws them.

⚠ marks a bound: if the mean over the last steps is out of bounds, the report says so.
"""


@lru_cache(maxsize=1)
def _patterns() -> list[tuple[re.Pattern, Metric]]:
    return [(re.compile(re.escape(metric.name).replace("<role>", "[a-z][a-z0-9_]*")), metric) for metric in METRICS]


def find_metric(name: str) -> Metric | None:
    """The metric of this name; None if it is not listed in `metric_list`."""
    return next((metric for pattern, metric in _patterns() if pattern.fullmatch(name)), None)


def markdown() -> str:
    """docs/metrics.md."""
    parts = [_HEAD]
    for group, text in GROUPS.items():
        items = [_item(metric) for metric in METRICS if metric.name.split("/")[0] == group]
        parts.append("\n".join([f"## {group}\n", textwrap.fill(text, 120), "", *items]) + "\n")
    return "\n".join(parts)


def _item(metric: Metric) -> str:
    """A list item: name and unit, meaning, trouble and advice."""
    bounds = [f"above {metric.above:g}"] if metric.above is not None else [f"below {metric.below:g}"] if metric.below is not None else []
    notes = ", ".join(filter(None, [metric.unit, *(f"⚠ {bound}" for bound in bounds)]))
    lines = [f"- **`{metric.name}`**{f' ({notes})' if notes else ''}: {metric.meaning}"]
    lines += [f"  - *{label}:* {text}" for label, text in (("Trouble", metric.trouble), ("What to do", metric.advice)) if text]
    return "\n".join(textwrap.fill(line, 120, subsequent_indent=" " * (line.index("-") + 2), break_long_words=False) for line in lines)


if __name__ == "__main__":
    print(markdown(), end="")
