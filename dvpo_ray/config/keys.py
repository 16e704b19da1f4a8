"""Every dotted key of the config, what it accepts in words, and the nearest key to a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from dvpo_ray.config.schema import Config, Section


@dataclass(frozen=True)
class Key:
    """One setting, or one group of settings.

    Attributes:
        path: dotted, `policy.deepspeed.zero_stage`.
        field: pydantic's record of default, description and constraints.
        section: the group's model, or None for a single setting.
        optional: the key may be null.
    """

    path: str
    field: FieldInfo
    section: type[Section] | None
    optional: bool

    @property
    def expected(self) -> str:
        """What the key accepts, in words: "a whole number of at least 1"."""
        return _in_words(self.field.annotation, self.field.metadata)


@cache
def known_keys() -> dict[str, Key]:
    """All keys by dotted path, in the order of the schema; a section comes before its settings."""
    return {key.path: key for key in _walk(Config, "")}


_OTHER_NAMES = {"lr": "learning_rate"}
"""Last names of keys as other libraries call them."""


def nearest_keys(path: str) -> list[str]:
    """The known keys that an unknown dotted path may stand for.

    Those with the same last name (a setting in the wrong section), else the one that is spelt most similarly, or two that are equally.
    """
    parent, dot, leaf = path.rpartition(".")
    leaf = _OTHER_NAMES.get(leaf, leaf)
    path = f"{parent}{dot}{leaf}"
    same = [known for known in known_keys() if known.rpartition(".")[2] == leaf]
    if not parent and same:
        return same[:3]
    nearest = difflib.get_close_matches(path, same or known_keys(), n=2, cutoff=0 if same else 0.7)
    return [known for known in nearest if _similarity(known, path) == _similarity(nearest[0], path)]


def _similarity(known: str, path: str) -> float:
    return difflib.SequenceMatcher(None, known, path).ratio()


def _walk(model: type[Section], prefix: str) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        section, optional = _section_of(field.annotation)
        yield Key(prefix + name, field, section, optional)
        if section is not None:
            yield from _walk(section, f"{prefix}{name}.")


def _section_of(annotation) -> tuple[type[Section] | None, bool]:
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    sections = [member for member in members if isinstance(member, type) and issubclass(member, Section)]
    return (sections[0] if sections else None), NoneType in members


# -------------------------------------------------------------------------------------------- types in words

_SCALARS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _in_words(annotation, metadata: Sequence = ()) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _in_words(args[0], [bound for item in args[1:] for bound in getattr(item, "metadata", [item])])
    if origin in (Union, UnionType):
        members = sorted(args, key=lambda member: member is not NoneType)
        return " or ".join(_in_words(member, metadata) for member in members)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is list:
        return f"a list, each item {_in_words(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)}, each item {_in_words(args[0])}"
    if annotation is NoneType:
        return "null"
    if annotation in _SCALARS:
        return _SCALARS[annotation] + _bounds_in_words(metadata)
    return "a mapping of settings"


def _bounds_in_words(bounds: Sequence) -> str:
    words = []
    for bound in bounds:
        match bound:
            case Gt(gt=limit):
                words.append(f"above {limit:.12g}")
            case Ge(ge=limit):
                words.append(f"of at least {limit:.12g}")
            case Lt(lt=limit):
                words.append(f"below {limit:.12g}")
            case Le(le=limit):
                words.append(f"of at most {limit:.12g}")
            case MinLen():
                words.append("that is not empty")
        if getattr(bound, "pattern", None):
            words.append(f"matching `{bound.pattern}`")
    return f" {' and '.join(words)}" if words else ""
