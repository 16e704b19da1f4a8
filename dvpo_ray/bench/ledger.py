"""`dvpo bench ledger`: what a training step of each algorithm costs in memory and time, on the real loop, from one config."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from dvpo_ray.actors.roles import Roles
from dvpo_ray.bench.ledger_results import algorithm_results, ledger_results, lines, markdown, training_cost
from dvpo_ray.bench.measure import describe_measurement
from dvpo_ray.bench.memory import read_ledger, start_ledger
from dvpo_ray.bench.overhead import StepProfile, profile_steps, take_rounds
from dvpo_ray.config import override_config
from dvpo_ray.config.algorithms import ALGORITHMS
from dvpo_ray.config.arithmetic import counted, derive_batch
from dvpo_ray.config.schema import Config
from dvpo_ray.errors import InputError
from dvpo_ray.monitoring.console import RunConsole
from dvpo_ray.planning.memory import ActorMemory, predict_roles
from dvpo_ray.runtime.cluster import connect
from dvpo_ray.runtime.waiting import get
from dvpo_ray.training.policy_inputs import load_inputs


def bench_ledger(
    config: Config, algorithms: Sequence[str], run_folder: Path, repeats: int, group_size: int, settings: Mapping[str, Sequence[str]], rounds: int = 1
) -> tuple[dict, str]:
    """Measure a step of several algorithms, one after the other, and print the results.

    Args:
        config: of all algorithms; see `config_for` for what is changed for each.
        run_folder: gets a folder for each algorithm with the actors' logs and what the steps write.
        repeats: measured steps; one more warms up. Memory is that of the last one.
        group_size: samples of a prompt for the algorithms that compare them, where the config has one.
        settings: overrides for each algorithm, such as the layout that suits it best.
        rounds: turns that the algorithms take, each from a new start; memory is that of the last one.

    Returns:
        The results with all that they depend on, ready for JSON, and their tables as Markdown.

    Raises:
        InputError, ResourceError: in one line; bad input is found before any actor starts.
    """
    measurement = describe_measurement(config)
    configs = {algorithm: config_for(override_config(config, settings[algorithm]), algorithm, group_size) for algorithm in algorithms}
    with RunConsole() as console, console.stage("reading models and prompts", quiet=True):
        inputs = {algorithm: load_inputs(changed) for algorithm, changed in configs.items()}
    memory: dict[str, dict[str, ActorMemory]] = {algorithm: {} for algorithm in algorithms}

    def profile(algorithm: str, folder: Path, after_step: Callable[[], None]) -> StepProfile:
        return profile_steps(configs[algorithm], inputs[algorithm], folder, repeats, after_step, partial(memory_by_role, memory[algorithm]))

    contestants = {algorithm: partial(profile, algorithm) for algorithm in algorithms}
    with RunConsole() as console, console.entering("start of Ray", connect(config.ray, console.say), quiet=True):
        profiles = take_rounds(contestants, console, run_folder.resolve(), rounds, repeats + 1)
        measured = {
            algorithm: algorithm_results(
                derive_batch(changed).samples_per_step,
                profiles[algorithm],
                memory[algorithm],
                {role: plan.memory for role, plan in predict_roles(changed).items()},
            )
            for algorithm, changed in configs.items()
        }
        sections = sorted({ALGORITHMS[algorithm].section for algorithm in algorithms})
        training = {section: training_cost(Path(getattr(config, section).path)) for section in sections}
        results = ledger_results(measured, training, on_gpu=torch.cuda.is_available() and config.policy.gpus_per_actor > 0)
        for line in lines(results):
            console.say(line)
    as_json = {
        "benchmark": "ledger",
        **measurement,
        "rounds": rounds,
        "repeats": repeats,
        **results,
        "settings": settings,
        "config": config.model_dump(mode="json"),
    }
    return as_json, markdown(results)


def config_for(config: Config, algorithm: str, group_size: int) -> Config:
    """The config of one algorithm: the same samples per step, each of exactly `rollout.max_response_tokens` tokens.

    An algorithm that compares the samples of a prompt gets `group_size` of them where the config has one, and fewer prompts accordingly.

    Raises:
        InputError: the samples of a step are not a multiple of the group size.
    """
    batch, longest = config.batch, config.rollout.max_response_tokens
    # Every response is cut off: none may be left out.
    changes = [f"algorithm={algorithm}", f"rollout.min_response_tokens={longest}", "advantage.truncated=bootstrap"]
    if batch.samples_per_prompt < ALGORITHMS[algorithm].min_samples_per_prompt:
        samples = batch.prompts_per_step * batch.samples_per_prompt
        if samples % group_size:
            raise InputError(f"--group-size is {group_size}, but a step of {algorithm} has {counted(samples, 'sample')}; give a divisor of that")
        changes += [f"batch.prompts_per_step={samples // group_size}", f"batch.samples_per_prompt={group_size}"]
    return override_config(config, changes)


@contextmanager
def memory_by_role(memory: dict[str, ActorMemory], roles: Roles) -> Iterator[None]:
    """Put the memory of the step inside a `with` block into a dictionary by role, summed over the role's actors."""
    handles = {role: actors for role, actors in roles.by_role.items() if role != "experience"}  # which holds no model
    get([actor.observe.remote(start_ledger) for actors in handles.values() for actor in actors], what="the start of the memory ledger")
    yield
    pending = {role: [actor.observe.remote(read_ledger) for actor in actors] for role, actors in handles.items()}
    memory.update({role: sum(get(refs, what=f"memory of {role}"), ActorMemory()) for role, refs in pending.items()})
