"""The steps of the check: what proves something at the same time, then what measures, the most important first."""

from __future__ import annotations

from dvpo_ray.bench.gpu_check.runner import Step

_HERE = "dvpo_ray.bench.gpu_check"

STEPS = (
    Step("imports", f"{_HERE}.environment:imports", 100, "libraries, versions, kernels", beside=True),
    Step("packed", f"{_HERE}.layouts:packed", 100, "packed rows against padded rows, and the control", beside=True),
    Step("loops", f"{_HERE}.on_card:loops", 150, "algorithms, LoRA, temperature, transports, sleep, off-load, checkpoint", beside=True),
    Step("zero", f"{_HERE}.alone:zero", 120, "ZeRO 0 to 3, one rank", beside=True),
    Step("gvm", f"{_HERE}.runs:gvm", 150, "training of a value model, killed and resumed", beside=True),
    Step("models", f"{_HERE}.shapes:make_models", 150, "checkpoints for the steps below", beside=True),
    Step("costs-1b", f"{_HERE}.on_card:costs_1b", 220, "sync, engine, memory, DVPO against PPO, 1B"),
    Step("speed-3b", f"{_HERE}.alone:speed_3b", 150, "each role alone, 3B"),
    Step("speed-1b", f"{_HERE}.alone:speed_1b", 110, "each role alone, 1B"),
    Step("nccl", f"{_HERE}.runs:nccl", 100, "weights by NCCL", gpus=2),
    Step("tensor-parallel", f"{_HERE}.runs:tensor_parallel", 100, "an engine over two GPUs", gpus=2),
    Step("two-ranks", f"{_HERE}.runs:two_ranks", 240, "ZeRO 1 to 3, two ranks", gpus=2),
)
