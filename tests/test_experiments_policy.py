"""The experiments on policies: which runs they are made of, and their tables. No run is real here."""

from __future__ import annotations

import numpy as np
import pytest
from study_fakes import STORIES, dvpo, leave_manifest, leave_policy, leave_value_model, result_of

from dvpo_ray.experiments.convergence import compare
from dvpo_ray.experiments.readings import Curve

# ----------------------------------------------------------------------------------------------------- convergence

CONVERGENCE = ("convergence", STORIES, "evaluation.every_steps=1")


def leave_learning(run):
    if run.stage == "gvm":
        leave_value_model(run, {"mean": 0.8, "last": 0.8})
        return
    fast = run.config.algorithm == "dvpo"
    leave_policy(run, [0.5, 0.9, 0.95] if fast else [0.5, 0.7, 0.8], [0.0, 4.0, 8.0], seconds=1.0 if fast else 2.0)


def test_all_algorithms_train_on_as_many_samples(faked, tmp_path):
    started = faked(leave_learning)
    assert dvpo(*CONVERGENCE, "reward_model.path=null", "--seeds", 0, 1, "--out", tmp_path) == 0
    assert [run.variant for run in started] == ["reward-model", *["dvpo", "ppo", "grpo", "rloo", "remax"] * 2]
    batches = {run.config.algorithm: (run.config.batch.prompts_per_step, run.config.batch.samples_per_prompt) for run in started[1:]}
    assert batches == {"dvpo": (64, 1), "ppo": (64, 1), "grpo": (16, 4), "rloo": (16, 4), "remax": (64, 1)}
    model = started[0].config.reward_model
    assert (started[0].stage, model.epochs, model.learning_rate) == ("rm", 2, 2e-3)
    assert started[2].config.reward_model.path == str(tmp_path / "reward-model-seed0" / "final")
    assert started[1].config.gvm.path == "runs/stories/gvm/final"  # the config has a value model
    table = {row["algorithm"]: row for row in result_of(tmp_path)["table"]}
    assert table["grpo"]["final length"]["values"] == [62.0, 62.0]


def test_a_value_model_is_trained_where_the_config_has_none_and_none_where_it_is_not_needed(faked, tmp_path):
    started = faked(leave_learning)
    assert dvpo(*CONVERGENCE, "gvm.path=null", "--algorithms", "dvpo", "--seeds", 3, "--out", tmp_path) == 0
    assert [(run.stage, run.variant, run.config.gvm.path) for run in started] == [
        ("gvm", "value-model", None),
        ("policy", "dvpo", str(tmp_path / "value-model-seed3" / "final")),
    ]


def test_settings_of_one_algorithm_and_a_grid_for_all(faked, tmp_path):
    started = faked(leave_learning)
    own = ("--set", "ppo:critic.learning_rate=0.01", "--grid", "policy.learning_rate=1e-4,3e-4")
    assert dvpo(*CONVERGENCE, "reward_model.path=rm", "--algorithms", "dvpo", "ppo", *own, "--seeds", 0, "--out", tmp_path) == 0
    assert [(run.variant, run.config.policy.learning_rate, run.config.critic.learning_rate) for run in started] == [
        ("dvpo-1e-4", 1e-4, 1e-3),
        ("dvpo-3e-4", 3e-4, 1e-3),
        ("ppo-1e-4", 1e-4, 1e-2),
        ("ppo-3e-4", 3e-4, 1e-2),
    ]
    assert result_of(tmp_path)["table"][0]["of PPO's seconds"]["mean"] == pytest.approx(0.75 / 4.0)


def curve(variant, seed, seconds, gold):
    n = len(gold)
    return Curve(variant, seed, 10 * np.arange(n), np.array(seconds, float), 4.0 * np.arange(n), np.array(gold, float))


def test_comparison_at_equal_samples_time_and_kl():
    curves = {
        "dvpo": [curve("dvpo", 0, [0, 10, 20], [0.4, 0.8, 0.9]), curve("dvpo", 1, [0, 10, 20], [0.4, 0.6, 0.7])],
        "ppo": [curve("ppo", 0, [0, 30, 60], [0.4, 0.8, 0.6]), curve("ppo", 1, [0, 30, 60], [0.4, 0.7, 0.8])],
    }
    dvpo_row, ppo_row = compare(curves, [4.0])
    assert dvpo_row["final gold"]["values"] == [0.9, 0.7]
    assert ppo_row["best gold"]["values"] == [0.8, 0.8]
    # Both had 20 seconds: PPO was two thirds through its first ten steps.
    assert ppo_row["gold at equal wall-clock"]["values"] == [pytest.approx(0.4 + 0.4 * 2 / 3), pytest.approx(0.6)]
    assert ppo_row["gold at 4 nats"]["values"] == [0.8, 0.7]
    # PPO's best is 0.8 in both seeds; DVPO has it at step 10 after 10 of PPO's 30 seconds in one, never in the other.
    assert dvpo_row["steps to PPO's best"]["values"][0] == 10.0 and dvpo_row["of PPO's seconds"]["values"][0] == pytest.approx(1 / 3)
    assert dvpo_row["seeds that reach it"]["values"] == [1.0, 0.0] and np.isnan(dvpo_row["seconds to PPO's best"]["mean"])
    assert ppo_row["seconds to PPO's best"]["values"] == [30.0, 60.0]
    assert dvpo_row["seconds per step"]["mean"] == 1.0


def test_without_ppo_there_is_no_race():
    (row,) = compare({"dvpo": [curve("dvpo", 0, [0, 10], [0.4, 0.8])]}, [])
    assert not any("PPO" in column for column in row)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--group", 7], "--group 7: a step has 64 samples, which is not a multiple of it"),
        (["--set", "reinforce:seed=1"], "--set reinforce:seed=1: expected ALGORITHM:KEY=VALUE with one of dvpo, ppo"),
        (["--set", "ppo:policy.threads=1", "--grid", "policy.threads=1,2"], "--grid policy.threads: already set for ppo; search it or set it"),
        (["--grid", "policy.lr=1"], "unknown key policy.lr"),
        (["evaluation.judge=none"], "evaluation.judge is none, and convergence compares gold; set one"),
    ],
)
def test_what_convergence_refuses(argv, line, capsys):
    assert dvpo(*CONVERGENCE, *argv) == 2
    assert line in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- refresh

REFRESH = ("refresh", STORIES, "evaluation.every_steps=1", "train.steps=4", "gvm.refresh.prompts=8", "gvm.refresh.pairs_per_prompt=1")


def leave_refreshing(run):
    """Value models of as many pairs as they may have; with refreshes every two steps, five new pairs by step 3."""
    if run.stage == "gvm":
        leave_value_model(run, {"mean": 0.8, "last": 0.8})
        leave_manifest(run, pairs=run.config.data.preferences.limit)
        return
    refreshed = run.config.gvm.refresh_every_steps > 0
    new = {"refresh/pairs_total": 5.0, "refresh/heldout_accuracy_before": 0.6, "refresh/heldout_accuracy": 0.7}
    leave_policy(
        run,
        [0.5, 0.6, 0.7, 0.8, 0.9] if refreshed else [0.5, 0.6, 0.6, 0.6, 0.6],
        [0.0, 2.0, 4.0, 6.0, 8.0],
        more=lambda step: new | ({"time/refresh_seconds": 9.0} if step == 3 else {}) if refreshed and step >= 3 else {},
    )


def test_refreshed_value_models_stand_beside_frozen_ones_of_fewer_and_of_as_many_pairs(faked, tmp_path):
    started = faked(leave_refreshing)
    assert dvpo(*REFRESH, "--pairs", 20, "--every", 2, "--seeds", 0, 1, "--out", tmp_path) == 0
    assert [run.variant for run in started] == ["gvm-20", "gvm-28", "frozen-20", "every-2", "frozen-28"] * 2  # one refresh of 8 prompts
    frozen, refreshed = started[2].config, started[3].config
    assert frozen.gvm.path == refreshed.gvm.path == str(tmp_path / "gvm-20-seed0" / "final")
    assert (frozen.gvm.refresh_every_steps, refreshed.gvm.refresh_every_steps, refreshed.gvm.refresh.source) == (0, 2, "judge")
    assert refreshed.data.preferences.limit == 20  # what a refresh mixes in may not be feedback that nobody counts
    assert started[4].config.gvm.path == str(tmp_path / "gvm-28-seed0" / "final")

    result = result_of(tmp_path)
    table = {row["value model"]: row for row in result["table"]}
    assert {name: row["feedback, pairs"]["values"] for name, row in table.items()} == {
        "frozen-20": [20, 20],
        "every-2": [25, 25],  # five of the eight prompts gave a pair
        "frozen-28": [28, 28],
    }
    assert table["every-2"]["final gold"]["mean"] == 0.9 and table["every-2"]["refreshing, seconds"]["mean"] == 9.0
    assert table["every-2"]["accuracy on the last new pairs, before"]["values"] == [0.6, 0.6]
    assert table["frozen-20"]["and after their refresh"]["mean"] is None
    # The evaluation after step 2 comes before the refresh between the steps 2 and 3.
    assert next(c for c in result["curves"] if c["variant"] == "every-2")["pairs"] == [20, 20, 20, 25, 25]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--every", 4], "--every 4: expected less than train.steps, which is 4"),
        (["data.preferences=null"], "data.preferences.path is not set"),
    ],
)
def test_what_refresh_refuses(argv, line, capsys):
    assert dvpo(*REFRESH, *argv) == 2
    assert line in capsys.readouterr().err
