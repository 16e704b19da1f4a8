"""The parts of a step against the bare libraries: rollouts, the frozen models, and the learner."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from dvpo_ray.actors.frozen import ReferenceModel, ValueScorer
from dvpo_ray.actors.policy_learner import PolicyLearner
from dvpo_ray.actors.rollout_engine import RolloutEngine
from dvpo_ray.actors.update_plan import plan_update
from dvpo_ray.batch import RaggedBatch
from dvpo_ray.bench.bare import LAYOUTS, BareLearner, BareReference, BareRollout, BareScorer
from dvpo_ray.bench.measure import Contestant, Sample, compare, take_turns
from dvpo_ray.config import override_config
from dvpo_ray.config.arithmetic import derive_batch
from dvpo_ray.config.schema import Config
from dvpo_ray.models.loading import packs_rows
from dvpo_ray.planning.placement import Seat
from dvpo_ray.rollouts.schedule import prompt_indices, sampling_seed
from dvpo_ray.runtime.process import Actor, environment
from dvpo_ray.runtime.room import reserved, spawn, stop, wait_until_ready
from dvpo_ray.runtime.waiting import get, wait
from dvpo_ray.training.policy_inputs import Inputs

ROLLOUT_TARGET, FROZEN_TARGET, LEARNER_TARGET = 0.9, 0.9, 0.85


@dataclass
class Bench:
    """What the comparisons share. `compare_rollout` comes first: it makes the rollouts that the others work on.

    Attributes:
        config: the run's settings with one actor of each role.
        inputs: prompts and stop tokens.
        run_folder: gets the actors' logs.
        rows: prompts with one response each, in every round.
        learner_rows: how many of them the learner works on.
        repeats: measured rounds; one more warms up.
        after_round: called after each round, for a progress bar.
        chunks: rollouts of the last round, as the engine streamed them.
    """

    config: Config
    inputs: Inputs
    run_folder: str
    rows: int
    learner_rows: int
    repeats: int
    after_round: Callable[[], None] = lambda: None
    chunks: list[ObjectRef] = field(default_factory=list)

    def prompts_of(self, round_: int) -> list[list[int]]:
        """The prompts of a round, new ones every round."""
        batch = self.config.batch
        indices = prompt_indices(len(self.inputs.prompts), batch.prompts_per_step, round_ + 1, self.config.seed)
        prompts = [self.inputs.prompts[index] for index in indices for _ in range(batch.samples_per_prompt)]
        return prompts[: self.rows]

    def rollouts(self) -> RaggedBatch:
        """All rollouts of the last round."""
        return RaggedBatch.concatenate(ray.get(self.chunks)).sorted_by_id()

    @contextmanager
    def side_by_side(self, section: str, product: type[Actor], bare: type[Actor], *arguments) -> Iterator[tuple[ActorHandle, ActorHandle]]:
        """An actor of the system and its bare counterpart, ready, for the time of a `with` block.

        They work in turns, so together they reserve the CPUs of one. They are on the same GPU, which must have room for both.

        Args:
            section: of the config, with the settings of the role.
            arguments: of both constructors, after config, index and run folder.

        Raises:
            ResourceError: the cluster has no room for them, or one did not start in time.
        """
        config, settings = self.config, getattr(self.config, section)
        cpus = max(settings.cpus_per_actor / 2, 0.01)  # a placement group can't be empty
        gpus = settings.gpus_per_actor * getattr(settings, "tensor_parallel_size", 1)
        seats = {cls: Seat(f"bench_{cls.role}", 0, cpus, tuple(range(gpus))) for cls in (product, bare)}
        handles: list[ActorHandle] = []
        with reserved(list(seats.values()), config.ray) as room:
            try:
                for cls, seat in seats.items():
                    handles.append(spawn(cls, seat, room, environment(settings), config, 0, self.run_folder, *arguments, run_folder=self.run_folder))
                wait_until_ready({section: handles}, config.rollout.start_timeout_seconds)
                yield handles[0], handles[1]
            finally:
                stop(handles)


def compare_rollout(bench: Bench) -> list[dict]:
    """Generated tokens per second of the rollout engine's stream, as the driver sees it, against the library's own `generate`."""
    config = bench.config
    bare_name = "vllm LLM.generate" if config.rollout.backend == "vllm" else "transformers generate"
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    arguments = (bench.inputs.stop_token_ids, "object_store", longest)
    with bench.side_by_side("rollout", RolloutEngine, BareRollout, *arguments) as (engine, bare):

        def stream(round_: int) -> Sample:
            prompts, seed = bench.prompts_of(round_), sampling_seed(config.seed, round_, 0)
            started = time.perf_counter()
            bench.chunks = list(engine.generate.remote(prompts, round_, list(range(len(prompts))), seed))
            seconds = time.perf_counter() - started
            return Sample(int(bench.rollouts().response_lengths.sum()), seconds)

        def generate(round_: int) -> Sample:
            return get(bare.generate.remote(bench.prompts_of(round_), sampling_seed(config.seed, round_, 0)), what=bare_name)

        samples = take_turns({"product": stream, bare_name: generate}, bench.repeats, bench.after_round)
        # The engine owns the chunks' values and takes them with it when it ends.
        bench.chunks = [ray.put(chunk) for chunk in ray.get(bench.chunks)]
    return [compare("rollout", ROLLOUT_TARGET, samples)]


def compare_frozen(bench: Bench) -> list[dict]:
    """Tokens per second of the value scorer and of the reference model on the engine's chunks, against bare forward passes."""
    batch = bench.rollouts()
    comparisons = []
    for section, product, bare in (("scorer", ValueScorer, BareScorer), ("reference", ReferenceModel, BareReference)):
        with bench.side_by_side(section, product, bare) as (scorer, bare_scorer):

            def score(_round: int, scorer=scorer, section=section) -> Sample:
                started = time.perf_counter()
                scores = [scorer.score.remote(chunk) for chunk in bench.chunks]
                wait(scores, what=section)  # as in the loop: the driver never fetches them
                seconds = time.perf_counter() - started
                get(scores, what=section)  # raises what went wrong
                return Sample(batch.num_tokens, seconds)

            samples = take_turns({"product": score, **_by_layout(bare_scorer.forward, batch)}, bench.repeats, bench.after_round)
        comparisons.append(compare(section, FROZEN_TARGET, samples))
    return comparisons


def _by_layout(method, *arguments) -> dict[str, Contestant]:
    """The bare contestants: one for each layout of the rows."""
    return {layout: lambda _round, layout=layout: get(method.remote(*arguments, layout), what="the bare loop") for layout in LAYOUTS}


def compare_learner(bench: Bench) -> list[dict]:
    """Real tokens per second of the learner's update against bare forward, backward and AdamW with the same number of optimizer steps.

    The update is measured with the old log-probs given, which is the work of the bare loop. Where the config recomputes them,
    a second comparison, for information, adds the time of that extra forward pass.
    """
    recomputes = bench.config.policy.old_log_probs == "recompute" and derive_batch(bench.config).optimizer_steps_per_step > 1
    bench = replace(bench, config=override_config(bench.config, ["policy.old_log_probs=rollout"]))
    config = bench.config
    shard = with_learner_fields(bench.rollouts().select(np.arange(bench.learner_rows)), config.seed)
    reference = ray.put(shard)
    packed = packs_rows(config.model, config.model.path, on_gpu=config.policy.gpus_per_actor > 0)
    kl_coefficient = config.kl.coefficient if config.kl.placement == "loss" else 0.0
    with bench.side_by_side("policy", PolicyLearner, BareLearner) as (learner, bare):
        get(learner.connect.remote(learner.rendezvous.remote()), what="the start of the learner")

        def planned(round_: int) -> ObjectRef:
            return ray.put(plan_update(shard, config.batch, 1, config.batch.micro_batch_tokens, packed=packed, seed=config.seed, step=round_))

        def update(round_: int) -> Sample:
            work = planned(round_)
            started = time.perf_counter()
            get(learner.update.remote(work, kl_coefficient), what="the policy update")
            return Sample(shard.num_tokens * config.batch.update_epochs, time.perf_counter() - started)

        def recompute(round_: int) -> Sample:
            work = planned(round_)
            started = time.perf_counter()
            get(learner.old_log_probs.remote(work), what="old log-probs")
            return Sample(shard.num_tokens, time.perf_counter() - started)

        contestants = {"product": update} | ({"recompute": recompute} if recomputes else {})
        contestants |= _by_layout(bare.train, reference, _minibatches(config, shard.num_rows))
        samples = take_turns(contestants, bench.repeats, bench.after_round)
    recomputed = samples.pop("recompute", None)
    comparisons = [compare("learner", LEARNER_TARGET, samples)]
    if recomputed is not None:
        both = [Sample(a.tokens, a.seconds + b.seconds) for a, b in zip(samples["product"], recomputed, strict=True)]
        comparisons.append(compare("learner, old log-probs recomputed", None, samples | {"product": both}))
    return comparisons


def with_learner_fields(batch: RaggedBatch, seed: int) -> RaggedBatch:
    """The fields that a shard has, with random advantages: the cost of an update does not depend on them."""
    mask = batch.response_mask.astype(np.float32)
    advantages = np.random.default_rng(seed).standard_normal(batch.num_tokens).astype(np.float32) * mask
    return batch.with_token_fields(advantages=advantages, loss_mask=mask, reference_log_probs=batch.by_token["log_probs"])


def _minibatches(config: Config, num_rows: int) -> list[np.ndarray]:
    """Row indices of every optimizer step of a batch, shuffled as in the learner."""
    generator = np.random.default_rng(config.seed)
    count = config.batch.minibatches_per_epoch
    return [rows for _ in range(config.batch.update_epochs) for rows in np.split(generator.permutation(num_rows), count)]
