"""Semi-online refresh: new preferences over the current policy's samples continue the training of the Global Value Model.

    sample → label → train, in the room of the scorers → scorers again, with the new artifact

A refresh has a folder, `gvm/refresh_<step>/` of the run, with samples, labels, pairs, and the files of `dvpo gvm train`.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from dvpo_ray.actors.roles import Roles
from dvpo_ray.config.arithmetic import counted
from dvpo_ray.config.schema import Config, PreferenceData
from dvpo_ray.data.prompts import Prompt
from dvpo_ray.data.rows import count_note
from dvpo_ray.errors import InputError
from dvpo_ray.gvm.artifact import GVMManifest, read_manifest
from dvpo_ray.gvm.dataset import load_heldout
from dvpo_ray.models.loading import load_tokenizer
from dvpo_ray.monitoring.console import RunConsole
from dvpo_ray.refresh.labels import SOURCES, candidate_pairs, labelled_rows
from dvpo_ray.refresh.pairs import HELDOUT, TRAINING, heldout_fraction, pairs_of_data, pairs_of_refreshes, preference_rows, single_note, write_pairs
from dvpo_ray.refresh.samples import read_samples
from dvpo_ray.rollouts.schedule import prompt_indices
from dvpo_ray.runtime.waiting import get
from dvpo_ray.training.policy_inputs import Inputs
from dvpo_ray.training.run import Run
from dvpo_ray.training.stages import Stages
from dvpo_ray.training.value_model import train_value_model

SAMPLES_STREAM = 2
"""Stream of random numbers of the samples of a refresh."""


@dataclass(frozen=True)
class Refreshed:
    """The result of the last refresh, and totals over all of them.

    Attributes:
        path: the artifact in force.
        steps: the steps that a refresh followed.
        pairs_total: labelled pairs of all refreshes.
        accuracy_before, accuracy: of the GVM before and after the last refresh, by the last value, on the held-out pairs of that refresh.
    """

    path: str
    steps: tuple[int, ...] = ()
    pairs_total: int = 0
    accuracy_before: float | None = None
    accuracy: float | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """`refresh/…`; empty before the first refresh."""
        if not self.steps:
            return {}
        return {
            "refresh/count": len(self.steps),
            "refresh/pairs_total": self.pairs_total,
            "refresh/heldout_accuracy_before": self.accuracy_before,
            "refresh/heldout_accuracy": self.accuracy,
        }


class Refresher:
    """The value model of a run, and its refreshes."""

    def __init__(self, run: Run, inputs: Inputs) -> None:
        self.run = run
        self.config = run.config
        self.inputs = inputs
        self.state = Refreshed(self.config.gvm.path or "")

    def is_due(self, step: int, alarmed: bool) -> bool:
        """Whether the GVM is to be refreshed after a step."""
        every = self.config.gvm.refresh_every_steps
        return (every > 0 and step % every == 0) or (alarmed and self.config.health.on_alarm == "refresh")

    @property
    def scoring_config(self) -> Config:
        """The run's config with the artifact in force."""
        return self.config.model_copy(update={"gvm": self.config.gvm.model_copy(update={"path": self.state.path or None})})

    def refresh(self, step: int, loop: Stages, console: RunConsole) -> dict[str, float]:
        """Collect preferences on the policy of a step, continue the training of the GVM, and give it to the scorers.

        Returns:
            The time it took, as a metric.

        Raises:
            InputError, ResourceError: too few pairs, bad labels, no labels in time, or an error of the training.
        """
        started = time.perf_counter()
        folder = self._emptied(self._folder(step))
        rows = self._label(folder, step, self._sample(folder, step, loop, console), console)
        settings, manifest = self.config.gvm.refresh, read_manifest(Path(self.state.path))
        (old, _), earlier = pairs_of_data(self.config.data), pairs_of_refreshes(map(self._folder, self.state.steps))
        fraction = heldout_fraction(self.config.data.prompts, settings.heldout_fraction)
        share, seed = settings.old_pairs_per_new, self.config.seed + step
        self._note(step, write_pairs(folder, rows, f"policy@{step}", fraction, old, earlier, share, seed), console)
        config = training_config(self.config, manifest, self.state.path, folder)
        with console.stage("accuracy before the refresh", quiet=True):
            before = self._accuracy(config, manifest, loop.roles)
        with loop.gpus_lent():
            artifact = train_value_model(config, config.gvm, folder, console=console, room=loop.roles.retire("scorer"))
            self.state = Refreshed(
                path=str(artifact),
                steps=(*self.state.steps, step),
                pairs_total=self.state.pairs_total + len(rows),
                accuracy_before=before,
                accuracy=read_manifest(artifact).heldout_accuracy["last"],
            )
            with console.stage("start of the scorers", quiet=True):
                self.run.memory.add_pids(loop.roles.restart("scorer", self.scoring_config))
        console.say(
            f"GVM refreshed after step {step} on {counted(len(rows), 'new pair')}: held-out accuracy {before:.3f} → {self.state.accuracy:.3f}"
        )
        return {"time/refresh_seconds": time.perf_counter() - started}

    def _folder(self, step: int) -> Path:
        return self.run.folder / "gvm" / f"refresh_{step:06d}"

    def _emptied(self, folder: Path) -> Path:
        """The folder of a refresh. Files of an interrupted attempt are removed, but its labels stay."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "labels.jsonl":
                path.unlink()
        return folder

    def _sample(self, folder: Path, step: int, loop: Stages, console: RunConsole) -> Path:
        """The policy's answers to some training prompts, written to the refresh's folder."""
        settings, texts = self.config.gvm.refresh, self.inputs.texts
        indices = prompt_indices(len(texts), min(settings.prompts, len(texts)), len(self.state.steps) + 1, self.config.seed)
        chosen = list(dict.fromkeys(indices))
        requests = [self.inputs.prompts[i] for i in chosen for _ in range(settings.samples_per_prompt)]
        path = folder / "samples.jsonl"
        with console.stage("samples for the refresh", total=len(requests), unit="responses") as progress:
            prompts: list[Prompt] = [texts[i] for i in chosen]
            write = loop.roles.builder.write_samples.remote(loop.sample(requests, step, SAMPLES_STREAM), prompts, str(path))
            usable, notes = get(write, what="samples for the refresh")
            progress.advance(len(requests), f"{usable} different and usable")
        self._note(step, notes, console)
        return path

    def _note(self, step: int, notes: list[str], console: RunConsole) -> None:
        """Tell the user, on the console and among the notes of the run's summary."""
        for note in notes:
            self.inputs.notes.append(f"refresh after step {step}: {note}")
            console.warn(self.inputs.notes[-1])

    def _label(self, folder: Path, step: int, samples: Path, console: RunConsole) -> list[dict]:
        """Rows of a preference file, from the source that the config names."""
        settings, answered = self.config.gvm.refresh, read_samples(samples)
        if settings.source == "judge":
            rows, notes = preference_rows(answered, settings.pairs_per_prompt, settings.min_score_gap)
            self._note(step, notes, console)
            return rows
        pairs = candidate_pairs(answered, settings.pairs_per_prompt)
        if not pairs:
            raise InputError(
                f"{samples}: no prompt has two different responses to compare; raise gvm.refresh.samples_per_prompt or rollout.temperature"
            )
        labels = SOURCES[settings.source](pairs, folder, settings, console.say)
        ties = [pair.prompt.where for pair in pairs if labels[pair.id].preferred == "tie"]
        self._note(step, [*single_note(answered), *count_note("left out", ties, len(pairs), "pairs of samples", "labelled a tie")], console)
        return labelled_rows(pairs, labels, needs_scores=read_manifest(Path(self.state.path)).outcome.kind == "score")

    def _accuracy(self, config: Config, manifest: GVMManifest, roles: Roles) -> float:
        """Accuracy of the GVM in force on the new held-out pairs."""
        tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
        pairs, _ = load_heldout(config, config.gvm, manifest, tokenizer)  # the training that follows tells the notes
        return get(roles.by_role["scorer"][0].accuracy.remote(pairs), what="the accuracy before the refresh")

    # ------------------------------------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict:
        """What a checkpoint keeps. The path of an artifact in the run folder is relative to it, so that the folder can move."""
        path = Path(self.state.path)
        inside = bool(self.state.steps) and path.is_relative_to(self.run.folder)
        return asdict(self.state) | {"path": str(path.relative_to(self.run.folder)) if inside else self.state.path}

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict`."""
        path = str(self.run.folder / state["path"]) if state["steps"] else self.state.path
        self.state = Refreshed(**state | {"path": path, "steps": tuple(state["steps"])})


def training_config(config: Config, manifest: GVMManifest, start: str, folder: Path) -> Config:
    """The config of a refresh's training: it starts from the GVM in force, with that model's own objective, in the scorers' room.

    Args:
        start: the artifact in force.
        folder: with the files of `write_pairs`.
    """
    objective, settings, scorer = manifest.objective, config.gvm.refresh, config.scorer
    changes = {
        "init_from": start,
        "keep_head": True,
        "num_layers": None,
        "objective": objective.name,
        "td_lambda": objective.td_lambda,
        "bradley_terry_weight": objective.bradley_terry_weight,
        "bradley_terry_value": objective.bradley_terry_value,
        "outcome": manifest.outcome.kind,
        "outcome_scale": manifest.outcome.scale,
        "context": config.gvm.context.model_copy(update=manifest.context.model_dump()),
        "epochs": settings.epochs,
        "num_actors": scorer.num_actors,
        "cpus_per_actor": scorer.cpus_per_actor,
        "gpus_per_actor": scorer.gpus_per_actor,
    }
    pairs = PreferenceData(path=str(folder / TRAINING), heldout_path=str(folder / HELDOUT))
    longest = max(config.data.max_response_tokens, config.rollout.max_response_tokens)
    return config.model_copy(
        update={
            "gvm": config.gvm.model_copy(update=changes),
            "data": config.data.model_copy(update={"preferences": pairs, "max_response_tokens": longest}),
            "train": config.train.model_copy(update={"trackers": []}),  # the run's own trackers show its policy
        }
    )
