"""Command-line options: text to a number within bounds, or argparse's complaint in one line; settings of one algorithm."""

from __future__ import annotations

import math
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Collection, Sequence

from dvpo_ray.errors import InputError


def whole_number(at_least: int) -> Callable[[str], int]:
    """A parser of whole numbers that are not too small."""

    def parse(text: str) -> int:
        if text.removeprefix("-").isdecimal() and len(text) < 20 and int(text) >= at_least:
            return int(text)
        raise ArgumentTypeError(f"{shown(text)} is no whole number of at least {at_least}")

    return parse


def finite_number(*, at_least: float = -math.inf, above: float = -math.inf, at_most: float = math.inf) -> Callable[[str], float]:
    """A parser of finite numbers within bounds, of which `above` does not belong to them."""
    limits = {"of at least": at_least, "above": above, "of at most": at_most}
    bounds = " and".join(f" {words} {limit:g}" for words, limit in limits.items() if math.isfinite(limit))

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and at_least <= number <= at_most and number > above):
            raise ArgumentTypeError(f"{shown(text)} is no finite number{bounds}")
        return number

    return parse


def shown(text: str) -> str:
    """What the user wrote, in quotes and at most 60 characters of it."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def refuse_own_key(option: str, key: str) -> None:
    """Refuse a setting that the command gives each run itself, and that would be ignored.

    Raises:
        InputError: names the option and the key.
    """
    if key in ("algorithm", "seed", "out"):
        raise InputError(f"{option}: {key} is the command's own to choose; leave it out")


def add_set_option(parser: ArgumentParser) -> None:
    """`--set`: settings of one algorithm alone."""
    parser.add_argument("--set", action="append", default=[], metavar="ALGORITHM:KEY=VALUE", help="a setting of one algorithm")


def settings_by_algorithm(texts: Sequence[str], algorithms: Collection[str]) -> dict[str, list[str]]:
    """The overrides that `--set` gives each of some algorithms.

    Raises:
        InputError: a text names none of them or no setting.
    """
    settings: dict[str, list[str]] = {algorithm: [] for algorithm in algorithms}
    for text in texts:
        name, _, setting = text.partition(":")
        if name not in settings or "=" not in setting:
            raise InputError(f"--set {text}: expected ALGORITHM:KEY=VALUE with one of {', '.join(algorithms)}")
        refuse_own_key(f"--set {text}", setting.partition("=")[0].strip())
        settings[name].append(setting)
    return settings
