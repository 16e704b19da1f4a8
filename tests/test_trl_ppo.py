"""The PPO baseline computes what TRL 1.12.0's PPO computes: advantages, returns, both losses and their gradients.

The golden numbers are TRL's own lines run on fixed inputs, see data/make_trl_ppo_golden.py. What differs between the two is a
setting here (`kl.placement: reward`, `advantage.whiten`, `advantage.gae_lambda`, `critic.value_clip`, `policy.clip_epsilon`), except:

    TRL gives a response that ended early one step more, after its end: the reward stands there, with a value before it that is
    trained as well. Here the reward stands at the last token, and what a critic says after it is never read. With lambda 1 the
    advantages of the tokens are the same; else they are those of the row with that step written out.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.policy.advantages import AdvantageResult, compute_advantages, value_targets
from dvpo_ray.policy.losses import policy_loss, value_loss
from dvpo_ray.policy.mode_inputs import masked_whiten

GOLDEN = json.loads((Path(__file__).parent / "data" / "trl_ppo_golden.json").read_text())
SETTINGS = GOLDEN["settings"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
NEVER_READ = 123.0


def case_of(name: str) -> tuple[dict, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A case, its inputs and TRL's outputs."""
    case = GOLDEN["cases"][name]
    return case, *({key: np.array(numbers) for key, numbers in case[part].items()} for part in ("inputs", "outputs"))


def rows(numbers: np.ndarray, lengths: list[int]) -> list[list[float]]:
    """The first so many numbers of each row."""
    return [row[:length].tolist() for row, length in zip(numbers, lengths, strict=True)]


def batch_of(inputs: dict[str, np.ndarray], lengths: list[int], steps: list[int]) -> RaggedBatch:
    """Rows with a prompt of 2 tokens and so many steps, of which those after the row's length have no KL."""
    kl_free = np.arange(inputs["values"].shape[1]) >= np.array(lengths)[:, None]
    log_probs = {name: rows(np.where(kl_free, 0.0, inputs[name]), steps) for name in ("logprobs", "ref_logprobs")}
    batch = RaggedBatch.from_rows(
        [[1, 1]] * len(steps),
        [[2] * count for count in steps],
        by_response_token={"log_probs": log_probs["logprobs"], "reference_log_probs": log_probs["ref_logprobs"]},
    )
    values = np.full(batch.num_tokens, NEVER_READ, np.float32)
    values[np.flatnonzero(batch.response_mask) - 1] = np.concatenate(rows(inputs["values"], steps))  # TRL's stand before the token
    return batch.with_token_fields(values=values).with_row_fields(rewards=inputs["scores"].astype(np.float64))


def advantages_of(batch: RaggedBatch, lam: float) -> AdvantageResult:
    return compute_advantages(
        batch, mode="ppo", gae_lambda=lam, kl_coefficient=SETTINGS["kl_coef"], whiten=True, value_whitening="batch", truncated="bootstrap"
    )


def flat(numbers: np.ndarray, lengths: list[int], requires_grad: bool = False) -> torch.Tensor:
    return torch.tensor(np.concatenate(rows(numbers, lengths)), dtype=torch.float32, requires_grad=requires_grad)


@pytest.mark.parametrize("name", ["full", "early_lambda_1"])
def test_advantages(name):
    case, inputs, outputs = case_of(name)
    batch = batch_of(inputs, case["lengths"], case["lengths"])
    result = advantages_of(batch, case["lam"])
    np.testing.assert_allclose(result.advantages[batch.response_mask], flat(outputs["advantages"], case["lengths"]), **CLOSE)
    np.testing.assert_allclose(value_targets(batch, result.unwhitened)[batch.response_mask], flat(outputs["returns"], case["lengths"]), **CLOSE)


def test_advantages_of_responses_that_end_early_are_trls_with_its_last_step_written_out():
    case, inputs, outputs = case_of("early")
    lengths, most = case["lengths"], inputs["values"].shape[1]
    steps = [min(length + 1, most) for length in lengths]
    batch = batch_of(inputs, lengths, steps)
    result = advantages_of(batch, case["lam"])
    np.testing.assert_allclose(value_targets(batch, result.unwhitened)[batch.response_mask], flat(outputs["returns"], steps), **CLOSE)

    of_tokens = np.concatenate([np.arange(count) < length for count, length in zip(steps, lengths, strict=True)])
    whitened = masked_whiten(result.unwhitened[batch.response_mask], of_tokens)
    np.testing.assert_allclose(whitened[of_tokens], flat(outputs["advantages"], lengths), **CLOSE)


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_policy_loss_and_its_gradient(name):
    case, inputs, outputs = case_of(name)
    lengths = case["lengths"]
    new = flat(inputs["new_logprobs"], lengths, requires_grad=True)
    loss, _ = policy_loss(
        new,
        flat(inputs["logprobs"], lengths),
        flat(outputs["advantages"], lengths),
        minibatch_tokens=len(new),
        clip_epsilon=SETTINGS["cliprange"],
    )
    loss.backward()
    assert loss.item() == pytest.approx(outputs["policy_loss"], abs=1e-5)
    np.testing.assert_allclose(new.grad, flat(outputs["policy_gradient"], lengths), **CLOSE)


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_value_loss_and_its_gradient(name):
    case, inputs, outputs = case_of(name)
    steps = [min(length + 1, inputs["values"].shape[1]) for length in case["lengths"]]
    new = flat(inputs["new_values"], steps, requires_grad=True)
    loss, metrics = value_loss(
        new,
        flat(inputs["values"], steps),
        flat(outputs["returns"], steps),
        minibatch_tokens=len(new),
        clip=SETTINGS["cliprange_value"],
    )
    loss.backward()
    assert loss.item() == pytest.approx(outputs["value_loss"], abs=1e-5)
    assert metrics["critic/clip_fraction"].item() == pytest.approx(outputs["value_clip_fraction"], abs=1e-6)
    np.testing.assert_allclose(new.grad, flat(outputs["value_gradient"], steps), **CLOSE)


def test_the_inputs_reach_every_branch():
    """Ratios and values beyond both clipping ranges, and rows that end early."""
    for name in GOLDEN["cases"]:
        case, inputs, outputs = case_of(name)
        ratio = np.exp(inputs["new_logprobs"] - inputs["logprobs"])
        assert (ratio > 1.2).any() and (ratio < 0.8).any()
        assert 0 < outputs["value_clip_fraction"] < 1
        assert 0 < (outputs["policy_gradient"] != 0).sum() < sum(case["lengths"])
