"""Checks of row contents: text, messages, scores; and what happens to a bad row."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, TypeVar

from dvpo_ray.data.reading import Row
from dvpo_ray.errors import InputError

Messages = list[dict[str, str]]
Content = str | Messages
T = TypeVar("T")

_LABEL = re.compile(r"(.*)[:\[](\d+)\]?")
_OTHER_TEXT = ("reasoning_content", "reasoning", "thinking", "tool_calls", "function_call")
"""Keys under which a message holds text beside its `content`. Templates differ in what they make of it, so none of it is read."""


class BadRow(ValueError):
    """A row that cannot be used; the message says what is wrong and what would be right."""


class NothingSaid(ValueError):
    """A row that is as it should be, but has nothing to learn from; the message says why."""


def count_note(start: str, labels: Sequence[str], total: int, rows: str, why: str) -> list[str]:
    """One line on rows that were treated in one way, for the user: how many of how many, why, and the first; nothing without rows.

    Args:
        start: what was done, after the source of the rows if need be.
        labels: of the rows.
        total: how many rows there were.
        rows: what the rows are called, in the plural.
        why: the reason, with the setting behind it.
    """
    return [f"{start} {len(labels)} of {total} {rows}: {why}; the first is {first_of(labels)}"] if labels else []


def first_of(labels: Sequence[str]) -> str:
    """The first of these rows in the file of `labels[0]`: held-out rows come after the others, whatever their place in the file."""
    first, *others = (_LABEL.fullmatch(label) for label in labels)
    if first is None:
        return labels[0]
    return min([first, *(one for one in others if one is not None and one[1] == first[1])], key=lambda label: int(label[2]))[0]


def parse_rows(path: str, rows: Iterable[Row], parse: Callable[[Mapping, str], T], on_bad_row: Literal["error", "skip"]) -> tuple[list[T], list[str]]:
    """Parse every row of a source.

    Args:
        path: name of the source in messages.
        parse: makes an item from a row's columns and its label; raises `BadRow`, or `NothingSaid`.
        on_bad_row: stop at the first bad row, or go on and count it.

    Returns:
        The items in order, and one line for each reason why rows are left out; of bad rows, one for all and one for each fault.

    Raises:
        InputError: a bad row when `on_bad_row` is "error"; no rows at all; only bad rows.
    """
    items: list[T] = []
    bad: dict[str, list[str]] = {}
    left_out: dict[str, list[str]] = {}
    for row in rows:
        try:
            if row.problem:
                raise BadRow(row.problem)
            items.append(parse(row.columns, row.where))
        except NothingSaid as error:
            left_out.setdefault(str(error), []).append(row.where)
        except BadRow as error:
            if on_bad_row == "error":
                raise InputError(f"{row.where}: {error}; correct the row, or leave bad rows out with data.on_bad_row=skip") from error
            bad.setdefault(_fault(str(error)), []).append(f"{row.where}: {error}")
    total = len(items) + sum(map(len, [*bad.values(), *left_out.values()]))
    if not total:
        raise InputError(f"{path}: no rows; the data set is empty")
    if not items and not left_out:
        rows = "the only row is bad:" if total == 1 else f"all {total} rows are bad; the first is"
        raise InputError(f"{path}: {rows} {next(iter(bad.values()))[0]}")
    return items, _bad_notes(path, list(bad.values()), total) + [
        line for why, labels in left_out.items() for line in count_note(f"{path}: left out", labels, total, "rows", why)
    ]


def _bad_notes(path: str, faults: Sequence[Sequence[str]], total: int) -> list[str]:
    """How many rows are bad, and the first of each fault; the rows of a fault are given by label and message."""
    why = "bad (data.on_bad_row skip)"
    if len(faults) < 2:
        return [line for rows in faults for line in count_note(f"{path}: left out", rows, total, "rows", why)]
    firsts = [rows[0] + (f" ({len(rows)} such rows)" if len(rows) > 1 else "") for rows in faults]
    return [f"{path}: left out {sum(map(len, faults))} of {total} rows: {why}, with {len(faults)} faults", *firsts]


def _fault(message: str) -> str:
    """What bad rows with one fault have in common: the message without its numbers, quotations, details and advice."""
    return re.sub(r"'.*?'|\(.*?\)|-?\d+(\.\d+)?(e[-+]?\d+)?", "", message.partition(";")[0])


def required(columns: Mapping, name: str) -> object:
    """The value of a column that must be there and not be null."""
    if columns.get(name) is None:
        there = ", ".join(str(column) for column, value in columns.items() if value is not None)
        raise BadRow(f"no `{name}`; the row has {there or 'no columns'}")
    return columns[name]


def first_present(columns: Mapping, *names: str) -> object:
    """The value of the first of these columns that is there and not null, else None."""
    return next((columns[name] for name in names if columns.get(name) is not None), None)


def checked_content(value: object, name: str) -> Content:
    """Text that is not blank, or a list of messages reduced to their `role` and `content`."""
    if isinstance(value, str):
        if not value.strip():
            raise BadRow(f"`{name}` is empty text")
        return _checked_text(value, name)
    if isinstance(value, list):
        return _checked_messages(value, name)
    raise BadRow(f"`{name}` must be text or a list of messages, got {type(value).__name__}")


def _checked_messages(value: list, name: str) -> Messages:
    if not value:
        raise BadRow(f"`{name}` is an empty list; it needs at least one message")
    for index, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise BadRow(f"`{name}[{index}]` must be a message with `role` and `content`, got {type(message).__name__}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise BadRow(f"`{name}[{index}]` needs `{key}` as text, got {type(message.get(key)).__name__}")
        _checked_text(message["content"], f"{name}[{index}]")
        for key in _OTHER_TEXT:
            if message.get(key):
                raise BadRow(f"`{name}[{index}]` has `{key}` beside `content`, and only `content` is read; write it there, or remove it")
    if not value[-1]["content"].strip():
        raise BadRow(f"`{name}` ends with a message whose content is empty")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _checked_text(text: str, name: str) -> str:
    """The text, unless it holds half of a surrogate pair: JSON can escape one, and no tokenizer takes it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"`{name}` has an unpaired surrogate at character {error.start}; it is not valid Unicode text") from error
    return text


def checked_prompt(value: object, name: str = "prompt") -> Content:
    """A prompt as text, or as messages that leave the next turn to the assistant."""
    prompt = checked_content(value, name)
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise BadRow(f"`{name}` ends with an assistant message; it must end with the turn to be answered")
    return prompt


def checked_response(value: object, name: str) -> Content:
    """A response as text, or as exactly one assistant message."""
    response = checked_content(value, name)
    if isinstance(response, list) and [message["role"] for message in response] != ["assistant"]:
        roles = ", ".join(message["role"] for message in response)
        raise BadRow(f"`{name}` must be one assistant message after the prompt, got {len(response)} ({roles})")
    return response


def checked_score(value: object, name: str) -> float | None:
    """A finite number; None for null."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRow(f"`{name}` must be a number, got {type(value).__name__} {value!r}")
    if not math.isfinite(value):
        raise BadRow(f"`{name}` must be a finite number, got {value}")
    return float(value)


def checked_flag(value: object, name: str) -> bool:
    """True or false; false for null."""
    if value is not None and not isinstance(value, bool):
        raise BadRow(f"`{name}` must be true or false, got {type(value).__name__} {value!r}")
    return bool(value)


def checked_name(value: object, name: str) -> str | None:
    """Text; None for null."""
    if value is not None and not isinstance(value, str):
        raise BadRow(f"`{name}` must be text, got {type(value).__name__}")
    return value


def content_text(content: Content) -> str:
    """The bare text. Messages give their contents, each on a line of its own, without roles."""
    return content if isinstance(content, str) else "\n".join(message["content"] for message in content)
