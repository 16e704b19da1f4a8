"""YAML and `key.sub=value` overrides to a checked `Config`. Every mistake is an `InputError` of one line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import yaml
from pydantic import ValidationError

from dvpo_ray.config.keys import Key, known_keys, nearest_keys
from dvpo_ray.config.schema import Config
from dvpo_ray.errors import InputError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, apply overrides in order, and check every key and value.

    Args:
        path: YAML file, UTF-8.
        overrides: `key.sub=value` each; the value is YAML, so that `null`, lists and `{rank: 8}` work. The last one wins.

    Raises:
        InputError: names the file or the override, the first mistake and what would be right, and how many more there are.
    """
    if not str(path):
        raise InputError("the CONFIG argument is empty; give a YAML file, for example cluster_configs/local-cpu.yaml")
    path = Path(path)
    return _resolve(_drop_empty_sections(_read_mapping(path), ""), path, overrides)


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """A config with more overrides on top.

    Raises:
        InputError: names the override; see `load_config`.
    """
    return _resolve(config.model_dump(mode="json"), Path("the config"), overrides) if overrides else config


def _resolve(tree: dict, path: Path, overrides: Sequence[str]) -> Config:
    """The config of a tree of settings and overrides; the path is for the errors."""
    problems = []
    applied: dict[str, str] = {}
    for text in overrides:
        problem = _apply_override(tree, text, applied)
        if problem:
            problems.append(f"override {_shortened(text, 120)}: {problem}")
    try:
        # JSON mode in strict form: `true` is no number and '3' is no count, while a list is fine for a tuple.
        config = Config.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        problems += [f"{_source(path, applied, key)}: {problem}" for key, problem in _explain(error, tree)]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InputError(problems[0] + more)
    return config


def dump_config(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


# ------------------------------------------------------------------------------------------------------- YAML


_TOO_DEEP = "nested too deeply; settings are mappings of at most four levels"


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


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+(_[0-9]+)*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    if len(text) > 1000:  # Python converts no more than 4300 digits
        raise yaml.constructor.ConstructorError(None, None, f"a whole number of {len(text)} digits", node.start_mark)
    return int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


_MAX_VALUES = 100_000
_MAX_BYTES = 10_000_000
"""A config file has some thousand; what has more is another file, or a device that never ends."""


def _read_mapping(path: Path) -> dict:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise InputError(f"{path}: more than {_MAX_BYTES // 10**6} MB, so this is no config file; give a YAML file of settings")
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text at byte {error.start}; save the file as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        tree = _as_json(yaml.load(text, _Loader))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: {_yaml_problem(error, text)}") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    except RecursionError:
        raise InputError(f"{path}: {_TOO_DEEP}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a mapping of settings at the top level, got {_shown(tree)}")
    return tree


def _yaml_problem(error: yaml.YAMLError, text: str) -> str:
    mark = getattr(error, "problem_mark", None)
    line = mark.line if mark else text.count("\n", 0, getattr(error, "position", 0))
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return f"not valid YAML at line {line + 1}: {' '.join(problem.split())}"


def _as_json(value):
    """The same value with text keys and without sharing, so that an override of one alias leaves the others alone.

    Raises:
        ValueError: an alias stands inside of what it refers to, or aliases of aliases make too much of it; names the key.
    """
    _refuse_endless(value, "", (), count())
    return json.loads(json.dumps(value, default=str))


def _refuse_endless(value, path: str, around: tuple, values: Iterator[int]) -> None:
    """Refuse a value that contains itself, or that has no end in practice.

    Args:
        around: the mappings and lists that it stands in.
        values: counts the values of the whole file, aliases written out.
    """
    if next(values) > _MAX_VALUES:
        raise ValueError(f"{path}: more than {_MAX_VALUES} values with its aliases written out; this is no config")
    if not isinstance(value, dict | list):
        return
    if any(value is outer for outer in around):
        raise ValueError(f"{path}: the alias stands inside of what it refers to, which has no end; write the value out")
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for name, part in parts:
        _refuse_endless(part, f"{path}.{name}" if path else str(name), (*around, value), values)


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


def _apply_override(tree: dict, text: str, applied: dict[str, str]) -> str | None:
    """Set one `key.sub=value` in the tree and record it; returns the problem in words, if there is one."""
    path, equals, value_text = text.partition("=")
    path = path.strip()
    if not equals or not path:
        return "expected key=value, for example policy.learning_rate=1e-5"
    if path not in known_keys():
        return _unknown(path)
    try:
        value = _as_json(yaml.load(value_text, _Loader))
    except (yaml.YAMLError, ValueError) as error:
        return f"the value is not valid YAML: {' '.join((getattr(error, 'problem', None) or str(error)).split())}"
    except RecursionError:
        return f"the value is {_TOO_DEEP}"
    *parents, name = path.split(".")
    for depth, parent in enumerate(parents, start=1):
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            return f"{'.'.join(parents[:depth])} is {_shown(tree)}; expected a mapping of settings"
    tree[name] = value
    applied[path] = text
    return None


def _source(path: Path, applied: dict[str, str], key: str) -> str:
    """Who set a key: the last override that wrote it or its section, else the file."""
    for overridden, text in reversed(applied.items()):
        if key == overridden or key.startswith(f"{overridden}."):
            return f"override {_shortened(text, 120)}"
    return str(path)


# ---------------------------------------------------------------------------------------------- explanations


def _explain(error: ValidationError, tree: dict) -> Iterator[tuple[str, str]]:
    """Pairs of a dotted key and its problem in words, one per key, in the order of the schema."""
    explained = set()
    for item in error.errors(include_url=False):
        path = ".".join(str(part) for part in item["loc"])
        key = _known_prefix(item["loc"])
        about = path if item["type"] == "extra_forbidden" or key is None else key.path
        if about not in explained:
            explained.add(about)
            yield about, _problem(item, path, key, tree)


def _known_prefix(loc: tuple) -> Key | None:
    """The key that pydantic's location lies in; locations go on into list items and members of a union."""
    keys = known_keys()
    for end in range(len(loc), 0, -1):
        key = keys.get(".".join(str(part) for part in loc[:end]))
        if key is not None:
            return key
    return None


def _problem(item: dict, path: str, key: Key | None, tree: dict) -> str:
    if item["type"] == "extra_forbidden":
        return _unknown(path)
    if item["type"] == "missing" and path == key.path:
        return _missing(key)
    if item["type"] == "value_error":
        return f"{key.path}: {item['ctx']['error']}" if key else str(item["ctx"]["error"])
    return f"{key.path} is {_shown(_lookup(tree, key.path))}; expected {key.expected}"


def _unknown(path: str) -> str:
    nearest = nearest_keys(path)
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else "docs/configuration.md lists all keys"
    return f"unknown key {path}; {hint}"


def _missing(key: Key) -> str:
    """A required setting, or the first required one of a section that isn't there."""
    while key.section is not None:
        key = next(known_keys()[f"{key.path}.{name}"] for name, field in key.section.model_fields.items() if field.is_required())
    return f"{key.path} is missing; expected {key.expected}: {key.field.description}"


def _lookup(tree: dict, path: str):
    for part in path.split("."):
        tree = tree[part]
    return tree


def _shown(value) -> str:
    """A YAML value as an error message shows it."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    text = json.dumps(value, default=str, ensure_ascii=False) if not isinstance(value, str) else f"'{value}'"
    return _shortened(" ".join(text.split()))


def _shortened(text: str, length: int = 60) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
