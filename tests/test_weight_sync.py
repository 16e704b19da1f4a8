"""Weights arrive whole and unchanged, or the run stops with a line that says where it hung."""

from __future__ import annotations

import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_config, tiny_language_model
from transformers import AutoModelForCausalLM

from dvpo_ray.config.schema import Config, LoraConfig, WeightSyncConfig
from dvpo_ray.errors import ResourceError
from dvpo_ray.models.trainable import apply_lora, describe_weights, full_weights, train_last_layers
from dvpo_ray.sync.adapters import AdapterSender
from dvpo_ray.sync.client import EngineClient
from dvpo_ray.sync.object_store import ObjectStoreSender, pack, unpack

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


def test_a_bucket_is_stored_while_the_engines_load_the_one_before_it(monkeypatch):
    done = []
    monkeypatch.setattr(ray, "put", lambda bucket: done.append(f"store {bucket['names'][0]}") or bucket["names"][0])

    class Client:
        def start_bucket(self, name: str):
            done.append(f"send {name}")
            return lambda: done.append(f"loaded {name}")

        def __getattr__(self, phase: str):
            return lambda *_: done.append(phase)

    weights = [(name, torch.ones(100)) for name in "abc"]
    ObjectStoreSender(Client(), lambda changing_only: weights, True, WeightSyncConfig(bucket_mib=0.0004)).send(1, changing_only=False)
    buckets = ["store a", "send a", "store b", "loaded a", "send b", "store c", "loaded b", "send c", "loaded c"]
    assert done == ["init_weight_transfer_engine", "begin", "start_weight_update", *buckets, "finish_weight_update", "set_policy_version"]


def test_a_damaged_bucket_is_refused():
    (bucket,) = pack([("a", torch.ones(4)), ("b", torch.ones(4))], 10_000, checksum=True)
    bucket["data"][1][5] ^= 1
    with pytest.raises(ValueError, match="weight bucket a … b arrived damaged"):
        list(unpack(**bucket))


def test_adapters_travel_in_one_bucket_with_their_description(monkeypatch):
    done = []
    monkeypatch.setattr(ray, "put", lambda stored: stored)

    class Client:
        def __getattr__(self, phase: str):
            return lambda *args: done.append((phase, *args))

    weights = [("a.lora_A.weight", torch.randn(2, 8).bfloat16()), ("a.lora_B.weight", torch.randn(8, 2).bfloat16())]
    AdapterSender(Client(), lambda: iter(weights), "described", True, WeightSyncConfig(bucket_mib=1e-6)).send(4, changing_only=False)
    AdapterSender(Client(), lambda: iter(weights), "described", False, WeightSyncConfig()).send(4, changing_only=False)  # another rank
    assert [phase for phase, *_ in done] == ["begin", "start_weight_update", "update_weights", "finish_weight_update", "set_policy_version"]
    (bucket,), (version,) = done[2][1:], done[4][1:]
    assert bucket.pop("description") == "described" and version == 4
    assert all(name == sent and torch.equal(got, weight) for (name, got), (sent, weight) in zip(unpack(**bucket), weights, strict=True))


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("trained", [lambda model: model, partial(apply_lora, lora=LoraConfig(rank=2)), lambda model: train_last_layers(model, 1)])
@pytest.mark.parametrize("changing_only", [False, True])
def test_weights_are_described_as_they_travel(architecture, trained, changing_only):
    model = tiny_language_model(tiny_config(architecture))
    model = trained(model) or model
    sent = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in full_weights(model, changing_only=changing_only)]
    assert sent and list(map(tuple, describe_weights(model, changing_only=changing_only))) == sent


def test_what_zero_3_has_cut_is_described_whole(tiny_model):
    model = tiny_language_model(tiny_config("qwen3_moe"))
    whole = describe_weights(model)
    for parameter in model.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, parameter.data.new_empty(0)
    assert describe_weights(model) == whole


@pytest.fixture
def ipc_without_a_gpu(monkeypatch):
    """vLLM's CUDA IPC on a CPU: its buffer is an ordinary tensor, and the handle is the number of the buffer."""
    packed_tensor = pytest.importorskip("vllm.distributed.weight_transfer.packed_tensor")
    empty, exported = torch.empty, []

    def export(buffer: torch.Tensor) -> tuple:
        exported.append(buffer)
        return None, (len(exported) - 1, *[0] * 7)

    monkeypatch.setattr(torch, "empty", lambda *size, device=None, **more: empty(*size, **more))
    monkeypatch.setattr(packed_tensor, "reduce_tensor", export)
    monkeypatch.setattr("torch.multiprocessing.reductions.rebuild_cuda_tensor", lambda number, *_: exported[number])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="GPU-0"))
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)


class _IPCEngine:
    """The client of a sender, and behind it vLLM's receiving end with a model that keeps what it loads."""

    def __init__(self) -> None:
        from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine, PackedBufferImporter

        self.loaded: list[tuple[str, torch.Tensor]] = []
        self.buckets, self.version = 0, None
        self.end = IPCWeightTransferEngine.__new__(IPCWeightTransferEngine)
        self.end.device, self.end._packed_importer = torch.device("cuda:0"), PackedBufferImporter()
        self.end.model = SimpleNamespace(load_weights=self.loaded.extend)

    def begin(self) -> None: ...

    def init_weight_transfer_engine(self, info: dict) -> None:
        self.end.init_transfer_engine(self.end.parse_init_info(info))

    def start_weight_update(self) -> None: ...

    def update_weights(self, info: dict) -> None:
        self.buckets += 1
        self.end.receive_weights(self.end.parse_update_info(info))

    def finish_weight_update(self) -> None: ...

    def set_policy_version(self, version: int) -> None:
        self.version = version


def test_a_weight_above_the_bucket_travels_by_ipc(ipc_without_a_gpu):
    from dvpo_ray.sync.vllm_transports import VLLMSender

    weights = [("embedding", torch.randn(64, 32)), ("a", torch.randn(20)), ("b", torch.randn(30)), ("head", torch.randn(60, 32).bfloat16())]
    described = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights]
    engine = _IPCEngine()
    sender = VLLMSender("ipc", engine, lambda changing_only: iter(weights), lambda changing_only: described, 0, WeightSyncConfig(bucket_mib=0.001))
    sender.send(3, changing_only=False)
    assert engine.version == 3 and engine.buckets == 2  # one buffer, of the size of the embedding
    assert [name for name, _ in engine.loaded] == [name for name, _ in weights]
    assert all(torch.equal(sent, got) and sent.dtype == got.dtype for (_, sent), (_, got) in zip(weights, engine.loaded, strict=True))


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
    stuck.finish_weight_update()
    with pytest.raises(ResourceError, match=r"rollout engine 1 did not answer finish_weight_update within weight_sync.timeout_seconds=5"):
        stuck.set_policy_version(1)


@pytest.mark.slow
def test_bench_sync_counts_every_weight(loop_settings, tmp_path):
    from dvpo_ray.bench.sync import bench_sync

    results = bench_sync(Config.model_validate(loop_settings), tmp_path / "bench", repeats=2)
    parameters = AutoModelForCausalLM.from_pretrained(loop_settings["model"]["path"]).parameters()
    assert results["bytes"] == 4 * sum(parameter.numel() for parameter in parameters) and results["transport"] == "object_store"
    assert results["gb_per_second"] == [results["bytes"] / seconds / 1e9 for seconds in results["seconds"]] and len(results["seconds"]) == 2
