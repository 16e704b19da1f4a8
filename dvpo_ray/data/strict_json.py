"""JSON as a user means it: a key that is there twice, a number beyond all use and endless nesting are mistakes, with a line that says so."""

from __future__ import annotations

import json
from collections.abc import Sequence


class JSONProblem(ValueError):
    """Text that is JSON by the letter and cannot be a row; the message says why."""


def parse_json(text: str) -> object:
    """The value of a JSON text.

    Raises:
        json.JSONDecodeError: not JSON.
        JSONProblem: a key is twice in one object, of which only one value could be kept; a whole number of more digits than Python
            converts; or lists and objects nested deeper than Python's stack.
    """
    try:
        return json.loads(text, object_pairs_hook=_with_unique_keys)
    except (json.JSONDecodeError, JSONProblem):
        raise
    except RecursionError:
        raise JSONProblem("lists or objects are nested too deeply; a row is one object of texts, numbers and messages") from None
    except ValueError as error:  # Python's limit on the digits of an integer, the one other thing that the parser refuses
        raise JSONProblem("a whole number has thousands of digits; scores are ordinary numbers") from error


def _with_unique_keys(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise JSONProblem(f"the key `{key}` is there twice; keep one of them")
            seen.add(key)
    return unique
