"""`dvpo bench ledger`: what a training step of each algorithm costs in memory and time, on the real loop, from one config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from dvpo_ray.actors.roles import Roles
from dvpo_ray.bench.ledger_results import AlgorithmLedger, LedgerResults, training_cost
from dvpo_ray.bench.machine import describe_measurement
from dvpo_ray.bench.memory import read_ledger, start_ledger
from dvpo_ray.bench.overhead import StepProfile, profile_steps, round_folder, round_title
from dvpo_ray.config import override_config
from dvpo_ray.config.algorithms import ALGORITHMS
from dvpo_ray.config.arithmetic import derive_batch
from dvpo_ray.config.schema import Config
from dvpo_ray.errors import InputError
from dvpo_ray.monitoring.console import RunConsole
from dvpo_ray.planning.memory import ActorMemory, predict_roles
from dvpo_ray.runtime.cluster import connect, get
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
        settings: overrides of each algorithm's own, such as the layout that suits it best.
        rounds: the algorithms take so many turns, each from a new start, in every second one the other way round; memory is that of the last.

    Returns:
        The results with all that they depend on, ready for JSON, and their tables as Markdown.

    Raises:
        InputError, ResourceError: in one line; bad input is found before any actor starts.
    """
    measurement = describe_measurement(config)
    configs = {algorithm: config_for(override_config(config, settings[algorithm]), algorithm, group_size) for algorithm in algorithms}
    inputs = {algorithm: load_inputs(changed) for algorithm, changed in configs.items()}
    profiles: dict[str, list[StepProfile]] = {algorithm: [] for algorithm in configs}
    meters = {algorithm: _RoleMemory() for algorithm in configs}
    with RunConsole() as console, connect(config.ray):
        for number in range(1, rounds + 1):
            for algorithm in algorithms if number % 2 == 1 else algorithms[::-1]:
                folder = round_folder((run_folder / algorithm).resolve(), number, rounds)
                with console.stage(round_title(algorithm, number, rounds), repeats + 1, unit="steps") as progress:
                    around_step = meters[algorithm].around_step
                    profiles[algorithm].append(profile_steps(configs[algorithm], inputs[algorithm], folder, repeats, progress.advance, around_step))
        ledgers = [
            AlgorithmLedger(
                algorithm,
                derive_batch(changed).samples_per_step,
                profiles[algorithm],
                meters[algorithm].by_role,
                {role: prediction.memory for role, prediction in predict_roles(changed).items()},
            )
            for algorithm, changed in configs.items()
        ]
        results = LedgerResults(ledgers, _costs(config, algorithms), on_gpu=torch.cuda.is_available() and config.policy.gpus_per_actor > 0)
        for line in results.lines():
            console.say(line)
    as_json = {
        "benchmark": "ledger",
        **measurement,
        "rounds": rounds,
        "repeats": repeats,
        **results.as_json(),
        "settings": settings,
        "config": config.model_dump(mode="json"),
    }
    return as_json, results.markdown()


def config_for(config: Config, algorithm: str, group_size: int) -> Config:
    """The config of one algorithm: the same samples per step, each of exactly `rollout.max_response_tokens` tokens.

    An algorithm that compares the samples of a prompt gets `group_size` of them, where the config says one, and as many fewer prompts.

    Raises:
        InputError: the samples of a step can't be shared out in such groups.
    """
    batch = config.batch
    if batch.samples_per_prompt < ALGORITHMS[algorithm].min_samples_per_prompt:
        samples = batch.prompts_per_step * batch.samples_per_prompt
        if samples % group_size:
            raise InputError(
                f"--group-size is {group_size}, but {algorithm} can't share {samples} samples of a step out in groups of it; give a divisor"
            )
        batch = batch.model_copy(update={"prompts_per_step": samples // group_size, "samples_per_prompt": group_size})
    changes = {
        "algorithm": algorithm,
        "batch": batch,
        "rollout": config.rollout.model_copy(update={"min_response_tokens": config.rollout.max_response_tokens}),
        "advantage": config.advantage.model_copy(update={"truncated": "bootstrap"}),  # every response is cut off: none may be left out
    }
    return config.model_copy(update=changes)


class _RoleMemory:
    """The memory of one step by role, summed over a role's actors."""

    def __init__(self) -> None:
        self.by_role: dict[str, ActorMemory] = {}

    @contextmanager
    def around_step(self, roles: Roles) -> Iterator[None]:
        handles = {role: actors for role, actors in roles.by_role.items() if role != "experience"}  # which holds no model
        get([actor.observe.remote(start_ledger) for actors in handles.values() for actor in actors], what="the start of the memory ledger")
        yield
        pending = {role: [actor.observe.remote(read_ledger) for actor in actors] for role, actors in handles.items()}
        self.by_role = {role: sum(get(refs, what=f"memory of {role}"), ActorMemory()) for role, refs in pending.items()}


def _costs(config: Config, algorithms: Sequence[str]) -> dict[str, dict | None]:
    """What training the frozen models cost before, by config section."""
    sections = {ALGORITHMS[algorithm].section for algorithm in algorithms}
    return {section: training_cost(Path(getattr(config, section).path)) for section in sorted(sections)}
