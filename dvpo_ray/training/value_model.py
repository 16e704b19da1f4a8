"""`dvpo gvm train` and `dvpo rm train`: preference pairs to a value model or a reward model, on Ray and DeepSpeed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import ray
from ray.actor import ActorHandle

from dvpo_ray.actors.gvm_trainer import SHARES, GVMTrainer
from dvpo_ray.config import Config
from dvpo_ray.config.arithmetic import counted, value_model_steps
from dvpo_ray.errors import InputError, diverged
from dvpo_ray.gvm.artifact import GVMManifest
from dvpo_ray.gvm.dataset import GVMData, TrainingSettings, load_gvm_data, manifest_entries
from dvpo_ray.gvm.evaluation import chance_warning, heldout_report, heldout_warning, length_warning, unmoved_warning, write_evaluation
from dvpo_ray.gvm.pairs import minibatches
from dvpo_ray.gvm.views import HeldoutValues
from dvpo_ray.monitoring.console import RunConsole
from dvpo_ray.monitoring.ending import accuracy_words
from dvpo_ray.monitoring.run_files import read_json_lines
from dvpo_ray.planning.placement import plan_training_placement
from dvpo_ray.runtime.checkpoints import trainer_bytes
from dvpo_ray.runtime.cluster import check_gpus, connect
from dvpo_ray.runtime.fork_server import prepare
from dvpo_ray.runtime.process import environment
from dvpo_ray.runtime.room import Room, reserved, spawn, stop, wait_until_ready
from dvpo_ray.runtime.waiting import get
from dvpo_ray.training.run import Run, check_finite, is_due

STAGES = {"gvm": "gvm", "reward_model": "rm"}


def train_value_model(
    config: Config, settings: TrainingSettings, out: Path, resume: bool = False, console: RunConsole | None = None, room: Room | None = None
) -> Path:
    """Train a value model on the config's preference pairs.

    Args:
        settings: `config.gvm` for a Global Value Model, `config.reward_model` for a reward model.
        out: run folder. The artifact goes to its `final/`, the held-out evaluation to `evaluation/`.
        resume: continue the run in that folder from its last whole checkpoint.
        console: of a larger run that this is a part of; otherwise the run opens its own.
        room: lent by a larger run, with a free seat for each of `num_actors`. Otherwise the run reserves its own.

    Returns:
        The artifact's folder.

    Raises:
        InputError, ResourceError: in one line; bad input is found before any actor starts.
    """
    prepare(config)
    run = Run(STAGES[settings.section], config, out, resume=resume)
    if room is None:
        check_gpus({f"{settings.section}.gpus_per_actor": settings.gpus_per_actor}, config.ray)
    is_part = console is not None
    with nullcontext(console) if is_part else RunConsole() as console:
        with console.stage("reading the pairs", quiet=True):
            data = load_gvm_data(config, settings)
        training = ValueModelTraining(run, settings, data)
        training.check_checkpoint(run.open_checkpoint())
        with (
            run.started(training.title, training.header(), data.notes, lambda: training.summary, console, is_part=is_part),
            console.entering("start of Ray", connect(config.ray, console.say), quiet=True),
            console.entering("start of the trainers", training.started_trainers(room, console)) as trainers,
        ):
            return training.train(trainers, console)


class ValueModelTraining:
    """The steps of one training, the held-out evaluation and the artifact."""

    def __init__(self, run: Run, settings: TrainingSettings, data: GVMData) -> None:
        self.run = run
        self.config = run.config
        self.settings = settings
        self.data = data
        self.steps_per_epoch, self.total_steps = value_model_steps(data.train.num_pairs, settings)
        self.is_reward_model = settings.objective == "bradley_terry"
        self.title, self.called = ("Reward model", "reward model") if self.is_reward_model else ("Global Value Model", "GVM")
        self.summary: dict = {"model": settings.init_from or self.config.model.path}

    def header(self) -> dict[str, object]:
        """What runs, for the console."""
        examples = self.settings.context.examples
        return {
            "model": self.summary["model"],
            "objective": self.settings.objective,
            **({"context": f"{counted(examples, 'example')} before each prompt"} if examples else {}),
            "pairs": f"{self.data.train.num_pairs} training, {self.data.heldout.num_pairs} held out",
            "steps": self.total_steps,
        }

    def check_checkpoint(self, state: dict | None) -> None:
        """Refuse a checkpoint whose run had another number of steps than the data gives now.

        Raises:
            InputError: names the checkpoint.
        """
        if state is not None and state["total_steps"] != self.total_steps:
            raise InputError(
                f"{self.run.checkpoint[0]}: the run had {counted(state['total_steps'], 'step')}, {self.config.data.preferences.path} gives "
                f"{self.total_steps} now; resume with the data of its start"
            )

    @contextmanager
    def started_trainers(self, room: Room | None, console: RunConsole) -> Iterator[list[ActorHandle]]:
        """All ranks of the trainer with their shards of the model, for the time of a `with` block."""
        config, folder, trainers = self.config, str(self.run.folder), []
        with reserved(plan_training_placement(self.settings), config.ray) if room is None else nullcontext(room) as room:
            try:
                for index, seat in enumerate(room.free):
                    arguments = (config, self.settings, index, folder)
                    trainers.append(spawn(GVMTrainer, seat, room, environment(self.settings), *arguments, run_folder=folder, role=GVMTrainer.role))
                pids = wait_until_ready({GVMTrainer.role: trainers}, config.rollout.start_timeout_seconds, console.starting)
                self.run.memory.add_pids(pids[GVMTrainer.role])
                yield trainers
            finally:
                stop(trainers)

    def train(self, trainers: list[ActorHandle], console: RunConsole) -> Path:
        """All steps after the checkpoint or from the start, then the held-out evaluation and the artifact. Returns the artifact's folder."""
        with console.stage(f"loading the {self.called}", quiet=True):
            address = get(trainers[0].rendezvous.remote(), what=f"the meeting of the {self.called} trainers")
            pairs = ray.put(self.data.train)
            connected = [trainer.connect.remote(*address, pairs, self.total_steps) for trainer in trainers]
            head, num_layers = get(connected, what=f"the start of the {self.called} trainers")[0]
            size = get(trainers[0].observe.remote(trainer_bytes), what="the size of a checkpoint")
            self.run.expect_checkpoints(size, self.settings.checkpoint_every_steps, self.total_steps)
            if self.run.checkpoint is not None:
                folder = str(self.run.checkpoint[0] / "trainer")
                get([trainer.load_checkpoint.remote(folder) for trainer in trainers], what="loading a checkpoint")
        write, state = partial(self._write_checkpoint, trainers), {"total_steps": self.total_steps}
        with (
            self.run.metrics_log() as log,
            console.stage(self.called, total=self.total_steps, done=self.run.last_step, unit="steps") as progress,
            self.run.saved_when_interrupted(write, lambda: state, console),
        ):
            for step in range(self.run.last_step + 1, self.total_steps + 1):
                with self.run.whole_step(console):
                    metrics = self.step(trainers, step)
                    check_finite(step, metrics, "gvm", self.settings.section, dtype=self.config.model.dtype)
                    self.run.last_step = step
                    log.write(step, metrics)
                    if is_due(step, self.settings.checkpoint_every_steps):
                        with console.stage("saving a checkpoint", quiet=True):
                            self.run.save_checkpoint(write, state)
                text = f"loss {metrics['gvm/loss']:.3f} · accuracy {metrics['gvm/accuracy']:.2f} · last step {metrics['time/step_seconds']:.1f} s"
                progress.advance(1, text)
        report = self._evaluate(trainers, console)
        manifest = GVMManifest(
            **manifest_entries(self.config, self.settings, self.data),
            head=head,
            num_layers=num_layers,
            heldout_accuracy=report["heldout_accuracy"],
            heldout_regression={name: report["regression"][name] for name in ("mse", "explained_variance")},
            heldout_warnings=self.summary.get("warnings", []),
        )
        final = self.run.folder / "final"
        with console.stage(f"saving the {self.called}", quiet=True):
            get([trainer.save_artifact.remote(str(final), manifest) for trainer in trainers], what=f"saving the {self.called}")
        self.summary["gvm"] = {"path": str(final), **manifest.measured}
        return final

    def step(self, trainers: list[ActorHandle], step: int) -> dict[str, float]:
        """One optimizer step, counted from 1, on all ranks, and its metrics."""
        started = time.perf_counter()
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        pairs = minibatches(self.data.train.num_pairs, self.settings.pairs_per_step, epoch, self.config.seed)[index]
        shares = get([trainer.step.remote(pairs) for trainer in trainers], what=f"{self.called} step {step}")
        seconds = time.perf_counter() - started
        total = {name: sum(share[name] for share in shares) for name in (*SHARES, "tokens")}
        return {
            **{f"gvm/{name}": total[name] for name in ("loss", "regression_loss", "bradley_terry_loss", "accuracy")},
            **{f"gvm/{name}": shares[0][name] for name in ("grad_norm", "learning_rate")},
            "throughput/trained_tokens_per_second": total["tokens"] / seconds,
            "time/step_seconds": seconds,
        }

    def _write_checkpoint(self, trainers: list[ActorHandle], folder: Path) -> None:
        get([trainer.save_checkpoint.remote(str(folder / "trainer")) for trainer in trainers], what="saving a checkpoint")

    def _evaluate(self, trainers: list[ActorHandle], console: RunConsole) -> dict:
        """Held-out metrics of the trained model, written to the run folder; with a warning when they are poor."""
        with console.stage("held-out evaluation", quiet=True):
            heldout = ray.put(self.data.heldout)
            parts = get([trainer.evaluate.remote(heldout) for trainer in trainers], what="the held-out evaluation")
        values = HeldoutValues.from_parts(self.data.heldout, [part for worker in parts for part in worker])
        if not np.isfinite(values.values).all():
            raise diverged("the held-out values are not finite after the last step", self.settings.section)
        report = heldout_report(values, self.settings.outcome)
        write_evaluation(self.run.folder / "evaluation", values, report)
        views = ["last"] if self.is_reward_model else ["mean", "last"]
        for line in accuracy_words(report, views):
            console.say(line)
        trained = training_accuracy(self.run.folder, self.steps_per_epoch)
        weak = heldout_warning(report["heldout_accuracy"], trained, self.data.train.num_pairs, self.settings.section, views[0])
        unmoved = unmoved_warning(report, self.settings.section, f" after {counted(self.total_steps, 'step')}")
        warnings = [*(unmoved or ([weak] if weak is not None else [])), *chance_warning(report, views[0]), *length_warning(report, views[0])]
        for warning in warnings:
            console.warn(warning)
        if warnings:
            self.summary["warnings"] = warnings
        return report


def training_accuracy(run_folder: Path, steps: int) -> float:
    """Mean accuracy on the minibatches of the last steps, also of those before the run was resumed."""
    rows, _ = read_json_lines(run_folder / "metrics.jsonl")
    return float(np.mean([row["gvm/accuracy"] for row in rows[-steps:]]))
