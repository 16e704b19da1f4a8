"""YAML and `key.sub=value` overrides to a checked `Config`. Every mistake is an `InputError` of one line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import NamedTuple

import yaml
from pydantic import ValidationError

from dvpo_ray.config.keys import Key, known_keys, nearest_keys
from dvpo_ray.config.paths import in_home, or_nearest
from dvpo_ray.config.resuming import flat_settings
from dvpo_ray.config.schema import Config
from dvpo_ray.errors import InputError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, apply overrides in order, and check every key and value.

    Args:
        path: YAML file, UTF-8.
        overrides: `key.sub=value` each; the value is YAML, so that `null`, lists and `{rank: 8}` work. The last one wins. A mapping
            changes the settings that it names and leaves the others of its section.

    Raises:
        InputError: names the file or the override, the first mistake and what would be right, and how many more there are.
    """
    if not str(path):
        raise InputError("the CONFIG argument is empty; give a YAML file, for example cluster_configs/local-cpu.yaml")
    try:
        path = Path(in_home(str(path)))
    except ValueError as error:
        raise InputError(str(error)) from None
    return _resolve(_drop_empty_sections(_read_mapping(path), ""), path, overrides)


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """A config with more overrides on top.

    Raises:
        InputError: names the override; see `load_config`.
    """
    return _resolve(config.model_dump(mode="json"), Path("the config"), overrides) if overrides else config


def dump_config(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _resolve(tree: dict, path: Path, overrides: Sequence[str]) -> Config:
    """The config of a tree of settings and overrides; the path is for the errors."""
    applied: list[_Applied] = []
    for override in overrides:
        try:
            applied.append(_apply_override(tree, override))
        except ValueError as error:
            raise InputError(f"override {override}: {error}") from None
    try:
        # JSON mode in strict form: `true` is not a number and '3' is not a count, while a list is fine for a tuple.
        return Config.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        (key, problem), *others = _explain(error, tree)
        more = f" (and {len(others)} more)" if others else ""
        raise InputError(f"{_source(path, applied, key)}: {problem}{more}") from None


# ------------------------------------------------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2 and unique keys: `1e-5` is a number, `off` and `2024-01-01` are text."""

    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value} is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+(_[0-9]+)*",
    "float": r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?",
    "merge": r"<<",
}
for _name, _pattern in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), None)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))  # 010 is ten


def _parse_yaml(text: str):
    """The value of a YAML text, with text keys and no shared parts, so that an override of one alias leaves the others alone.

    Raises:
        ValueError: not YAML; the message names the line.
    """
    try:
        return json.loads(json.dumps(yaml.load(text, _Loader), default=str))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ValueError(f"not valid YAML{line}: {' '.join(problem.split())}") from None


def _read_mapping(path: Path) -> dict:
    try:
        tree = _parse_yaml(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file{or_nearest(path, ('.yaml', '.yml'))}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text at byte {error.start}; save the file as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a mapping of settings at the top level, got {_shown(tree)}")
    return tree


def _drop_empty_sections(tree: dict, prefix: str) -> dict:
    """`data:` with nothing under it means the section's defaults, unless the section may be null."""
    kept = {}
    for name, value in tree.items():
        key = known_keys().get(prefix + name)
        if value is None and key is not None and key.section is not None and not key.optional:
            continue
        kept[name] = _drop_empty_sections(value, f"{prefix}{name}.") if isinstance(value, dict) else value
    return kept


# -------------------------------------------------------------------------------------------------- overrides


class _Applied(NamedTuple):
    """An override as the user wrote it, its key, and the keys of that section that were there before and that it left alone."""

    text: str
    key: str
    kept: frozenset[str]


def _apply_override(tree: dict, text: str) -> _Applied:
    """Set one `key.sub=value` in the tree.

    Raises:
        ValueError: says what is wrong with it.
    """
    path, equals, value = text.partition("=")
    path = path.strip()
    if not equals or not path:
        raise ValueError("expected key=value, for example policy.learning_rate=1e-5")
    if path not in known_keys():
        raise ValueError(_unknown(path))
    *parents, name = path.split(".")
    for depth, parent in enumerate(parents, start=1):
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise ValueError(f"{'.'.join(parents[:depth])} is {_shown(tree)}; expected a mapping of settings")
    old, new, kept = tree.get(name), _parse_yaml(value), frozenset()
    if isinstance(old, dict) and isinstance(new, dict):
        kept = frozenset(flat_settings(old, f"{path}.").keys() - flat_settings(new, f"{path}.").keys())
        new = _merged(old, new)
    tree[name] = new
    return _Applied(text, path, kept)


def _merged(old: dict, new: dict) -> dict:
    """The settings of two mappings; the new ones win."""
    both = {name: _merged(old[name], value) for name, value in new.items() if isinstance(value, dict) and isinstance(old.get(name), dict)}
    return old | new | both


def _source(path: Path, applied: Sequence[_Applied], key: str) -> str:
    """What set a key: the last override that wrote it or its section, else the file."""
    overriding = (one.text for one in reversed(applied) if (key == one.key or key.startswith(f"{one.key}.")) and key not in one.kept)
    return next((f"override {text}" for text in overriding), str(path))


# ---------------------------------------------------------------------------------------------- explanations


def _explain(error: ValidationError, tree: dict) -> Iterator[tuple[str, str]]:
    """Pairs of a dotted key and its problem in words, one per key, in the order of the schema."""
    explained = set()
    for item in error.errors(include_url=False):
        path = ".".join(map(str, item["loc"]))
        key = _known_prefix(item["loc"])
        about = path if item["type"] == "extra_forbidden" or key is None else key.path
        if about not in explained:
            explained.add(about)
            yield about, _problem(item, path, key, tree)


def _known_prefix(loc: tuple) -> Key | None:
    """The key that pydantic's location lies in; locations go on into list items and members of a union."""
    prefixes = (".".join(map(str, loc[:end])) for end in range(len(loc), 0, -1))
    return next((known_keys()[prefix] for prefix in prefixes if prefix in known_keys()), None)


def _problem(item: dict, path: str, key: Key | None, tree: dict) -> str:
    if item["type"] == "extra_forbidden":
        return _unknown(path)
    if item["type"] == "missing" and path == key.path:
        return _missing(key)
    if item["type"] == "value_error":
        return f"{key.path}: {item['ctx']['error']}" if key else str(item["ctx"]["error"])
    return f"{key.path} is {_shown(reduce(getitem, key.path.split('.'), tree))}; expected {key.expected}"


def _unknown(path: str) -> str:
    nearest = nearest_keys(path)
    hint = f"did you mean {' or '.join(filter(None, [', '.join(nearest[:-1]), nearest[-1]]))}?" if nearest else "docs/configuration.md lists all keys"
    return f"unknown key {path}; {hint}"


def _missing(key: Key) -> str:
    """A required setting, or the first required one of a section that isn't there."""
    while key.section is not None:
        key = next(known_keys()[f"{key.path}.{name}"] for name, field in key.section.model_fields.items() if field.is_required())
    return f"{key.path} is missing; expected {key.expected}: {key.field.description}"


def _shown(value) -> str:
    """A YAML value as an error message shows it."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    text = f"'{' '.join(value.split())}'" if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
