"""Prompt sets for policy optimisation and for its evaluation."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from dvpo_ray.config.schema import PromptData
from dvpo_ray.data.preferences import separate_prompt
from dvpo_ray.data.rows import BadRow, Content, Messages, checked_content, checked_prompt, content_text, count_note, required
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
        """Equal for prompts that are held out together; see `prompt_key`."""
        return prompt_key(self.content)

    @property
    def text(self) -> str:
        """The prompt as bare text, for a judge or a reader: message contents, each on a line of its own."""
        return content_text(self.content)


def ids_key(token_ids: Sequence[int] | np.ndarray) -> bytes:
    """A short key for the token ids of a prompt."""
    return hashlib.blake2b(np.asarray(token_ids, dtype=np.int64).tobytes(), digest_size=16).digest()


def load_prompts(data: PromptData, on_bad_row: Literal["error", "skip"]) -> Sets[Prompt]:
    """Read, check and split the prompts that the config names.

    Only an exact repeat is left out: the same text, or messages of the same roles and texts. Prompts that differ in letter case or
    white space stay, on the same side of the split.

    Raises:
        InputError: a missing, unreadable or empty source; a bad row, unless bad rows are skipped.
    """

    def distinct(path: str, prompts: list[Prompt]) -> tuple[list[Prompt], list[str]]:
        first: dict[str, Prompt] = {}
        for prompt in prompts:
            first.setdefault(json.dumps(prompt.content), prompt)
        repeats = [prompt.where for prompt in prompts if first[json.dumps(prompt.content)] is not prompt]
        return list(first.values()), count_note(f"{path}: left out", repeats, len(prompts), "prompts", "exact repeats of an earlier one")

    return load_sets("data.prompts", "prompts", data, on_bad_row, parse_prompt, distinct)


def sample_prompts(prompts: Sequence[tuple[Prompt, list[int]]], count: int, seed: int) -> tuple[list[tuple[Prompt, list[int]]], list[str]]:
    """At most `count` held-out prompts with their ids, drawn by the seed, and a line if others are left out."""
    if len(prompts) <= count:
        return list(prompts), []
    chosen = random.Random(seed).sample(range(len(prompts)), count)
    others = [prompts[i][0].where for i in sorted(set(range(len(prompts))) - set(chosen))]
    why = f"evaluations use {count} of them (evaluation.prompts)"
    return [prompts[i] for i in chosen], count_note("left out", others, len(prompts), "held-out prompts", why)


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
