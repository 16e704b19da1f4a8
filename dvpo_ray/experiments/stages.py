"""How each kind of run is done. Every one leaves config.yaml and summary.json in its folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from dvpo_ray.config import dump_config
from dvpo_ray.experiments.study import Run
from dvpo_ray.monitoring.console import RunConsole
from dvpo_ray.monitoring.run_files import write_summary
from dvpo_ray.training.run_folder import CONFIG


def _goes_on(run: Run) -> bool:
    """Whether a run that was stopped goes on from a checkpoint. What one left that has none is removed, and it begins anew."""
    if any((run.folder / "checkpoints").glob("step_*")):
        return True
    if (run.folder / CONFIG).is_file():  # this very run's, as `Run.check_kept` has seen
        shutil.rmtree(run.folder)
    return False


def train_policy(run: Run, console: RunConsole) -> None:
    """`dvpo train`, from its last checkpoint where it was stopped."""
    from dvpo_ray.training.policy import train

    train(run.config, resume=_goes_on(run), console=console)


def train_gvm(run: Run, console: RunConsole) -> None:
    """`dvpo gvm train`, from its last checkpoint where it was stopped."""
    from dvpo_ray.training.value_model import train_value_model

    train_value_model(run.config, run.config.gvm, run.folder, resume=_goes_on(run), console=console)


def train_reward_model(run: Run, console: RunConsole) -> None:
    """`dvpo rm train`, from its last checkpoint where it was stopped."""
    from dvpo_ray.training.value_model import train_value_model

    train_value_model(run.config, run.config.reward_model, run.folder, resume=_goes_on(run), console=console)


def evaluate_value_model(run: Run, console: RunConsole) -> None:
    """`dvpo gvm eval` of `gvm.path` on the config's held-out pairs."""
    from dvpo_ray.gvm.evaluation import evaluate_gvm

    def measure() -> dict:
        report = evaluate_gvm(run.config, Path(run.config.gvm.path), run.folder / "evaluation")
        return {"gvm": {"path": run.config.gvm.path, "heldout_accuracy": report["heldout_accuracy"]}}

    measured(run, measure)


def measure_shift(run: Run, console: RunConsole) -> None:
    """Values of one policy's states against what it makes of them."""
    from dvpo_ray.experiments import distribution_shift

    measured(run, lambda: distribution_shift.measure_shift(run))


def measure_bound(run: Run, console: RunConsole) -> None:
    """Gradients of one policy under several values."""
    from dvpo_ray.experiments import bound

    measured(run, lambda: bound.measure_bound(run))


def measured(run: Run, measure: Callable[[], dict]) -> None:
    """Do a measurement and keep what it returns in summary.json, beside the run's options."""
    started = time.time()
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / CONFIG).write_text(dump_config(run.config), encoding="utf-8")
    measurements = measure()
    write_summary(
        run.folder,
        {
            "name": run.config.name,
            "state": "finished",
            "seed": run.seed,
            "options": dict(run.options),
            "duration_seconds": round(time.time() - started, 1),
            **measurements,
        },
    )


STAGES: dict[str, Callable[[Run, RunConsole], None]] = {
    "policy": train_policy,
    "gvm": train_gvm,
    "rm": train_reward_model,
    "gvm-eval": evaluate_value_model,
    "shift": measure_shift,
    "bound": measure_bound,
}
