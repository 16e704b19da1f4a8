"""Answers to learn in supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dvpo_ray.data.prompts import parse_prompt
from dvpo_ray.data.reading import read_rows
from dvpo_ray.data.rows import BadRow, Content, checked_content, checked_prompt, checked_response, count_note, parse_rows, required


@dataclass(frozen=True)
class Answer:
    """A prompt and the answer to learn. A prompt of None makes the answer a text to learn as a whole; an empty one leaves it out."""

    prompt: Content | None
    answer: Content
    where: str


def load_answers(path: str, on_bad_row: Literal["error", "skip"]) -> tuple[list[Answer], list[str]]:
    """Every answer of a file or hub set, in TRL's SFT layouts (`text`; `prompt`, `completion`; `messages`) or Alpaca's.

    Returns:
        The answers, and one line for each reason why rows or answers are left out.

    Raises:
        InputError: a missing, unreadable or empty source; a bad row, unless bad rows are skipped.
    """
    rows, notes = parse_rows(path, read_rows(path, "train"), parse_answers, on_bad_row)
    answers = [answer for row in rows for answer in row]
    first = [answer.where for answer in answers if answer.prompt == []]
    notes += count_note(f"{path}: left out", first, len(answers), "answers", "they begin their dialogue, so they answer nothing")
    return [answer for answer in answers if answer.prompt != []], notes


def parse_answers(columns: Mapping, where: str) -> list[Answer]:
    """The answers of one row: one, or in a dialogue one for each turn of the assistant.

    Raises:
        BadRow: no answer, or an unknown layout.
    """
    if columns.get("messages") is not None:
        return _dialogue(columns["messages"], where)
    if columns.get("instruction") is not None:
        return [Answer(parse_prompt(columns, where).content, checked_response(required(columns, "output"), "output"), where)]
    if columns.get("prompt") is not None:
        return [Answer(checked_prompt(columns["prompt"]), checked_response(required(columns, "completion"), "completion"), where)]
    if columns.get("text") is not None:
        return [Answer(None, _text(columns["text"]), where)]
    raise BadRow(
        f"needs `messages`, `prompt` and `completion`, `instruction` and `output`, or `text`; the row has {', '.join(columns) or 'no columns'}"
    )


def _dialogue(value: object, where: str) -> list[Answer]:
    messages = checked_content(value, "messages")
    if not isinstance(messages, list):
        raise BadRow("`messages` must be a list of messages")
    answers = [Answer(messages[:turn], [message], where) for turn, message in enumerate(messages) if message["role"] == "assistant"]
    if not any(answer.prompt for answer in answers):
        raise BadRow("`messages` has no assistant message after another message")
    return answers


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadRow("`text` must be a text and not empty")
    return str(checked_content(value, "text"))
