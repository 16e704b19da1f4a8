"""Gold judges: outcome scores for responses, independent of the Global Value Model that the policy is trained against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from dvpo_ray.errors import InputError


class Judge(Protocol):
    """Scores responses; higher is better. A judge is deterministic: the same text always gets the same score."""

    name: str

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Scores of `responses[i]` as answers to `prompts[i]`, float32 [n]."""
        ...


class VaderJudge:
    """VADER's compound sentiment of the response text, in [-1, 1]; the prompt plays no part.

    A lexicon with rules (Hutto and Gilbert 2014): offline, fast, and nothing that a value model was ever trained on.
    Text without a word of its lexicon, the empty text too, scores 0.
    """

    name = "vader"

    def __init__(self) -> None:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self._analyzer = SentimentIntensityAnalyzer()

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts for {len(responses)} responses")
        return np.array([self._analyzer.polarity_scores(text)["compound"] for text in responses], dtype=np.float32)


_JUDGES: dict[str, type[Judge]] = {"vader": VaderJudge}


def make_judge(name: str) -> Judge | None:
    """The judge that `evaluation.judge` names; None for `none`.

    Raises:
        InputError: there is no judge of that name.
    """
    if name == "none":
        return None
    if name not in _JUDGES:
        raise InputError(f"evaluation.judge: unknown judge {name!r}; use one of {', '.join([*_JUDGES, 'none'])}")
    return _JUDGES[name]()
