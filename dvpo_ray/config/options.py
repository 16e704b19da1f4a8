"""Command-line options: numbers within bounds, and settings of one algorithm."""

from __future__ import annotations

import math
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Collection, Sequence

from dvpo_ray.errors import InputError


def whole_number(at_least: int) -> Callable[[str], int]:
    """A parser of whole numbers for argparse."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = -math.inf
        if number < at_least:
            raise ArgumentTypeError(f"'{text}' is not a whole number of at least {at_least}")
        return number

    return parse


def finite_number(*, at_least: float = -math.inf, above: float = -math.inf, at_most: float = math.inf) -> Callable[[str], float]:
    """A parser of finite numbers for argparse."""
    limits = {"of at least": at_least, "above": above, "of at most": at_most}
    bounds = " and".join(f" {words} {limit:g}" for words, limit in limits.items() if math.isfinite(limit))

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and at_least <= number <= at_most and number > above):
            raise ArgumentTypeError(f"'{text}' is not a finite number{bounds}")
        return number

    return parse


def refuse_own_key(option: str, key: str) -> None:
    """Refuse a setting that the command itself gives each run.

    Raises:
        InputError: names the option and the key.
    """
    if key in ("algorithm", "seed", "out"):
        raise InputError(f"{option}: the command itself chooses {key}; leave it out")


def add_set_option(parser: ArgumentParser) -> None:
    """`--set`: settings of one algorithm only."""
    parser.add_argument("--set", action="append", default=[], metavar="ALGORITHM:KEY=VALUE", help="a setting of one algorithm")


def settings_by_algorithm(texts: Sequence[str], algorithms: Collection[str]) -> dict[str, list[str]]:
    """The overrides that `--set` gives each of some algorithms.

    Raises:
        InputError: a text does not name one of them, or no setting.
    """
    settings: dict[str, list[str]] = {algorithm: [] for algorithm in algorithms}
    for text in texts:
        name, _, setting = text.partition(":")
        if name not in settings or "=" not in setting:
            raise InputError(f"--set {text}: expected ALGORITHM:KEY=VALUE with one of {', '.join(algorithms)}")
        refuse_own_key(f"--set {text}", setting.partition("=")[0].strip())
        settings[name].append(setting)
    return settings
