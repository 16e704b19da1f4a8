"""The state of a virtual environment, for install.sh. It runs in that environment and imports only the standard library.

venv_state.py ready KEY EXTRA...    exit 0 if the last install with this KEY is complete, has these extras and is undamaged
venv_state.py mode                  print the mode (cpu or gpu) of the last complete install; nothing if there is none
venv_state.py extras                print the extras of the last complete install
venv_state.py repair MODE           make damaged packages look absent, so that the installer puts them back
venv_state.py sound MODE            exit 0 if no package is damaged or breaks this mode
venv_state.py record KEY MODE EXTRA...   write down that an install is complete
"""

from __future__ import annotations

import json
import shutil
import sys
import sysconfig
from importlib.metadata import PathDistribution, distributions
from pathlib import Path

STAMP = Path(sys.prefix) / "dvpo-install.json"
SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])
CPU_STRAYS = {"torchvision", "torchaudio", "torchcodec"}
"""Their builds on PyPI are for CUDA. Beside PyTorch for CPU they break `import transformers`."""


def read_stamp() -> dict:
    """The record of the last complete install; empty if there is none or it can't be read."""
    try:
        return json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}


def package_versions() -> dict[str, str]:
    """Version of every package by name."""
    return {d.name: d.version for d in distributions(path=[str(SITE_PACKAGES)]) if d.metadata["Name"]}


def is_damaged(info: Path) -> bool:
    """Whether the package of a dist-info folder lacks its metadata, or a file, or has a file of another size."""
    try:
        distribution = PathDistribution(info)
        if not distribution.metadata["Name"] or not distribution.files:
            return True
        sizes = [(file.size, (SITE_PACKAGES / file).stat().st_size) for file in distribution.files if file.suffix != ".pyc"]
    except (OSError, ValueError):
        return True
    return any(recorded not in (None, size) for recorded, size in sizes)


def faults(mode: str) -> list[Path]:
    """Dist-info folders of packages that are damaged, or that break this mode."""
    infos = sorted(SITE_PACKAGES.glob("*.dist-info"))
    return [info for info in infos if is_damaged(info) or (mode == "cpu" and package_of(info) in CPU_STRAYS)]


def package_of(info: Path) -> str:
    return info.name.split("-")[0].lower()


def is_ready(key: str, extras: list[str]) -> bool:
    """Whether nothing needs to be done."""
    stamp = read_stamp()
    if stamp.get("key") != key or not set(extras) <= set(stamp["extras"]):
        return False
    return stamp["packages"].items() <= package_versions().items() and not faults(stamp["mode"])


def repair(mode: str) -> None:
    """Remove leftovers of interrupted installs, packages that break this mode, and the records of damaged packages.

    A package without its record counts as absent: the installer writes its files again, over those that are there.
    """
    for leftover in SITE_PACKAGES.glob("~*"):
        print(f"removing {leftover.name}, left by an interrupted install")
        shutil.rmtree(leftover)
    for info in faults(mode):
        print(f"removing {info.name.removesuffix('.dist-info')}, which is damaged or breaks the {mode} build")
        shutil.rmtree(info)
        if package_of(info) in CPU_STRAYS:
            shutil.rmtree(SITE_PACKAGES / package_of(info), ignore_errors=True)


def record(key: str, mode: str, extras: list[str]) -> None:
    """Write the stamp."""
    STAMP.write_text(json.dumps({"key": key, "mode": mode, "extras": sorted(set(extras)), "packages": package_versions()}, indent=1))


def main(command: str, *arguments: str) -> int:
    """Run one of the commands in the module's description; returns the exit status."""
    if command == "ready":
        return 0 if is_ready(arguments[0], list(arguments[1:])) else 1
    if command == "mode":
        print(read_stamp().get("mode", ""))
    elif command == "extras":
        print(*read_stamp().get("extras", []))
    elif command == "repair":
        repair(arguments[0])
    elif command == "sound":
        return 1 if faults(arguments[0]) else 0
    elif command == "record":
        record(arguments[0], arguments[1], list(arguments[2:]))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
