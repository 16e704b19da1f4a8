"""The steps of the check, the most important first."""

from __future__ import annotations

from dvpo_ray.bench.gpu_check.runner import Step

_HERE = "dvpo_ray.bench.gpu_check"

STEPS = (
    Step("imports", f"{_HERE}.environment:imports", 60, "libraries, versions, kernels"),
    Step("packed", f"{_HERE}.layouts:packed", 50, "packed rows against padded rows, and the control"),
    Step("loops", f"{_HERE}.on_card:loops", 150, "algorithms, LoRA, temperature, transports, sleep, checkpoint"),
    Step("speed-1b", f"{_HERE}.alone:speed_1b", 90, "each role alone, 1B"),
    Step("costs-1b", f"{_HERE}.on_card:costs_1b", 210, "sync, engine, memory, DVPO against PPO, 1B"),
    Step("speed-3b", f"{_HERE}.alone:speed_3b", 130, "each role alone, 3B"),
    Step("zero", f"{_HERE}.alone:zero", 60, "ZeRO 0 to 3, one rank"),
    Step("gvm", f"{_HERE}.runs:gvm", 90, "training of a value model, killed and resumed"),
    Step("nccl", f"{_HERE}.runs:nccl", 100, "weights by NCCL", gpus=2),
    Step("tensor-parallel", f"{_HERE}.runs:tensor_parallel", 100, "an engine over two GPUs", gpus=2),
    Step("two-ranks", f"{_HERE}.runs:two_ranks", 240, "ZeRO 1 to 3, two ranks", gpus=2),
)
