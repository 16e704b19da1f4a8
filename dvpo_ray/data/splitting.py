"""Held-out sets: split by prompt, never by pair, the same way wherever the prompt appears.

The side a prompt falls on depends on nothing but the prompt and the fraction. So it survives a new order of the rows, rows
added or skipped, and a prompt set read from another file than the preference pairs: with equal fractions, what is held out
of one is never trained on in the other.
"""

from __future__ import annotations

import hashlib
import json
import logging
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from dvpo_ray.config.schema import PreferenceData, PromptData
from dvpo_ray.data.reading import has_splits
from dvpo_ray.data.rows import Content
from dvpo_ray.errors import InputError

logger = logging.getLogger(__name__)


class HasPrompt(Protocol):
    """Anything with a `key` that is equal for equal prompts."""

    @property
    def key(self) -> str: ...


Item = TypeVar("Item", bound=HasPrompt)


def prompt_key(prompt: Content) -> str:
    """SHA-256 of the normalised prompt, in hex.

    Equal for prompts that differ only in letter case, white space or Unicode composition, and for a text and the same text
    as a single user message.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    turns = [(message["role"], _normalised(message["content"])) for message in messages]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def is_heldout(key: str, fraction: float) -> bool:
    """Whether the prompt with this key belongs to the held-out `fraction`; a larger fraction holds out the same and more."""
    return int(key[:16], 16) / 16**16 < fraction


def split_by_prompt(items: Sequence[Item], fraction: float) -> tuple[list[Item], list[Item]]:
    """Items to train on and items held out, each in their order; all items of a prompt are on one side.

    About `fraction` of the distinct prompts is held out, and at least one of them.

    Raises:
        InputError: there are fewer than two distinct prompts, or all of them fall on the held-out side.
    """
    keys = {item.key for item in items}
    if len(keys) < 2:
        raise InputError(f"{len(keys)} distinct prompt cannot be split into training and held-out prompts; give heldout_path")
    heldout = {key for key in keys if is_heldout(key, fraction)} or {min(keys)}
    if len(heldout) == len(keys):
        raise InputError(f"heldout_fraction {fraction} of {len(keys)} distinct prompts leaves none to train on; lower it")
    return [item for item in items if item.key not in heldout], [item for item in items if item.key in heldout]


@dataclass(frozen=True)
class Split(Generic[Item]):
    """Training and held-out items, and what the user should know of them."""

    train: list[Item]
    heldout: list[Item]
    warnings: list[str] = field(default_factory=list)


def load_split(section: str, data: PreferenceData | PromptData, load: Callable[[str, str], list[Item]]) -> Split[Item]:
    """The training and the held-out items that a config section asks for, the training items cut to `limit`.

    Args:
        section: the section's key, for messages.
        load: reads the items of a path and a split.

    Raises:
        InputError: what `load` raises; a held-out set that is the training set; a split asked of a single file.
    """
    if data.split != "train" and not has_splits(data.path):
        raise InputError(f"{section}.split is {data.split}, but {data.path} is a single file and has no splits; leave it out, or cut with limit")
    train = load(data.path, data.split)
    warnings = []
    if data.heldout_path is None and data.heldout_split is None:
        try:
            train, heldout = split_by_prompt(train, data.heldout_fraction)
        except InputError as error:
            raise InputError(f"{data.path}: {error}") from error
    else:
        heldout = load(*_heldout_source(section, data))
        warnings = overlap_warning(data.path, train, heldout)
    return Split(train[: data.limit], heldout, warnings)


def _heldout_source(section: str, data: PreferenceData | PromptData) -> tuple[str, str]:
    path, split = data.heldout_path or data.path, data.heldout_split or data.split
    if data.heldout_split is not None and not has_splits(path):
        raise InputError(f"{section}.heldout_split: {path} is a single file and has no splits; give {section}.heldout_path instead")
    if path == data.path and (split == data.split or not has_splits(path)):
        raise InputError(f"{section}: the held-out set is the training set; give another heldout_path or heldout_split, or leave both out")
    return path, split


def overlap_warning(name: str, train: Iterable[HasPrompt], heldout: Iterable[HasPrompt]) -> list[str]:
    """One line if prompts of the held-out set are in the training set too, else nothing; also logged."""
    heldout_keys = {item.key for item in heldout}
    shared = heldout_keys & {item.key for item in train}
    if not shared:
        return []
    warning = f"{name}: {len(shared)} of {len(heldout_keys)} held-out prompts are training prompts too; held-out numbers flatter"
    logger.warning(warning)
    return [warning]
