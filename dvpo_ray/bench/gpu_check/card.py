"""The roles of every algorithm on one card, started once."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import ray
from ray.actor import ActorHandle

from dvpo_ray.actors.experience_builder import ExperienceBuilder
from dvpo_ray.actors.frozen import ReferenceModel, ValueScorer
from dvpo_ray.actors.policy_learner import PolicyLearner
from dvpo_ray.actors.roles import Roles, plan_memory, started_roles
from dvpo_ray.actors.rollout_engine import RolloutEngine
from dvpo_ray.batch import RaggedBatch
from dvpo_ray.bench.gpu_check.figures import Report
from dvpo_ray.bench.gpu_check.shapes import changed, models_of
from dvpo_ray.bench.ledger import config_for
from dvpo_ray.config.algorithms import ALGORITHMS
from dvpo_ray.config.arithmetic import derive_batch
from dvpo_ray.config.schema import Config, RoleConfig
from dvpo_ray.planning.memory import predict_roles
from dvpo_ray.runtime.cluster import connect
from dvpo_ray.runtime.fork_server import prepare, runtime_env
from dvpo_ray.runtime.process import Actor, driver_folders, environment
from dvpo_ray.runtime.room import wait_until_ready
from dvpo_ray.runtime.waiting import get, introduce, patience
from dvpo_ray.training.policy import PolicyLoop
from dvpo_ray.training.policy_inputs import Inputs, load_inputs

GROUP_SIZE = 4
PATIENCE_SECONDS = 120.0
"""For any answer of an actor."""
TEMPERATURE = 0.7
ADAPTERS = "policy.lora={rank: 8, alpha: 16}"


class Card:
    """The roles of all algorithms, and the loop of each of them.

    Attributes:
        roles: those of PPO, and `scorer` beside them.
        others: an engine that gets its weights through the object store and samples at another temperature; and where the start was with
            adapters, the roles of a DVPO of its own with a LoRA learner.
        adapted: the same roles, but an engine that gets adapters alone.
        other_config: of `others`.
        version: of the weights of the engine in `roles`.
        began: when the command began, but for the making of models and for the plans of loops, in seconds since the epoch.
        is_measured: the shape is one that targets are for.
    """

    def __init__(
        self,
        report: Report,
        config: Config,
        other_config: Config,
        inputs: Inputs,
        roles: Roles,
        others: Roles,
        adapted: Roles,
        began: float,
        is_measured: bool,
    ) -> None:
        self.report, self.config, self.other_config, self.inputs = report, config, other_config, inputs
        self.roles, self.others, self.adapted, self.began, self.is_measured = roles, others, adapted, began, is_measured
        self.version = 0

    @property
    def engine(self) -> ActorHandle:
        return self.roles.engines[0]

    @property
    def learner(self) -> ActorHandle:
        return self.roles.learners[0]

    def loop(self, algorithm: str) -> PolicyLoop:
        """The loop of an algorithm on the roles that it has."""
        config, facts = config_for(self.config, algorithm, GROUP_SIZE), ALGORITHMS[algorithm]
        get(self.roles.builder.observe.remote(_begin_again, config), what="the experience builder")
        wanted = ("rollout", facts.scorer, "reference", "learner", *(["critic"] if facts.has_critic else []), "experience")
        # The scorer of a GVM has no seat; it takes that of the reward model.
        seats = [replace(seat, role=facts.scorer) if seat.role == "reward_model" else seat for seat in self.roles.room.seats]
        room = replace(self.roles.room, seats=[seat for seat in seats if seat.role in wanted])
        by_role = {role: self.roles.by_role[role] for role in wanted}
        planning = time.time()
        slots = plan_memory(config, room, predict_roles(config)) if room.cards else None
        self.began += time.time() - planning  # a run does this while Ray starts
        roles = replace(self.roles, by_role=by_role, room=room, slots=slots)
        loop = PolicyLoop(config, roles, self.inputs.prompts, [])
        loop.policy_version, loop.start_is_checked = self.version, self.version > 0
        return loop

    def step(self, loop: PolicyLoop) -> dict[str, float]:
        """The next step, counted over all loops."""
        self.version += 1
        return loop.step(self.version)

    def sync(self, engines: list[ActorHandle] | None = None, transport: str = "", times: int = 1) -> tuple[list[float], int]:
        """Bring all weights to the engines; see `timed_syncs`."""
        with self.learner_here():
            return get(self.learner.observe.remote(timed_syncs, engines, transport, self.version, times), what="weight sync")

    @contextmanager
    def learner_here(self) -> Iterator[None]:
        """For the time of a `with` block between two steps the learner is on the card, also where it is in host memory then."""
        away = self.roles.slots is not None and self.roles.slots.offloads_trained
        if away:
            get(self.learner.reload.remote(), what="the learner")
        yield
        if away:
            get(self.learner.offload.remote(), what="the learner")

    def prompts(self, round_: int) -> list[list[int]]:
        """The prompts of a batch, others in every round."""
        rows, prompts = derive_batch(self.config).samples_per_step, self.inputs.prompts
        return [prompts[(round_ * rows + row) % len(prompts)] for row in range(rows)]

    def greedy(self, engine: ActorHandle | None = None) -> np.ndarray:
        """The likeliest tokens of the engine, or of another one. In 16 bits, where ties are common, they depend on which prompts are
        cached: none is."""
        engine, prompts = engine or self.engine, self.prompts(0)
        get(engine.observe.remote(forget_prompts), what="the engine")
        chunks = ray.get(list(engine.generate.remote(prompts, 0, list(range(len(prompts))), 0, True)))
        return RaggedBatch.concatenate(chunks).sorted_by_id().tokens


def forget_prompts(engine: RolloutEngine) -> None:
    """Inside an engine: no prompt is cached from an earlier round."""
    engine.backend.llm.reset_prefix_cache()


def _begin_again(builder: ExperienceBuilder, config: Config) -> None:
    """Make an experience builder that of another algorithm; it holds no model."""
    ExperienceBuilder.__init__(builder, config, builder.index, str(builder.run_folder))


def timed_syncs(learner: PolicyLearner, engines: list[ActorHandle] | None, transport: str, version: int, times: int) -> tuple[list[float], int]:
    """Inside a learner: bring all its weights to its engines, or over a new channel to others; seconds of each time, and bytes."""
    own, seconds = learner.sender, []
    if engines is not None:
        learner.open_channel(engines, transport)
    for _ in range(times):
        started = time.perf_counter()
        learner.sender.send(version, changing_only=False)
        seconds.append(time.perf_counter() - started)
    learner.sender = own
    return seconds, sum(tensor.numel() * tensor.element_size() for _, tensor in learner.training.weights())


def beside(report: Report, cls: type[Actor], section: str | None, config: Config, folder: str, *more) -> ActorHandle:
    """An actor on the same card as the others, without a seat.

    Args:
        section: of the config, with the settings of the role; None for a role without.
        more: arguments of its constructor after config, index and folder.
    """
    variables = environment(getattr(config, section) if section else RoleConfig()) | driver_folders()
    if report.on_gpu:
        card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        variables |= {"CUDA_VISIBLE_DEVICES": card, "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
    name, log = f"{Path(folder).name}-{cls.role}", Path(folder) / "logs" / f"{cls.role}-0.log"
    options = {"name": name, "num_cpus": 0, "num_gpus": 0, "runtime_env": runtime_env(variables)}
    handle = ray.remote(cls).options(**options).remote(config, 0, folder, *more)
    introduce(handle, name, log)
    return handle


def connected(learner: ActorHandle, engines: list[ActorHandle], transport: str) -> ActorHandle:
    """A learner of one rank with its model, and its channel to some engines."""
    get(learner.connect.remote(learner.rendezvous.remote()), what="the start of the learner")
    get(learner.open_channel.remote(engines, transport), what="the channel to the engines")
    return learner


@contextmanager
def started_card(report: Report, name: str, *overrides: str, adapters: bool) -> Iterator[Card]:
    """All roles at a shape, started together, with their first weights.

    Args:
        name: of the shape.
        adapters: also start a LoRA learner and what its loop needs.
    """
    began, making = psutil.Process().create_time(), time.time()
    _, made = models_of(report, name)
    began += time.time() - making
    base = changed(made, *overrides)
    config, dvpo = (config_for(base, algorithm, GROUP_SIZE) for algorithm in ("ppo", "dvpo"))
    differs = ["weight_sync.transport=object_store", f"rollout.temperature={TEMPERATURE}", "rollout.kv_cache_gib=1", "rollout.enforce_eager=true"]
    other = changed(dvpo, *differs, ADAPTERS)
    prepare(config)
    inputs = load_inputs(config)
    stops, longest = inputs.stop_token_ids, config.data.max_prompt_tokens + config.rollout.max_response_tokens
    folder, second = str(report.folder / "run"), str(report.folder / "other")
    with connect(config.ray, print), patience(seconds=PATIENCE_SECONDS):
        scorer = [beside(report, ValueScorer, "scorer", dvpo, folder)]
        others = {"rollout": [beside(report, RolloutEngine, "rollout", other, second, stops, "object_store", longest, False)]}
        adapted = []
        if adapters:
            alone, third = changed(other, "weight_sync.transport=adapters"), str(report.folder / "adapted")
            adapted = [beside(report, RolloutEngine, "rollout", alone, third, stops, "adapters", longest, True, report.on_gpu)]
            others["reference"] = [beside(report, ReferenceModel, "reference", other, second, stops)]
            others["learner"] = [beside(report, PolicyLearner, "policy", other, second, stops)]
            others["experience"] = [beside(report, ExperienceBuilder, None, other, second)]
        with started_roles(config, folder, stops, longest) as roles:
            wait_until_ready({"scorer": scorer}, config.rollout.start_timeout_seconds)
            with report.part("the other roles"):
                wait_until_ready(others | {"adapted": adapted}, config.rollout.start_timeout_seconds)
                for learner in others.get("learner", []):
                    connected(learner, others["rollout"], "object_store")
            report.figure("start of the actors, from the command", time.time() - began, "s")
            own = replace(roles, by_role={**roles.by_role, "scorer": scorer})
            apart = Roles({**others, "scorer": scorer}, [], replace(roles.room, seats=[]), second)  # nobody of them takes turns
            engines = replace(apart, by_role=apart.by_role | {"rollout": adapted})
            yield Card(report, config, other, inputs, own, apart, engines, began, is_measured=name != "tiny")
