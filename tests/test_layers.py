"""The layers of docs/architecture.md: a package imports only what stands below it, and no module imports itself through others.

Every import counts: at the top of a module, inside a function, and for type checkers alone.
"""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dvpo_ray"

LAYERS = (
    "__main__",
    "cli",
    "commands",
    "experiments",
    "bench",
    "quickstart",
    "training",
    "rollouts",
    "actors",
    "sync",
    "runtime",
    "planning",
    "refresh",
    "monitoring",
    "health",
    "evaluation",
    "gvm",
    "policy",
    "models",
    "data",
    "batch",
    "config",
    "files",
    "errors",
)
"""From the top to the bottom; a name is a package or a module of `dvpo_ray`."""


def name_of(file: Path, package: Path) -> str:
    parts = file.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(package: Path) -> dict[str, set[str]]:
    """What each module of a package imports of the same package, by dotted names."""
    modules = {name_of(file, package): file for file in sorted(package.rglob("*.py"))}
    found: dict[str, set[str]] = {}
    for name, file in modules.items():
        found[name] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                # `from package import module` imports the module, `from module import name` the module that has the name
                targets = [f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in modules else node.module for alias in node.names]
            elif isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                assert not (isinstance(node, ast.ImportFrom) and node.level), f"{file}: a relative import"
                continue
            found[name] |= {target for target in targets if target.split(".")[0] == package.name}
    return found


def layer_of(module: str) -> str | None:
    """None for the package itself, which holds nothing but its version."""
    return module.split(".")[1] if "." in module else None


def upward(found: dict[str, set[str]]) -> list[str]:
    """Imports of what does not stand below the importer's layer."""
    return [
        f"{module} imports {target}"
        for module, targets in found.items()
        for target in sorted(targets)
        if None not in (layer_of(module), layer_of(target))
        and layer_of(module) != layer_of(target)
        and LAYERS.index(layer_of(target)) < LAYERS.index(layer_of(module))
    ]


def check_cycles(found: dict[str, set[str]]) -> None:
    TopologicalSorter(found).prepare()


def test_every_package_has_its_layer():
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()} - {"__init__"}
    assert there == set(LAYERS)


def test_no_import_points_up():
    assert upward(imports(PACKAGE)) == []


def test_no_module_imports_itself_through_others():
    check_cycles(imports(PACKAGE))


def test_the_docs_name_the_layers_in_this_order():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("## Layers")[2].partition("\n## ")[0]
    rows = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in table.splitlines() if row.startswith("| `")]
    assert [name for row in rows for name in row] == [name for name in LAYERS if name not in ("files", "errors")]


@pytest.fixture
def toy(tmp_path) -> Path:
    """A package of two layers with an import of each kind that points up, and one that points down."""
    package = tmp_path / "dvpo_ray"
    for folder in ("training", "config"):
        (package / folder).mkdir(parents=True)
        (package / folder / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "training" / "loop.py").write_text("from dvpo_ray.config.schema import Config\n")
    (package / "config" / "schema.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import dvpo_ray.training.loop\n"
        "def late():\n    from dvpo_ray.training import loop\n"
    )
    return package


def test_nested_imports_are_seen(toy):
    found = imports(toy)
    assert found["dvpo_ray.training.loop"] == {"dvpo_ray.config.schema"}
    assert upward(found) == ["dvpo_ray.config.schema imports dvpo_ray.training.loop"]
    with pytest.raises(CycleError):
        check_cycles(found)
