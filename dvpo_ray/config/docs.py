"""docs/configuration.md, written from the schema: `python -m dvpo_ray.config.docs > docs/configuration.md`."""

from __future__ import annotations

import inspect
import json

from dvpo_ray.config.keys import Key, known_keys
from dvpo_ray.config.schema import Config

INTRODUCTION = """\
# Configuration

One YAML file describes a whole run; `cluster_configs/` holds some. Every command takes the file and `key.sub=value` overrides:

```
dvpo train cluster_configs/local-cpu.yaml gvm.path=runs/gvm/final policy.learning_rate=1e-5 policy.lora.rank=8
```

- Values are YAML 1.2: `1e-5` is a number, `off` is text, `null` unsets, lists are `[a, b]`.
- A mapping changes the settings that it names and leaves the rest: `policy={learning_rate: 1e-4, lora: {rank: 8}}` is
  `policy.learning_rate=1e-4 policy.lora.rank=8`.
- An unknown key, a wrong type or impossible batch arithmetic ends the command with one line and exit status 2.
- `--dry-run` starts nothing. It prints the resolved config with every default, the derived batch sizes, the placement,
  and notes on what is missing. The output is itself a config file.
- Relative paths are relative to the working directory. `~` at the start of a path, or of a path in an option, is the home folder.
- A section that is null by default (`lora`, `data.preferences`) exists as soon as one of its keys is set.

`python -m dvpo_ray.config.docs` writes this page from `dvpo_ray/config/schema.py`.
"""


def configuration_page() -> str:
    """The whole page, Markdown: one table per section, in the order of the schema."""
    tables = [_table("Top level", inspect.getdoc(Config), "")]
    for key in known_keys().values():
        if key.section is not None:
            purpose = key.field.description or inspect.getdoc(key.section)
            tables.append(_table(f"`{key.path}`", purpose + (" Null by default." if key.optional else ""), key.path))
    return "\n".join([INTRODUCTION, *tables])


def _table(title: str, purpose: str, section: str) -> str:
    rows = [_row(key) for key in known_keys().values() if key.section is None and key.path.rpartition(".")[0] == section]
    header = ["", "| key | type | default | meaning |", "| --- | --- | --- | --- |"] if rows else []
    return "\n".join([f"## {title}", "", purpose, *header, *rows, ""])


def _row(key: Key) -> str:
    default = key.field.default
    shown = "required" if key.field.is_required() else f"`{default}`" if isinstance(default, str) else f"`{json.dumps(default)}`"
    cells = (f"`{key.path}`", key.expected, shown, key.field.description)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    print(configuration_page(), end="")
