"""A response token by token, coloured by a number per token."""

from __future__ import annotations

from collections.abc import Sequence

from dvpo_ray.monitoring.charts import number
from dvpo_ray.monitoring.markup import escape, tag

_BROKEN = "\ufffd"  # what a token decodes to that holds only part of a character
_LONGEST_CHARACTERS = 8  # of the text that a run of such tokens stands for


def align_tokens(tokens: Sequence[str], response: str) -> list[str]:
    """The part of a response that each token stands for.

    Decoding token by token loses spaces (SentencePiece) and characters spread over several tokens (bytes of an emoji); the
    response text has them. Tokens that the text does not show, such as an end-of-turn token, stand for themselves.

    Args:
        tokens: each token decoded by itself.
        response: all tokens decoded together, without special tokens.

    Returns:
        One text per token; for a run of tokens that share a character, the first has it and the others are empty.
    """
    pieces: list[str] = []
    position = 0
    broken: list[int] = []  # indices of the run of broken tokens that ends here
    for token in tokens:
        begin, end = _place(token, response, position, search=bool(broken))
        if end is None:
            if _BROKEN in token:
                broken.append(len(pieces))
            pieces.append(token)
            continue
        _mend(pieces, broken, response[position:begin])
        broken = []
        pieces.append(response[begin:end])
        position = end
    _mend(pieces, broken, response[position:])
    return pieces


def _place(token: str, response: str, position: int, search: bool) -> tuple[int, int | None]:
    """Where a token's text begins and ends in the response, its leading spaces included; the end is None when it is not there."""
    if token and response.startswith(token, position):
        return position, position + len(token)
    core = token.lstrip(" ")
    gap = len(response) - position - len(response[position:].lstrip(" "))
    if core and response.startswith(core, position + gap):
        return position, position + gap + len(core)
    if core and search and (found := response.find(token, position, position + _LONGEST_CHARACTERS + len(token))) >= 0:
        return found, found + len(token)
    return position, None


def _mend(pieces: list[str], broken: list[int], text: str) -> None:
    """Give a run of broken tokens the text that it stands for."""
    if broken and text:
        for i in broken:
            pieces[i] = ""
        pieces[broken[0]] = text


def coloured_tokens(pieces: Sequence[str], numbers: Sequence[float], tips: Sequence[str]) -> str:
    """Spans coloured from one hue over none, at 0, to another; full colour is the largest absolute number.

    Args:
        pieces: text of each token.
        numbers: one per token.
        tips: tooltip of each token.
    """
    scale = max((abs(n) for n in numbers), default=0.0) or 1.0
    spans = []
    for i, (piece, value, tip) in enumerate(zip(pieces, numbers, tips, strict=True)):
        kind = "pos" if value >= 0 else "neg"
        spans.append(f'<span class="tok {kind}" style="--a:{abs(value) / scale:.3f}" data-token="{i}" title="{escape(tip)}">{_visible(piece)}</span>')
    return tag("p", *spans, class_="tokens", dir="auto")


def colour_legend(numbers: Sequence[float], low: str, high: str) -> str:
    """The colour scale of `coloured_tokens` with its ends named."""
    scale = max((abs(n) for n in numbers), default=0.0) or 1.0
    return tag(
        "div",
        tag("span", f"{number(-scale)} {escape(low)}"),
        tag("span", class_="ramp", role="img", aria_label="colour scale, from negative over zero to positive"),
        tag("span", f"{number(scale)} {escape(high)}"),
        class_="legend-ramp",
    )


def _visible(piece: str) -> str:
    """A token's text with its line breaks marked, so that a token of nothing else can be seen and pointed at."""
    return escape(piece).replace("\n", '<i class="mark">↵</i>\n') or '<i class="mark">·</i>'
