"""All ranks make the same number of passes, and every row is trained on once in each epoch."""

from __future__ import annotations

import numpy as np
import pytest
import torch.distributed as dist

from dvpo_ray.actors import minibatches
from dvpo_ray.actors.minibatches import cut_minibatches
from dvpo_ray.batch import RaggedBatch
from dvpo_ray.config.schema import Config


def _shard(rng, rows: int) -> RaggedBatch:
    lengths = rng.integers(1, 9, rows)
    batch = RaggedBatch.from_rows([[1] * int(n) for n in rng.integers(1, 5, rows)], [[2] * int(n) for n in lengths], row_ids=list(range(rows)))
    return batch.with_token_fields(loss_mask=batch.response_mask.astype(np.float32))


@pytest.fixture
def both_ranks(monkeypatch):
    """Cut the shards of two ranks as if each heard the other: the messages of a first round are what the second one hears."""

    def cut(config: Config, shards: list[RaggedBatch]):
        sent: list[list] = []
        monkeypatch.setattr(minibatches, "over_ranks", lambda values, op: sent[-1].append((list(values), op)) or list(values))
        for rank, shard in enumerate(shards):
            sent.append([])
            cut_minibatches(config, shard, 3, rank, 12)
        assert [op for _, op in sent[0]] == [dist.ReduceOp.SUM, dist.ReduceOp.MAX]  # two messages for the whole update
        merge = {dist.ReduceOp.SUM: np.sum, dist.ReduceOp.MAX: np.max}
        heard = {op: merge[op]([messages[i][0] for messages in sent], axis=0).tolist() for i, (_, op) in enumerate(sent[0])}
        monkeypatch.setattr(minibatches, "over_ranks", lambda values, op: heard[op])
        return [cut_minibatches(config, shard, 3, rank, 12) for rank, shard in enumerate(shards)]

    return cut


def test_ranks_run_together_and_count_every_token_once(both_ranks):
    rng = np.random.default_rng(0)
    config = Config(model={"path": "m"}, batch={"prompts_per_step": 24, "update_epochs": 3, "minibatches_per_epoch": 4}, policy={"num_actors": 2})
    shards = [_shard(rng, 12) for _ in range(2)]
    ranks = both_ranks(config, shards)
    assert [len(cut) for cut in ranks] == [12, 12]
    idle = 0
    for pair in zip(*ranks, strict=True):
        passes = [list(minibatch.passes()) for minibatch in pair]
        assert len(passes[0]) == len(passes[1])
        counted = [np.concatenate([rows for rows, counts in of_rank if counts]) for of_rank in passes]
        assert all(sorted(rows) == [0, 1, 2] for rows in counted)
        assert pair[0].tokens == pair[1].tokens == sum(int(minibatch.batch.by_token["loss_mask"].sum()) for minibatch in pair)
        idle += sum(not counts for of_rank in passes for _, counts in of_rank)
    assert idle > 0  # else this says nothing of ranks with fewer passes
    for shard, cut in zip(shards, ranks, strict=True):
        for epoch in range(3):
            rows = np.concatenate([minibatch.batch.row_ids for minibatch in cut[4 * epoch : 4 * epoch + 4]])
            assert sorted(rows.tolist()) == shard.row_ids.tolist()


def test_a_minibatch_without_a_token_in_the_loss_divides_by_one(monkeypatch):
    monkeypatch.setattr(minibatches, "over_ranks", lambda values, op: list(values))
    shard = _shard(np.random.default_rng(1), 2)
    (minibatch,) = cut_minibatches(Config(model={"path": "m"}), shard.with_token_fields(loss_mask=np.zeros(shard.num_tokens, np.float32)), 1, 0, 64)
    assert minibatch.tokens == 1
