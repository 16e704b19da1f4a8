"""`dvpo gvm train`: preference pairs to a Global Value Model, on Ray and DeepSpeed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import ray
from ray.actor import ActorHandle

from dvpo_ray.actors.process import environment
from dvpo_ray.config import Config
from dvpo_ray.divergence import check_finite, diverged
from dvpo_ray.errors import InputError
from dvpo_ray.gvm.advice import heldout_warning
from dvpo_ray.gvm.artifact import GVMManifest
from dvpo_ray.gvm.dataset import GVMData, load_gvm_data, manifest_entries
from dvpo_ray.gvm.evaluation import heldout_report, write_evaluation
from dvpo_ray.gvm.start import training_section
from dvpo_ray.gvm.trainer import SHARES, GVMTrainer
from dvpo_ray.gvm.trajectories import minibatches
from dvpo_ray.gvm.views import HeldoutValues
from dvpo_ray.monitoring.console import RunConsole
from dvpo_ray.monitoring.memory import PeakMemory
from dvpo_ray.monitoring.metrics import MetricsLog
from dvpo_ray.monitoring.summary import write_summary
from dvpo_ray.orchestration import checkpoints
from dvpo_ray.orchestration.cluster import check_gpus, connect, get
from dvpo_ray.orchestration.placement import plan_gvm_placement
from dvpo_ray.orchestration.roles import Room, reserved, spawn, wait_until_ready
from dvpo_ray.run_folder import begin, check_resume


def train_gvm(config: Config, out: Path, resume: bool = False, console: RunConsole | None = None, room: Room | None = None) -> Path:
    """Train a Global Value Model on the config's preference pairs.

    Args:
        out: run folder. The artifact goes to its `final/`, the held-out evaluation to `evaluation/`.
        resume: continue the run in that folder from its last whole checkpoint.
        console: of a larger run that this is a part of; otherwise the run opens its own.
        room: of a larger run that lends it; has a free bundle for each of `gvm.num_actors`. Otherwise the run reserves its own.

    Returns:
        The artifact's folder.

    Raises:
        InputError, ResourceError: in one line; bad input is found before any actor starts.
    """
    out = out.resolve()
    stage = "rm" if config.gvm.objective == "bradley_terry" else "gvm"
    if resume:
        check_resume(out, stage, config)
    if room is None:
        check_gpus({f"{training_section(config)}.gpus_per_actor": config.gvm.gpus_per_actor}, config.ray)
    data = load_gvm_data(config)
    checkpoint = _checkpoint(out, config, data) if resume else None
    with nullcontext(console) if console is not None else RunConsole() as console:
        return GVMRun(config, stage, out, data, console, room).train(checkpoint)


def _checkpoint(out: Path, config: Config, data: GVMData) -> tuple[Path, dict]:
    """The last whole checkpoint of a run on as many steps as the data of this one gives."""
    folder, state = checkpoints.last_whole(out)
    total = total_steps(config, data)
    if state["total_steps"] != total:
        raise InputError(
            f"{folder}: the run had {state['total_steps']} steps, {config.data.preferences.path} gives {total} now; "
            "resume with the data that it started with"
        )
    return folder, state


def total_steps(config: Config, data: GVMData) -> int:
    """Optimizer steps of a run."""
    return max(1, round(config.gvm.epochs * _steps_per_epoch(config, data)))


def _steps_per_epoch(config: Config, data: GVMData) -> int:
    return -(-data.train.num_pairs // config.gvm.pairs_per_step)


class GVMRun:
    """One training run in its folder: steps, checkpoints, the held-out evaluation, the artifact and the summary."""

    def __init__(self, config: Config, stage: str, out: Path, data: GVMData, console: RunConsole, room: Room | None = None) -> None:
        self.config = config
        self.out = out
        self.data = data
        self.console = console
        self.room = room
        self.memory = PeakMemory()
        self.steps_per_epoch = _steps_per_epoch(config, data)
        self.total_steps = total_steps(config, data)
        self.last_step = 0
        self.accuracies: list[float] = []
        self.section = training_section(config)
        self.is_reward_model = stage == "rm"
        self.called = "reward model" if self.is_reward_model else "GVM"
        model = config.gvm.init_from or config.model.path
        self.summary: dict = {"name": config.name, "stage": stage, "model": model, "seed": config.seed, "notes": data.notes}

    def train(self, checkpoint: tuple[Path, dict] | None) -> Path:
        started, state = time.time(), "failed"
        if checkpoint is not None:
            self.last_step = checkpoint[1]["step"]
        try:
            begin(self.out, self.summary["stage"], self.config, resumed=checkpoint is not None)
            self.console.header("Reward model" if self.is_reward_model else "Global Value Model", self._facts())
            for note in self.data.notes:
                self.console.warn(note)
            with self.memory, connect(self.config.ray), self._trainers() as trainers:
                artifact = self._run(trainers, checkpoint)
            state = "finished"
            return artifact
        except KeyboardInterrupt:
            state = "interrupted"
            raise
        finally:
            measured = {"duration_seconds": round(time.time() - started, 1), "peak_memory_gib": round(self.memory.peak_gib, 3)}
            write_summary(self.out, self.summary | {"state": state, "steps": self.last_step} | measured)

    def _facts(self) -> dict[str, object]:
        settings = self.config.gvm
        context = {"context": f"{settings.context.examples} examples before each prompt"} if settings.context.examples else {}
        pairs = f"{self.data.train.num_pairs} training, {self.data.heldout.num_pairs} held out"
        facts = {"model": self.summary["model"], "objective": settings.objective, **context, "pairs": pairs}
        return facts | {"steps": self.total_steps, "run folder": self.out}

    @contextmanager
    def _trainers(self) -> Iterator[list[ActorHandle]]:
        """All ranks of the trainer, ready, for the time of a `with` block."""
        config, env = self.config, environment(self.config.gvm)
        trainers: list[ActorHandle] = []
        with reserved(plan_gvm_placement(config), config.ray) if self.room is None else nullcontext(self.room) as room:
            try:
                for index, bundle in enumerate(room.free):
                    spawned = spawn(GVMTrainer, bundle, room.group, room.bundles, env, config, index, str(self.out), role=GVMTrainer.role)
                    trainers.append(spawned)
                pids = wait_until_ready({GVMTrainer.role: trainers}, config.rollout.start_timeout_seconds)
                self.memory.add_pids(pids[GVMTrainer.role])
                yield trainers
            finally:
                for trainer in trainers:
                    ray.kill(trainer)

    def _run(self, trainers: list[ActorHandle], checkpoint: tuple[Path, dict] | None) -> Path:
        address = get(trainers[0].rendezvous.remote(), what=f"the meeting of the {self.called} trainers")
        train = ray.put(self.data.train)
        facts = get(
            [trainer.connect.remote(*address, train, self.total_steps) for trainer in trainers], what=f"the start of the {self.called} trainers"
        )
        if checkpoint is not None:
            self._restore(trainers, checkpoint[0])
        with MetricsLog(
            self.out,
            self.config.train.trackers,
            resume_step=self.last_step if checkpoint is not None else None,
            config=self.config.model_dump(mode="json"),
        ) as log:
            self._optimise(trainers, log)
        report = self._evaluate(trainers)
        return self._save(trainers, facts[0], report)

    def _optimise(self, trainers: list[ActorHandle], log: MetricsLog) -> None:
        with self.console.stage(self.called, total=self.total_steps, done=self.last_step, unit="steps") as stage:
            while self.last_step < self.total_steps:
                metrics = self._step(trainers, self.last_step)
                self.last_step += 1
                check_finite(self.last_step, metrics, "gvm", self.section, dtype=self.config.model.dtype)
                log.write(self.last_step, metrics)
                self.accuracies.append(metrics["gvm/accuracy"])
                if self.last_step % self.config.gvm.checkpoint_every_steps == 0:
                    self._checkpoint(trainers)
                stage.advance(
                    1, f"loss {metrics['gvm/loss']:.3f} · accuracy {metrics['gvm/accuracy']:.2f} · {metrics['time/step_seconds']:.1f} s/step"
                )

    def _step(self, trainers: list[ActorHandle], step: int) -> dict[str, float]:
        """One optimizer step (0-based) on all ranks, and its metrics."""
        started = time.perf_counter()
        epoch, index = divmod(step, self.steps_per_epoch)
        pairs = minibatches(self.data.train.num_pairs, self.config.gvm.pairs_per_step, epoch, self.config.seed)[index]
        shares = get([trainer.step.remote(pairs) for trainer in trainers], what=f"{self.called} step {step + 1}")
        seconds = time.perf_counter() - started
        total = {name: sum(share[name] for share in shares) for name in SHARES}
        return {
            "gvm/loss": total["loss"],
            "gvm/regression_loss": total["regression_loss"],
            "gvm/bradley_terry_loss": total["bradley_terry_loss"],
            "gvm/accuracy": total["accuracy"],
            "gvm/grad_norm": shares[0]["grad_norm"],
            "gvm/learning_rate": shares[0]["learning_rate"],
            "throughput/trained_tokens_per_second": total["tokens"] / seconds,
            "time/step_seconds": seconds,
        }

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _checkpoint(self, trainers: list[ActorHandle]) -> None:
        draft = checkpoints.begin(self.out, self.last_step)
        get([trainer.save_checkpoint.remote(str(draft / "trainer")) for trainer in trainers], what="saving a checkpoint")
        checkpoints.commit(draft, {"step": self.last_step, "total_steps": self.total_steps}, self.config.checkpoint.keep)

    def _restore(self, trainers: list[ActorHandle], folder: Path) -> None:
        get([trainer.load_checkpoint.remote(str(folder / "trainer")) for trainer in trainers], what="loading a checkpoint")
        self.console.say(f"resumed after step {self.last_step}")

    # ------------------------------------------------------------------------------------ evaluation and artifact

    def _evaluate(self, trainers: list[ActorHandle]) -> dict:
        """Held-out metrics of the trained model, written to the run folder; a warning where they are poor."""
        heldout = ray.put(self.data.heldout)
        parts = get([trainer.evaluate.remote(heldout) for trainer in trainers], what="the held-out evaluation")
        values = HeldoutValues.from_parts(self.data.heldout, [part for worker in parts for part in worker])
        if not np.isfinite(values.values).all():
            raise diverged("the held-out values are not finite after the last step", self.section)
        report = heldout_report(values, self.config.gvm.outcome)
        write_evaluation(self.out / "evaluation", values, report)
        accuracy = report["heldout_accuracy"]
        by_mean = "" if self.is_reward_model else f"{accuracy['mean']:.3f} by mean value, "
        self.console.say(f"held-out accuracy: {by_mean}{accuracy['last']:.3f} by last value, {values.num_pairs} pairs")
        training_accuracy = float(np.mean(self.accuracies[-self.steps_per_epoch :] or [1.0]))
        warning = heldout_warning(
            accuracy, training_accuracy, self.data.train.num_pairs, self.section, view="last" if self.is_reward_model else "mean"
        )
        if warning is not None:
            self.console.warn(warning)
            self.summary["warnings"] = [warning]
        return report

    def _save(self, trainers: list[ActorHandle], facts: tuple, report: dict) -> Path:
        head, num_layers = facts
        manifest = GVMManifest(
            **manifest_entries(self.config, self.data),
            head=head,
            num_layers=num_layers,
            heldout_accuracy=report["heldout_accuracy"],
            heldout_regression={name: report["regression"][name] for name in ("mse", "explained_variance")},
        )
        final = self.out / "final"
        get([trainer.save_artifact.remote(str(final), manifest) for trainer in trainers], what=f"saving the {self.called}")
        self.summary["gvm"] = {"path": str(final), "heldout_accuracy": manifest.heldout_accuracy}
        return final
