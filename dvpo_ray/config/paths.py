"""Paths as a user writes them: `~` is the home folder, and the quickstart's model is found where the quickstart keeps it."""

from __future__ import annotations

import difflib
import os
from argparse import ArgumentTypeError
from collections.abc import Collection
from pathlib import Path

QUICKSTART_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def in_home(path: str) -> str:
    """The path with `~` or `~user` at its start replaced by the home folder; every other path and every hub name as it is.

    Raises:
        ValueError: no such user.
    """
    whole = os.path.expanduser(path)
    if whole.startswith("~"):
        raise ValueError(f"{path}: no user {whole.partition('/')[0].removeprefix('~')} has a home folder; a file of this name is ./{path}")
    return whole


def from_home(path: str) -> str:
    """The path as people read it: `~` for the home folder at its start; every other path and every hub name as it is."""
    home = os.path.expanduser("~")
    return f"~{path.removeprefix(home)}" if path.startswith(f"{home}/") else path


def path_option(text: str) -> Path:
    """The type of every option that takes a path, for argparse: the shell leaves the `~` of `--out=~/runs` as it is."""
    return Path(name_or_path_option(text))


def name_or_path_option(text: str) -> str:
    """The type of every option that takes a path or a hub name, for argparse."""
    try:
        return in_home(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def or_nearest(path: str | Path, suffixes: Collection[str]) -> str:
    """What to add to the error about a file that is not there: the file beside it that may be meant; empty if there is none.

    Args:
        suffixes: those that a file of this kind can have.
    """
    folder, name = os.path.split(path)
    try:
        names = [one for one in sorted(os.listdir(folder or ".")) if Path(one).suffix in suffixes]
    except OSError:
        return ""
    same = [one for one in names if Path(one).stem in (name, Path(name).stem)]
    nearest = (same or difflib.get_close_matches(name, names, n=1, cutoff=0.8))[:1]
    return f"; did you mean {os.path.join(folder, nearest[0])}?" if nearest else ""


def quickstart_cache() -> Path:
    """The folder for what the quickstart fetches: `$DVPO_CACHE`, else `dvpo_ray` in the user's cache folder."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or in_home("~/.cache")
    return Path(in_home(os.environ.get("DVPO_CACHE") or f"{user_cache}/dvpo_ray"))


def model_here(path: str) -> str:
    """The folder of the quickstart's model, where the quickstart has fetched the model of this hub name; else the path as it is."""
    if path != QUICKSTART_MODEL:
        return path
    folder = quickstart_cache() / Path(QUICKSTART_MODEL).name
    return str(folder) if folder.is_dir() else path
