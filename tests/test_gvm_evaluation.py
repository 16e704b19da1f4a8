"""Views of held-out values against hand-computed numbers, and the files that `dvpo gvm eval` writes."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from gvm_artifacts import make_gvm

from dvpo_ray.config.schema import Config
from dvpo_ray.data.encoding import EncodedPair
from dvpo_ray.errors import InputError
from dvpo_ray.gvm.evaluation import chance_warning, evaluate_gvm, heldout_report, heldout_warning, length_warning, unmoved_warning
from dvpo_ray.gvm.pairs import build_pairs
from dvpo_ray.gvm.views import (
    HeldoutValues,
    accuracies,
    binary_calibration,
    length_matched,
    ranked_right,
    regression_by_decile,
    regression_metrics,
    response_scores,
    score_calibration,
    value_spread,
    wilson_interval,
)
from dvpo_ray.monitoring.metrics import MetricsLog
from dvpo_ray.training.value_model import training_accuracy


def heldout(*rows, outcomes=None):
    """Rows are values[0..T]; chosen and rejected rows alternate."""
    lengths = np.array([len(row) for row in rows])
    outcomes = np.tile([1.0, -1.0], len(rows) // 2) if outcomes is None else np.array(outcomes)
    return HeldoutValues(np.concatenate(rows).astype(np.float32), lengths, outcomes.astype(np.float32))


# --------------------------------------------------------------------------------------------------------- ranking


def test_ties_count_half():
    assert ranked_right(np.array([2.0, 1.0, 1.0, 2.0, 3.0, 3.0])).tolist() == [1.0, 0.0, 0.5]


def test_views_of_a_response():
    """No view of the response contains values[0], the value of the prompt."""
    scores = response_scores(heldout([9.0, 0.0, 1.0, 2.0, 3.0], [-9.0, 5.0]))
    assert scores["mean"].tolist() == [1.5, 5.0]
    assert scores["last"].tolist() == [3.0, 5.0]
    assert scores["p50"].tolist() == [1.5, 5.0]
    assert scores["p25"].tolist() == [0.75, 5.0]
    assert [scores[f"position_{p}"][0] for p in (25, 50, 75, 100)] == [0.0, 1.0, 2.0, 3.0]
    assert [scores[f"position_{p}"][1] for p in (25, 50, 75, 100)] == [5.0] * 4
    assert {f"p{p}" for p in (1, 5, 10, 25, 50, 75, 90, 95, 99)} <= scores.keys()


def test_positions_between_tokens_round_up():
    scores = response_scores(heldout([0.0, 1.0, 2.0, 3.0], [0.0, 1.0]))
    assert [scores[f"position_{p}"][0] for p in (25, 50, 75, 100)] == [1.0, 2.0, 3.0, 3.0]


def test_length_matching_allows_a_tenth_of_the_longer_response():
    def pair(a, b):
        return [np.zeros(a + 1), np.zeros(b + 1)]

    rows = [*pair(10, 9), *pair(10, 8), *pair(45, 50), *pair(44, 50), *pair(3, 3)]
    assert length_matched(heldout(*rows)).tolist() == [True, False, True, False, True]


def test_accuracies_and_the_length_baseline():
    right = accuracies(heldout([0, 1.0, 1.0], [0, 0.5, 0.5], [0, 1.0], [0, 2.0, 0.0, 0.0, 0.0]))
    assert right["mean"].tolist() == [1.0, 1.0]
    assert right["position_25"].tolist() == [1.0, 0.0]
    assert right["longer_wins"].tolist() == [0.5, 0.0]
    assert right["length_matched_last"].tolist() == [1.0]


def test_no_length_matched_pairs_no_such_view():
    assert "length_matched_mean" not in accuracies(heldout([0, 1.0], [0, 2.0, 0.0]))


def test_wilson_interval_golden_values():
    # The usual example: 81 of 263 gives 0.2553 .. 0.3662 (Newcombe 1998, table I).
    low, high = wilson_interval(81 / 263, 263)
    assert (low, high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
    # And 0 of 20: 0 .. 0.1611.
    assert wilson_interval(0.0, 20) == (0.0, pytest.approx(0.1611, abs=1e-4))


# ------------------------------------------------------------------------------------------ regression, calibration


def test_regression_metrics():
    outcomes = np.array([1.0, -1.0, 1.0, -1.0])
    assert regression_metrics(outcomes, outcomes) == {"mse": 0.0, "explained_variance": 1.0}
    assert regression_metrics(np.zeros(4), outcomes) == {"mse": 1.0, "explained_variance": 0.0}
    shifted = regression_metrics(outcomes + 0.5, outcomes)  # a constant error has no variance
    assert shifted == {"mse": 0.25, "explained_variance": 1.0}
    assert regression_metrics(np.zeros(2), np.ones(2))["explained_variance"] is None


def test_deciles_cover_every_state_once_and_end_with_the_terminal_one():
    perfect_at_the_end = [np.array([0.0] * 10 + [r]) for r in (1.0, -1.0)]
    bins = regression_by_decile(heldout(*perfect_at_the_end))
    assert [(b["from"], b["states"]) for b in bins] == [(d / 10, 2 if d < 9 else 4) for d in range(10)]
    assert bins[0]["mse"] == 1.0 and bins[9]["mse"] == 0.5
    assert bins[9]["explained_variance"] > bins[0]["explained_variance"] == 0.0


def test_a_state_at_the_start_of_a_tenth_belongs_to_it():
    """7/35 times ten is a little under 2 in floating point."""
    bins = regression_by_decile(heldout(np.zeros(36), np.zeros(36)))
    assert [b["states"] for b in bins] == [2 * states for states in (4, 3, 4, 3, 4, 3, 4, 3, 4, 4)]


def test_binary_calibration_golden_values():
    values = np.array([0.5, 0.5, 0.5, 0.5, -3.0, 0.0])  # P = 0.75 four times, 0 by clipping, 0.5
    outcomes = np.array([1.0, 1.0, -1.0, -1.0, -1.0, 1.0])
    result = binary_calibration(values, outcomes)
    assert result["bins"] == [
        {"predicted": 0.0, "observed": 0.0, "states": 1},
        {"predicted": 0.5, "observed": 1.0, "states": 1},
        {"predicted": 0.75, "observed": 0.5, "states": 4},
    ]
    assert result["error"] == pytest.approx((0.0 + 0.5 + 4 * 0.25) / 6)


def test_score_calibration_has_bins_of_equal_size():
    values = np.arange(20.0)
    result = score_calibration(values, values + 1.0)
    assert [b["states"] for b in result["bins"]] == [2] * 10
    assert result["bins"][0]["predicted"] == 0.5 and result["error"] == pytest.approx(1.0)


# ----------------------------------------------------------------------------------------------------------- report


def test_parts_of_several_workers_come_together():
    def pair(chosen, rejected):
        return EncodedPair([1, 2], [7] * chosen, [7] * rejected, False, False, None, None, "")

    pairs = build_pairs([pair(1, 2), pair(3, 1), pair(2, 2)], "binary", 1.0)
    values = np.arange(int(pairs.pair_states.sum()), dtype=np.float32)
    whole = HeldoutValues.from_parts(pairs, [(np.array([0, 1, 2]), values)])
    np.testing.assert_array_equal(whole.values, values)
    first, second, third = np.split(values, np.cumsum(pairs.pair_states)[:-1])
    parts = [(np.array([2, 0]), np.concatenate([third, first])), (np.array([1]), second)]
    np.testing.assert_array_equal(HeldoutValues.from_parts(pairs, parts).values, values)


def test_report_is_json_and_complete():
    rng = np.random.default_rng(0)
    rows = [np.concatenate([[0.0], rng.normal(0.3 * (1 - 2 * (r % 2)), 1.0, rng.integers(1, 30))]) for r in range(80)]
    for outcome in ("binary", "score"):
        report = json.loads(json.dumps(heldout_report(heldout(*rows), outcome)))
        assert report["pairs"] == 40
        assert report["heldout_accuracy"].keys() == report["accuracy_ci95"].keys()
        for name, (low, high) in report["accuracy_ci95"].items():
            assert 0 <= low <= report["heldout_accuracy"][name] <= high <= 1
        assert report["calibration"]["outcome"] == outcome
        assert sum(b["states"] for b in report["regression"]["by_position_decile"]) == sum(map(len, rows))


# ----------------------------------------------------------------------------------------------------------- command


def write_pairs(path, count, scores=False):
    words = ["good", "bad", "happy", "sad", "great", "awful", "kind", "cry"]
    rows = []
    for i in range(count):
        row = {"prompt": f"Tell me {i} about", "chosen": f" a {words[i % 8]} day", "rejected": f" the {words[(i + 1) % 8]} rain"}
        rows.append(row | ({"chosen_score": 3.0, "rejected_score": 1.0} if scores else {}))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def config(tiny_model, tmp_path):
    return Config.model_validate(
        {
            "model": {"path": str(tiny_model), "dtype": "float32"},
            "data": {
                "preferences": {"path": write_pairs(tmp_path / "train.jsonl", 4), "heldout_path": write_pairs(tmp_path / "heldout.jsonl", 12)},
                "max_prompt_tokens": 64,
                "max_response_tokens": 64,
            },
        }
    )


def test_evaluate_writes_json_and_plots(config, tiny_model, tmp_path):
    gvm = make_gvm(tmp_path / "gvm", tiny_model)
    config.data.preferences.limit = 3
    report = evaluate_gvm(config, gvm, tmp_path / "out")
    assert any("left out 1 of 4 training pairs: data.preferences.limit is 3" in note for note in report["notes"])
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == report
    assert report["pairs"] == 12
    for name in ("accuracy_by_position", "calibration", "value_trajectories"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_outcomes_are_those_the_gvm_was_trained_on(config, tiny_model, tmp_path):
    """Held-out data without scores can't evaluate a model of scores."""
    gvm = make_gvm(tmp_path / "gvm", tiny_model, outcome={"kind": "score", "scale": 2.0})
    with pytest.raises(InputError, match="heldout.jsonl:1: gvm.outcome is score"):
        evaluate_gvm(config, gvm, tmp_path / "out")
    config.data.preferences.heldout_path = write_pairs(tmp_path / "scored.jsonl", 6, scores=True)
    report = evaluate_gvm(config, gvm, tmp_path / "out")
    assert report["calibration"]["outcome"] == "score"
    mean_outcome = sum(b["observed"] * b["states"] for b in report["calibration"]["bins"]) / sum(b["states"] for b in report["calibration"]["bins"])
    assert 2.0 < mean_outcome < 6.0  # scores of 3 and 1, doubled


def test_weak_models_are_warned_about_with_advice():
    assert heldout_warning({"mean": 0.61, "last": 0.5}, 0.9, 100) is None
    overfit = heldout_warning({"mean": 0.55, "last": 0.58}, 0.98, 142)
    assert "0.55 by mean value (0.58 by last value)" in overfit and "142 training pairs: give more pairs" in overfit
    underfit = heldout_warning({"mean": 0.52, "last": 0.5}, 0.53, 5000)
    assert "raise gvm.learning_rate or gvm.epochs" in underfit


def test_weak_reward_models_are_judged_by_their_last_value_and_advised_in_their_own_settings():
    settings = {"section": "reward_model", "view": "last"}
    assert heldout_warning({"mean": 0.2, "last": 0.61}, 0.9, 100, **settings) is None
    warning = heldout_warning({"mean": 0.9, "last": 0.58}, 0.98, 142, **settings)
    assert warning.startswith("held-out accuracy 0.58 by last value is under 0.60;") and "fewer reward_model.epochs" in warning
    underfit = heldout_warning({"mean": 0.9, "last": 0.5}, 0.53, 5000, **settings)
    assert underfit.endswith("raise reward_model.learning_rate or reward_model.epochs") and "gvm" not in underfit


def report_of(*pairs: tuple[int, int, float]) -> dict:
    """The report on pairs of a chosen length, a rejected length, and how much higher the chosen response is valued."""
    rows = [row for chosen, rejected, gap in pairs for row in (np.full(chosen + 1, gap / 2), np.full(rejected + 1, -gap / 2))]
    return heldout_report(heldout(*rows), "binary")


def test_accuracy_that_length_alone_explains_is_warned_about():
    [longer] = length_warning(report_of(*[(20, 8, 1.0)] * 58, *[(9, 9, -1.0)] * 2))
    assert longer.startswith(
        "the value model may have learnt length alone: held-out accuracy is 0.97 by mean value, and 0.98 by the rule that the longer"
    )
    assert "2 of 60 pairs have responses of like lengths and 0.00 of them are ranked right" in longer
    [shorter] = length_warning(report_of(*[(8, 20, 1.0)] * 60), "last")
    assert shorter.startswith("the reward model may have learnt length alone")
    assert "1.00 by last value, and 1.00 by the rule that the shorter response wins; 0 of 60 pairs have responses of like lengths; train" in shorter


def test_accuracy_that_length_does_not_explain_is_not_warned_about():
    assert length_warning(report_of(*[(20, 8, 1.0)] * 30, *[(9, 9, 1.0)] * 30)) == []  # right where length says nothing
    assert length_warning(report_of(*[(20, 8, 1.0)] * 70, *[(8, 20, 1.0)] * 30)) == []  # right where length is wrong
    assert length_warning(report_of(*[(20, 8, 1.0)] * 30, *[(8, 20, 1.0)] * 30)) == []  # length says nothing
    assert length_warning(report_of(*[(20, 8, 1.0)] * 4, (8, 20, 1.0))) == []  # four of five is chance
    assert length_warning(report_of(*[(20, 8, -1.0)] * 60)) == []  # nothing is learnt, which `heldout_warning` says


def test_an_accuracy_on_few_pairs_that_may_be_chance_is_warned_about():
    [line] = chance_warning(report_of(*[(9, 9, 1.0)] * 6, *[(9, 9, -1.0)] * 3))
    assert line.startswith("held-out accuracy 0.67 on 9 pairs may be chance: its 95 % interval is 0.35 to 0.88; hold out more pairs")
    assert chance_warning(report_of(*[(9, 9, 1.0)] * 60, *[(9, 9, -1.0)] * 30)) == []  # the same accuracy on 90
    assert chance_warning(report_of(*[(9, 9, 1.0)] * 9)) == []
    assert chance_warning(report_of(*[(9, 9, 1.0)] * 5, *[(9, 9, -1.0)] * 4)) == []  # `heldout_warning` says that this is weak


def test_values_that_have_hardly_moved_are_warned_about_however_well_they_order():
    barely = report_of(*[(9, 9, 0.04)] * 9)
    assert barely["heldout_accuracy"]["mean"] == 1.0 and barely["value_spread"] == pytest.approx(0.02)
    [line] = unmoved_warning(barely, after=" after 2 steps")
    assert line.startswith("the values have hardly moved after 2 steps: they spread by 0.020 where outcomes spread by 1, so the model has hardly")
    assert line.endswith("raise gvm.epochs, lower gvm.pairs_per_step, or raise gvm.learning_rate")
    assert unmoved_warning(barely, "reward_model")[0].endswith("raise reward_model.learning_rate")
    assert unmoved_warning(report_of(*[(9, 9, 0.2)] * 9)) == []


def test_the_spread_is_in_units_of_the_outcomes():
    scored = heldout(np.full(5, 3.0), np.full(5, 1.0))
    assert value_spread(dataclasses.replace(scored, outcomes=np.float32([10, 2]))) == pytest.approx(0.25)
    assert value_spread(dataclasses.replace(scored, outcomes=np.float32([2, 2]))) == float("inf")


def test_evaluation_says_that_length_may_be_all(config, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("dvpo_ray.gvm.evaluation.length_warning", lambda report, view: [f"{report['pairs']} pairs by {view}"])
    assert evaluate_gvm(config, make_gvm(tmp_path / "gvm", tiny_model), tmp_path / "out")["notes"][-1] == "12 pairs by mean"


def test_the_training_accuracy_of_a_resumed_run_is_that_of_its_whole_last_epoch(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step, accuracy in enumerate((0.0, 0.2, 0.6), start=1):
            log.write(step, {"gvm/accuracy": accuracy})
    with MetricsLog(tmp_path, resume_step=2) as log:
        log.write(3, {"gvm/accuracy": 1.0})
    assert training_accuracy(tmp_path, 2) == pytest.approx(0.6)
