"""Weights arrive whole and unchanged, or the run stops with a line that says where it hung."""

from __future__ import annotations

import time

import numpy as np
import pytest
import ray
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpo_ray.errors import ResourceError
from dvpo_ray.sync.client import EngineClient
from dvpo_ray.sync.object_store import pack, unpack

shapes = st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=8)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@settings(deadline=None)
@given(shapes, st.lists(dtypes, min_size=8, max_size=8), st.integers(1, 400), st.booleans())
def test_buckets_carry_every_weight_unchanged(sizes, kinds, bucket_bytes, checksum):
    weights = [(f"w{i}", torch.randn(size).to(kind)) for i, (size, kind) in enumerate(zip(sizes, kinds, strict=False))]
    buckets = list(pack(weights, bucket_bytes, checksum))
    arrived = [pair for bucket in buckets for pair in unpack(**bucket)]
    assert [name for name, _ in arrived] == [name for name, _ in weights]
    for (_, sent), (_, got) in zip(weights, arrived, strict=True):
        assert got.dtype == sent.dtype and got.shape == sent.shape and torch.equal(got, sent)
    assert all(len(bucket["names"]) == 1 or sum(map(len, bucket["data"])) <= bucket_bytes for bucket in buckets)


def test_a_damaged_bucket_is_refused():
    (bucket,) = pack([("a", torch.ones(4)), ("b", torch.ones(4))], 10_000, checksum=True)
    bucket["data"][1][5] ^= 1
    with pytest.raises(ValueError, match="weight bucket a … b arrived damaged"):
        list(unpack(**bucket))


class _Engine:
    """Stands in for a rollout engine: remembers the calls, hangs where it is told to."""

    def __init__(self, hangs_in: str | None = None) -> None:
        self.hangs_in = hangs_in
        self.calls: list[tuple] = []

    def _phase(self, name: str, *args) -> None:
        if name == self.hangs_in:
            time.sleep(3600)
        self.calls.append((name, *args))

    def init_weight_transfer_engine(self, info):
        self._phase("init", info)

    def start_weight_update(self):
        self._phase("start")

    def update_weights(self, bucket):
        self._phase("update", sum(int(raw.sum()) for raw in bucket["data"]))

    def finish_weight_update(self):
        self._phase("finish")

    def set_policy_version(self, version):
        self._phase("version", version)

    def seen(self):
        return self.calls


@pytest.mark.slow
def test_phases_reach_every_engine_in_order_and_a_hang_is_named(ray_session):
    engines = [ray.remote(_Engine).remote() for _ in range(2)]
    client = EngineClient(engines, ranks_per_engine=2, timeout_seconds=60)
    client.init_weight_transfer_engine({"rank_offset": 1})
    client.start_weight_update()
    client.update_weights(ray.put({"data": [np.ones(3)]}))
    client.finish_weight_update()
    client.set_policy_version(7)
    tail = [("start",), ("update", 3.0), ("finish",), ("version", 7)]
    seen = ray.get([engine.seen.remote() for engine in engines])
    # Each engine's tensor-parallel ranks come after those of the engine before it in the transfer group.
    assert seen == [[("init", {"rank_offset": 1}), *tail], [("init", {"rank_offset": 3}), *tail]]

    hangs = ray.remote(_Engine).remote("finish")
    ray.get(hangs.seen.remote())  # it is up; what is late from now on hangs
    stuck = EngineClient([engines[0], hangs], ranks_per_engine=1, timeout_seconds=5)
    stuck.begin()
    stuck.start_weight_update()
    with pytest.raises(ResourceError, match=r"rollout engine 1 did not answer finish_weight_update within weight_sync.timeout_seconds=5"):
        stuck.finish_weight_update()
