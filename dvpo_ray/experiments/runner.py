"""Doing the runs of an experiment: what each kind of run reads, checked before the first one starts, how it is done, and what all say together."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from dvpo_ray.config import Config, dump_config
from dvpo_ray.config.arithmetic import counted
from dvpo_ray.config.inputs import Needed, is_local, policy_inputs, policy_misfits, preference_inputs, problems, value_model_misfits
from dvpo_ray.errors import InputError
from dvpo_ray.experiments.bound import measure_bound
from dvpo_ray.experiments.distribution_shift import measure_shift
from dvpo_ray.experiments.results import markdown, write_result
from dvpo_ray.experiments.study import Run, Study
from dvpo_ray.monitoring.console import RunConsole
from dvpo_ray.monitoring.run_files import write_summary

# ----------------------------------------------------------------------------------------------------------- stages


def _train(run: Run, console: RunConsole) -> None:
    """`dvpo train`, `dvpo gvm train` or `dvpo rm train`, from its last checkpoint where it was stopped."""
    from dvpo_ray.training import policy, value_model

    resume = _goes_on(run)
    if run.stage == "policy":
        policy.train(run.config, resume=resume, console=console)
    else:
        settings = run.config.gvm if run.stage == "gvm" else run.config.reward_model
        value_model.train_value_model(run.config, settings, run.folder, resume=resume, console=console)


def _goes_on(run: Run) -> bool:
    """Whether a run that was stopped goes on from a checkpoint. One without a checkpoint is removed and begins anew."""
    if any((run.folder / "checkpoints").glob("step_*")):
        return True
    if (run.folder / "config.yaml").is_file():  # of this very run: see `Run.check_kept`
        shutil.rmtree(run.folder)
    return False


def _evaluate_value_model(run: Run) -> dict:
    """`dvpo gvm eval` of `gvm.path` on the config's held-out pairs."""
    from dvpo_ray.gvm.evaluation import evaluate_gvm

    report = evaluate_gvm(run.config, Path(run.config.gvm.path), run.folder / "evaluation")
    return {"gvm": {"path": run.config.gvm.path, "heldout_accuracy": report["heldout_accuracy"]}}


def _measurement(measure: Callable[[Run], dict]) -> Callable[[Run, RunConsole], None]:
    """Does a measurement and keeps what it returns in summary.json, beside the run's options."""

    def do(run: Run, _console: RunConsole) -> None:
        started = time.time()
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "config.yaml").write_text(dump_config(run.config), encoding="utf-8")
        measurements = measure(run)
        summary = {"name": run.config.name, "state": "finished", "seed": run.seed, "options": dict(run.options)}
        write_summary(run.folder, summary | {"duration_seconds": round(time.time() - started, 1)} | measurements)

    return do


STAGES: dict[str, Callable[[Run, RunConsole], None]] = {
    "policy": _train,
    "gvm": _train,
    "rm": _train,
    "gvm-eval": _measurement(_evaluate_value_model),
    "shift": _measurement(measure_shift),
    "bound": _measurement(measure_bound),
}
"""How each kind of run is done. Every one leaves config.yaml and summary.json in its folder."""


# ----------------------------------------------------------------------------------------------------------- inputs

NEEDED: dict[str, Callable[[Run], Iterable[Needed]]] = {
    "policy": lambda run: policy_inputs(run.config),
    "gvm": lambda run: preference_inputs(run.config),
    "rm": lambda run: preference_inputs(run.config, "reward_model"),
    "gvm-eval": lambda run: [Needed("gvm.path", run.config.gvm.path, "gvm"), *preference_inputs(run.config)],
    "shift": lambda run: [Needed("--policy", run.options["policy"], "policy"), *policy_inputs(run.config)],
    "bound": lambda run: [Needed("--policy", run.options["policy"], "policy"), *policy_inputs(run.config, scored=False)],
}
"""What each kind of run reads."""

_MISFITS: dict[str, Callable[[Config], list[str]]] = {"gvm": value_model_misfits, "policy": policy_misfits}
"""By stage, what the config asks of a checkpoint that its config.json denies."""


def study_problems(study: Study, runs: Sequence[Run], *, ask_hub: bool) -> list[str]:
    """What the runs that are still to do lack, one line each.

    Args:
        runs: `study.runs()`, the finished ones too: what they make is there, or will be.
        ask_hub: also count the pairs of a data set that is not on this machine.

    Raises:
        InputError: the pairs are to be counted and cannot be read.
    """
    todo = [run for run in runs if not run.is_finished]
    folders = [run.folder.absolute() for run in runs]
    needed = (one for run in todo for one in NEEDED[run.stage](run))
    missing = problems(one for one in needed if not any(Path(one.path).absolute().is_relative_to(folder) for folder in folders))
    missing += dict.fromkeys(problem for run in todo if run.stage in _MISFITS for problem in _MISFITS[run.stage](run.config))
    data = study.config.data
    if missing or not todo or study.training_pairs is None or not (ask_hub or is_local(data.preferences.path)):
        return missing
    from dvpo_ray.data.preferences import load_preferences

    asked, most = study.training_pairs
    there = len(load_preferences(data.preferences.model_copy(update={"limit": None}), data.on_bad_row).train)
    return [f"{asked}: {data.preferences.path} has {counted(there, 'training pair')}; ask for fewer"] if most > there else []


# ------------------------------------------------------------------------------------------------------- experiment


def run_study(study: Study, runs: Sequence[Run]) -> str:
    """Do the runs that are not finished yet and write result.json, table.md and plot.png.

    Args:
        runs: `study.runs()`, each with its folder checked.

    Returns:
        The markdown table.

    Raises:
        InputError: something that a run reads is not there; found before anything starts.
    """
    for problem in study_problems(study, runs, ask_hub=True):
        raise InputError(problem)
    study.out.mkdir(parents=True, exist_ok=True)
    if not all(run.is_finished for run in runs):
        _do(runs, study.config)
    result = study.result(runs)
    table = markdown(result.table, study.cell, result.columns)
    options = study.options
    about = {"experiment": study.name, "config": options.config, "overrides": list(options.overrides), "seeds": study.seeds}
    write_result(study.out, result, about, table)
    return table


def _do(runs: Sequence[Run], config: Config) -> None:
    """Do the runs that are not finished, on one Ray session."""
    with RunConsole() as console:
        with console.stage("loading the libraries"):
            from dvpo_ray.runtime.cluster import connect
        with console.entering("start of Ray", connect(config.ray, console.say), quiet=True):
            for number, run in enumerate(runs, start=1):
                if not run.is_finished:
                    console.say(f"run {number} of {len(runs)}: {run.variant}, seed {run.seed}")
                    STAGES[run.stage](run, console)
