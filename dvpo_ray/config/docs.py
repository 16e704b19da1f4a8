"""docs/configuration.md, written from the schema: `python -m dvpo_ray.config.docs > docs/configuration.md`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator

from pydantic_core import PydanticUndefined

from dvpo_ray.config.keys import Key, known_keys
from dvpo_ray.config.schema import Config, Section

INTRODUCTION = """\
# Configuration

One YAML file describes a whole run; `cluster_configs/` holds ready ones. Every command takes the file and `key.sub=value` overrides:

```
dvpo train cluster_configs/local-cpu.yaml gvm.path=runs/gvm/final policy.learning_rate=1e-5 policy.lora.rank=8
```

- Values are YAML 1.2: `1e-5` is a number, `off` is text, `null` unsets, lists are `[a, b]`.
- An unknown key, a wrong type or impossible batch arithmetic ends the command with one line and exit status 2.
- `--dry-run` prints the resolved config with every default, the derived batch sizes, the placement and notes on what is missing, and starts nothing.
  What it prints is itself a config file.
- Relative paths are relative to the working directory.
- A section that is null by default (`lora`, `data.preferences`) comes into being with the first key set in it.

This page is generated from `dvpo_ray/config/schema.py` by `python -m dvpo_ray.config.docs`.
"""


def configuration_page() -> str:
    """The whole page, Markdown: one table per section in the order of the schema."""
    tables = [_table("Top level", inspect.getdoc(Config), "", Config)]
    tables += [_table(f"`{key.path}`", _purpose(key), f"{key.path}.", key.section) for key in known_keys().values() if key.section is not None]
    return "\n".join([INTRODUCTION, *tables])


def _purpose(key: Key) -> str:
    null = " Null by default." if key.optional else ""
    return f"{key.field.description or inspect.getdoc(key.section)}{null}"


def _table(title: str, purpose: str, prefix: str, section: type[Section]) -> str:
    rows = "\n".join(_rows(prefix, section))
    header = "| key | type | default | meaning |\n| --- | --- | --- | --- |\n"
    return f"## {title}\n\n{purpose}\n" + (f"\n{header}{rows}\n" if rows else "")


def _rows(prefix: str, section: type[Section]) -> Iterator[str]:
    for name in section.model_fields:
        key = known_keys()[prefix + name]
        if key.section is None:
            cells = (f"`{key.path}`", key.expected, _default(key), key.field.description)
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(key: Key) -> str:
    if key.field.default is PydanticUndefined:
        return "required"
    return f"`{json.dumps(key.field.default)}`" if not isinstance(key.field.default, str) else f"`{key.field.default}`"


if __name__ == "__main__":
    print(configuration_page(), end="")
