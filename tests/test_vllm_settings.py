"""What vLLM is asked for, and in which order its sleep mode is used."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from dvpo_ray.config.schema import Config
from dvpo_ray.errors import ResourceError

pytest.importorskip("vllm")
from dvpo_ray.actors import vllm_backend

GIB = 2**30


class _LLM:
    """Stands in for vLLM's `LLM`: keeps its settings and the calls, in order."""

    def __init__(self, **settings) -> None:
        self.settings, self.calls = settings, []
        self.resets = True

    def collective_rpc(self, method: str, args: tuple = ()) -> None:
        self.calls.append((method, *args))

    def sleep(self, level: int) -> None:
        self.calls.append(("sleep", level))

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(("wake_up", *tags))

    def reset_prefix_cache(self) -> bool:
        self.calls.append(("reset_prefix_cache",))
        return self.resets


@pytest.fixture
def backend(monkeypatch):
    """Makes a backend of rollout settings, with the stand-in."""
    monkeypatch.setattr(vllm_backend, "LLM", _LLM)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def backend(sleeps: bool = False, **rollout) -> vllm_backend.VLLMBackend:
        config = Config.model_validate({"model": {"path": "m"}, "rollout": rollout})
        return vllm_backend.VLLMBackend(config, frozenset({2}), "object_store", 1024, sleeps=sleeps)

    return backend


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(vllm_backend.current_platform, "is_sleep_mode_available", lambda: True)


def test_on_a_cpu_it_is_eager_with_a_small_cache(backend):
    settings = backend().llm.settings
    assert settings["enforce_eager"] and settings["kv_cache_memory_bytes"] == GIB
    assert {"gpu_memory_utilization", "compilation_config"}.isdisjoint(settings) and not settings["enable_sleep_mode"]
    assert backend(kv_cache_gib=2.5, enforce_eager=False).llm.settings["kv_cache_memory_bytes"] == 2.5 * GIB


def test_on_a_gpu_it_has_graphs_and_takes_what_is_left(backend):
    settings = backend(gpus_per_actor=1, gpu_memory_utilization=0.7).llm.settings
    assert not settings["enforce_eager"] and settings["gpu_memory_utilization"] == 0.7
    assert {"kv_cache_memory_bytes", "compilation_config"}.isdisjoint(settings)  # vLLM measures, and has graphs up to 512 sequences
    assert backend(gpus_per_actor=1, enforce_eager=True).llm.settings["enforce_eager"]


def test_with_a_given_cache_it_starts_on_a_gpu_that_others_fill(backend):
    settings = backend(gpus_per_actor=1, kv_cache_gib=8).llm.settings
    assert settings["kv_cache_memory_bytes"] == 8 * GIB
    assert settings["gpu_memory_utilization"] < 0.02  # more must be free at the start, whatever the cache


def test_every_number_of_sequences_has_a_graph(backend):
    for sequences, largest in ((600, 608), (1024, 1024)):
        settings = backend(gpus_per_actor=1, max_concurrent_sequences=sequences).llm.settings
        assert settings["compilation_config"] == {"max_cudagraph_capture_size": largest}
    assert "compilation_config" not in backend(gpus_per_actor=1, max_concurrent_sequences=600, enforce_eager=True).llm.settings


def test_a_pass_has_room_for_every_sequence(backend):
    assert backend().llm.settings["max_num_batched_tokens"] is None
    assert backend(max_batched_tokens=4096).llm.settings["max_num_batched_tokens"] == 4096
    with pytest.raises(ValidationError, match="max_batched_tokens must be at least max_concurrent_sequences, 256"):
        backend(max_batched_tokens=255)


@pytest.mark.parametrize(("shards", "executor"), [(1, "uni"), (2, "mp")])
def test_rays_executor_is_never_vllms_choice(backend, shards, executor):
    assert backend(tensor_parallel_size=shards).llm.settings["distributed_executor_backend"] == executor


def test_an_engine_sleeps_and_wakes_around_a_sync(backend, on_gpu):
    engine = backend(sleeps=True, gpus_per_actor=1, kv_cache_gib=4)
    assert engine.llm.settings["enable_sleep_mode"]
    assert engine.sleep()
    engine.wake("weights")
    engine.start_weight_update()
    engine.update_weights({"names": []})
    engine.finish_weight_update()
    engine.wake("cache")
    update = [("start_weight_update",), ("update_weights", {"names": []}), ("finish_weight_update",), ("reset_prefix_cache",)]
    assert engine.llm.calls == [("sleep", 2), ("wake_up", "weights"), *update, ("wake_up", "kv_cache")]


def test_an_engine_that_does_not_sleep_says_so(backend):
    engine = backend(gpus_per_actor=1)
    assert not engine.sleep()
    engine.wake("weights")
    assert engine.llm.calls == []


def test_a_device_without_sleep_mode_is_one_line(backend):
    with pytest.raises(ResourceError, match=r"^rollout: an engine on a cpu can't sleep; vLLM's sleep mode needs a GPU$"):
        backend(sleeps=True)


def test_keys_and_values_of_old_weights_end_the_run(backend):
    engine = backend()
    engine.llm.resets = False
    with pytest.raises(RuntimeError, match="kept keys and values of the old weights"):
        engine.finish_weight_update()


class _Card:
    """Stands in for torch's view of a GPU: free memory of the calls to come."""

    def __init__(self, *free: int) -> None:
        self.free = list(free)

    def get_memory_info(self) -> tuple[int, int]:
        return self.free.pop(0), 80 * GIB

    def synchronize(self) -> None:
        pass


class _Worker:
    """What a worker of vLLM needs to sleep."""

    model_runner = SimpleNamespace(model=torch.nn.Linear(1, 1))
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(enable_nccl_comm_suspend=False))

    def __init__(self) -> None:
        self.levels: list[int] = []
        self.sleep_mode_backend = SimpleNamespace(suspend=self.levels.append)

    def _save_sleep_parameters(self, model: torch.nn.Module) -> None:
        pass

    def get_draft_model(self) -> None:
        return None


@pytest.mark.parametrize("free_afterwards", [50, 20])
def test_an_engine_falls_asleep_while_others_on_its_gpu_take_memory(monkeypatch, free_afterwards):
    from dvpo_ray.sync.vllm_receiver import Worker

    worker = _Worker()
    monkeypatch.setattr(torch, "accelerator", _Card(30 * GIB, free_afterwards * GIB))
    Worker.sleep(worker, level=2)  # 30 GiB were free before
    assert worker.levels == [2]


def test_another_failure_of_vllms_sleep_is_one(monkeypatch):
    from dvpo_ray.sync.vllm_receiver import Worker

    def broken(level: int) -> None:
        raise AssertionError("cumem allocator is not available")

    worker = _Worker()
    worker.sleep_mode_backend.suspend = broken
    monkeypatch.setattr(torch, "accelerator", _Card(30 * GIB))
    with pytest.raises(AssertionError, match="not available"):
        Worker.sleep(worker, level=2)
