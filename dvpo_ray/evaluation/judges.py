"""Gold judges: scores for responses that do not depend on the Global Value Model that the policy is trained against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Judge(Protocol):
    """Scores responses; higher is better. A judge is deterministic: it always gives the same text the same score."""

    name: str

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Scores of `responses[i]` as answers to `prompts[i]`, float32 [n]."""
        ...


class VaderJudge:
    """VADER's compound sentiment of the response text, in [-1, 1]. It ignores the prompt.

    VADER is a lexicon with rules (Hutto and Gilbert 2014): it works offline, is fast, and no value model was trained on it.
    A text without a word of the lexicon scores 0, and so does the empty text.
    """

    name = "vader"

    def __init__(self) -> None:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self._analyzer = SentimentIntensityAnalyzer()

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        return np.array([self._analyzer.polarity_scores(text)["compound"] for text in responses], dtype=np.float32)


def make_judge(name: str) -> Judge | None:
    """The judge that `evaluation.judge` names; None for `none`."""
    judges: dict[str, type[Judge]] = {"vader": VaderJudge}
    return None if name == "none" else judges[name]()
