"""Types of command-line options: text to a number within bounds, or argparse's complaint in one line."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Callable


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
