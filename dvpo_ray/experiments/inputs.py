"""What the runs of an experiment read, checked before the first of them starts: files, checkpoints and artifacts that no earlier run makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dvpo_ray.config.inputs import Needed, decoder_layers, policy_inputs, preference_inputs, problems
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
    return [*found, *dict.fromkeys(problem for run in todo if run.stage == "gvm" and (problem := _too_many_layers(run)) is not None)]


def _too_many_layers(run: Run) -> str | None:
    gvm = run.config.gvm
    start = gvm.init_from or run.config.model.path
    there = decoder_layers(start)
    if gvm.num_layers is None or there is None or gvm.num_layers <= there:
        return None
    return f"gvm.num_layers {gvm.num_layers}: {start} has {there} decoder layers; give {there} or fewer"


def _of_value_model(run: Run) -> Iterator[Needed]:
    return preference_inputs(run.config)


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
    "gvm-eval": _of_evaluation,
    "policy": _of_policy,
    "shift": _of_measurement,
    "bound": _of_measurement,
}
"""By stage; the keys are those of `dvpo_ray.experiments.stages.STAGES`."""
