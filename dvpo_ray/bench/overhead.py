"""What a step spends outside of its models: object store, messages, advantages, logging."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from dvpo_ray.actors.roles import Roles, started_roles
from dvpo_ray.bench.measure import Spread
from dvpo_ray.config.schema import Config
from dvpo_ray.monitoring.memory import PeakMemory
from dvpo_ray.monitoring.metrics import MetricsLog
from dvpo_ray.training.policy import PolicyLoop
from dvpo_ray.training.policy_inputs import Inputs

COMPUTING_STAGES = ("generate", "score", "reference", "update", "sync")
OVERHEAD_TARGET = 0.05


@dataclass(frozen=True)
class StepTime:
    """One measured step, in seconds.

    Attributes:
        total: from the step's start until its metrics are written.
        stages: of the loop, by name.
        waiting: part of the stages in which neither the engines (generate) nor the learner (update, sync) computed: what the
            object store and messages cost inside the stages.
    """

    total: float
    stages: dict[str, float]
    waiting: float

    @classmethod
    def of(cls, metrics: dict[str, float], total: float) -> StepTime:
        """From the metrics that the loop returned and the whole time."""
        stages = {name.removeprefix("time/").removesuffix("_seconds"): value for name, value in metrics.items() if name.startswith("time/")}

        def busy(role: str) -> float:
            return (1.0 - metrics[f"idle/{role}_fraction"]) * stages["step"]

        waiting = max(0.0, stages["generate"] - busy("rollout")) + max(0.0, stages["update"] + stages["sync"] - busy("learner"))
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

    @property
    def overhead(self) -> Spread:
        """Share of a step outside of the computing stages."""
        return Spread.of([step.overhead for step in self.steps])

    @property
    def waiting(self) -> float:
        """Median share of a step in which the computing stages wait for the object store and for messages."""
        return statistics.median(step.waiting / step.total for step in self.steps)

    def stage_seconds(self) -> dict[str, float]:
        """Median seconds of each stage, and of what is in none: `logging` (statistics, metrics, rollout files)."""
        names = [name for name in self.steps[0].stages if name != "step"]
        medians = {name: statistics.median(step.stages[name] for step in self.steps) for name in names}
        return medians | {"logging": statistics.median(step.total - sum(step.stages[name] for name in names) for step in self.steps)}


def round_folder(folder: Path, number: int, rounds: int) -> Path:
    """The folder of one of several rounds, made where it is missing; of a single round it is the folder itself."""
    chosen = folder if rounds == 1 else folder / f"round-{number}"
    chosen.mkdir(parents=True, exist_ok=True)
    return chosen


def round_title(contestant: str, number: int, rounds: int) -> str:
    """What a progress line calls a round."""
    return contestant if rounds == 1 else f"{contestant}, round {number} of {rounds}"


def by_round(ratios: Sequence[float], digits: int) -> str:
    """Each round's own ratio, to stand behind the median of them; nothing where there is one round."""
    return f" (by round: {', '.join(f'{ratio:.{digits}f}' for ratio in ratios)})" if len(ratios) > 1 else ""


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
    config = config.model_copy(update={"train": config.train.model_copy(update={"steps": repeats + 1})})
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    with PeakMemory() as memory, started_roles(config, str(run_folder), inputs.stop_token_ids, longest) as roles:
        memory.add_pids(roles.local_pids)
        steps = _measured_steps(config, roles, inputs, run_folder, after_step, around_last_step)
    return StepProfile(steps[1:], memory.peak_gib)


def _measured_steps(
    config: Config,
    roles: Roles,
    inputs: Inputs,
    run_folder: Path,
    after_step: Callable[[], None],
    around_last_step: Callable[[Roles], AbstractContextManager],
) -> list[StepTime]:
    loop = PolicyLoop(config, roles, inputs.prompts, [], inputs.manifest.context.examples > 0)
    steps = []
    with MetricsLog(run_folder, config.train.trackers, config=config.model_dump(mode="json")) as log:
        for step in range(1, config.train.steps + 1):
            with around_last_step(roles) if step == config.train.steps else nullcontext():
                started = time.perf_counter()
                metrics = loop.step(step)
                log.write(step, metrics)
                steps.append(StepTime.of(metrics, time.perf_counter() - started))
            after_step()
    return steps
