"""Prompt sets for policy optimisation and for its evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from dvpo_ray.config.schema import PromptData
from dvpo_ray.data.preferences import separate_prompt
from dvpo_ray.data.rows import BadRow, Content, Messages, checked_content, checked_prompt, content_text, required
from dvpo_ray.data.splitting import Sets, load_sets, prompt_key


@dataclass(frozen=True)
class Prompt:
    """A prompt to be answered.

    Attributes:
        content: text, or messages that end with the turn to be answered.
        where: the row's label, `file.jsonl:LINE` or `name[row]`.
    """

    content: Content
    where: str = ""

    @cached_property
    def key(self) -> str:
        """Equal for equal prompts; see `prompt_key`."""
        return prompt_key(self.content)

    @property
    def text(self) -> str:
        """The prompt as bare text, for a judge or a reader: message contents, each on a line of its own."""
        return content_text(self.content)


def load_prompts(data: PromptData, on_bad_row: Literal["error", "skip"]) -> Sets[Prompt]:
    """Read, check and split the prompts that the config names; a prompt that repeats is taken once.

    Raises:
        InputError: a missing, unreadable or empty source; a bad row, unless bad rows are skipped.
    """

    def distinct(_: str, prompts: list[Prompt]) -> list[Prompt]:
        first: dict[str, Prompt] = {}
        for prompt in prompts:
            first.setdefault(prompt.key, prompt)
        return list(first.values())

    return load_sets("data.prompts", data, on_bad_row, parse_prompt, distinct)


def parse_prompt(columns: Mapping, where: str) -> Prompt:
    """The prompt of a row: prompt-only, preference, `messages`, or `instruction` with an optional `input`.

    Raises:
        BadRow: the row has no prompt.
    """
    if columns.get("chosen") is not None and columns.get("rejected") is not None:
        return Prompt(separate_prompt(columns)[0], where)
    if columns.get("messages") is not None:
        return Prompt(_unanswered(checked_content(columns["messages"], "messages")), where)
    if columns.get("instruction") is not None:
        return Prompt(_instruction(columns), where)
    return Prompt(checked_prompt(required(columns, "prompt")), where)


def _unanswered(messages: Content) -> Messages:
    """A dialogue without its last answer."""
    if not isinstance(messages, list):
        raise BadRow("`messages` must be a list of messages")
    return checked_prompt(messages[:-1] if messages[-1]["role"] == "assistant" else messages, "messages")


def _instruction(columns: Mapping) -> str:
    instruction = checked_prompt(columns["instruction"], "instruction")
    extra = columns.get("input")
    if not extra:
        return instruction
    if not isinstance(extra, str) or not isinstance(instruction, str):
        raise BadRow("`instruction` and `input` must be text")
    return f"{instruction}\n\n{extra}"
