"""What a run of policy optimisation knows beside its actors: evaluations, alarms, refreshes; what a checkpoint and the summary hold of it."""

from __future__ import annotations

from dataclasses import asdict

from dvpo_ray.config.algorithms import ALGORITHMS
from dvpo_ray.config.arithmetic import counted
from dvpo_ray.evaluation.gain import gold_gain
from dvpo_ray.health.alarms import RULES, Alarm, HealthMonitor
from dvpo_ray.monitoring.console import RunConsole
from dvpo_ray.training.policy_inputs import Inputs
from dvpo_ray.training.refresh import Refresher
from dvpo_ray.training.run import Run, is_due
from dvpo_ray.training.stages import Stages


class PolicyState:
    """The driver's own state. Of a resumed run it is that of the checkpoint.

    Attributes:
        evaluations: results by step.
        refresh_is_due: the GVM is refreshed before the next step.

    Raises:
        InputError: a resumed run has no whole checkpoint.
    """

    def __init__(self, run: Run, inputs: Inputs) -> None:
        self.run = run
        self.config = run.config
        self.inputs = inputs
        self.evaluations: dict[int, dict[str, float]] = {}
        self.health = HealthMonitor(self.config.health)
        self.refresher = Refresher(run, inputs)
        self.refresh_is_due = False
        state = run.open_checkpoint()
        if state is not None:
            self._load_state_dict(state)

    def evaluate(self, loop: Stages, console: RunConsole) -> None:
        """Judge the policy of the last step on the held-out prompts, if there are any."""
        if not self.inputs.heldout:
            return
        step, prompts = self.run.last_step, len(self.inputs.heldout)
        with console.stage(f"evaluation at step {step}", total=prompts, unit="held-out prompts") as progress:
            result = self.evaluations[step] = loop.evaluate(step)
            progress.advance(prompts, " · ".join(f"{name} {value:z.3f}" for name, value in result.items()))

    def evaluate_if_due(self, loop: Stages, console: RunConsole) -> None:
        """Evaluate before the first step and every `evaluation.every_steps`, unless it was done before the run was interrupted."""
        if self.run.last_step not in self.evaluations and is_due(self.run.last_step, self.config.evaluation.every_steps, at_start=True):
            self.evaluate(loop, console)

    def heed(self, alarms: list[Alarm], console: RunConsole) -> bool:
        """Tell the user of the alarms of the last step, and decide what follows it. Returns whether the run stops here."""
        for alarm in alarms:
            since, times = self.health.lasting(alarm)
            if times == 1:
                console.warn(f"ALARM {alarm.name} at {alarm}")
            elif times & (times - 1) == 0:  # ever more seldom: the 2nd, 4th, 8th … time
                console.warn(f"ALARM {alarm.name} goes on: raised {times} times from step {since} to step {alarm.step}")
        if alarms:
            self.run.tell(alarms=self._alarms)
        goes_on = self.run.last_step < self.config.train.steps
        alarmed = any(not RULES[alarm.name].once for alarm in alarms)
        self.refresh_is_due = goes_on and self.refresher.is_due(self.run.last_step, alarmed=alarmed)
        return goes_on and alarmed and self.config.health.on_alarm == "stop"

    def refresh(self, loop: Stages, console: RunConsole) -> dict[str, float]:
        """Refresh the GVM between two steps, if that is due; returns the metrics of this and all earlier refreshes.

        The checkpoint before a refresh says that it is due: a run that dies waiting for labels goes on here.
        """
        if not self.refresh_is_due:
            return self.refresher.state.metrics
        seconds = self.refresher.refresh(self.run.last_step, loop, console)
        self.health.restart()
        self.refresh_is_due = False
        return seconds | self.refresher.state.metrics

    # ------------------------------------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict:
        """What a checkpoint keeps."""
        return {
            "health": self.health.state_dict(),
            "refresh": self.refresher.state_dict(),
            "refresh_is_due": self.refresh_is_due,
            "evaluations": {str(step): result for step, result in self.evaluations.items()},
        }

    def _load_state_dict(self, state: dict) -> None:
        self.refresher.load_state_dict(state["refresh"])
        self.health.load_state_dict(state["health"])
        self.refresh_is_due = state["refresh_is_due"] and state["step"] < self.config.train.steps
        self.evaluations = {int(step): result for step, result in state["evaluations"].items()}

    # ------------------------------------------------------------------------------------------ header and summary

    @property
    def _advantage_mode(self) -> str:
        return self.config.advantage.mode if self._section == "gvm" else self.config.algorithm

    @property
    def _section(self) -> str:
        return ALGORITHMS[self.config.algorithm].section

    @property
    def _scoring_model(self) -> str:
        return getattr(self.config, self._section).path

    @property
    def _alarms(self) -> list[dict]:
        return [asdict(alarm) for alarm in self.health.alarms]

    def header(self) -> dict[str, object]:
        """What runs, and with what."""
        config, batch = self.config, self.config.batch
        return {
            "model": config.model.path,
            {"gvm": "value model", "reward_model": "reward model"}[self._section]: f"{self._scoring_model} ({self._accuracy()})",
            "prompts": f"{len(self.inputs.prompts)} training, {len(self.inputs.heldout)} held out",
            "batch": f"{counted(batch.prompts_per_step, 'prompt')} x {counted(batch.samples_per_prompt, 'sample')}, "
            + counted(config.train.steps, "step"),
            "advantage": f"{self._advantage_mode}, KL in {config.kl.placement} x {config.kl.coefficient:g}",
        }

    def _accuracy(self) -> str:
        """How well the scoring model orders held-out pairs; a baseline reads the last value alone."""
        known = self.inputs.manifest.measured
        views = [view for view in (["mean", "last"] if self._section == "gvm" else ["last"]) if view in known["accuracy_ci95"]]
        if not views:
            return "held-out accuracy unknown"
        shown = ", ".join(f"{view} {known['heldout_accuracy'][view]:.3f}" for view in views)
        low, high = known["accuracy_ci95"][views[0]]
        return f"held-out accuracy {shown}, on {counted(known['pairs'], 'pair')}, 95 % interval {low:.2f} to {high:.2f}"

    def summary(self) -> dict[str, object]:
        """The entries of summary.json that only policy optimisation has."""
        refreshed, last = self.refresher.state, max(self.evaluations, default=0)
        entries: dict[str, object] = {
            "algorithm": self.config.algorithm,
            "advantage_mode": self._advantage_mode,
            self._section: {"path": self._scoring_model, **self.inputs.manifest.measured},
            **({"warnings": self.inputs.warnings} if self.inputs.warnings else {}),
            "alarms": self._alarms,
            **({"refresh": asdict(refreshed)} if refreshed.steps else {}),
            "evaluations": {str(step): result for step, result in sorted(self.evaluations.items())},
        }
        if last > 0:
            entries["kl"] = {"after_mean": self.evaluations[last]["kl"]}
            if "gold" in self.evaluations[last]:
                entries["gold"] = gold_gain(self.run.folder, last)
        return entries
