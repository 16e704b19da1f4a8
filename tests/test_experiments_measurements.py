"""What experiments measure by themselves: Monte-Carlo values, errors of estimates, policy gradients."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from study_fakes import STORIES, dvpo, leave_measurement, leave_policy, leave_value_model, result_of

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.experiments import distribution_shift
from dvpo_ray.experiments.bound import COMPARISONS, REWARD_MODEL, VALUE_MODEL, model_errors, token_credits
from dvpo_ray.experiments.monte_carlo import gradient_difference, policy_gradients
from dvpo_ray.experiments.states import CONTINUATIONS_STREAM, error_metrics, finish, fit_affine, states_at


@pytest.fixture
def batch() -> RaggedBatch:
    """Two responses, of four tokens and of one, to prompts of two and three."""
    return RaggedBatch.from_rows([[1, 2], [3, 4, 5]], [[10, 11, 12, 13], [20]])


# --------------------------------------------------------------------------------------------------- continuations


def test_states_lie_at_shares_of_the_response(batch):
    states = states_at(batch, [0.0, 0.3, 1.0])
    assert states.row.tolist() == [0, 0, 0, 1, 1, 1]
    assert states.tokens.tolist() == [0, 2, 4, 0, 1, 1]  # 1.2 tokens are rounded up, as 0.3 of one token is
    # Positions of values[t]: the last prompt token is values[0].
    assert batch.tokens[states.flat_index(batch)].tolist() == [2, 11, 13, 5, 20, 20]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 12))
def test_segments_cover_every_token_once(lengths, segments):
    rows = RaggedBatch.from_rows([[1]] * len(lengths), [[7] * length for length in lengths])
    states = states_at(rows, np.arange(1, segments + 1) / segments)
    q = np.arange(len(states.row), dtype=float)
    credits = token_credits(states, q, rows.response_mask)
    assert credits[rows.response_mask].sum() == pytest.approx(0.0, abs=1e-6)
    for r, length in enumerate(lengths):
        ends = states.tokens[states.row == r]
        of_row = q[states.row == r]
        expected = [of_row[np.flatnonzero(ends >= t)[0]] for t in range(1, length + 1)]
        found = credits[rows.response(r)]
        assert found - found[0] == pytest.approx(np.array(expected) - expected[0])


def test_responses_go_on_from_their_states_and_end_at_the_limit(batch):
    asked = []

    def sample(prompts, stream):
        asked.append((prompts, stream))
        return RaggedBatch.from_rows(prompts, [[100 + i] * 3 for i in range(len(prompts))])

    responses = finish(batch, states_at(batch, [0.5, 1.0]), 2, 4, sample)
    ((prompts, stream),) = asked
    assert stream == CONTINUATIONS_STREAM
    assert prompts == [[1, 2, 10, 11]] * 2  # the ends of responses, and the middle of one token, have nothing to add
    assert responses[0] == [[10, 11, 100, 100], [10, 11, 101, 101]]  # two tokens of the three fit
    assert responses[1] == [[10, 11, 12, 13]] * 2
    assert responses[2] == responses[3] == [[20]] * 2


def test_finished_responses_alone_need_no_sampling(batch):
    assert finish(batch, states_at(batch, [1.0]), 2, 4, None) == [[[10, 11, 12, 13]] * 2, [[20]] * 2]


# ---------------------------------------------------------------------------------------------------------- errors


def test_the_best_line():
    assert fit_affine(np.array([0.0, 1.0, 2.0]), np.array([1.0, 3.0, 5.0]))([0.0, 4.0]) == pytest.approx([1.0, 9.0])
    assert fit_affine(np.array([4.0, 4.0]), np.array([1.0, 3.0]))(np.array([9.0])).tolist() == [2.0]


def test_error_is_that_of_the_estimate_and_not_of_the_samples():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=4000)
    samples = truth[:, None] + rng.normal(scale=2.0, size=(4000, 4))
    exact = error_metrics(truth, samples)
    off = error_metrics(truth + 0.5, samples)
    assert exact["rmse"] < 0.2 and abs(exact["bias"]) < 0.05  # the means of four samples alone are 1.0 off
    assert off["rmse"] == pytest.approx(0.5, abs=0.1) and off["bias"] == pytest.approx(0.5, abs=0.05)
    assert exact["correlation"] == pytest.approx(1 / np.sqrt(2), abs=0.05)
    assert np.isnan(error_metrics(np.ones(3), samples[:3])["correlation"])


def test_errors_of_models_do_not_depend_on_their_zero_and_unit():
    rng = np.random.default_rng(1)
    gold = rng.normal(size=(50, 4)) * 0.1 + rng.normal(size=(50, 1))
    rewards = gold + rng.normal(size=gold.shape) * 0.2
    values = gold.mean(axis=1) + rng.normal(size=50) * 0.3
    errors, value_q, reward_q = model_errors(values, rewards, gold)
    moved, moved_q, _ = model_errors(7 - 2 * values, 3 + 5 * rewards, gold)
    assert moved == pytest.approx(errors) and moved_q == pytest.approx(value_q)
    assert errors["eps_R"] == pytest.approx(0.2, abs=0.03)
    assert errors[f"eps_Q: {VALUE_MODEL}"] == pytest.approx(0.3, abs=0.08)
    assert errors[f"eps_Q: {REWARD_MODEL}"] < 0.1  # the mean of four rewards, their noise taken out
    perfect, _, _ = model_errors(gold.mean(axis=1), gold, gold)
    assert perfect["eps_R"] == pytest.approx(0.0, abs=1e-9) and reward_q.shape == (50,)


# ------------------------------------------------------------------------------------------------------- gradients


def test_gradients_are_those_of_autograd_and_linear_in_credit(tiny_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    rows = RaggedBatch.from_rows([[1, 30], [1, 31, 32]], [[40, 41, 42], [50]])
    rng = np.random.default_rng(0)
    credits = rng.normal(size=(2, rows.num_tokens))
    both, one, other = policy_gradients(model, rows, np.stack([credits.sum(0), *credits]), max_tokens=4, temperature=1.0)
    assert both == pytest.approx(one + other, abs=1e-5)
    loss = 0.0
    for r in range(2):
        ids = torch.tensor(rows.tokens[rows.row(r)])[None]
        log_probs = torch.log_softmax(model(ids).logits[0, :-1], -1)[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
        start = rows.prompt_lengths[r] - 1
        loss = loss + (log_probs[start:] * torch.tensor(credits[0][rows.response(r)])).sum() / 4
    loss.backward()
    expected = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).numpy()
    assert one == pytest.approx(expected, abs=1e-5)


def test_difference_of_gradients():
    found = gradient_difference(np.array([3.0, 0.0]), np.array([0.0, 4.0]))
    assert found == {"cosine": 0.0, "difference": pytest.approx(5 / 4)}


# ------------------------------------------------------------------------------------------------ the experiments


def leave_drifting(run):
    """Values are right for the untrained policy, in another unit, and 0.1 too high per five steps of training."""
    if run.stage == "policy":
        leave_policy(run, [0.5, 0.9], [0.0, 12.0], every=20)
        return
    step = int(run.variant.removeprefix("step"))
    rng = np.random.default_rng([run.seed, step])
    gold = np.repeat(rng.uniform(-1, 1, size=(40, 1)), 2, axis=1)
    values = (gold[:, 0] + 0.02 * step - 0.5) / 2
    kl = np.full(40, 0.6 * step)
    leave_measurement(run, {})
    columns = {"value": values, "kl": kl, "position": np.tile([0.0, 100.0], 20), "gold": gold}
    (run.folder / distribution_shift.MEASUREMENT).write_text(json.dumps({name: column.tolist() for name, column in columns.items()}))


def test_error_grows_with_the_distance_of_the_policy(faked, tmp_path):
    started = faked(leave_drifting)
    assert dvpo("distribution-shift", STORIES, "--snapshots", 2, "--seeds", 0, 1, "--out", tmp_path) == 0
    assert [run.variant for run in started] == ["policy", "step0000", "step0010", "step0020"] * 2
    policy, untrained, half, _ = started[:4]
    assert (policy.config.checkpoint.every_steps, policy.config.checkpoint.keep, policy.config.checkpoint.save_pretrained) == (10, 3, True)
    assert untrained.options["policy"] == "./stories260K"
    assert half.options["policy"] == str(tmp_path / "policy-seed0" / "checkpoints" / "step_000010" / "policy")
    assert half.config.model.path == "./stories260K" and half.config.evaluation.prompts == 64
    rows = {row["states"]: row for row in result_of(tmp_path)["table"]}
    assert rows["policy at step0000"]["rmse"]["mean"] == pytest.approx(0.0, abs=1e-6)
    assert rows["policy at step0020"]["bias"]["mean"] == pytest.approx(0.4, abs=1e-6)
    assert rows["KL below 2 nats"]["rmse"]["mean"] == pytest.approx(0.0, abs=1e-6)
    assert rows["KL 5 to 10 nats"]["rmse"]["mean"] == pytest.approx(0.2, abs=1e-6)
    assert rows["KL 10 to 20 nats"]["rmse"]["mean"] == pytest.approx(0.4, abs=1e-6)
    assert "rmse" not in rows["KL 20 nats and more"]  # no state of any seed is there
    assert rows["after 100 %"]["count"]["mean"] == 60


def leave_gradients(run):
    if run.stage == "gvm":
        leave_value_model(run, {"mean": 0.7, "last": 0.7})
        return
    models = {}
    for pairs in run.options["models"]:
        error = 10 / int(pairs)
        models[pairs] = {"eps_R": error, f"eps_Q: {VALUE_MODEL}": error, f"eps_Q: {REWARD_MODEL}": error}
        models[pairs] |= {f"{name}: {a} / {b}": 1 - error for name in ("cosine", "difference") for a, b in COMPARISONS}
    leave_measurement(run, {"models": models, "halves": {"cosine": 0.97, "difference": 0.2}})


def test_bound_compares_models_of_several_qualities(faked, tmp_path):
    started = faked(leave_gradients)
    assert dvpo("bound", STORIES, "--pairs", 50, 100, "--seeds", 0, "--out", tmp_path) == 0
    trained = {run.variant: (run.config.gvm.objective, run.config.data.preferences.limit) for run in started[:-1]}
    assert trained == {
        "gvm-50": ("monte_carlo", 50),
        "reward-50": ("bradley_terry", 50),
        "gvm-100": ("monte_carlo", 100),
        "reward-100": ("bradley_terry", 100),
    }
    assert started[-1].options["models"]["100"][REWARD_MODEL] == str(tmp_path / "reward-100-seed0" / "final")
    table = result_of(tmp_path)["table"]
    assert table[1]["training pairs"] == "100" and table[1]["eps_R"]["mean"] == pytest.approx(0.1)
    assert table[1]["cosine: value model / reward model"]["mean"] == pytest.approx(0.9)
    assert table[2]["cosine: half / half"]["mean"] == 0.97


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["distribution-shift", STORIES, "--snapshots", 30], "--snapshots is 30; expected 1 to train.steps, which is 20"),
        (["distribution-shift", STORIES, "--continuations", 1], "argument --continuations: '1' is "),
        (["bound", STORIES, "evaluation.judge=none"], "evaluation.judge is none, and bound compares gold; set one"),
        (["bound", STORIES, "rollout.min_response_tokens=4"], "rollout.min_response_tokens is 4, and bound finishes responses from their middle"),
        (["distribution-shift", STORIES, "rollout.min_response_tokens=4"], "rollout.min_response_tokens is 4, and distribution-shift finishes"),
    ],
)
def test_what_they_refuse(argv, line, capsys):
    assert dvpo(*argv) == 2
    assert line in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- for real


@pytest.mark.slow
def test_values_and_gradients_of_a_real_run(loop_settings, tmp_path):
    """Policy snapshots, engines, continuations, a GVM and gradients, on the tiny model."""
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(loop_settings | {"train": {"steps": 2, "trackers": []}}))
    small = ("--prompts", 8, "--continuations", 2, "--seeds", 0)
    assert dvpo("distribution-shift", config, "--snapshots", 1, "--kl-bins", 1, *small, "--out", tmp_path / "shift") == 0
    rows = {row["states"]: row for row in result_of(tmp_path / "shift")["table"]}
    assert rows["policy at step0000"]["KL"]["mean"] == pytest.approx(0.0, abs=1e-3)
    assert rows["policy at step0002"]["count"]["mean"] == 40
    states = json.loads((tmp_path / "shift" / "step0002-seed0" / "states.json").read_text())
    at_end = [gold for gold, position in zip(states["gold"], states["position"], strict=True) if position == 100]
    assert len(at_end) == 8 and all(first == second for first, second in at_end)

    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"Tell me story {i}", "chosen": " good day", "rejected": " bad storm"}) + "\n" for i in range(30)))
    data = (f"data.preferences.path={pairs}", "gvm.path=null")
    assert dvpo("bound", config, *data, "--pairs", 10, "--segments", 3, *small, "--out", tmp_path / "bound") == 0
    row = result_of(tmp_path / "bound")["table"][0]
    assert -1 <= row["cosine: value model / gold"]["mean"] <= 1 and row["eps_R"]["mean"] >= 0
