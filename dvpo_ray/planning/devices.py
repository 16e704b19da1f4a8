"""How fast a device computes and how much it holds: from a table, or measured here in seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from dvpo_ray.config.schema import Config
from dvpo_ray.errors import InputError, ResourceError
from dvpo_ray.gvm.model import keep_first_layers
from dvpo_ray.models.loading import default_device
from dvpo_ray.planning.architecture import ModelPlan, policy_plan
from dvpo_ray.planning.memory import rows_together
from dvpo_ray.planning.times import forward_flops

TERA, GIGA = 1e12, 1e9
COMPUTE_SHARE, BANDWIDTH_SHARE = 0.4, 0.6
"""Shares of a GPU's peak that training and scoring of a transformer, and decoding, commonly reach."""
_SLICE_LAYERS = 2
_MEASURED_TOKENS = 2048
_ROUNDS = 3


@dataclass(frozen=True)
class Device:
    """What one GPU, or the CPU with the policy's threads, does.

    Attributes:
        name: as `--device` takes it.
        memory_gib: of the GPU; None on a CPU, whose memory is the node's.
        training_flops: floating-point operations a second of forward and backward passes.
        scoring_flops: of forward passes.
        bytes_per_second: at which decoding reads weights and the optimizer its state.
        measured: on this machine; else from the table.
    """

    name: str
    memory_gib: float | None
    training_flops: float
    scoring_flops: float
    bytes_per_second: float
    measured: bool = False

    @property
    def is_gpu(self) -> bool:
        return self.memory_gib is not None


def _gpu(name: str, memory_gib: float, peak_tflops: float, peak_gb_per_second: float) -> Device:
    flops = COMPUTE_SHARE * peak_tflops * TERA
    return Device(name, memory_gib, flops, flops, BANDWIDTH_SHARE * peak_gb_per_second * GIGA)


# The makers' figures: usable GiB, dense bfloat16 TFLOP/s, GB/s of memory.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("h200", 139.8, 989, 4800),
        _gpu("h100-80gb", 79.1, 989, 3350),
        _gpu("a100-80gb", 79.2, 312, 2039),
        _gpu("a100-40gb", 39.4, 312, 1555),
        _gpu("l40s", 44.4, 362, 864),
        _gpu("a10g", 22.0, 70, 600),
        _gpu("l4", 22.0, 121, 300),
        _gpu("rtx-4090", 23.5, 165, 1008),
    )
}
_CPU_FLOPS_PER_THREAD, _CPU_BYTES_PER_SECOND = 30 * GIGA, 10 * GIGA


def choose_device(config: Config, name: str | None) -> Device:
    """The device that the learner computes on: the named GPU, else the one of this machine; a CPU where the config asks for no GPU.

    Raises:
        InputError: no GPU of that name is known. ResourceError: the config asks for GPUs, none is named and this machine has none.
    """
    if name not in (None, "cpu", *GPUS):
        raise InputError(f"--device {name!r}: not known; expected cpu or one of {', '.join(GPUS)}")
    if config.policy.gpus_per_actor == 0:
        if name not in (None, "cpu"):
            raise InputError(f"--device is {name}, but policy.gpus_per_actor is 0: this config computes on the CPU")
        flops = _CPU_FLOPS_PER_THREAD * config.policy.threads
        return Device("cpu", None, flops, flops, _CPU_BYTES_PER_SECOND)
    if name == "cpu":
        raise InputError(f"--device is cpu, but policy.gpus_per_actor is {config.policy.gpus_per_actor:g}; name a GPU: {', '.join(GPUS)}")
    if name is not None:
        return GPUS[name]
    if not torch.cuda.is_available():
        raise ResourceError(f"the config computes on GPUs and this machine has none; name one with --device: {', '.join(GPUS)}")
    return _this_gpu()


def _this_gpu() -> Device:
    properties = torch.cuda.get_device_properties(0)
    memory_gib = properties.total_memory / 2**30
    words = properties.name.lower().replace(" ", "-")
    known = [gpu for gpu in GPUS.values() if gpu.name.split("-80gb")[0].split("-40gb")[0] in words]
    if not known:
        raise ResourceError(f"{properties.name}: its speed is not in the table; measure it with --calibrate, or name a GPU like it with --device")
    return replace(min(known, key=lambda gpu: abs(gpu.memory_gib - memory_gib)), memory_gib=memory_gib)


def calibrate(config: Config) -> Device:
    """Measure two decoder layers of the policy on this machine, with the learner's threads and dtype: some seconds.

    Raises:
        InputError: the policy's config.json is missing. ResourceError: the config asks for GPUs and this machine has none.
    """
    on_gpu = config.policy.gpus_per_actor > 0
    if on_gpu and not torch.cuda.is_available():
        raise ResourceError("--calibrate measures this machine, but the config computes on GPUs and there is none here; name one with --device")
    plan = _slice_of(policy_plan(config, trained=False))
    device = default_device() if on_gpu else torch.device("cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(config.policy.threads)
    try:
        with torch.device(device):
            model = plan.build().base_model.train()
        return _measured(plan, model, config, device)
    finally:
        torch.set_num_threads(threads)


def _slice_of(plan: ModelPlan) -> ModelPlan:
    keep_first_layers(plan.model_config, min(_SLICE_LAYERS, plan.model_config.get_text_config().num_hidden_layers), "")
    return plan


def _measured(plan: ModelPlan, model: torch.nn.Module, config: Config, device: torch.device) -> Device:
    sizes = plan.architecture()
    length = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    rows = rows_together(min(_MEASURED_TOKENS, config.batch.micro_batch_tokens), length)
    ids = torch.zeros(rows, length, dtype=torch.long, device=device)
    flops = rows * length * forward_flops(sizes, length)

    def train() -> None:
        model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()

    def score() -> None:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)

    def decode() -> None:
        with torch.inference_mode():
            model(input_ids=ids[:1, :1], use_cache=False)

    name, memory = ("cpu", None) if device.type == "cpu" else ("this GPU", torch.cuda.get_device_properties(0).total_memory / 2**30)
    read = sizes.layer_matrices * next(model.parameters()).element_size()
    return Device(name, memory, 3 * flops / _seconds(train), flops / _seconds(score), read / _seconds(decode), measured=True)


def _seconds(work: Callable[[], None]) -> float:
    """The fastest of some rounds after one that warms up: what the machine can do when nothing else runs."""
    times = []
    for _ in range(_ROUNDS + 1):
        _synchronize()
        started = time.perf_counter()
        work()
        _synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
