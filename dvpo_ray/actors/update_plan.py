"""The plan of an update: which rows go to which rank, optimizer step and forward pass. The builder makes it, the ranks carry it out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.config.schema import BatchConfig
from dvpo_ray.models.layouts import Passes, deal


@dataclass(frozen=True)
class OptimizerStep:
    """A rank's part of one optimizer step.

    Attributes:
        passes: forward and backward passes, as many as on every other rank.
        tokens: tokens in the loss on all ranks together, at least 1.
    """

    passes: Passes
    tokens: int


@dataclass(frozen=True)
class RankPlan:
    """What one rank does in an update.

    Attributes:
        before: its share of the forward passes over all rows before the first optimizer step.
        steps: its share of each optimizer step.
    """

    before: Passes
    steps: list[OptimizerStep]


@dataclass(frozen=True)
class Update:
    """A batch, and what each rank of a trained role does with it. All ranks get the same object by reference."""

    batch: RaggedBatch
    plans: list[RankPlan]
    packed: bool

    def metrics(self) -> dict[str, float]:
        """The share of padding in the training passes (`padding/update_fraction`), and the tokens of the busiest rank over the mean
        (`balance/update_ratio`)."""
        lengths = self.batch.lengths
        groups = [[lengths[group] for step in plan.steps for group in step.passes.rows] for plan in self.plans]
        real = sum(int(lengths[group].sum()) for plan in self.plans for step in plan.steps for group in step.passes.working)
        computed = [sum(int(rows.sum() if self.packed else len(rows) * rows.max()) for rows in of_rank) for of_rank in groups]
        return {"padding/update_fraction": 1.0 - real / sum(computed), "balance/update_ratio": max(computed) * len(computed) / sum(computed)}


def plan_update(batch: RaggedBatch, settings: BatchConfig, ranks: int, max_tokens: int, *, packed: bool, seed: int, step: int) -> Update:
    """Cut the rows of a batch into optimizer steps, and deal each of them out to the ranks by tokens.

    Which rows an optimizer step has depends on the seed and the step alone, not on the number of ranks.

    Args:
        batch: has the token field `loss_mask`.
        max_tokens: of one forward pass, padding included.
        packed: rows are packed, not padded.
        step: number of the training step.
    """
    plans = [RankPlan(before, []) for before in deal(batch.lengths, ranks, max_tokens, packed=packed)]
    row_tokens = np.add.reduceat(batch.by_token["loss_mask"], batch.offsets[:-1])
    for epoch in range(settings.update_epochs):
        order = np.random.default_rng([seed, step, epoch, 0]).permutation(batch.num_rows)
        for rows in np.split(order, settings.minibatches_per_epoch):
            tokens = max(1, round(float(row_tokens[rows].sum())))
            for plan, passes in zip(plans, deal(batch.lengths[rows], ranks, max_tokens, packed=packed), strict=True):
                plan.steps.append(OptimizerStep(Passes([rows[group] for group in passes.rows], passes.idle), tokens))
    return Update(batch, plans, packed)
