"""Running the `dvpo` command within the tests' own process."""

from __future__ import annotations

from pathlib import Path

from dvpo_ray import cli

ROOT = Path(__file__).resolve().parents[1]
LOCAL_CPU = str(ROOT / "cluster_configs" / "local-cpu.yaml")
SHIPPED = ROOT / "dvpo_ray" / "quickstart" / "data"


def without_loading(printed: str) -> str:
    """What a command prints, without its first lines: they say that it asks the hub and loads its libraries."""
    first = ("asking the hub", "loading the libraries")
    return "".join(line for line in printed.splitlines(keepends=True) if not line.startswith(first))


def refusal(capsys, *argv: str) -> str:
    """The one line on stderr of a command that ends with status 2 and prints nothing else."""
    assert cli.main([str(word) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert without_loading(out) == ""
    assert err.startswith("dvpo: ") and err.count("\n") == 1
    return err.removeprefix("dvpo: ").rstrip("\n")
