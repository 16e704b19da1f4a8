"""What a run gained: the held-out evaluations before and after, compared prompt by prompt."""

from __future__ import annotations

import json
from pathlib import Path

from dvpo_ray.evaluation.intervals import mean_ci, paired_bootstrap_ci


def read_evaluation(run_folder: Path, step: int) -> list[dict]:
    """The rows of evaluation/step_*.jsonl: `prompt`, `response`, `gold` (None without a judge) and `kl`."""
    path = run_folder / "evaluation" / f"step_{step:06d}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def gold_gain(run_folder: Path, last_step: int) -> dict:
    """The `gold` entry of summary.json: `before`, `after` (mean and 95 % interval), `gain` and `gain_ci95`, paired over prompts.

    Args:
        last_step: step of the evaluation after training; the one before is step 0.
    """
    before, after = ([row["gold"] for row in read_evaluation(run_folder, step)] for step in (0, last_step))
    gain, low, high = paired_bootstrap_ci(before, after)

    def side(scores: list[float]) -> dict:
        mean, side_low, side_high = mean_ci(scores)
        return {"mean": mean, "ci95": [side_low, side_high]}

    return {"prompts": len(before), "before": side(before), "after": side(after), "gain": gain, "gain_ci95": [low, high]}
