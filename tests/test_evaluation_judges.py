"""The gold judges."""

import numpy as np
import pytest

from dvpo_ray.evaluation.judges import VaderJudge, make_judge


@pytest.fixture(scope="module")
def vader() -> VaderJudge:
    return VaderJudge()


def test_vader_scores_are_compound_sentiment(vader):
    # The first two are printed in VADER's own README; the third has no word of its lexicon.
    texts = ["VADER is smart, handsome, and funny.", "VADER is VERY SMART, handsome, and FUNNY!!!", "The table is in the room."]
    scores = vader.score(["x"] * 3, texts)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [0.8316, 0.9342, 0.0], atol=1e-6)


def test_vader_scores_span_minus_one_to_one(vader):
    good, bad = vader.score(["x", "x"], ["great love " * 200, "awful hate " * 200])
    assert 0.99 < good <= 1.0
    assert -1.0 <= bad < -0.99


def test_vader_reads_only_the_response(vader):
    assert vader.score(["I hate this terrible day."], [""]).tolist() == [0.0]


def test_vader_of_nothing(vader):
    assert vader.score([], []).shape == (0,)


def test_the_config_offers_every_judge():
    from typing import get_args

    from dvpo_ray.config.schema import EvaluationConfig

    for name in get_args(EvaluationConfig.model_fields["judge"].annotation):
        assert getattr(make_judge(name), "name", "none") == name
