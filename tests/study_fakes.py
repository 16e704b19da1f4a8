"""Runs of experiments without the work: what each stage would leave in its folder, in numbers that the test chooses."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

from dvpo_ray import cli
from dvpo_ray.config import dump_config
from dvpo_ray.experiments.study import Run
from dvpo_ray.gvm.artifact import GVMManifest, HeadSpec, ObjectiveSpec, OutcomeSpec, TrainingDataSpec

ROOT = Path(__file__).resolve().parents[1]
STORIES = str(ROOT / "cluster_configs" / "stories-cpu.yaml")


def dvpo(*argv) -> int:
    """The exit status of `dvpo experiment`."""
    with patch.object(cli, "quiet_libraries"):
        return cli.main(["experiment", *map(str, argv)])


def result_of(folder: Path) -> dict:
    """What an experiment left, its plot included."""
    assert (folder / "plot.png").stat().st_size > 1000
    return json.loads((folder / "result.json").read_text())


def leave_policy(
    run: Run,
    gold: Sequence[float],
    kl: Sequence[float],
    every: int = 1,
    seconds: float = 2.0,
    more: Callable[[int], dict[str, float]] = lambda step: {},
) -> None:
    """The folder of a policy run, evaluated every so many steps, each of so many seconds, with more metrics of a step."""
    evaluations = {str(i * every): {"gold": g, "kl": k} for i, (g, k) in enumerate(zip(gold, kl, strict=True))}
    _leave(run, {"evaluations": evaluations})
    rows = [
        {"step": step, "time/step_seconds": seconds, "response_length/mean": 60.0 + step} | more(step)
        for step in range(1, (len(gold) - 1) * every + 1)
    ]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def leave_value_model(run: Run, accuracy: dict[str, float], explained_variance: float = 0.2) -> None:
    """The folder of a value model's training or evaluation."""
    _leave(run, {"duration_seconds": 10.0})
    (run.folder / "evaluation").mkdir(exist_ok=True)
    report = {"heldout_accuracy": accuracy, "regression": {"mse": 0.5, "explained_variance": explained_variance}}
    (run.folder / "evaluation" / "evaluation.json").write_text(json.dumps(report), encoding="utf-8")


def leave_manifest(run: Run, pairs: int) -> None:
    """The manifest of a value model of so many training pairs."""
    final = run.folder / "final"
    final.mkdir(exist_ok=True)
    objective = ObjectiveSpec(name="monte_carlo", td_lambda=0.95, bradley_terry_weight=0.0, bradley_terry_value="last")
    manifest = GVMManifest(
        base_model="tiny",
        num_layers=2,
        tokenizer_sha256="0" * 64,
        chat_template_sha256="0" * 64,
        chat_template="plain",
        head=HeadSpec(name="score.weight", shape=[1, 8], dtype="float32"),
        objective=objective,
        outcome=OutcomeSpec(kind="binary", scale=1.0),
        training_data=TrainingDataSpec(path="pairs.jsonl", fingerprint="0" * 64, pairs=pairs, heldout_pairs=4),
        heldout_accuracy={"mean": 0.8, "last": 0.8},
        heldout_regression={"mse": 0.5, "explained_variance": 0.2},
    )
    (final / "gvm.json").write_text(manifest.model_dump_json(), encoding="utf-8")


def leave_measurement(run: Run, measurements: dict) -> None:
    """The folder of a measurement."""
    _leave(run, {"options": dict(run.options)} | measurements)


def _leave(run: Run, summary: dict) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.yaml").write_text(dump_config(run.config), encoding="utf-8")
    (run.folder / "summary.json").write_text(json.dumps({"state": "finished"} | summary), encoding="utf-8")
