"""Steps of the real training loop, timed: their stages, and what they spend outside of the models."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from dvpo_ray.actors.roles import Roles, started_roles
from dvpo_ray.bench.measure import Spread
from dvpo_ray.config import override_config
from dvpo_ray.config.schema import Config
from dvpo_ray.monitoring.console import RunConsole
from dvpo_ray.monitoring.memory import PeakMemory
from dvpo_ray.monitoring.metrics import MetricsLog
from dvpo_ray.training.policy import PolicyLoop
from dvpo_ray.training.policy_inputs import Inputs

T = TypeVar("T")
COMPUTING_STAGES = ("generate", "score", "reference", "update", "sync")
OVERHEAD_TARGET = 0.05


@dataclass(frozen=True)
class StepTime:
    """One measured step, in seconds.

    Attributes:
        total: from the step's start until its metrics are written.
        stages: of the loop, by name.
        waiting: part of the stages in which neither the engines (generate) nor the learner (update, sync) computed: the cost of
            the object store and of messages inside the stages.
    """

    total: float
    stages: dict[str, float]
    waiting: float

    @classmethod
    def of(cls, metrics: Mapping[str, float], total: float) -> StepTime:
        """From the metrics that the loop returned and the whole time."""
        stages = {name.removeprefix("time/").removesuffix("_seconds"): value for name, value in metrics.items() if name.startswith("time/")}
        busy = {role: (1.0 - metrics[f"idle/{role}_fraction"]) * stages["step"] for role in ("rollout", "learner")}
        waiting = max(0.0, stages["generate"] - busy["rollout"]) + max(0.0, stages["update"] + stages["sync"] - busy["learner"])
        return cls(total, stages, waiting)

    @property
    def overhead(self) -> float:
        """Share of the step outside of the computing stages."""
        return 1.0 - sum(self.stages[stage] for stage in COMPUTING_STAGES) / self.total


@dataclass(frozen=True)
class StepProfile:
    """Where the time of a step goes.

    Attributes:
        steps: every measured step.
        peak_memory_gib: of the whole run on this node.
    """

    steps: list[StepTime]
    peak_memory_gib: float

    @property
    def total(self) -> Spread:
        """Seconds of a step."""
        return Spread.of([step.total for step in self.steps])

    def stage_seconds(self) -> dict[str, float]:
        """Median seconds of each stage, and of the time outside of all stages: `logging` (statistics, metrics, rollout files)."""
        names = [name for name in self.steps[0].stages if name != "step"]
        medians = {name: statistics.median(step.stages[name] for step in self.steps) for name in names}
        return medians | {"logging": statistics.median(step.total - sum(step.stages[name] for name in names) for step in self.steps)}

    def as_json(self) -> dict:
        """`overhead` is the share of a step outside of the computing stages, `waiting_in_stages` the median share in which those wait for
        the object store and for messages."""
        return {
            "seconds": self.total._asdict(),
            "stage_seconds": self.stage_seconds(),
            "overhead": Spread.of([step.overhead for step in self.steps])._asdict(),
            "overhead_target": OVERHEAD_TARGET,
            "waiting_in_stages": statistics.median(step.waiting / step.total for step in self.steps),
            "peak_memory_gib": self.peak_memory_gib,
            "steps": [asdict(step) for step in self.steps],
        }


def profile_steps(
    config: Config,
    inputs: Inputs,
    run_folder: Path,
    repeats: int,
    after_step: Callable[[], None] = lambda: None,
    around_last_step: Callable[[Roles], AbstractContextManager] = lambda _roles: nullcontext(),
) -> StepProfile:
    """Run one step to warm up and `repeats` measured ones, with the whole config's actors and all that a run logs.

    Args:
        after_step: called after each step, for a progress bar.
        around_last_step: makes a context from the run's actors, within which the last step runs.
    """
    config = override_config(config, [f"train.steps={repeats + 1}"])
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    with (
        PeakMemory() as memory,
        started_roles(config, str(run_folder), inputs.stop_token_ids, longest) as roles,
        MetricsLog(run_folder, config.train.trackers, config=config.model_dump(mode="json")) as log,
    ):
        memory.add_pids(roles.local_pids)
        loop = PolicyLoop(config, roles, inputs.prompts, [], inputs.manifest.context.examples > 0)
        loop.sync_between_steps(0)
        steps = profile_loop(loop, log, range(1, config.train.steps + 1), after_step, around_last_step)
    return StepProfile(steps, memory.peak_gib)


def profile_loop(
    loop: PolicyLoop,
    log: MetricsLog,
    numbers: Sequence[int],
    after_step: Callable[[], None] = lambda: None,
    around_last_step: Callable[[Roles], AbstractContextManager] = lambda _roles: nullcontext(),
) -> list[StepTime]:
    """The steps of these numbers on a loop whose engines have their weights, but for the first, which warms up."""
    steps = []
    for step in numbers:
        with around_last_step(loop.roles) if step == numbers[-1] else nullcontext():
            started = time.perf_counter()
            metrics = loop.step(step)
            log.write(step, metrics)
            steps.append(StepTime.of(metrics, time.perf_counter() - started))
        after_step()
    return steps[1:]


# ------------------------------------------------------------------------------------------------ contestants in rounds


def take_rounds(
    contestants: Mapping[str, Callable[[Path, Callable[[], None]], T]], console: RunConsole, run_folder: Path, rounds: int, steps: int
) -> dict[str, list[T]]:
    """What each contestant measures in each round. They take turns, in every second round the other way round.

    Args:
        contestants: measure in a folder, and call a function after each of their `steps`, for a progress bar.
        run_folder: gets a folder for each contestant, and in it one for each round where there are several.
    """
    measured: dict[str, list[T]] = {name: [] for name in contestants}
    for number in range(1, rounds + 1):
        for name in list(contestants)[:: 1 if number % 2 else -1]:
            folder = run_folder / name / ("" if rounds == 1 else f"round-{number}")
            folder.mkdir(parents=True, exist_ok=True)
            title = name if rounds == 1 else f"{name}, round {number} of {rounds}"
            with console.stage(title, steps, unit="steps") as progress:
                measured[name].append(contestants[name](folder, progress.advance))
    return measured


def by_round(ratios: Sequence[float], digits: int) -> str:
    """The ratio of each round, to stand behind their median; empty for one round."""
    return f" (by round: {', '.join(f'{ratio:.{digits}f}' for ratio in ratios)})" if len(ratios) > 1 else ""
