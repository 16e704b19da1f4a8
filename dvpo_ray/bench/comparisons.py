"""The parts of a step against the bare libraries: rollouts, the frozen models, and the learner."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import ray
from ray import ObjectRef

from dvpo_ray.actors.frozen import ReferenceModel, ValueScorer
from dvpo_ray.actors.policy_learner import PolicyLearner
from dvpo_ray.actors.rollout_engine import RolloutEngine
from dvpo_ray.batch import RaggedBatch
from dvpo_ray.bench.bare_models import BareLearner, BareReference, BareScorer
from dvpo_ray.bench.bare_rollout import BareTransformers, BareVLLM
from dvpo_ray.bench.layouts import LAYOUTS
from dvpo_ray.bench.measure import Comparison, Sample, compare, take_turns
from dvpo_ray.bench.side_by_side import Competitor, side_by_side
from dvpo_ray.config.arithmetic import derive_batch
from dvpo_ray.config.schema import Config
from dvpo_ray.rollouts.schedule import prompt_indices, sampling_seed
from dvpo_ray.runtime.cluster import get
from dvpo_ray.training.policy_inputs import Inputs

ROLLOUT_TARGET = 0.9
FROZEN_TARGET = 0.9
LEARNER_TARGET = 0.85


@dataclass
class Bench:
    """What the comparisons share.

    Attributes:
        config: the run's settings with one actor of each role.
        inputs: prompts and stop tokens.
        run_folder: gets the actors' logs.
        rows: prompts with one response each, in every round.
        learner_rows: how many of them the learner works on.
        repeats: measured rounds; one more warms up.
        after_round: called after each round, for a progress bar.
        chunks: rollouts of the last round, as the engine streamed them; made by `compare_rollout` and worked on by the others.
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


def compare_rollout(bench: Bench) -> Comparison:
    """Generated tokens per second of the rollout engine's stream, as the driver sees it, against the library's own `generate`."""
    config, rollout = bench.config, bench.config.rollout
    longest = config.data.max_prompt_tokens + rollout.max_response_tokens
    stop_token_ids = bench.inputs.stop_token_ids
    bare_class, bare_name = (BareVLLM, "vllm LLM.generate") if rollout.backend == "vllm" else (BareTransformers, "transformers generate")
    competitors = [
        Competitor(RolloutEngine, rollout, (stop_token_ids, "object_store", longest), rollout.tensor_parallel_size),
        Competitor(bare_class, rollout, (stop_token_ids, longest), rollout.tensor_parallel_size),
    ]
    with side_by_side(config, bench.run_folder, competitors) as (engine, bare):

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
    return compare("rollout", ROLLOUT_TARGET, samples.pop("product"), samples)


def compare_frozen(bench: Bench) -> list[Comparison]:
    """Tokens per second of the value scorer and of the reference model on the engine's chunks, against bare forward passes."""
    config = bench.config
    scorers = [Competitor(ValueScorer, config.scorer), Competitor(BareScorer, config.scorer)]
    references = [Competitor(ReferenceModel, config.reference), Competitor(BareReference, config.reference)]
    comparisons = []
    with side_by_side(config, bench.run_folder, scorers + references) as (scorer, bare_scorer, reference, bare_reference):
        for name, method, bare in (("scorer", scorer.score, bare_scorer), ("reference", reference.score, bare_reference)):
            contestants = {"product": _scoring_of(bench, method, name), **_bare(bare.forward, bench.rollouts())}
            samples = take_turns(contestants, bench.repeats, bench.after_round)
            comparisons.append(compare(name, FROZEN_TARGET, samples.pop("product"), samples))
    return comparisons


def _scoring_of(bench: Bench, method, name: str) -> Callable[[int], Sample]:
    tokens = bench.rollouts().num_tokens

    def score(_round: int) -> Sample:
        started = time.perf_counter()
        scores = [method.remote(chunk) for chunk in bench.chunks]
        ray.wait(scores, num_returns=len(scores), fetch_local=False)  # as the loop does: the driver never fetches them
        seconds = time.perf_counter() - started
        get(scores, what=name)  # raises what went wrong
        return Sample(tokens, seconds)

    return score


def _bare(method, batch: RaggedBatch, *arguments) -> dict[str, Callable[[int], Sample]]:
    """The bare contestants: one for each layout of the rows."""
    return {layout: lambda _round, layout=layout: get(method.remote(batch, *arguments, layout), what="the bare loop") for layout in LAYOUTS}


def compare_learner(bench: Bench) -> list[Comparison]:
    """Real tokens per second of the learner's update against bare forward, backward and AdamW with as many optimizer steps.

    The update is measured with old log-probs at hand, which is the bare loop's work. Where the config has them recomputed,
    a second comparison, for information, adds the time of that extra forward pass.
    """
    recomputes = bench.config.policy.old_log_probs == "recompute" and derive_batch(bench.config).optimizer_steps_per_step > 1
    config = bench.config.model_copy(update={"policy": bench.config.policy.model_copy(update={"old_log_probs": "rollout"})})
    shard = _with_learner_fields(bench.rollouts().select(np.arange(bench.learner_rows)), config.seed)
    minibatches = _minibatches(config, shard.num_rows)
    passes = config.batch.update_epochs
    reference = ray.put(shard)
    kl_coefficient = config.kl.coefficient if config.kl.placement == "loss" else 0.0
    with side_by_side(config, bench.run_folder, [Competitor(PolicyLearner, config.policy), Competitor(BareLearner, config.policy)]) as (
        learner,
        bare,
    ):
        address = get(learner.rendezvous.remote(), what="learner rendezvous")
        get(learner.connect.remote(*address, [], "object_store"), what="the learner's start")  # weights are sent nowhere

        def update(round_: int) -> Sample:
            started = time.perf_counter()
            get(learner.update.remote(reference, round_, kl_coefficient), what="the policy update")
            return Sample(shard.num_tokens * passes, time.perf_counter() - started)

        def recompute(_round: int) -> Sample:
            started = time.perf_counter()
            get(learner.log_probs.remote(reference), what="old log-probs")
            return Sample(shard.num_tokens, time.perf_counter() - started)

        contestants = {"product": update, **({"recompute": recompute} if recomputes else {}), **_bare(bare.train, reference, minibatches)}
        samples = take_turns(contestants, bench.repeats, bench.after_round)
    product, recomputed = samples.pop("product"), samples.pop("recompute", None)
    comparisons = [compare("learner", LEARNER_TARGET, product, samples)]
    if recomputed is not None:
        both = [Sample(a.tokens, a.seconds + b.seconds) for a, b in zip(product, recomputed, strict=True)]
        comparisons.append(compare("learner, old log-probs recomputed", None, both, samples))
    return comparisons


def _with_learner_fields(batch: RaggedBatch, seed: int) -> RaggedBatch:
    """The fields a shard has, with advantages at random: what an update costs doesn't depend on them."""
    mask = batch.response_mask.astype(np.float32)
    advantages = np.random.default_rng(seed).standard_normal(batch.num_tokens).astype(np.float32) * mask
    return batch.with_token_fields(advantages=advantages, loss_mask=mask, reference_log_probs=batch.by_token["log_probs"])


def _minibatches(config: Config, num_rows: int) -> list[np.ndarray]:
    """Row indices of every optimizer step of a batch, shuffled as the learner does."""
    generator = np.random.default_rng(config.seed)
    count = config.batch.minibatches_per_epoch
    return [rows for _ in range(config.batch.update_epochs) for rows in np.split(generator.permutation(num_rows), count)]
