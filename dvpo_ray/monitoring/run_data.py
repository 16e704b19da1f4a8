"""A run folder as the report sees it: whatever is there, and a note about everything that is not usable."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from dvpo_ray.config.arithmetic import counted
from dvpo_ray.config.resuming import STAGES
from dvpo_ray.errors import InputError
from dvpo_ray.monitoring.run_files import check_step, living, read_json_lines

DIED = "died"
"""The state of a run whose summary says `running` though its process is gone."""


@dataclass
class RunData:
    """The files of a run folder.

    Attributes:
        folder: the run folder.
        summary: summary.json, {} if it is missing.
        metrics: rows of metrics.jsonl in the order of their steps.
        evaluations: rows of evaluation/step_*.jsonl by step.
        rollouts: rows of the last rollouts/step_*.jsonl that has any.
        rollout_step: its step.
        config: text of config.yaml, "" if it is missing.
        notes: one line for every file or line that is not usable.
    """

    folder: Path
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    rollouts: list[dict[str, Any]] = field(default_factory=list)
    rollout_step: int | None = None
    config: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The run's name, or its folder's if the summary has none."""
        return self.summary.get("name") or self.folder.resolve().name

    @property
    def state(self) -> str:
        """How the run ended: a state of summary.json, `DIED`, or "" where nothing is known."""
        state = str(self.summary.get("state") or "")
        return DIED if state == "running" and not living(self.summary) else state

    @property
    def stage(self) -> str:
        """What kind of run it is: train, gvm, rm, sft or dpo; a folder without a summary is taken for one of `dvpo train`."""
        stage = self.summary.get("stage")
        return stage if stage in STAGES else "gvm" if self.is_value_model else "train"

    @property
    def last_step(self) -> int:
        """The last step that is done. The summary of a run that has not ended may be behind metrics.jsonl."""
        said, logged = self.summary_number("steps"), max(self.steps, default=0)
        return int(logged if said is None or self.state in ("running", DIED) else said)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings of config.yaml."""
        return parse_config(self.config)

    @property
    def is_value_model(self) -> bool:
        """Whether this is a run of `dvpo gvm train`, which has no policy, no rollouts and no gold scores."""
        return any(name.startswith("gvm/") for name in self.names())

    @property
    def steps(self) -> list[int]:
        """Steps that have metrics."""
        return [row["step"] for row in self.metrics]

    def column(self, name: str) -> list[float | None]:
        """One metric over the steps; None if a step has no number for it."""
        return [_number(row.get(name)) for row in self.metrics]

    def names(self) -> list[str]:
        """Metrics with at least one number, in the order of their first appearance."""
        seen = {name: None for row in self.metrics for name, value in row.items() if _number(value) is not None}
        return [name for name in seen if name not in ("step", "time")]

    def summary_number(self, key: str) -> float | None:
        """A number of the summary by its dotted key; None if it is not there."""
        return _number(setting(self.summary, key))


def parse_config(text: str) -> dict[str, Any]:
    """The settings of a config.yaml, none where it is damaged."""
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return config if isinstance(config, dict) else {}


def setting(config: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key, None where it is not set."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def load_run(folder: str | Path) -> RunData:
    """Read a run folder.

    Raises:
        InputError: the folder is not there, or it has no file of a run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run folder")
    run = RunData(folder)
    run.summary = _read_summary(run)
    run.metrics = sorted(_read_rows(run, folder / "metrics.jsonl", check_step, appended=True), key=lambda row: row["step"])
    for step, path in _step_files(folder / "evaluation"):
        if rows := _read_rows(run, path, _check_evaluation):
            run.evaluations[step] = rows
    for step, path in reversed(_step_files(folder / "rollouts")):
        if rows := _read_rows(run, path, _check_rollout):
            run.rollouts, run.rollout_step = rows, step
            break
    if (folder / "config.yaml").is_file():
        run.config = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
    if not (run.summary or run.metrics or run.evaluations or run.rollouts or run.config or run.notes):
        raise InputError(f"{folder}: not a run folder; it has no summary.json, metrics.jsonl, evaluation/ or rollouts/")
    return run


def _number(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def _read_summary(run: RunData) -> dict[str, Any]:
    path = run.folder / "summary.json"
    if not path.is_file():
        return {}
    try:
        summary = json.loads(path.read_bytes())
        problem = None if isinstance(summary, dict) else f"expected a JSON object, found {type(summary).__name__}"
    except ValueError as error:
        problem = f"not valid JSON ({error})"
    if problem is None:
        return summary
    run.notes.append(f"{path}: {problem}; the summary is left out")
    return {}


def _read_rows(run: RunData, path: Path, check: Callable[[dict], str | None], *, appended: bool = False) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows, bad = read_json_lines(path, check, appended=appended)
    run.notes += [f"{line}; the line is left out" for line in bad]
    if not rows and not bad and not appended:
        run.notes.append(f"{path}: no rows; the file is left out")
    return rows


def _step_files(folder: Path) -> list[tuple[int, Path]]:
    """The step_*.jsonl files of a folder with their steps, ascending."""
    found = [(re.fullmatch(r"step_(\d+)\.jsonl", path.name), path) for path in folder.glob("step_*.jsonl")]
    return sorted((int(match[1]), path) for match, path in found if match)


def _check_evaluation(row: dict) -> str | None:
    for key in ("prompt", "response"):
        if not isinstance(row.get(key), str) and not (key == "prompt" and _is_dialogue(row.get(key))):
            return f"`{key}` is missing or not a text"
    for key in ("gold", "kl"):
        if row.get(key) is not None and _number(row[key]) is None:
            return f"`{key}` is not a number"
    return None


def _is_dialogue(content: Any) -> bool:
    known = isinstance(content, list) and all(isinstance(message, dict) for message in content)
    return known and all(isinstance(message.get(part), str) for message in content for part in ("role", "content"))


def _check_rollout(row: dict) -> str | None:
    if problem := _check_evaluation(row):
        return problem
    tokens = row.get("tokens")
    if not isinstance(tokens, list) or not tokens:
        return "`tokens` is missing or not a list of texts"
    lengths = {"values": len(tokens) + 1, **dict.fromkeys(("advantages", "log_probs", "reference_log_probs"), len(tokens))}
    if "values" not in row:  # a baseline without a critic has none
        del lengths["values"]
    for key, length in lengths.items():
        numbers = row.get(key)
        if not isinstance(numbers, list) or len(numbers) != length or any(_number(n) is None for n in numbers):
            return f"`{key}` is not a list of {counted(length, 'number')} for {counted(len(tokens), 'token')}"
    return None
