"""Rows of a data set, one at a time, each with the label that names it in messages.

Lines of a JSONL file are read and parsed here, because a parse error must name its line. Parquet files, folders and hub
names go through `datasets`, which keeps them in memory-mapped Arrow files; nothing here holds more than one row.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow

from dvpo_ray.config.inputs import is_local
from dvpo_ray.data.hub import NEITHER_HERE_NOR_CACHED, prepare_hub
from dvpo_ray.data.strict_json import JSONProblem, parse_json
from dvpo_ray.errors import InputError

JSONL_SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Row:
    """One row as read: its label, and either its columns or the reason why it could not be read."""

    where: str
    columns: dict = field(default_factory=dict)
    problem: str | None = None


@dataclass(frozen=True)
class NamedDataset:
    """A hub data set that is known by a short name; `splits` translates the usual split names to its own."""

    hub_name: str
    splits: dict[str, str]

    def own_split(self, split: str) -> str:
        """The set's own name of a split, a slice (`train[:1000]`) kept."""
        name, bracket, rows = split.partition("[")
        return self.splits.get(name, name) + bracket + rows


NAMED_DATASETS = {
    "ultrafeedback": NamedDataset("openbmb/UltraFeedback", {}),
    "ultrafeedback_binarized": NamedDataset("HuggingFaceH4/ultrafeedback_binarized", {"train": "train_prefs", "test": "test_prefs"}),
}


def has_splits(path: str) -> bool:
    """Whether the path names something that can have splits: a folder or a hub data set, not a single file."""
    return not Path(path).is_file()


def read_rows(path: str, split: str) -> Iterator[Row]:
    """Every row of a JSONL, JSON or Parquet file, a folder, a hub data set or a named data set.

    Args:
        path: what the user wrote in the config.
        split: split of a folder or a hub data set; a single file has none.

    Yields:
        Rows labelled `file.jsonl:LINE` (lines count from 1) or `name[row]` (rows count from 0). A line that is not UTF-8,
        not JSON or not an object is yielded with its `problem`, so that the caller decides whether to stop.

    Raises:
        InputError: nothing is there, it cannot be read, or its format is not one of these.
    """
    source = Path(path)
    if path in NAMED_DATASETS:
        return _read_hub(NAMED_DATASETS[path].hub_name, NAMED_DATASETS[path].own_split(split))
    if source.is_dir():
        return _read_folder(source, split)
    if source.is_file():
        return _read_file(source)
    if source.exists():
        raise InputError(f"{path}: a pipe or a device, which can be read only once; give a file")
    if is_local(path):
        raise InputError(f"{path}: no such file or folder")
    return _read_hub(path, split)


# -------------------------------------------------------------------------------------------------- single files


def _read_file(path: Path) -> Iterator[Row]:
    if path.suffix in JSONL_SUFFIXES:
        return _read_jsonl(path)
    if path.suffix == ".json":
        return _read_json(path)
    if path.suffix == ".parquet":
        return _read_datasets(str(path), "parquet", data_files=str(path), split="train")
    raise InputError(f"{path}: unknown format {path.suffix or '(no suffix)'}; use .jsonl, .json, .parquet, a folder or a hub name")


def _read_jsonl(path: Path) -> Iterator[Row]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield _parse_line(f"{path}:{number}", line)


def _parse_line(where: str, line: bytes) -> Row:
    try:
        return _as_row(where, parse_json(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return Row(where, problem=f"not UTF-8 at byte {error.start} of the line; save the file as UTF-8")
    except json.JSONDecodeError as error:
        return Row(where, problem=f"not valid JSON ({error.msg} at column {error.colno}); each line must be one JSON object")
    except JSONProblem as error:
        return Row(where, problem=str(error))


def _as_row(where: str, value: object) -> Row:
    if isinstance(value, dict):
        return Row(where, value)
    return Row(where, problem=f"a row must be a JSON object with named columns, got {type(value).__name__}")


def _read_json(path: Path) -> Iterator[Row]:
    try:
        value = parse_json(path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        hint = "; one object per line belongs in a .jsonl file" if error.msg == "Extra data" else ""
        raise InputError(f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno}){hint}") from error
    except JSONProblem as error:
        raise InputError(f"{path}: {error}") from error
    if not isinstance(value, list):
        raise InputError(f"{path}: must be a JSON list of rows, got {type(value).__name__}")
    return (_as_row(f"{path}[{index}]", row) for index, row in enumerate(value))


# ------------------------------------------------------------------------------- folders and hub names, by `datasets`


def _read_folder(path: Path, split: str) -> Iterator[Row]:
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _read_saved(path, split)
    files = [file for file in sorted(path.rglob("*")) if file.suffix in (*JSONL_SUFFIXES, ".json", ".parquet")]
    if not files:
        raise InputError(f"{path}: a folder without .jsonl, .json or .parquet files, and not one written by save_to_disk")
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: a pipe, a device or a folder by the name of a data file; take it out of {path}")
        _check_readable(file)
    return _read_datasets(str(path), str(path), split=split)


def _check_readable(file: Path) -> None:
    """Name the line of a file that `datasets` would refuse without naming it."""
    if file.suffix in JSONL_SUFFIXES:
        for row in _read_jsonl(file):
            if row.problem:
                raise InputError(f"{row.where}: {row.problem}")


def _read_saved(path: Path, split: str) -> Iterator[Row]:
    from datasets import DatasetDict, load_from_disk

    saved = load_from_disk(path)
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise InputError(f"{path}: no split {split!r}; it has {', '.join(saved)}")
        saved = saved[split]
    return _label(str(path), saved)


def _read_hub(name: str, split: str) -> Iterator[Row]:
    missing = "no such file or folder here, and the hub did not give it" if prepare_hub() else NEITHER_HERE_NOR_CACHED
    return _read_datasets(name, name, split=split, missing=missing)


def _read_datasets(label: str, path: str, *, missing: str = "could not be read", **options) -> Iterator[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        with _only_raising("datasets"):
            dataset = load_dataset(path, **options)
    except (DatasetsError, OSError, ValueError, RuntimeError, pyarrow.ArrowException) as error:
        raise InputError(f"{label}: {missing} ({_reason(error)})") from error
    return _label(label, dataset)


@contextmanager
def _only_raising(library: str) -> Iterator[None]:
    """Keep a library from logging the errors that it raises as well."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """First line of the error, or of its innermost cause where the error only says that something went wrong."""
    from datasets.exceptions import DatasetGenerationError

    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _label(label: str, dataset) -> Iterator[Row]:
    return (Row(f"{label}[{index}]", columns) for index, columns in enumerate(dataset))
