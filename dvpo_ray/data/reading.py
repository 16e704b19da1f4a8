"""Rows of a data set, one at a time, each with the label that names it in messages.

JSONL files are read and parsed here, because a parse error must name its line. Parquet files, folders and hub names go through
`datasets`, which keeps them in memory-mapped Arrow files. Except for a `.json` list, no more than one row is held here.
"""

from __future__ import annotations

import codecs
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import pyarrow

from dvpo_ray.config.inputs import DATA_SUFFIXES, NAMED_DATA, from_csv, no_data, or_with_suffix
from dvpo_ray.data.hub import NEITHER_HERE_NOR_CACHED, prepare_hub, unwritable_cache
from dvpo_ray.errors import InputError

JSONL_SUFFIXES = (".jsonl", ".ndjson")
_COLUMNS = {"prompt", "chosen", "rejected", "messages", "instruction", "completion", "text"}
"""Names that only the first line of a table can have without quotes and braces around it."""
_ABOUT_DATA = ("dataset_info.json", "dataset_infos.json", "config.json")
"""Files beside the data of a hub's folder that hold no rows."""


@dataclass(frozen=True)
class Row:
    """One row as read: its label, and either its columns or the reason why it could not be read."""

    where: str
    columns: dict = field(default_factory=dict)
    problem: str | None = None


def has_splits(path: str) -> bool:
    """Whether the path can have splits: a folder or a hub data set can, a single file cannot."""
    return not Path(path).is_file()


def read_rows(path: str, split: str) -> Iterator[Row]:
    """Every row of a JSONL, JSON or Parquet file, a folder, a hub data set or a named data set.

    Args:
        path: as the user wrote it in the config.
        split: split of a folder or a hub data set; a single file has none.

    Yields:
        Rows labelled `file.jsonl:LINE` (lines count from 1) or `name[row]` (rows count from 0). A line that is not UTF-8,
        not JSON or not an object is yielded with its `problem`, so that the caller decides whether to stop; so is a file of a
        folder whose rows are in no split.

    Raises:
        InputError: nothing is there, it cannot be read, or its format is not one of these.
    """
    source = Path(path)
    if path == "ultrafeedback_binarized":
        split = re.sub(r"^(train|test)(?=\[|$)", r"\1_prefs", split)
    if path in NAMED_DATA:
        return _read_hub(NAMED_DATA[path], split)
    problem = no_data(path)
    if problem is not None:
        raise InputError(problem)
    if source.is_dir():
        return _read_folder(source, split)
    return _read_file(source) if source.exists() else _read_hub(path, split)


# -------------------------------------------------------------------------------------------------- single files


def _read_file(path: Path) -> Iterator[Row]:
    if path.suffix in JSONL_SUFFIXES:
        return _read_jsonl(path)
    if path.suffix == ".json":
        return _read_json(path)
    return _read_datasets(str(path), "parquet", data_files=str(path), split="train")


def _read_jsonl(path: Path) -> Iterator[Row]:
    with open(path, "rb") as lines:
        other_format = _other_format(path, lines)
        if other_format is not None:
            raise InputError(other_format)
        lines.seek(0)
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path}:{number}"
                try:
                    row = _as_row(where, _parse_json(line, "each line must be one JSON object"))
                except ValueError as error:
                    row = Row(where, problem=str(error))
                yield row


def _other_format(path: Path, lines: BinaryIO) -> str | None:
    """What a file is whose first line shows that it holds no objects, one on each line; None where it may."""
    first = next((line for line in lines if line.strip()), b"")
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in first[:4]:
        return f"{path}: is UTF-16; save it as UTF-8"
    text = first.decode("utf-8-sig", errors="replace").strip()
    if text.startswith("[") and (not _is_json(text) or not any(line.strip() for line in lines)):
        return f"{path}: is one JSON list; name it {path.with_suffix('.json')}"
    fields = [field.strip(' "') for field in re.split(r"[,;\t]", text)]
    if len(fields) > 1 and _COLUMNS.intersection(fields) and not text.startswith(("{", "[")):
        return f"{path}: looks like CSV, with the columns {', '.join(fields)}; {from_csv(path)}"
    return None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _read_json(path: Path) -> Iterator[Row]:
    try:
        value = _parse_json(path.read_bytes(), "it must be one list of rows; one object per line belongs in a .jsonl file")
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    if not isinstance(value, list):
        raise InputError(f"{path}: must be a JSON list of rows, got {type(value).__name__}")
    return (_as_row(f"{path}[{index}]", row) for index, row in enumerate(value))


def _parse_json(content: bytes, advice: str) -> object:
    """The value of a JSON text.

    Raises:
        ValueError: not UTF-8, not JSON (with the advice), or a key is there twice; says where.
    """
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_with_unique_keys)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        problem = f"{error.doc[error.pos]!r} after the end of the value" if error.msg == "Extra data" else error.msg
        raise ValueError(f"not valid JSON ({problem} at {line}column {error.colno}); {advice}") from error


def _with_unique_keys(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    unique: dict[str, object] = {}
    for key, value in pairs:
        if key in unique:
            raise ValueError(f"the key `{key}` is there twice; keep one of them")
        unique[key] = value
    return unique


def _as_row(where: str, value: object) -> Row:
    if isinstance(value, dict):
        return Row(where, value)
    return Row(where, problem=f"a row must be a JSON object with named columns, got {type(value).__name__}")


# ------------------------------------------------------------------------------- folders and hub names, by `datasets`


def _read_folder(path: Path, split: str) -> Iterator[Row]:
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _read_saved(path, split)
    files = [file for file in sorted(path.rglob("*")) if file.suffix in DATA_SUFFIXES and file.name not in _ABOUT_DATA]
    if not files:
        raise InputError(f"{path}: a folder without .jsonl, .json or .parquet files, and not one written by save_to_disk")
    for file in files:  # `datasets` would refuse a bad line without naming it
        for row in _read_jsonl(file) if file.suffix in JSONL_SUFFIXES else ():
            if row.problem:
                raise InputError(f"{row.where}: {row.problem}")
    rows = _read_datasets(str(path), str(path), split=split)
    return chain(_unread(path, files), rows)


def _unread(path: Path, files: list[Path]) -> Iterator[Row]:
    """The files of a folder that `datasets` passes over: it reads files of one format, and all of them say their split or none does."""
    from datasets import load_dataset_builder

    splits = load_dataset_builder(str(path)).config.data_files or {}
    read = {Path(file).resolve() for names in splits.values() for file in names}
    for file in files:
        if file.resolve() not in read:
            problem = "the rows of this file are in no split: its name says none, or its format is not that of the other files"
            yield Row(str(file), problem=f"{problem}; rename or convert it, or move it away")


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
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it also logs the errors that it raises
    try:
        dataset = load_dataset(path, **options)
    except (DatasetsError, OSError, ValueError, RuntimeError, pyarrow.ArrowException) as error:
        cause: BaseException = error
        while isinstance(cause, DatasetGenerationError) and cause.__cause__ is not None:
            cause = cause.__cause__  # the error itself says only that something went wrong
        reason = str(cause).strip().splitlines() or [type(cause).__name__]
        unwritable = unwritable_cache() if isinstance(cause, OSError) else None
        raise InputError(f"{label}: {unwritable or f'{missing} ({reason[0]})'}{or_with_suffix(path)}") from error
    return _label(label, dataset)


def _label(label: str, dataset) -> Iterator[Row]:
    return (Row(f"{label}[{index}]", columns) for index, columns in enumerate(dataset))
