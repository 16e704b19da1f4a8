"""Held-out sets: split by prompt, never by pair, the same way wherever the prompt appears.

The side of a prompt depends only on the prompt and the fraction. So it stays the same for a new order of the rows, when rows are added
or skipped, and when prompts and preference pairs come from different files: with equal fractions, what is held out of one is never
trained on in the other.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from dvpo_ray.config.arithmetic import counted
from dvpo_ray.config.notes import foreign_heldout
from dvpo_ray.config.schema import SplitData
from dvpo_ray.data.reading import has_splits, read_rows
from dvpo_ray.data.rows import Content, count_note, parse_rows
from dvpo_ray.errors import InputError

Item = TypeVar("Item")
"""A preference pair or a prompt, with its `key`, which is equal for prompts that are the same to the split, and its label `where`."""


def prompt_key(prompt: Content) -> str:
    """SHA-256 of the normalised prompt, in hex: what counts as the same prompt for holding out, so that no near copy is on both sides.

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


def split_by_prompt(items: Sequence[Item], fraction: float, trained: Set[str] = frozenset()) -> tuple[list[Item], list[Item]]:
    """Items to train on and items held out, each in their order; all items of a prompt are on one side.

    About `fraction` of the distinct prompts is held out, and at least one of them.

    Args:
        trained: keys of prompts that were trained on before. Where no prompt is in the fraction, another one than these is held out, if
            there is one.

    Raises:
        InputError: there are fewer than two distinct prompts, or all of them fall on the held-out side.
    """
    keys = {item.key for item in items}
    if len(keys) < 2:
        raise InputError(f"{len(keys)} distinct prompt cannot be split into training and held-out prompts; give heldout_path")
    heldout = {key for key in keys if is_heldout(key, fraction)} or {min(keys - trained or keys)}
    if len(heldout) == len(keys):
        raise InputError(f"heldout_fraction {fraction} of {len(keys)} distinct prompts leaves none to train on; lower it")
    return [item for item in items if item.key not in heldout], [item for item in items if item.key in heldout]


@dataclass(frozen=True)
class Sets(Generic[Item]):
    """What a config section of data names.

    Attributes:
        train: items to train on, in the order of the data.
        heldout: items of other prompts.
        notes: what the user should know, one line each; every row that is left out is counted in one of them.
    """

    train: list[Item]
    heldout: list[Item]
    notes: list[str] = field(default_factory=list)


def load_sets(
    section: str,
    items: str,
    data: SplitData,
    on_bad_row: Literal["error", "skip"],
    parse: Callable[[Mapping, str], Item],
    choose: Callable[[str, list[Item]], tuple[list[Item], list[str]]],
) -> Sets[Item]:
    """Read, check and split what a config section names. The training items are cut to `limit`.

    Args:
        section: the section's key, for messages.
        items: what the items are called, in the plural.
        parse: makes an item from a row; see `parse_rows`.
        choose: the items to use of those of a path, and one line for each reason why others are left out.

    Raises:
        InputError: as in `parse_rows`; a held-out set that is the training set; a split of a single file.
    """
    notes = foreign_heldout(section, data)

    def load(path: str, split: str) -> list[Item]:
        parsed, of_rows = parse_rows(path, read_rows(path, split), parse, on_bad_row)
        chosen, of_choice = choose(path, parsed)
        notes.extend([*of_rows, *of_choice])
        return chosen

    def limited(train: list[Item]) -> list[Item]:
        over = [item.where for item in train[data.limit :]] if data.limit is not None else []
        notes.extend(count_note(f"{data.path}: left out", over, len(train), f"training {items}", f"{section}.limit is {data.limit}"))
        return train[: data.limit]

    if data.split != "train" and not has_splits(data.path):
        raise InputError(f"{section}.split is {data.split}, but {data.path} is a single file and has no splits; leave it out, or cut with limit")
    train = load(data.path, data.split)
    if data.holds_out_a_share:
        try:
            train, heldout = split_by_prompt(train, data.heldout_fraction)
        except InputError as error:
            raise InputError(f"{data.path}: {error}") from error
        return Sets(limited(train), heldout, notes)
    path, split = data.heldout_path or data.path, data.heldout_split or data.split
    if data.heldout_split is not None and not has_splits(path):
        raise InputError(f"{section}.heldout_split: {path} is a single file and has no splits; give {section}.heldout_path instead")
    if path == data.path and (split == data.split or not has_splits(path)):
        raise InputError(f"{section}: the held-out set is the training set; give another heldout_path or heldout_split, or leave both out")
    train, heldout = limited(train), load(path, split)
    notes.extend(_overlap_note(data.path, train, heldout))
    return Sets(train, heldout, notes)


def _overlap_note(name: str, train: Iterable[Item], heldout: Iterable[Item]) -> list[str]:
    """One line if prompts of the held-out set are in the training set too, else nothing."""
    heldout_keys = {item.key for item in heldout}
    shared = heldout_keys & {item.key for item in train}
    if not shared:
        return []
    are = "is a training prompt" if len(shared) == 1 else "are training prompts"
    return [f"{name}: {len(shared)} of {counted(len(heldout_keys), 'held-out prompt')} {are} too; held-out results are too good"]
