"""Advantages against hand-computed numbers, an independent row-by-row reference, and their invariants.

The reference below follows the definitions, one token at a time with double sums, and shares no code with the package.
"""

from __future__ import annotations

import math
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpo_ray.actors import experience_builder
from dvpo_ray.batch import RaggedBatch
from dvpo_ray.config.schema import Config
from dvpo_ray.models.forward import batch_values
from dvpo_ray.policy.advantages import MODES, compute_advantages
from dvpo_ray.policy.mode_inputs import discounted_to_go, masked_whiten
from dvpo_ray.runtime import process

ALL_MODES = [name for name, mode in MODES.items() if mode.reads == ("values",)]  # the others are in test_outcome_advantages.py
HANDLINGS = ["bootstrap", "mask", "penalty"]
WHITENINGS = ["row", "batch"]


def make_batch(rows: list[dict]) -> RaggedBatch:
    """A batch of rows with `prompt` (its length), `values` of all tokens, `log_probs`, `reference` of the response tokens."""
    batch = RaggedBatch.from_rows(
        [[1] * row["prompt"] for row in rows],
        [[2] * len(row["log_probs"]) for row in rows],
        truncated=[row.get("truncated", False) for row in rows],
        by_response_token={
            "log_probs": [row["log_probs"] for row in rows],
            "reference_log_probs": [row["reference"] for row in rows],
        },
    )
    return batch.with_token_fields(values=np.array([v for row in rows for v in row["values"]], dtype=np.float32))


def advantages_of(rows: list[dict] | RaggedBatch, **settings_) -> SimpleNamespace:
    defaults = dict(mode="gae", gae_lambda=1.0, kl_coefficient=0.0, whiten=False, value_whitening="batch", truncated="bootstrap")
    batch = rows if isinstance(rows, RaggedBatch) else make_batch(rows)
    return compute_advantages(batch, **{**defaults, **settings_})


# -------------------------------------------------------------------------------------------------- by hand

# v[0..3] = 0.1 0.3 0.2 0.6, so d = 0.2 -0.1 0.4; kl = 0.5 -0.5 0.5. The value of the first prompt token must not matter.
ROW = {"prompt": 2, "values": [9.0, 0.1, 0.3, 0.2, 0.6], "log_probs": [-1.0, -2.0, -0.5], "reference": [-1.5, -1.5, -1.0]}


@pytest.mark.parametrize(
    ("mode", "gae_lambda", "kl_coefficient", "expected"),
    [
        ("static_q", 1.0, 0.0, [0.3, 0.2, 0.6]),
        ("static_q", 1.0, 0.1, [0.25, 0.2, 0.55]),
        ("td", 1.0, 0.0, [0.2, -0.1, 0.4]),
        ("td", 1.0, 0.1, [0.15, -0.05, 0.35]),
        ("gae", 0.0, 0.1, [0.15, -0.05, 0.35]),
        ("gae", 0.5, 0.1, [0.2125, 0.125, 0.35]),
        ("gae", 1.0, 0.0, [0.5, 0.3, 0.4]),
        ("gae", 1.0, 0.1, [0.45, 0.3, 0.35]),
    ],
)
def test_hand_computed_row(mode, gae_lambda, kl_coefficient, expected):
    result = advantages_of([ROW], mode=mode, gae_lambda=gae_lambda, kl_coefficient=kl_coefficient)
    np.testing.assert_allclose(result.advantages, [0, 0, *expected], atol=1e-6)
    assert result.loss_mask.tolist() == [False, False, True, True, True]
    assert result.advantages.dtype == np.float32


def test_hand_computed_whitening():
    # td with KL is 0.15 -0.05 0.35: mean 0.15, unbiased variance (0.04 + 0.04) / 2
    result = advantages_of([ROW], mode="td", kl_coefficient=0.1, whiten=True)
    np.testing.assert_allclose(result.advantages, [0, 0, 0, -1, 1], atol=1e-6)
    np.testing.assert_allclose(result.unwhitened, [0, 0, 0.15, -0.05, 0.35], atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("static_q", [0.3, 0.2, 0.1]), ("td", [0.2, -0.1, -0.1]), ("gae", [0.0, -0.2, -0.1])],
)
def test_hand_computed_penalty_of_a_cut_off_response(mode, expected):
    # the last value 0.6 becomes 0.1
    result = advantages_of([{**ROW, "truncated": True}], mode=mode, truncated="penalty", truncation_penalty=0.5)
    np.testing.assert_allclose(result.advantages[2:], expected, atol=1e-6)
    whole = advantages_of([ROW], mode=mode, truncated="penalty", truncation_penalty=0.5)
    np.testing.assert_array_equal(whole.advantages, advantages_of([ROW], mode=mode).advantages)


# values -1 3 -1 -1 have mean 0 and unbiased variance 4: whitened -0.5 1.5 -0.5 -0.5; the first three are V_1 V_2 V_3
RELEASE_ROW = {"prompt": 1, "values": [-1.0, 3.0, -1.0, -1.0], "log_probs": [-1.0, -3.0, -1.0], "reference": [-2.0, -1.0, -1.5]}


@pytest.mark.parametrize("whitening", WHITENINGS)  # one row is the whole batch
def test_hand_computed_release(whitening):
    # A_3 = 0.5; A_2 = -1.5 + 0.05 * -0.5; A_1 = 0.5 + 0.05 * (1.5 + 0.95 * -0.5)
    result = advantages_of([RELEASE_ROW], mode="release", value_whitening=whitening)
    np.testing.assert_allclose(result.unwhitened, [0, 0.55125, -1.525, 0.5], atol=1e-6)
    # mean -0.157917, unbiased variance 1.402344, standard deviation 1.184206
    np.testing.assert_allclose(result.advantages, [0, 0.598854, -1.154430, 0.555576], atol=1e-6)
    whitened = advantages_of([RELEASE_ROW], mode="release", value_whitening=whitening, whiten=True)
    np.testing.assert_array_equal(result.advantages, whitened.advantages)


@pytest.mark.parametrize("whitening", WHITENINGS)
def test_hand_computed_release_with_kl(whitening):
    # rewards -0.1 * (1, -2, 0.5): deltas 1.9 -1.8 0.45, discounted by 0.95
    result = advantages_of([RELEASE_ROW], mode="release", value_whitening=whitening, kl_coefficient=0.1)
    np.testing.assert_allclose(result.unwhitened, [0, 0.596125, -1.3725, 0.45], atol=1e-6)


# Two rows of different level and spread: the first has mean 6 and unbiased variance 36, the second 2.5 and 1, both together 4 and 16.
RELEASE_ROWS = [
    {"prompt": 1, "values": [12.0, 0.0, 6.0], "log_probs": [-1.0, -1.0], "reference": [-2.0, -1.0]},
    {"prompt": 2, "values": [2.0, 4.0, 2.0, 2.0], "log_probs": [-1.0, -3.0], "reference": [-1.0, -1.0]},
]


@pytest.mark.parametrize(
    ("whitening", "kl_coefficient", "unwhitened", "advantages"),
    [
        # Whitened values 1 -1 0 and -0.5 1.5 -0.5 -0.5, so V_1 V_2 are 1 -1 and 1.5 -0.5: A_2 = -V_2 and A_1 = -V_1 + 0.05 * V_2.
        # Mean -0.26875, unbiased variance 1.463073.
        ("row", 0.0, [-1.05, 1.0, -1.525, 0.5], [-0.645888, 1.048921, -1.038587, 0.635553]),
        # Whitened values 2 -1 0.5 and -0.5 0 -0.5 -0.5, so V_1 V_2 are 2 -1 and 0 -0.5. Mean -0.14375, unbiased variance 1.790156.
        ("batch", 0.0, [-2.05, 1.0, -0.025, 0.5], [-1.424736, 0.854842, 0.088754, 0.481140]),
        # Rewards -0.1 * (1, 0) and -0.1 * (0, -2): A_1 of the first row falls by 0.1; A_2 and A_1 of the second rise by 0.2 and 0.95 * 0.2.
        ("row", 0.1, [-1.15, 1.0, -1.335, 0.7], None),
        ("batch", 0.1, [-2.15, 1.0, 0.165, 0.7], None),
    ],
)
def test_hand_computed_release_of_two_rows(whitening, kl_coefficient, unwhitened, advantages):
    batch = make_batch(RELEASE_ROWS)
    result = advantages_of(batch, mode="release", value_whitening=whitening, kl_coefficient=kl_coefficient)
    np.testing.assert_allclose(result.unwhitened[batch.response_mask], unwhitened, atol=1e-6)
    if advantages is not None:
        np.testing.assert_allclose(result.advantages[batch.response_mask], advantages, atol=1e-6)


def test_hand_computed_release_with_a_penalty_and_with_a_masked_row():
    cut = [{**RELEASE_ROWS[0], "truncated": True}, RELEASE_ROWS[1]]
    # V_3 = -0.5 in place of 0: A_2 falls by 0.5 and A_1 by 0.95 * 0.5; the other row stays as it is.
    result = advantages_of(cut, mode="release", value_whitening="row", truncated="penalty", truncation_penalty=0.5)
    np.testing.assert_allclose(result.unwhitened, [0, -1.525, 0.5, 0, 0, -1.525, 0.5], atol=1e-6)
    masked = {w: advantages_of(cut, mode="release", value_whitening=w, truncated="mask") for w in WHITENINGS}
    np.testing.assert_allclose(masked["row"].unwhitened, [0, 0, 0, 0, 0, -1.525, 0.5], atol=1e-6)
    np.testing.assert_array_equal(masked["batch"].unwhitened, masked["row"].unwhitened)  # one row is left


@pytest.mark.parametrize("whitening", WHITENINGS)
def test_release_identity(whitening):
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": p, "values": rng.normal(size=p + t).tolist(), "log_probs": [0.0] * t, "reference": [0.0] * t} for p, t in [(3, 40), (1, 7), (5, 1)]
    ]
    batch = make_batch(rows)
    result = advantages_of(batch, mode="release", gae_lambda=0.3, kl_coefficient=0.05, value_whitening=whitening)
    values = batch.by_token["values"].astype(np.float64)
    for r in range(batch.num_rows):
        together = values[batch.row(r)] if whitening == "row" else values
        state = (values[batch.states(r)][:-1] - together.mean()) / math.sqrt(together.var(ddof=1) + 1e-8)
        expected = [-state[t] + 0.05 * sum(0.95 ** (k - t - 1) * state[k] for k in range(t + 1, len(state))) for t in range(len(state))]
        np.testing.assert_allclose(result.unwhitened[batch.response(r)], expected, atol=1e-6)


def test_gae_with_lambda_one_telescopes():
    rng = np.random.default_rng(1)
    values = rng.normal(size=60)
    row = {"prompt": 10, "values": values.tolist(), "log_probs": [0.0] * 50, "reference": [0.0] * 50}
    result = advantages_of([row], mode="gae", gae_lambda=1.0)
    np.testing.assert_allclose(result.advantages[10:], values[-1] - values[9:-1], atol=1e-5)


# ----------------------------------------------------------------------------------- the slow, plain reference


def reference_raw(rows: list[dict], mode: str, lam: float, beta: float, value_whitening: str, penalty: float) -> list[list[float]]:
    """Advantages before whitening, from the definitions. `penalty` is subtracted from the last value of a cut-off row."""
    advantages = []
    for row in rows:
        together = [float(np.float32(v)) for other in rows for v in other["values"] if value_whitening == "batch" or other is row]
        mean = sum(together) / len(together)
        spread = math.sqrt(sum((v - mean) ** 2 for v in together) / max(len(together) - 1, 1) + 1e-8)
        length = len(row["log_probs"])
        v = [float(np.float32(x)) for x in row["values"][row["prompt"] - 1 :]]  # v[0..T]
        kl = [None] + [float(np.float32(a)) - float(np.float32(b)) for a, b in zip(row["log_probs"], row["reference"], strict=True)]
        cut = penalty if row.get("truncated") else 0.0
        before = [(x - mean) / spread for x in v] if mode == "release" else v
        state = before[:-1] + [(0.0 if mode == "release" else v[-1]) - cut]
        of_row = []
        for t in range(1, length + 1):
            if mode == "static_q":
                credit = state[t] - beta * sum(kl[s] for s in range(t, length + 1))
            elif mode == "td":
                credit = state[t] - state[t - 1] - beta * kl[t]
            else:
                decay = 0.95 if mode == "release" else lam
                credit = sum(decay ** (s - t) * (state[s] - state[s - 1] - beta * kl[s]) for s in range(t, length + 1))
            of_row.append(credit)
        advantages.append(of_row)
    return advantages


def reference_advantages(
    rows: list[dict], mode, gae_lambda, kl_coefficient, whiten, value_whitening, truncated, truncation_penalty
) -> list[list[float]]:
    in_loss = [not (truncated == "mask" and row.get("truncated")) for row in rows]
    kept = [row for row, keep in zip(rows, in_loss, strict=True) if keep]
    raw = reference_raw(kept, mode, gae_lambda, kl_coefficient, value_whitening, truncation_penalty if truncated == "penalty" else 0.0)
    everything = [a for row in raw for a in row]
    if (whiten or mode == "release") and everything:
        mean = statistics.fmean(everything)
        variance = statistics.variance(everything) if len(everything) > 1 else 0.0
        raw = [[(a - mean) / math.sqrt(variance + 1e-8) for a in row] for row in raw]
    remaining = iter(raw)
    return [next(remaining) if keep else [0.0] * len(row["log_probs"]) for row, keep in zip(rows, in_loss, strict=True)]


numbers = st.floats(-3, 3, width=32)


@st.composite
def random_rows(draw, min_rows: int = 1) -> list[dict]:
    rows = []
    for _ in range(draw(st.integers(min_rows, 5))):
        prompt, response = draw(st.integers(1, 4)), draw(st.integers(0, 7))
        rows.append(
            {
                "prompt": prompt,
                "values": draw(st.lists(numbers, min_size=prompt + response, max_size=prompt + response)),
                "log_probs": draw(st.lists(numbers, min_size=response, max_size=response)),
                "reference": draw(st.lists(numbers, min_size=response, max_size=response)),
                "truncated": draw(st.booleans()),
            }
        )
    return rows


mode_settings = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(ALL_MODES),
        "gae_lambda": st.floats(0, 1),
        "kl_coefficient": st.sampled_from([0.0, 0.05, 1.0]),
        "whiten": st.booleans(),
        "value_whitening": st.sampled_from(WHITENINGS),
        "truncated": st.sampled_from(HANDLINGS),
        "truncation_penalty": st.sampled_from([0.0, 0.5]),
    }
)


@settings(max_examples=200, deadline=None)
@given(random_rows(), mode_settings)
def test_equals_the_reference(rows, chosen):
    batch = make_batch(rows)
    result = compute_advantages(batch, **chosen)
    expected = reference_advantages(rows, **chosen)
    for r, row in enumerate(rows):
        np.testing.assert_allclose(result.advantages[batch.response(r)], expected[r], rtol=1e-6, atol=1e-6)
        assert (result.advantages[batch.row(r)][: row["prompt"]] == 0).all()
        in_loss = not (chosen["truncated"] == "mask" and row["truncated"])
        assert result.loss_mask[batch.row(r)].tolist() == [False] * row["prompt"] + [in_loss] * len(row["log_probs"])


@pytest.mark.parametrize("kl_coefficient", [0.0, 0.2])
@pytest.mark.parametrize("whitening", WHITENINGS)
def test_release_equals_the_released_recipe_in_torch(whitening, kl_coefficient):
    """The recipe written as such code is: rectangular tensors, a reversed loop over time. Rows of one length, so no padding.

    The forward mini-batch, whose values are whitened together, is one sequence or the whole batch.
    """
    torch.manual_seed(0)
    rows, prompt, length = 6, 3, 30
    levels = torch.arange(rows, dtype=torch.float64)[:, None]
    head = torch.randn(rows, prompt + length, dtype=torch.float64)
    log_probs, reference = -torch.rand(2, rows, length, dtype=torch.float64) * 3
    head, log_probs, reference = (head * (1 + levels) + levels).float().double(), log_probs.float().double(), reference.float().double()

    whitened = [(part - part.mean()) * torch.rsqrt(part.var() + 1e-8) for part in head.split(1 if whitening == "row" else rows)]
    values = torch.cat(whitened)[:, prompt - 1 : -1]
    rewards = -kl_coefficient * (log_probs - reference)
    advantages, carry = torch.zeros_like(values), torch.zeros(rows, dtype=torch.float64)
    for t in reversed(range(length)):
        next_value = values[:, t + 1] if t < length - 1 else 0.0
        carry = rewards[:, t] + next_value - values[:, t] + 0.95 * carry
        advantages[:, t] = carry
    expected = (advantages - advantages.mean()) * torch.rsqrt(advantages.var() + 1e-8)

    batch = make_batch(
        [{"prompt": prompt, "values": head[r].tolist(), "log_probs": log_probs[r].tolist(), "reference": reference[r].tolist()} for r in range(rows)]
    )
    result = advantages_of(batch, mode="release", value_whitening=whitening, kl_coefficient=kl_coefficient)
    np.testing.assert_allclose(result.advantages.reshape(rows, -1)[:, prompt:], expected, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------- invariants


@settings(max_examples=60, deadline=None)
@given(random_rows(min_rows=2), mode_settings, st.randoms(use_true_random=False))
def test_order_and_sharding_of_rows_change_nothing(rows, chosen, random):
    """With shards of shuffled rows, joined in any order, each row gets the same bits."""
    batch = make_batch(rows)
    order = list(range(len(rows)))
    random.shuffle(order)
    cut = random.randint(0, len(rows))
    shards = [batch.select(order[cut:]), batch.select(order[:cut])]
    assembled = RaggedBatch.concatenate(shards)
    result = compute_advantages(assembled, **chosen)
    restored = assembled.with_token_fields(advantages=result.advantages, mask=result.loss_mask.astype(np.float32)).sorted_by_id()
    whole = compute_advantages(batch, **chosen)
    np.testing.assert_array_equal(restored.by_token["advantages"], whole.advantages)
    np.testing.assert_array_equal(restored.by_token["mask"].astype(bool), whole.loss_mask)


@settings(max_examples=60, deadline=None)
@given(random_rows(min_rows=2), mode_settings.filter(lambda s: s["mode"] != "release" or s["value_whitening"] == "row"))
def test_before_whitening_a_row_depends_on_no_other(rows, chosen):
    batch = make_batch(rows)
    whole = compute_advantages(batch, **chosen)
    for r in range(batch.num_rows):
        alone = compute_advantages(batch.select([r]), **chosen)
        np.testing.assert_array_equal(alone.unwhitened, whole.unwhitened[batch.row(r)])


@settings(max_examples=60, deadline=None)
@given(random_rows(min_rows=2), mode_settings)
def test_masked_rows_are_as_if_absent(rows, chosen):
    chosen = {**chosen, "truncated": "mask"}
    batch = make_batch(rows)
    whole = compute_advantages(batch, **chosen)
    kept = np.flatnonzero(~batch.truncated)
    without = compute_advantages(batch.select(kept), **chosen)
    np.testing.assert_array_equal(batch.with_token_fields(a=whole.advantages).select(kept).by_token["a"], without.advantages)
    assert not whole.advantages[~whole.loss_mask].any()


@settings(max_examples=60, deadline=None)
@given(random_rows(), mode_settings.filter(lambda s: s["mode"] != "release"), numbers)
def test_values_of_states_before_the_response_never_matter(rows, chosen, other):
    changed = [{**row, "values": [other] * (row["prompt"] - 1) + row["values"][row["prompt"] - 1 :]} for row in rows]
    before, after = compute_advantages(make_batch(rows), **chosen), compute_advantages(make_batch(changed), **chosen)
    np.testing.assert_array_equal(before.advantages, after.advantages)


@settings(max_examples=60, deadline=None)
@given(random_rows(), mode_settings, st.lists(st.integers(-8, 8), min_size=5, max_size=5))
def test_release_forgets_the_level_of_what_is_whitened_together(rows, chosen, levels):
    """A number added to every value of a row, or of the batch, changes nothing. Float32 holds sums of multiples of 1/4 exactly."""
    chosen = {**chosen, "mode": "release"}
    if chosen["value_whitening"] == "batch":
        levels = levels[:1] * len(rows)
    low = [{**row, "values": [round(4 * v) / 4 for v in row["values"]]} for row in rows]
    high = [{**row, "values": [v + level for v in row["values"]]} for row, level in zip(low, levels, strict=False)]
    before, after = compute_advantages(make_batch(low), **chosen), compute_advantages(make_batch(high), **chosen)
    np.testing.assert_allclose(before.unwhitened, after.unwhitened, rtol=1e-6, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(random_rows(), mode_settings)
def test_only_release_reads_the_whitening_of_values(rows, chosen):
    row, batch = (compute_advantages(make_batch(rows), **{**chosen, "value_whitening": whitening}) for whitening in WHITENINGS)
    if chosen["mode"] != "release" or len(rows) == 1:
        np.testing.assert_array_equal(row.advantages, batch.advantages)


@settings(max_examples=60, deadline=None)
@given(numbers, st.integers(1, 300))
def test_equal_values_whiten_to_exactly_zero(value, length):
    flat = {"prompt": 1, "values": [value] * (length + 1), "log_probs": [0.0] * length, "reference": [0.0] * length}
    batch = make_batch([*RELEASE_ROWS, flat])
    assert not advantages_of(batch, mode="release", value_whitening="row").unwhitened[batch.row(2)].any()
    assert not advantages_of([flat, flat], mode="release", value_whitening="batch").unwhitened.any()


class RunningSum(torch.nn.Module):
    """A causal value model that is easy to check: the value after a token is the sum of the weights of the tokens so far.

    The weights are multiples of 1/64, so that float32 holds every sum exactly.
    """

    config = SimpleNamespace(_attn_implementation="sdpa")

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randint(-64, 65, (20,), generator=torch.Generator().manual_seed(0)) / 64)

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.weight[input_ids].cumsum(1)[..., None])


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_padding_of_the_scoring_pass_changes_nothing(mode, max_tokens):
    """From tokens through padded forward passes of any shape to advantages: the padded length of a row doesn't matter."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 30, size=(12, 2))
    prompts, responses = ([rng.integers(0, 20, n).tolist() for n in column] for column in lengths.T)
    kl = [rng.normal(size=n).tolist() for n in lengths[:, 1]]
    zeros = [[0.0] * n for n in lengths[:, 1]]
    batch = RaggedBatch.from_rows(prompts, responses, by_response_token={"log_probs": kl, "reference_log_probs": zeros})
    model = RunningSum()
    weight = model.weight.detach().numpy()
    exact = np.concatenate([weight[batch.tokens[batch.row(r)]].cumsum(dtype=np.float32) for r in range(batch.num_rows)])
    padded = advantages_of(batch.with_token_fields(values=batch_values(model, batch, max_tokens)), mode=mode, kl_coefficient=0.05, whiten=True)
    plain = advantages_of(batch.with_token_fields(values=exact), mode=mode, kl_coefficient=0.05, whiten=True)
    np.testing.assert_allclose(padded.advantages, plain.advantages, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(random_rows(), mode_settings)
def test_whitened_advantages_have_mean_zero_and_at_most_unit_variance(rows, chosen):
    result = compute_advantages(make_batch(rows), **{**chosen, "whiten": True})
    counted = result.advantages[result.loss_mask].astype(np.float64)
    if len(counted) > 1:
        assert abs(counted.mean()) < 1e-5
        assert counted.var(ddof=1) < 1 + 1e-5


# ---------------------------------------------------------------------------------------------- pieces and errors


@given(st.lists(st.integers(0, 6), max_size=6), st.floats(0, 1), st.randoms(use_true_random=False))
def test_discounted_to_go_is_its_definition(lengths, decay, random):
    rows = [[random.uniform(-1, 1) for _ in range(n)] for n in lengths]
    expected = [sum(decay ** (s - t) * row[s] for s in range(t, len(row))) for row in rows for t in range(len(row))]
    flat = np.array([x for row in rows for x in row], dtype=np.float64)
    np.testing.assert_allclose(discounted_to_go(flat, np.array(lengths, dtype=np.int64), decay), expected, atol=1e-12)


def test_masked_whiten_reads_only_the_mask():
    values = np.array([1.0, np.nan, 3.0, 5.0])
    np.testing.assert_allclose(masked_whiten(values, np.array([True, False, True, True])), [-1, 0, 0, 1], atol=1e-8)


def test_masked_whiten_gives_the_same_bits_in_every_order():
    rng = np.random.default_rng(0)
    values, order = rng.normal(size=1000), rng.permutation(1000)
    everything = np.ones(1000, dtype=bool)
    np.testing.assert_array_equal(masked_whiten(values[order], everything), masked_whiten(values, everything)[order])


@pytest.mark.parametrize("count", [0, 1])
def test_masked_whiten_of_too_few_numbers_is_zero(count):
    assert masked_whiten(np.array([7.0, 8.0]), np.arange(2) < count).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("mode", ALL_MODES)
def test_a_batch_with_nothing_in_the_loss(mode):
    rows = [{**ROW, "truncated": True}, {"prompt": 2, "values": [1.0, 2.0], "log_probs": [], "reference": []}]
    result = advantages_of(rows, mode=mode, truncated="mask", whiten=True)
    assert not result.advantages.any() and not result.loss_mask.any()


@pytest.mark.parametrize("whitening", WHITENINGS)
def test_the_experience_builder_passes_the_settings_on(whitening, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(process, "redirect_process_output", lambda file: None)
    monkeypatch.setattr(experience_builder.ray, "get", list)
    config = Config.model_validate({"model": {"path": str(tiny_model)}, "advantage": {"mode": "release", "value_whitening": whitening}})
    builder = experience_builder.ExperienceBuilder(config, 0, str(tmp_path))
    batch = make_batch(RELEASE_ROWS)
    _, update = builder.build([experience_builder.ScoredChunk(batch)], step=1, policy_version=0, kl_reward_coefficient=0.1)
    expected = advantages_of(batch, mode="release", value_whitening=whitening, kl_coefficient=0.1)
    np.testing.assert_array_equal(update.batch.by_token["advantages"], expected.advantages)


def test_a_number_that_is_not_finite_names_its_row():
    with pytest.raises(ValueError, match="field 'values' of row 1 is not finite at token 3"):
        advantages_of([ROW, {**ROW, "values": [0.0, 0.0, 0.0, math.nan, 0.0]}])
