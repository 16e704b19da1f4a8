"""What every experiment is made of: runs by variant and seed, each in a folder of its own, and what they say together.

A finished run is kept and never done again, so an experiment can be stopped and started at any time, and can get more seeds or
variants. A run is an ordinary one of `dvpo train` or `dvpo gvm train`, or a measurement on what those left.

Importing this loads neither torch nor ray, so that a plan is instant.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, ClassVar

from dvpo_ray.config import Config, load_config
from dvpo_ray.config.arithmetic import counted
from dvpo_ray.config.options import finite_number, whole_number
from dvpo_ray.config.resuming import flat_settings
from dvpo_ray.errors import InputError
from dvpo_ray.experiments.results import RESULT, Result, Statistic, with_interval

_WITHOUT_EFFECT = {"name": True, "out": True, "ray": True, "train": {"trackers"}}


@dataclass(frozen=True)
class Run:
    """One run of an experiment.

    Attributes:
        stage: what it does; a key of `dvpo_ray.experiments.runner.STAGES`.
        variant, seed: runs of one variant differ only in the seed.
        overrides: what it changes in the experiment's config.
        config: with those changes, the seed and the folder.
        folder: of this run alone.
        options: of a stage that is not a command of its own.
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

    @property
    def final(self) -> str:
        """The checkpoint or artifact that it makes."""
        return str(self.folder / "final")

    def check_kept(self) -> None:
        """Refuse a folder that holds another run: its numbers would pass for those of this setting.

        Raises:
            InputError: names the folder and the first setting that differs.
        """
        kept = self.folder / "config.yaml"
        if not kept.exists():
            return
        mine, theirs = (flat_settings(config.model_dump(mode="json", exclude=_WITHOUT_EFFECT)) for config in (self.config, load_config(kept)))
        if self.is_finished:
            mine, theirs = mine | dict(self.options), theirs | self.summary.get("options", {})
        for key in mine | theirs:
            if mine.get(key) != theirs.get(key):
                had, wanted = theirs.get(key), mine.get(key)
                raise InputError(f"{self.folder}: holds a run with {key} {had}, not {wanted}; give another --out, or remove that folder")


def _read_object(file: Path) -> dict:
    """A JSON object that an earlier run left.

    Raises:
        InputError: it is not a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("expected an object")
    except ValueError as error:
        raise InputError(f"{file}: not readable as JSON ({error}); remove {file.parent} to do it again") from error
    return content


def override(key: str, value: Any) -> str:
    """`key=value` with the value as YAML that reads back as the same."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


class Study(ABC):
    """One experiment, as `dvpo experiment NAME` offers it.

    Args:
        options: the command line: `config`, `overrides`, `seeds`, and what `add_options` added.
        out: the experiment's folder; every run has its own in it.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    example: ClassVar[str]
    cell: ClassVar[Callable[[Statistic], str]] = staticmethod(with_interval)
    """Writes a cell of the markdown table."""

    def __init__(self, options: Namespace, out: Path) -> None:
        self.config = load_config(options.config, options.overrides)
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
        """The option that asks for the most training pairs of `data.preferences`, and how many; None where there is none."""
        return None

    @abstractmethod
    def result(self, runs: Sequence[Run]) -> Result:
        """What the finished runs say."""

    def check_folder(self) -> None:
        """Refuse a folder of something else: nothing in it would be lost, but two results would be in one place.

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
            raise InputError(f"{self.out}: not empty, and without a run of an experiment; give another --out")

    # ------------------------------------------------------------------------------------------- for the subclasses

    def run(self, stage: str, variant: str, seed: int, *overrides: str, **options: Any) -> Run:
        """A run in the folder `<variant>-seed<seed>`."""
        folder = self.out / f"{variant}-seed{seed}"
        own = [*overrides, override("seed", seed), override("out", str(folder))]
        return Run(stage, variant, seed, overrides, load_config(self.options.config, [*self.options.overrides, *own]), folder, options)

    def require(self, *keys: str, judge: bool = False, curves: bool = False, continuations: bool = False) -> None:
        """Refuse a config that lacks one of these settings, or a judge of policies at the end or (for `curves`) along the run.

        Args:
            continuations: responses are finished from their middle; engines would count a least length from there.
        """
        for key in keys:
            if reduce(lambda part, name: getattr(part, name, None), key.split("."), self.config) is None:
                raise InputError(f"{self.options.config}: {key} is not set, and {self.name} needs it")
        if (judge or curves) and self.config.evaluation.judge == "none":
            raise InputError(f"{self.options.config}: evaluation.judge is none, and {self.name} compares gold; set one")
        if curves and self.config.evaluation.every_steps == 0:
            raise InputError(f"{self.options.config}: evaluation.every_steps is 0, and {self.name} compares gold along the run; set it")
        if continuations and (least := self.config.rollout.min_response_tokens):
            raise InputError(
                f"{self.options.config}: rollout.min_response_tokens is {least}, and {self.name} finishes responses from their middle, "
                "where an engine would count from anew; set it to 0"
            )

    def details(self, curves: Sequence, **more) -> dict:
        """For result.json: the curves behind a table, and what they were measured with."""
        batch = self.config.batch
        setting = {"steps": self.config.train.steps, "samples_per_step": batch.prompts_per_step * batch.samples_per_prompt}
        return {**setting, **more, "curves": [curve.as_json() for curve in curves]}


def add_numbers(
    parser: ArgumentParser,
    option: str,
    default: float | list[float],
    meaning: str,
    parse: Callable[[str], float] = whole_number(at_least=1),  # noqa: B008 (a parser holds no state)
    metavar: str = "N",
) -> None:
    """An option for one number, or for several where the default is a list."""
    several = isinstance(default, list)
    shown = " ".join(f"{number:g}" for number in (default if several else [default]))
    text = f"{meaning} (default: {shown})"
    parser.add_argument(option, type=parse, nargs="+" if several else None, default=default, metavar=metavar, help=text)


def add_kl_option(parser: ArgumentParser) -> None:
    add_numbers(parser, "--kl", [4.0, 8.0, 12.0], "KLs at which gold is compared", finite_number(at_least=0), "NATS")


def variants(runs: Iterable[Run], *, stage: str | None = None) -> dict[str, list[Run]]:
    """The runs (of one stage) by variant, in their order."""
    chosen = [run for run in runs if stage in (None, run.stage)]
    return {variant: [run for run in chosen if run.variant == variant] for variant in dict.fromkeys(run.variant for run in chosen)}


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
    return [f"{counted(len(runs), 'run')}, {todo} to do", *lines]


def _changes(run: Run) -> str:
    options = (override(name, value) if isinstance(value, Mapping) else f"{name}={value}" for name, value in run.options.items())
    return " ".join([*run.overrides, *options])
