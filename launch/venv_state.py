"""What state a virtual environment is in, for install.sh. It runs inside that environment and imports the standard library only.

venv_state.py ready KEY EXTRA...    exit 0 if the last install with this KEY is complete, has these extras and is undamaged
venv_state.py mode                  print the mode (cpu or gpu) of the last complete install; nothing when there was none
venv_state.py extras                print the extras of the last complete install
venv_state.py repair MODE           make damaged packages look absent, so that the installer puts them back
venv_state.py record KEY MODE EXTRA...   write down that an install is complete
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
import sysconfig
from pathlib import Path

STAMP = Path(sys.prefix) / "dvpo-install.json"
SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])
CPU_STRAYS = {"torchvision", "torchaudio", "torchcodec"}
"""Their builds on PyPI are for CUDA; beside PyTorch for CPU they break `import transformers`."""


def read_stamp() -> dict:
    """The record of the last complete install; empty when there is none or it can't be read."""
    try:
        return json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}


def package_versions() -> dict[str, str]:
    """Version of every whole package by name."""
    return {d.name: d.version for d in importlib.metadata.distributions(path=[str(SITE_PACKAGES)]) if d.metadata["Name"]}


def damage(info: Path) -> str | None:
    """What is wrong with the package of a dist-info folder: its metadata or one of its files is missing or cut short."""
    try:
        distribution = importlib.metadata.PathDistribution(info)
        files = distribution.files
        if not distribution.metadata["Name"] or files is None:
            return "no metadata"
    except (OSError, ValueError) as error:
        return str(error)
    for file in files:
        if file.suffix == ".pyc":
            continue
        path = SITE_PACKAGES / file
        if not path.exists():
            return f"{file} is missing"
        if file.size is not None and path.stat().st_size != file.size:
            return f"{file} has another size"
    return None


def damaged_packages() -> dict[Path, str]:
    """Dist-info folders whose packages are damaged, with the reason."""
    infos = sorted(SITE_PACKAGES.glob("*.dist-info"))
    return {info: reason for info in infos if (reason := damage(info)) is not None}


def strays(mode: str) -> list[Path]:
    """Dist-info folders of packages that break this mode."""
    if mode != "cpu":
        return []
    return [info for info in SITE_PACKAGES.glob("*.dist-info") if info.name.split("-")[0].lower() in CPU_STRAYS]


def is_ready(key: str, extras: list[str]) -> bool:
    """Whether nothing needs to be done."""
    stamp = read_stamp()
    if stamp.get("key") != key or not set(extras) <= set(stamp["extras"]):
        return False
    return stamp["packages"].items() <= package_versions().items() and not strays(stamp["mode"]) and not damaged_packages()


def repair(mode: str) -> None:
    """Remove strays, leftovers of interrupted installs, and the records of damaged packages.

    A package without its record counts as absent: the installer then lays its files down again, over those that are there.
    """
    for leftover in SITE_PACKAGES.glob("~*"):
        print(f"removing {leftover.name}, left by an interrupted install")
        shutil.rmtree(leftover)
    for info in strays(mode):
        print(f"removing {info.name}: it does not belong beside PyTorch for CPU")
        shutil.rmtree(SITE_PACKAGES / info.name.split("-")[0], ignore_errors=True)
        shutil.rmtree(info)
    for info, reason in damaged_packages().items():
        print(f"reinstalling {info.name.removesuffix('.dist-info')}: {reason}")
        shutil.rmtree(info)


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
    elif command == "record":
        record(arguments[0], arguments[1], list(arguments[2:]))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
