"""Every row is sampled once, whichever engine has room for it, and its sample depends on nothing else."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from dvpo_ray.actors.rollout_backend import Response, RolloutBackend
from dvpo_ray.actors.rollout_engine import RolloutEngine
from dvpo_ray.batch import RaggedBatch
from dvpo_ray.config.schema import Config
from dvpo_ray.rollouts.pool import RolloutPool, cut_leases
from dvpo_ray.rollouts.schedule import sampling_seed
from dvpo_ray.runtime.process import BusyClock

groups = st.lists(st.integers(1, 9), max_size=40)


@given(groups, st.integers(1, 5), st.integers(1, 30), st.integers(0, 8))
def test_leases_hold_each_row_once_and_keep_samples_of_a_prompt_together(sizes, engines, room, ahead):
    prompts = [[1, number] for number, size in enumerate(sizes) for _ in range(size)]
    leases = cut_leases(prompts, engines, room, ahead)
    assert [row for lease in leases for row in lease] == list(range(len(prompts)))
    largest = 1
    if len(sizes) >= engines:
        largest = max(sizes, default=1)
        begins = {lease.start for lease in leases}
        assert begins <= {sum(sizes[:i]) for i in range(len(sizes) + 1)}
    share = math.ceil(len(prompts) / engines)
    assert all(len(lease) < share + largest for lease in leases)
    if engines > 1:
        assert all(len(lease) < room + ahead + largest for lease in leases)
        assert len(leases) > engines or len(prompts) <= engines * (room + ahead + largest)


def test_one_engine_has_all_rows_at_once():
    assert cut_leases([[1]] * 500, 1, room=4, ahead=1) == [range(500)]


class _Backend(RolloutBackend):
    """Works on a few rows at a time; a row takes as many steps as its seed says, and its tokens are its seed."""

    def __init__(self, seconds_per_step: float) -> None:
        self.rows: list[list] = []
        self.seconds = seconds_per_step
        self.most = self.added = 0

    @property
    def unfinished(self) -> int:
        return len(self.rows)

    def add(self, indices: Sequence[int], prompts: Sequence[Sequence[int]], seed: int | Sequence[int], greedy: bool = False) -> None:
        self.rows += [[index, own % 7 + 1, own] for index, own in zip(indices, seed, strict=True)]
        self.added += len(indices)
        self.most = max(self.most, len(self.rows))

    def step(self) -> Iterator[Response]:
        time.sleep(self.seconds)
        for row in self.rows[:8]:
            row[1] -= 1
        ended = [row for row in self.rows if row[1] == 0]
        self.rows = [row for row in self.rows if row[1] > 0]
        return (Response(index, [seed], [-1.0], False) for index, _, seed in ended)

    def init_weight_transfer(self, init_info: dict) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict) -> None: ...

    def finish_weight_update(self) -> None: ...

    def sleep(self) -> bool:
        return False

    def wake(self, part: str) -> None: ...


class _Engine(RolloutEngine):
    def __init__(self, seconds_per_step: float) -> None:
        self.index, self.chunk_rows, self.policy_version, self.clock = 0, 3, 0, BusyClock()
        self.backend, self._prompts, self._finished = _Backend(seconds_per_step), {}, []

    def counts(self) -> tuple[int, int]:
        """Rows in all, and the most at a time."""
        return self.backend.added, self.backend.most


@pytest.mark.slow
def test_the_faster_engine_gets_more_rows_and_no_sample_changes(ray_session):
    config = Config.model_validate({"model": {"path": "m"}, "seed": 5, "rollout": {"max_concurrent_sequences": 8}})
    prompts = [[1, number] for number in range(60) for _ in range(2)]

    def sample(*seconds: float) -> tuple[RaggedBatch, list[int]]:
        engines = [ray.remote(_Engine).remote(pause) for pause in seconds]
        ray.get([engine.counts.remote() for engine in engines])  # all are up
        chunks = ray.get(list(RolloutPool(engines, config).sample(prompts, 3)))
        added, most = zip(*ray.get([engine.counts.remote() for engine in engines]), strict=True)
        assert set(most) == {10}  # all that an engine works on, and a quarter more
        return RaggedBatch.concatenate(chunks).sorted_by_id(), list(added)

    batch, _ = sample(0.002, 0.002)
    assert batch.row_ids.tolist() == list(range(120)) and set(batch.steps.tolist()) == {3}
    assert batch.tokens.tolist() == [token for row, prompt in enumerate(prompts) for token in (*prompt, sampling_seed(5, 3, row))]
    other, (fast, slow) = sample(0.002, 0.05)
    assert other.tokens.tolist() == batch.tokens.tolist()
    assert fast > 2 * slow
