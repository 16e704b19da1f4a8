"""`dvpo train`, from a config to a finished run folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

from dvpo_ray.baselines.algorithms import ALGORITHMS
from dvpo_ray.config import Config
from dvpo_ray.errors import InputError
from dvpo_ray.evaluation.gain import gold_gain
from dvpo_ray.files import whole_folder
from dvpo_ray.health.alarms import Alarm, HealthMonitor
from dvpo_ray.monitoring.console import RunConsole
from dvpo_ray.monitoring.memory import PeakMemory
from dvpo_ray.monitoring.metrics import MetricsLog
from dvpo_ray.monitoring.report import write_report
from dvpo_ray.monitoring.summary import write_summary
from dvpo_ray.orchestration import checkpoints
from dvpo_ray.orchestration.cluster import connect, get
from dvpo_ray.orchestration.inputs import Inputs, load_inputs
from dvpo_ray.orchestration.loop import Loop
from dvpo_ray.orchestration.refresh import Refresher
from dvpo_ray.orchestration.roles import Roles, start_roles
from dvpo_ray.run_folder import begin, check_resume

STAGE = "train"


def train(config: Config, resume: bool = False, console: RunConsole | None = None) -> Path:
    """Optimise the policy of a config in `config.out` and return that folder.

    Args:
        resume: continue the run in that folder from its last whole checkpoint.
        console: of a larger run that this is a part of; otherwise the run opens its own.

    Raises:
        InputError, ResourceError: in one line; bad input is found before any actor starts.
    """
    run_folder = Path(config.out).resolve()
    if resume:
        check_resume(run_folder, STAGE, config)
    inputs = load_inputs(config)
    checkpoint = _checkpoint(run_folder, config) if resume else None
    with nullcontext(console) if console is not None else RunConsole() as console:
        return Run(config, run_folder, inputs, console).train(checkpoint)


def _checkpoint(run_folder: Path, config: Config) -> tuple[Path, dict]:
    """The last whole checkpoint of a run that is not over yet."""
    folder, state = checkpoints.last_whole(run_folder)
    if state["step"] > config.train.steps:
        raise InputError(f"train.steps is {config.train.steps}, but {folder} is at step {state['step']}; give {state['step']} or more to resume")
    return folder, state


class Run:
    """One run in its folder: steps, evaluations, checkpoints, the final model and the summary."""

    def __init__(self, config: Config, run_folder: Path, inputs: Inputs, console: RunConsole) -> None:
        self.console = console
        self.config = config
        self.run_folder = run_folder
        self.inputs = inputs
        self.started = time.time()
        self.memory = PeakMemory()
        self.evaluations: dict[int, dict[str, float]] = {}
        self.last_step = 0
        self.health = HealthMonitor(config.health)
        self.refresher = Refresher(config, run_folder, inputs, console, self.memory)
        self.refresh_is_due = False
        self.uses_rewards = ALGORITHMS[config.algorithm].scorer == "reward_model"

    @property
    def _advantage_mode(self) -> str:
        return self.config.algorithm if self.uses_rewards else self.config.advantage.mode

    @property
    def _scoring_model(self) -> str:
        return self.config.reward_model.path if self.uses_rewards else self.config.gvm.path

    def train(self, checkpoint: tuple[Path, dict] | None) -> Path:
        """Run from a checkpoint, or from the start, to the end; the summary and the report are written however it ends."""
        state = "failed"
        if checkpoint is not None:
            self._load_state_dict(checkpoint[1])
        try:
            begin(self.run_folder, STAGE, self.config, resumed=checkpoint is not None)
            self.console.header(self.config.algorithm.upper(), self._facts())
            for note in self.inputs.notes:
                self.console.warn(note)
            with connect(self.config.ray), self.memory, self._roles() as roles:
                state = self._optimise(roles, checkpoint)
        except KeyboardInterrupt:
            state = "interrupted"
            raise
        finally:
            self._summarise(state)
            write_report(self.run_folder)
        return self.run_folder

    def _facts(self) -> dict[str, object]:
        config, batch = self.config, self.config.batch
        accuracy = ", ".join(f"{view} {value:.3f}" for view, value in self.inputs.manifest.heldout_accuracy.items() if view in ("mean", "last"))
        return {
            "model": config.model.path,
            "reward model" if self.uses_rewards else "value model": f"{self._scoring_model} (held-out accuracy {accuracy or 'unknown'})",
            "prompts": f"{len(self.inputs.prompts)} training, {len(self.inputs.heldout)} held out",
            "batch": f"{batch.prompts_per_step} prompts x {batch.samples_per_prompt} samples, {config.train.steps} steps",
            "advantage": f"{self._advantage_mode}, KL in {config.kl.placement} x {config.kl.coefficient:g}",
            "run folder": self.run_folder,
        }

    @contextmanager
    def _roles(self) -> Iterator[Roles]:
        longest = self.config.data.max_prompt_tokens + self.config.rollout.max_response_tokens
        with ExitStack() as stack:
            with self.console.stage("start of the actors"):
                roles = stack.enter_context(start_roles(self.refresher.scoring_config, str(self.run_folder), self.inputs.stop_token_ids, longest))
                self.memory.add_pids(roles.local_pids)
            yield roles

    def _optimise(self, roles: Roles, checkpoint: tuple[Path, dict] | None) -> str:
        """All steps and what comes after them. Returns how it ended: `finished`, or `stopped` by an alarm."""
        takes_examples = self.inputs.manifest.context.examples > 0
        loop = Loop(self.config, roles, self.inputs.prompts, self.inputs.heldout, takes_examples)
        first = 1
        if checkpoint is not None:
            first = self._restore(loop, roles, *checkpoint) + 1
        else:
            self._evaluate(loop, 0)
        settings = self.config.model_dump(mode="json")
        with (
            MetricsLog(self.run_folder, self.config.train.trackers, resume_step=first - 1 if checkpoint else None, config=settings) as log,
            self.console.stage("policy optimisation", total=self.config.train.steps, done=first - 1, unit="steps") as progress,
        ):
            for step in range(first, self.config.train.steps + 1):
                refresh = self._refresh(loop, roles) if self.refresh_is_due else {}
                metrics = loop.step(step)
                health, alarms = self.health.observe(step, metrics)
                log.write(step, metrics | health | refresh | self.refresher.state.metrics)
                progress.step(step, metrics)
                self.last_step = step
                stops = self._heed(alarms)
                if self._is_due(step, self.config.evaluation.every_steps):
                    self._evaluate(loop, step)
                if stops or self.refresh_is_due or self._is_due(step, self.config.checkpoint.every_steps):
                    self._save(loop, roles, step)
                if stops:
                    break
        if self.last_step not in self.evaluations:
            self._evaluate(loop, self.last_step)
        self._save_final(roles)
        return "stopped" if self.last_step < self.config.train.steps else "finished"

    def _refresh(self, loop: Loop, roles: Roles) -> dict[str, float]:
        """Refresh the GVM between two steps. The checkpoint before it says so: a run that dies waiting for labels goes on here."""
        metrics = self.refresher.refresh(self.last_step, loop, roles)
        self.health.restart()
        self.refresh_is_due = False
        return metrics

    def _heed(self, alarms: list[Alarm]) -> bool:
        """Tell the user of the alarms of the last step, and decide what follows it. Returns whether the run stops here."""
        for alarm in alarms:
            self.console.warn(f"ALARM {alarm.name} at {alarm}")
        goes_on = self.last_step < self.config.train.steps
        self.refresh_is_due = goes_on and self.refresher.is_due(self.last_step, alarmed=bool(alarms))
        return goes_on and bool(alarms) and self.config.health.on_alarm == "stop"

    def _is_due(self, step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    def _evaluate(self, loop: Loop, step: int) -> None:
        if not self.inputs.heldout:
            return
        with self.console.stage(f"evaluation at step {step}", total=len(self.inputs.heldout), unit="held-out prompts") as progress:
            result = self.evaluations[step] = loop.evaluate(step)
            shown = " · ".join(f"{name} {value:.3f}" for name, value in result.items())
            progress.advance(len(self.inputs.heldout), shown)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _save(self, loop: Loop, roles: Roles, step: int) -> None:
        draft = checkpoints.begin(self.run_folder, step)
        saved = [rank.save_checkpoint.remote(str(draft / role)) for role, ranks in roles.trained.items() for rank in ranks]
        get(saved, what="saving a checkpoint")
        if self.config.checkpoint.save_pretrained:
            self._save_policy(roles, draft / "policy")
        state = {
            "step": step,
            "kl": loop.kl.state_dict(),
            "health": self.health.state_dict(),
            "refresh": self.refresher.state_dict(),
            "refresh_is_due": self.refresh_is_due,
            "evaluations": {str(k): v for k, v in self.evaluations.items()},
        }
        checkpoints.commit(draft, state, self.config.checkpoint.keep)

    def _load_state_dict(self, state: dict) -> None:
        """Bring what the driver itself knows to the state of a checkpoint."""
        self.refresher.load_state_dict(state["refresh"])
        self.health.load_state_dict(state["health"])
        self.refresh_is_due = state["refresh_is_due"] and state["step"] < self.config.train.steps
        self.evaluations = {int(k): v for k, v in state["evaluations"].items()}
        self.last_step = state["step"]

    def _restore(self, loop: Loop, roles: Roles, folder: Path, state: dict) -> int:
        """Bring every role to the state of a checkpoint; returns its step."""
        loaded = [rank.load_checkpoint.remote(str(folder / role)) for role, ranks in roles.trained.items() for rank in ranks]
        get(loaded, what="loading a checkpoint")
        loop.kl.load_state_dict(state["kl"])
        loop.sync(state["step"])
        return state["step"]

    def _save_final(self, roles: Roles) -> None:
        with whole_folder(self.run_folder / "final") as draft:
            self._save_policy(roles, draft)

    def _save_policy(self, roles: Roles, folder: Path) -> None:
        get([learner.save_pretrained.remote(str(folder)) for learner in roles.learners], what="saving the policy")

    # ---------------------------------------------------------------------------------------------------- summary

    def _summarise(self, state: str) -> None:
        last = max(self.evaluations, default=0)
        summary = {
            "name": self.config.name,
            "stage": STAGE,
            "state": state,
            "steps": self.last_step,
            "algorithm": self.config.algorithm,
            "advantage_mode": self._advantage_mode,
            "model": self.config.model.path,
            "seed": self.config.seed,
            "reward_model" if self.uses_rewards else "gvm": {
                "path": self._scoring_model,
                "heldout_accuracy": self.inputs.manifest.heldout_accuracy,
            },
            "duration_seconds": round(time.time() - self.started, 1),
            "peak_memory_gib": round(self.memory.peak_gib, 3),
            "notes": self.inputs.notes,
            "alarms": [asdict(alarm) for alarm in self.health.alarms],
        }
        if self.refresher.state.steps:
            summary["refresh"] = asdict(self.refresher.state)
        summary["evaluations"] = {str(step): result for step, result in sorted(self.evaluations.items())}
        if last > 0:
            summary["kl"] = {"after_mean": self.evaluations[last]["kl"]}
            if "gold" in self.evaluations[last]:
                summary["gold"] = gold_gain(self.run_folder, last)
        write_summary(self.run_folder, summary)
