"""What vLLM is asked for, and in which order its sleep mode is used."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from pydantic import ValidationError
from safetensors.torch import load_file

from dvpo_ray.config.schema import Config
from dvpo_ray.errors import ResourceError
from dvpo_ray.planning.placement import ADAPTER_RANKS
from dvpo_ray.sync.object_store import pack

pytest.importorskip("vllm")
from dvpo_ray.actors import vllm_backend

GIB = 2**30


class _LLM:
    """Stands in for vLLM's `LLM`: keeps its settings and the calls, in order."""

    def __init__(self, **settings) -> None:
        self.settings, self.calls, self.idle = settings, [], []
        self.resets = True

    def collective_rpc(self, method: str, args: tuple = ()) -> list:
        self.calls.append((method, *args))
        return [self.idle]

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


@pytest.fixture
def with_adapters(monkeypatch):
    """An engine that takes adapters of rank 9, with the stand-in, and what its vLLM has been given."""
    monkeypatch.setattr(vllm_backend, "LLM", _LLM)
    monkeypatch.setattr(vllm_backend.current_platform, "is_sleep_mode_available", lambda: True)
    lora = {"rank": 9, "alpha": 6, "target_modules": ["q_proj", "o_proj"]}
    config = Config.model_validate({"model": {"path": "m"}, "policy": {"lora": lora}, "rollout": {"gpus_per_actor": 1}})
    return vllm_backend.VLLMBackend(config, frozenset({2}), "adapters", 1024, sleeps=True)


def test_an_engine_with_adapters_keeps_its_model_in_its_sleep(with_adapters):
    settings = with_adapters.llm.settings
    assert settings["enable_lora"] and settings["max_lora_rank"] == 16 and settings["lora_target_modules"] == ["q_proj", "o_proj"]
    assert settings["weight_transfer_config"] is None and settings["load_format"] == "auto"
    assert not with_adapters.sleep()  # nothing is lost
    with_adapters.wake("weights")
    assert with_adapters.llm.calls == [("sleep", 1), ("wake_up", "weights")]


def test_new_adapters_replace_the_old_in_every_response_to_come(with_adapters):
    llm, given = with_adapters.llm, []
    llm.llm_engine = SimpleNamespace(
        add_lora=lambda request: given.append((request, *read(request.lora_path))), add_request=lambda *_, **more: given.append(more)
    )

    def read(folder: str) -> tuple[dict, dict]:
        return json.loads((Path(folder) / "adapter_config.json").read_text()), load_file(Path(folder) / "adapter_model.safetensors")

    weights = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.randn(9, 4)}
    (bucket,) = pack(weights.items(), 1000, checksum=True)
    with_adapters.start_weight_update()
    with_adapters.update_weights({"description": PeftLoraConfig(r=9, lora_alpha=6, target_modules=["q_proj"]), **bucket})
    with_adapters.finish_weight_update()
    request, description, arrived = given.pop()
    assert request.load_inplace and (description["r"], description["lora_alpha"]) == (9, 6)
    assert arrived.keys() == weights.keys() and all(torch.equal(arrived[name], weights[name]) for name in weights)
    assert not Path(request.lora_path).exists() and llm.calls[-1] == ("reset_prefix_cache",)
    with_adapters.add([0], [[1, 2]], seed=[3])
    (used,) = given
    assert used["lora_request"].lora_int_id == request.lora_int_id and not used["lora_request"].load_inplace  # else vLLM would read it at each step

    llm.idle = ["model.layers.0.other"]
    with pytest.raises(
        ResourceError, match=r"^weight_sync.transport is adapters, but vLLM has no place for the one of model.layers.0.other; set it to auto$"
    ):
        with_adapters.update_weights({"description": PeftLoraConfig(), **bucket})


def test_a_model_without_adapters_in_vllm_is_one_line(with_adapters, monkeypatch):
    def refuse(**_) -> None:
        raise ValueError("GPT2LMHeadModel does not support LoRA yet.")

    monkeypatch.setattr(vllm_backend, "LLM", refuse)
    config = Config.model_validate({"model": {"path": "m"}, "policy": {"lora": {}}})
    with pytest.raises(ResourceError, match=r"^weight_sync.transport is adapters, but vLLM says: GPT2LMHeadModel does not .* Set it to auto$"):
        vllm_backend.VLLMBackend(config, frozenset({2}), "adapters", 1024)


def test_ranks_are_those_that_vllm_has():
    from vllm.config.lora import MaxLoRARanks

    assert get_args(MaxLoRARanks) == ADAPTER_RANKS


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
