"""What the runs of an experiment read, checked before the first of them starts: files, checkpoints and artifacts that no earlier run makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dvpo_ray.config import Config
from dvpo_ray.config.inputs import Needed, is_local, policy_inputs, policy_misfits, preference_inputs, problems, value_model_misfits
from dvpo_ray.config.schema import DataConfig
from dvpo_ray.experiments.study import Run


def input_problems(runs: Sequence[Run]) -> list[str]:
    """What the runs that are still to do lack, one line each, once.

    Args:
        runs: all of an experiment, the finished ones too: what they made is there, or will be.
    """
    todo = [run for run in runs if not run.is_finished]
    folders = [run.folder.absolute() for run in runs]
    needed = (one for run in todo for one in _NEEDED[run.stage](run))
    found = problems(one for one in needed if not any(Path(one.path).absolute().is_relative_to(folder) for folder in folders))
    return [*found, *dict.fromkeys(problem for run in todo if run.stage in _MISFITS for problem in _MISFITS[run.stage](run.config))]


def too_many_pairs(data: DataConfig, asked: str, pairs: int, *, ask_hub: bool) -> list[str]:
    """One line where `data.preferences` has fewer training pairs than are asked for, else nothing.

    Args:
        asked: what asks for them, for the message.
        ask_hub: also count the pairs of a data set that is not on this machine.

    Raises:
        InputError: they cannot be read.
    """
    if not (ask_hub or is_local(data.preferences.path)):
        return []
    from dvpo_ray.data.preferences import load_preferences

    there = len(load_preferences(data.preferences.model_copy(update={"limit": None}), data.on_bad_row).train)
    return [f"{asked}: {data.preferences.path} has {there} training pairs; give fewer"] if pairs > there else []


def _of_value_model(run: Run) -> Iterator[Needed]:
    return preference_inputs(run.config)


def _of_reward_model(run: Run) -> Iterator[Needed]:
    return preference_inputs(run.config, "reward_model")


def _of_policy(run: Run) -> Iterator[Needed]:
    return policy_inputs(run.config)


def _of_evaluation(run: Run) -> Iterator[Needed]:
    yield Needed("gvm.path", run.config.gvm.path, "gvm")
    yield from preference_inputs(run.config)


def _of_measurement(run: Run) -> Iterator[Needed]:
    """What is sampled by a policy of its own, and judged and scored with what the config names."""
    yield Needed("--policy", run.options["policy"], "policy")
    yield from policy_inputs(run.config) if run.stage == "shift" else policy_inputs(run.config, scored=False)


_NEEDED: dict[str, Callable[[Run], Iterator[Needed]]] = {
    "gvm": _of_value_model,
    "rm": _of_reward_model,
    "gvm-eval": _of_evaluation,
    "policy": _of_policy,
    "shift": _of_measurement,
    "bound": _of_measurement,
}
"""By stage; the keys are those of `dvpo_ray.experiments.stages.STAGES`."""

_MISFITS: dict[str, Callable[[Config], list[str]]] = {"gvm": value_model_misfits, "policy": policy_misfits}
"""By stage, what the config asks of a checkpoint that its config.json denies."""
