"""Doing the runs of an experiment, and writing what they say together."""

from __future__ import annotations

from collections.abc import Sequence

from dvpo_ray.config import Config
from dvpo_ray.errors import InputError
from dvpo_ray.experiments.inputs import input_problems, too_many_pairs
from dvpo_ray.experiments.results import markdown, write_result
from dvpo_ray.experiments.stages import STAGES
from dvpo_ray.experiments.study import Run, Study


def study_problems(study: Study, runs: Sequence[Run], *, ask_hub: bool) -> list[str]:
    """What the runs that are still to do lack, one line each.

    Args:
        runs: `study.runs()`.
        ask_hub: also count the pairs of a data set that is not on this machine.

    Raises:
        InputError: the pairs are to be counted and cannot be read.
    """
    missing = input_problems(runs)
    if missing or study.training_pairs is None or all(run.is_finished for run in runs):
        return missing
    return too_many_pairs(study.config.data, *study.training_pairs, ask_hub=ask_hub)


def run_study(study: Study, runs: Sequence[Run]) -> str:
    """Do the runs that are not finished yet and write result.json, table.md and plot.png.

    Args:
        runs: `study.runs()`.

    Returns:
        The markdown table.

    Raises:
        InputError: a folder holds another run than the one it should, or something that a run reads isn't there; found before anything starts.
    """
    study.check_folder()
    for run in runs:
        run.check_kept()
    for problem in study_problems(study, runs, ask_hub=True):
        raise InputError(problem)
    study.out.mkdir(parents=True, exist_ok=True)
    if not all(run.is_finished for run in runs):
        _do(runs, study.config)
    result = study.result(runs)
    table = markdown(result.table, study.cell, result.columns)
    about = {"experiment": study.name, "config": study.source.path, "overrides": list(study.source.overrides), "seeds": list(study.seeds)}
    write_result(study.out, result, about, table)
    return table


def _do(runs: Sequence[Run], config: Config) -> None:
    """Do the runs that are not finished, on one Ray session."""
    from dvpo_ray.monitoring.console import RunConsole
    from dvpo_ray.runtime.cluster import connect

    with connect(config.ray), RunConsole() as console:
        for number, run in enumerate(runs, start=1):
            if not run.is_finished:
                console.say(f"run {number} of {len(runs)}: {run.variant}, seed {run.seed}")
                STAGES[run.stage](run, console)
