"""What every experiment is made of: runs by variant and seed, each in a folder of its own, and what they say together.

A finished run is kept and never done again, so an experiment can be stopped and started at any time, and grow by more seeds
or variants. A run is an ordinary one of `dvpo train` or `dvpo gvm train`, or a measurement on what those left.

Importing this loads neither torch nor ray, so that a plan is instant.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from dvpo_ray.config import Config, load_config
from dvpo_ray.config.resuming import flat_settings
from dvpo_ray.errors import InputError
from dvpo_ray.experiments.results import RESULT, Result, Statistic, with_interval


@dataclass(frozen=True)
class Source:
    """A config file and its overrides, to which a variant adds its own."""

    path: str
    overrides: tuple[str, ...] = ()

    def load(self, *more: str) -> Config:
        """The config with more overrides.

        Raises:
            InputError: as in `load_config`.
        """
        return load_config(self.path, [*self.overrides, *more])


@dataclass(frozen=True)
class Run:
    """One run of an experiment.

    Attributes:
        stage: what it does; a key of `dvpo_ray.experiments.stages.STAGES`.
        variant, seed: runs of one variant differ in the seed alone.
        overrides: what it changes in the experiment's config.
        config: with those changes, the seed and the folder.
        folder: of this run alone.
        options: of a stage that is no command of its own.
    """

    stage: str
    variant: str
    seed: int
    overrides: tuple[str, ...]
    config: Config
    folder: Path
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> dict:
        """Its summary.json.

        Raises:
            InputError: the file is damaged.
        """
        return _read_object(self.folder / "summary.json")

    @property
    def is_finished(self) -> bool:
        return (self.folder / "summary.json").exists() and self.summary.get("state") == "finished"

    def check_kept(self) -> None:
        """Refuse a folder whose run was another one: its numbers would pass for those of this setting.

        Raises:
            InputError: names the folder and the first setting that differs.
        """
        kept = self.folder / "config.yaml"
        if not kept.exists():
            return
        mine, theirs = (flat_settings(config.model_dump(mode="json", exclude=_OF_NO_CONSEQUENCE)) for config in (self.config, load_config(kept)))
        if self.is_finished:
            mine, theirs = mine | dict(self.options), theirs | self.summary.get("options", {})
        for key in mine | theirs:
            if mine.get(key) != theirs.get(key):
                had, wanted = theirs.get(key), mine.get(key)
                raise InputError(f"{self.folder}: holds a run with {key} {had}, not {wanted}; give another --out, or remove that folder")


def _read_object(file: Path) -> dict:
    """A JSON object that an earlier run left.

    Raises:
        InputError: it is no JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: not readable as JSON ({error}); remove {file.parent}, and it is done again") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected a JSON object; remove {file.parent}, and it is done again")
    return content


_OF_NO_CONSEQUENCE = {"name": True, "out": True, "ray": True, "train": {"trackers"}}


def override(key: str, value: Any) -> str:
    """`key=value` with the value as YAML that reads back as the same."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


class Study(ABC):
    """One experiment, as `dvpo experiment NAME` offers it.

    Args:
        source: the config.
        options: the command line: `seeds`, and what `add_options` added.
        out: the experiment's folder; every run has its own in it.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    example: ClassVar[str]

    def __init__(self, source: Source, options: Namespace, out: Path) -> None:
        self.source = source
        self.config = source.load()
        self.options = options
        self.seeds = list(dict.fromkeys(options.seeds))
        self.out = out

    @classmethod
    @abstractmethod
    def add_options(cls, parser: ArgumentParser) -> None:
        """Options beside CONFIG, `--seeds`, `--out` and `--dry-run`."""

    @abstractmethod
    def runs(self) -> list[Run]:
        """All runs, in an order in which each finds what it needs.

        Raises:
            InputError: the config lacks something.
        """

    @property
    def training_pairs(self) -> tuple[str, int] | None:
        """The most training pairs that one of its runs asks of `data.preferences`, after the option that asks for them, if one does."""
        return None

    @abstractmethod
    def result(self, runs: Sequence[Run]) -> Result:
        """What the finished runs say."""

    def cell(self, statistic: Statistic) -> str:
        """A cell of the markdown table."""
        return with_interval(statistic)

    def check_folder(self) -> None:
        """Refuse a folder of something else: nothing of it would be lost, but two results would lie in one place.

        Raises:
            InputError: names the folder and what is in it.
        """
        if not self.out.is_dir() or not any(self.out.iterdir()):
            return
        kept = self.out / RESULT
        if kept.is_file():
            experiment = _read_object(kept).get("experiment")
            if experiment != self.name:
                raise InputError(f"{self.out}: holds the experiment {experiment}, not {self.name}; give another --out")
        elif not any(folder.is_dir() for folder in self.out.glob("*-seed[0-9]*")):
            raise InputError(f"{self.out}: already there, not empty, and without a run of an experiment; give another --out")

    # ------------------------------------------------------------------------------------------- for the subclasses

    def run(self, stage: str, variant: str, seed: int, *overrides: str, **options: Any) -> Run:
        """A run in the folder `<variant>-seed<seed>`."""
        folder = self.out / f"{variant}-seed{seed}"
        config = self.source.load(*overrides, override("seed", seed), override("out", str(folder)))
        return Run(stage, variant, seed, overrides, config, folder, options)

    def require(self, *keys: str) -> None:
        """Refuse a config that lacks one of these settings.

        Raises:
            InputError: names the file and the setting.
        """
        for key in keys:
            value: Any = self.config
            for name in key.split("."):
                value = getattr(value, name, None)
            if value is None:
                raise InputError(f"{self.source.path}: {key} is not set, and {self.name} needs it")

    def require_judge(self) -> None:
        """Refuse a config whose policy runs would not be judged."""
        if self.config.evaluation.judge == "none":
            raise InputError(f"{self.source.path}: evaluation.judge is none, and {self.name} compares gold; set one")

    def require_curves(self) -> None:
        """Refuse a config whose policy runs would not be judged along the way."""
        if self.config.evaluation.judge == "none" or self.config.evaluation.every_steps == 0:
            raise InputError(f"{self.source.path}: set evaluation.judge and evaluation.every_steps; gold is compared along the run")


def variants(runs: Iterable[Run], *, stage: str | None = None) -> dict[str, list[Run]]:
    """The runs (of one stage) by variant, in their order."""
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        if stage is None or run.stage == stage:
            grouped.setdefault(run.variant, []).append(run)
    return grouped


def check_distinct(runs: Sequence[Run]) -> None:
    """Refuse runs of one name: a variant that is named twice would count each seed twice, and its intervals would be too narrow.

    Raises:
        InputError: names the first such run.
    """
    names = [run.folder.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"the run {twice} is asked for twice; name every variant once")


def plan_lines(runs: Sequence[Run]) -> list[str]:
    """What `--dry-run` says: one line for each run, with what it changes."""
    width = max(len(run.folder.name) for run in runs)
    todo = sum(not run.is_finished for run in runs)
    lines = [f"{'finished' if run.is_finished else 'to do':<9} {run.stage:<12} {run.folder.name:<{width}} {_changes(run)}".rstrip() for run in runs]
    return [f"{len(runs)} runs, {todo} to do", *lines]


def _changes(run: Run) -> str:
    options = (override(name, value) if isinstance(value, Mapping) else f"{name}={value}" for name, value in run.options.items())
    return " ".join([*run.overrides, *options])
