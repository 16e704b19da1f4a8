"""The plan of an update: every row once in each epoch, ranks in step, and metrics that do not depend on the split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from dvpo_ray.actors.tally import Tally
from dvpo_ray.actors.update_plan import plan_update
from dvpo_ray.batch import RaggedBatch
from dvpo_ray.config.schema import BatchConfig
from dvpo_ray.models.layouts import deal


def _batch(rng, rows: int) -> RaggedBatch:
    prompts = [[1] * int(n) for n in rng.integers(1, 5, rows)]
    batch = RaggedBatch.from_rows(prompts, [[2] * int(n) for n in rng.integers(1, 9, rows)])
    return batch.with_token_fields(loss_mask=batch.response_mask.astype(np.float32))


def _plan(batch: RaggedBatch, ranks: int, *, packed: bool = False, step: int = 3, **settings):
    return plan_update(batch, BatchConfig(**settings), ranks, 12, packed=packed, seed=0, step=step)


@given(st.lists(st.integers(1, 120), min_size=1, max_size=40), st.integers(1, 5), st.integers(1, 400), st.booleans())
def test_ranks_run_together_and_every_row_counts_once(lengths, ranks, budget, packed):
    lengths = np.array(lengths)
    dealt = deal(lengths, ranks, budget, packed=packed)
    assert len(dealt) == ranks and len({len(passes.rows) for passes in dealt}) == 1
    groups = [group for passes in dealt for group in passes.working]
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
    for group in groups:
        size = lengths[group].sum() if packed else len(group) * lengths[group].max()
        assert len(group) == 1 or size <= budget
    if len(lengths) >= ranks:
        assert all(passes.idle < len(passes.rows) for passes in dealt)  # no rank is idle all the time if there are enough rows


def test_packed_micro_batches_and_ranks_have_like_numbers_of_tokens():
    lengths = np.random.default_rng(0).integers(50, 1000, 200)
    dealt = deal(lengths, 4, 8192, packed=True)
    of_pass = np.array([[lengths[group].sum() for group in passes.rows] for passes in dealt])
    assert of_pass.max() <= 8192 and of_pass.max() / of_pass.min() < 1.02
    assert of_pass.sum(1).max() / of_pass.sum(1).mean() < 1.01


@pytest.mark.parametrize("packed", [False, True])
def test_every_row_is_trained_on_once_in_each_epoch(packed):
    batch = _batch(np.random.default_rng(0), 22)
    update = _plan(batch, 3, packed=packed, update_epochs=3, minibatches_per_epoch=2)
    idle = 0
    for number, steps in enumerate(zip(*(plan.steps for plan in update.plans), strict=True)):
        counted = np.concatenate([group for step in steps for group in step.passes.working])
        assert len(set(counted.tolist())) == 11
        assert {step.tokens for step in steps} == {int(batch.select(counted).by_token["loss_mask"].sum())}
        idle += sum(step.passes.idle for step in steps)
        if number % 2 == 0:
            first = counted
        else:
            assert sorted([*first, *counted]) == list(range(22))
    before = np.concatenate([group for plan in update.plans for group in plan.before.working])
    assert sorted(before.tolist()) == list(range(22))


def test_the_rows_of_an_optimizer_step_do_not_depend_on_the_number_of_ranks():
    batch = _batch(np.random.default_rng(1), 24)

    def steps(ranks: int, step: int) -> list[list[int]]:
        plans = _plan(batch, ranks, step=step, update_epochs=2, minibatches_per_epoch=3).plans
        return [sorted(row for plan in plans for group in plan.steps[i].passes.working for row in group) for i in range(6)]

    assert steps(1, 5) == steps(2, 5) == steps(5, 5)
    assert steps(1, 5) != steps(1, 6)


def test_padding_and_balance_of_a_plan():
    batch = RaggedBatch.from_rows([[1]] * 3, [[2] * 3, [2] * 2, [2] * 3])  # 4, 3 and 4 tokens
    batch = batch.with_token_fields(loss_mask=batch.response_mask.astype(np.float32))
    assert _plan(batch, 1, minibatches_per_epoch=1).metrics() == {"padding/update_fraction": pytest.approx(1 / 12), "balance/update_ratio": 1.0}
    packed = _plan(batch, 2, packed=True, minibatches_per_epoch=1).metrics()
    assert packed == {"padding/update_fraction": 0.0, "balance/update_ratio": pytest.approx(7 * 2 / 11)}


def test_a_minibatch_without_a_token_in_the_loss_divides_by_one():
    batch = _batch(np.random.default_rng(1), 2)
    nothing = batch.with_token_fields(loss_mask=np.zeros(batch.num_tokens, np.float32))
    assert _plan(nothing, 1).plans[0].steps[0].tokens == 1


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_metrics_are_sums_by_optimizer_step_and_means_over_them(alone):
    tally = Tally()
    for loss, ratio in ((1.0, 3.0), (2.0, 1.0), (5.0, 2.0)):  # two passes of one optimizer step, one of another
        tally.add({"policy/loss": torch.tensor(loss), "policy/ratio_max": torch.tensor(ratio)}, steps=2)
    tally.add({"mismatch/kl": torch.tensor(0.25)}, steps=1)
    tally.end_step(1.0)
    tally.end_step(torch.tensor(3.0))
    metrics, norm = tally.of_all_ranks()
    assert metrics == {"policy/loss": 4.0, "mismatch/kl": 0.25, "policy/ratio_max": 3.0}
    assert norm == 2.0
