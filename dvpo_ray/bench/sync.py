"""`dvpo bench sync`: how fast all weights travel from the learner to the engines."""

from __future__ import annotations

import math
import time
from pathlib import Path

from dvpo_ray.actors.policy_learner import PolicyLearner
from dvpo_ray.actors.roles import started_roles
from dvpo_ray.bench.measure import Spread, describe_measurement
from dvpo_ray.config.arithmetic import counted
from dvpo_ray.config.schema import Config
from dvpo_ray.monitoring.console import RunConsole
from dvpo_ray.planning.placement import choose_transport
from dvpo_ray.runtime.cluster import connect
from dvpo_ray.runtime.waiting import get
from dvpo_ray.training.turns import Turns


def bench_sync(config: Config, run_folder: Path, repeats: int) -> dict:
    """Measure syncs of all weights, or of all adapters, with the config's own engines, learner and transport, and print the result.

    Args:
        run_folder: gets the actors' logs.
        repeats: measured syncs after one that warms up.

    Returns:
        `seconds` and `gb_per_second` (10^9 bytes, each engine gets all of them) of each sync, ready for JSON.

    Raises:
        InputError, ResourceError: in one line.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    transport = choose_transport(config)
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    with RunConsole() as console, console.entering("start of Ray", connect(config.ray, console.say), quiet=True):
        roles = started_roles(config, str(run_folder.resolve()), frozenset({0}), longest, ("rollout", "learner"), console.starting)
        with console.entering("start of the actors", roles) as roles:
            size = get(roles.learners[0].observe.remote(_bytes, transport), what="the size of the weights")
            Turns(roles).updated()  # engines that share a GPU are asleep
            seconds = []
            for version in range(repeats + 1):
                started = time.perf_counter()
                get([learner.sync_weights.remote(version, True) for learner in roles.learners], what="weight sync")
                seconds.append(time.perf_counter() - started)
        speeds = [size / one / 1e9 for one in seconds[1:]]
        told = f"{size / 1e9:.3f} GB to {counted(len(roles.engines), 'engine')} by {transport}, first in {seconds[0]:.2f} s"
        console.say(f"{told}: {Spread.of(speeds):.2f} GB/s, median (range)")
    results = {"transport": transport, "bytes": size, "first_seconds": seconds[0], "seconds": seconds[1:], "gb_per_second": speeds}
    return {"benchmark": "sync", **describe_measurement(config), **results, "config": config.model_dump(mode="json")}


def _bytes(learner: PolicyLearner, transport: str) -> int:
    if transport == "adapters":
        return sum(tensor.nbytes for _, tensor in learner.training.adapters())
    return sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in learner.training.describe_weights())
