"""How the rows of an update are cut into optimizer steps and passes. All ranks agree on it at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist

from dvpo_ray.actors.deepspeed_rank import over_ranks
from dvpo_ray.batch import RaggedBatch
from dvpo_ray.config.schema import Config
from dvpo_ray.models.forward import micro_batches


@dataclass(frozen=True)
class Minibatch:
    """What one rank does for one optimizer step.

    Attributes:
        batch: the rank's rows, with the token field `loss_mask`.
        micro_batches: rows of each forward and backward pass.
        tokens: tokens in the loss on all ranks together, at least 1.
        idle_passes: how many more passes another rank has; ranks run together.
    """

    batch: RaggedBatch
    micro_batches: list[np.ndarray]
    tokens: int
    idle_passes: int

    def passes(self) -> Iterator[tuple[np.ndarray, bool]]:
        """Rows of every pass, as many on every rank, and whether they count."""
        yield from ((rows, True) for rows in self.micro_batches)
        yield from ((self.micro_batches[-1][-1:], False) for _ in range(self.idle_passes))


def minibatch_rows(config: Config, num_rows: int, step: int, epoch: int, rank: int) -> list[np.ndarray]:
    """Rows of a rank's shard behind each optimizer step of an epoch; every row once. A pure function of the seed and the numbers."""
    order = np.random.default_rng([config.seed, step, epoch, rank]).permutation(num_rows)
    return np.split(order, config.batch.minibatches_per_epoch)


def cut_minibatches(config: Config, shard: RaggedBatch, step: int, rank: int, micro_batch_tokens: int) -> list[Minibatch]:
    """The minibatches of all epochs of an update, in order. A collective of all ranks with two messages for the whole update."""
    batches = [
        shard.select(rows) for epoch in range(config.batch.update_epochs) for rows in minibatch_rows(config, shard.num_rows, step, epoch, rank)
    ]
    groups = [micro_batches(batch.lengths, micro_batch_tokens) for batch in batches]
    tokens = over_ranks([float(batch.by_token["loss_mask"].sum()) for batch in batches], dist.ReduceOp.SUM)
    most = over_ranks([len(group) for group in groups], dist.ReduceOp.MAX)
    return [
        Minibatch(batch, group, max(1, round(count)), round(passes) - len(group))
        for batch, group, count, passes in zip(batches, groups, tokens, most, strict=True)
    ]
