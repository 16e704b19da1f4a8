"""Every metric of a run: its unit, what it means, when it is trouble and what to do then.

`MetricsLog` refuses a name that is not listed in `metric_list`, and docs/metrics.md is generated from the list:

    python -m dvpo_ray.monitoring.catalogue > docs/metrics.md
"""

from __future__ import annotations

import difflib
import re
from functools import lru_cache

from dvpo_ray.monitoring.metric import Metric
from dvpo_ray.monitoring.metric_list import GROUPS, METRICS

_ROLE = "<role>"
_ROLE_PATTERN = "[a-z][a-z0-9_]*"


def find_metric(name: str) -> Metric:
    """The catalogue's entry for a metric name.

    Raises:
        ValueError: the name is not in the catalogue.
    """
    for pattern, metric in _patterns():
        if pattern.fullmatch(name):
            return metric
    close = difflib.get_close_matches(name, [metric.name for metric in METRICS], n=1)
    hint = f", did you mean {close[0]!r}" if close else ""
    raise ValueError(f"unknown metric {name!r}{hint}? Every metric is listed in dvpo_ray/monitoring/metric_list.py")


@lru_cache(maxsize=1)
def _patterns() -> list[tuple[re.Pattern, Metric]]:
    return [(re.compile(re.escape(metric.name).replace(re.escape(_ROLE), _ROLE_PATTERN)), metric) for metric in METRICS]


def markdown() -> str:
    """docs/metrics.md."""
    parts = [
        "# Metrics",
        "",
        "<!-- Generated: python -m dvpo_ray.monitoring.catalogue > docs/metrics.md -->",
        "",
        "`metrics.jsonl` in the run folder holds one object per step: `step`, `time` (Unix seconds) and these metrics.",
        "A value that is not finite is `null`.",
        "TensorBoard, Weights & Biases and MLflow get the same names (`train.trackers`), and `report.html` draws them.",
        "",
        "A metric marked ⚠ has bounds: when the mean over its last steps lies beyond them, the report says so by itself.",
    ]
    for group, text in GROUPS.items():
        rows = [metric for metric in METRICS if metric.group == group]
        if rows:
            parts += ["", f"## {group}", "", text, "", "| metric | unit | meaning | trouble when | what to do |", "| --- | --- | --- | --- | --- |"]
            parts += [_markdown_row(metric) for metric in rows]
    return "\n".join(parts) + "\n"


def _markdown_row(metric: Metric) -> str:
    bounded = metric.above is not None or metric.below is not None
    cells = [f"`{metric.name}`" + (" ⚠" if bounded else ""), metric.unit, metric.meaning, metric.trouble, metric.advice]
    return "| " + " | ".join(cell.replace("|", "\\|") or "–" for cell in cells) + " |"


if __name__ == "__main__":
    print(markdown(), end="")
