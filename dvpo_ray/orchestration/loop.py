"""Policy optimisation: with the Global Value Model frozen, or as one of the baselines.

    rollout → score ∥ reference → advantage → update → sync

The algorithm shows in the roles only: which frozen models score a rollout, and whether a critic is trained beside the policy.

The driver holds references and small numbers only: tokens go from the actor that made them to the actor that needs them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from contextlib import contextmanager

import ray
from ray import ObjectRef

from dvpo_ray.actors.experience_builder import ScoredChunk
from dvpo_ray.baselines.algorithms import ALGORITHMS, SCORE_FIELDS
from dvpo_ray.config.arithmetic import derive_batch
from dvpo_ray.config.schema import Config
from dvpo_ray.divergence import check_finite
from dvpo_ray.orchestration.cluster import get
from dvpo_ray.orchestration.roles import Roles
from dvpo_ray.orchestration.schedule import prompt_indices, sampling_seed
from dvpo_ray.policy.kl_controller import AdaptiveKLController
from dvpo_ray.policy.mismatch import check_mismatch

EXAMPLES_STREAM = 1
REFRESH_STREAM = 2
REFERENCE = SCORE_FIELDS["reference"]


class Loop:
    """The steps of one run. All randomness follows from the seed and the step's number.

    Args:
        prompts: token ids of the training prompts.
        heldout: token ids of the held-out prompts that evaluations sample from.
        takes_examples: the GVM is conditioned on examples of the current policy, which each step then samples first.
    """

    def __init__(
        self, config: Config, roles: Roles, prompts: Sequence[list[int]], heldout: Sequence[list[int]], takes_examples: bool = False
    ) -> None:
        self.config = config
        self.roles = roles
        self.prompts = prompts
        self.heldout = heldout
        self.takes_examples = takes_examples
        self.kl = AdaptiveKLController(config.kl.coefficient, config.kl.adaptive_target_nats, config.kl.adaptive_horizon)
        self.policy_version = 0
        self._samples = derive_batch(config).samples_per_step
        self._seconds: dict[str, float] = {}
        self.algorithm = ALGORITHMS[config.algorithm]
        self._turns = itertools.count()

    def step(self, step: int) -> dict[str, float]:
        """One batch of rollouts and the update on it. Returns the step's metrics."""
        self._seconds = {}
        with self._timed("step"):
            with self._timed("generate"):
                prompts = self._prompts_of(step)
                examples = self._examples(step) if self.takes_examples else None
                chunks = self._rollout(self._repeated(prompts), step, tuple(self.roles.frozen), examples=examples)
                greedy = self._rollout(prompts, step, (self.algorithm.scorer,), greedy=True) if self.algorithm.has_greedy_baseline else []
            with self._timed("score"):
                self._add_critic_values(chunks)
                _wait(ref for chunk in [*chunks, *greedy] for field, ref in chunk.scores.items() if field != REFERENCE)
            with self._timed("reference"):
                _wait(chunk.scores[REFERENCE] for chunk in chunks)
            with self._timed("advantage"):
                batch_metrics, shards = self._advantages(chunks, greedy)
            if self._keeps_rollouts(step):
                self.roles.builder.write_rollouts.remote(step)
            with self._timed("update"):
                update_metrics = self._update(shards, step)
            check_mismatch(update_metrics, self.config.mismatch.max_token_mult_error)
            for stage in ("policy", *(["critic"] if self.roles.critics else [])):
                check_finite(step, update_metrics, stage, stage, dtype=self.config.model.dtype)
            with self._timed("sync"):
                self.sync(step)
        in_force = {"policy_version": step, "kl/coefficient": self.kl.coefficient}
        self.kl.update(batch_metrics["kl/reference_mean"], self._samples)
        return batch_metrics | update_metrics | self._work_metrics(batch_metrics) | in_force

    def evaluate(self, step: int) -> dict[str, float]:
        """Sample one response to each held-out prompt and judge it; the sampling seed is the same at every step."""
        chunks = self._rollout(self.heldout, step=0, scored_by=("reference",))
        result = get(self.roles.builder.evaluate.remote(step, chunks), what="evaluation")
        self._role_statistics()  # what was spent here is no part of the next step
        return result

    def sample(self, prompts: Sequence[list[int]], step: int) -> list[ScoredChunk]:
        """Rollouts of the current policy that nothing scores, for a refresh of the value model."""
        chunks = self._rollout(prompts, step, scored_by=(), stream=REFRESH_STREAM)
        self._role_statistics()  # what was spent here is no part of the next step
        return chunks

    # ------------------------------------------------------------------------------------------------ the stages

    def _prompts_of(self, step: int) -> list[list[int]]:
        batch = self.config.batch
        indices = prompt_indices(len(self.prompts), batch.prompts_per_step, step, self.config.seed)
        return [self.prompts[i] for i in indices]

    def _repeated(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        return [prompt for prompt in prompts for _ in range(self.config.batch.samples_per_prompt)]

    def _rollout(
        self,
        prompts: Sequence[list[int]],
        step: int,
        scored_by: Sequence[str],
        *,
        greedy: bool = False,
        examples: ObjectRef | None = None,
        stream: int = 0,
    ) -> list[ScoredChunk]:
        """A response to each prompt, on all engines; every chunk goes to the frozen models while the next is being sampled.

        Args:
            examples: rollouts for a value model that takes them.
            stream: of random numbers; the samples of two streams of a step are independent.
        """
        streams = []
        for i, engine in enumerate(self.roles.engines):
            rows = range(i, len(prompts), len(self.roles.engines))
            seed = sampling_seed(self.config.seed, step, i, stream)
            streams.append(engine.generate.remote([prompts[row] for row in rows], list(rows), seed, greedy))
        chunks = []
        while streams:
            ready, _ = ray.wait(streams, num_returns=1, fetch_local=False)
            for stream in ready:
                rollouts = next(stream, None)
                if rollouts is None:
                    streams.remove(stream)
                else:
                    chunks.append(self._score(rollouts, scored_by, examples))
        return chunks

    def _score(self, rollouts: ObjectRef, scored_by: Sequence[str], examples: ObjectRef | None) -> ScoredChunk:
        scores, turn = {}, next(self._turns)
        for role, handles in ((role, self.roles.frozen[role]) for role in scored_by):
            model = handles[turn % len(handles)]
            scores[SCORE_FIELDS[role]] = model.score.remote(rollouts, examples) if role == "scorer" else model.score.remote(rollouts)
            if role == "scorer" and self.config.scorer.ensemble:
                scores["disagreement"] = model.disagreement.remote(rollouts, scores[SCORE_FIELDS[role]], examples)
        return ScoredChunk(rollouts, scores)

    def _examples(self, step: int) -> ObjectRef:
        """Fresh rollouts of the current policy to distinct prompts, for the value model to know the policy by."""
        distinct = list(dict.fromkeys(map(tuple, self.prompts)))
        indices = prompt_indices(len(distinct), min(self.config.gvm.context.pool, len(distinct)), step, self.config.seed)
        chunks = self._rollout([list(distinct[i]) for i in dict.fromkeys(indices)], step, scored_by=(), stream=EXAMPLES_STREAM)
        return self.roles.builder.gather.remote(chunks)

    def _add_critic_values(self, chunks: list[ScoredChunk]) -> None:
        """Values of the online critic, where there is one. All its ranks run forward together, so it takes a step's chunks at once."""
        critics = self.roles.critics
        for i, critic in enumerate(critics):
            mine = chunks[i :: len(critics)]
            refs = critic.values.options(num_returns=max(1, len(mine))).remote([chunk.rollouts for chunk in mine])
            for chunk, ref in zip(mine, [refs] if len(mine) <= 1 else refs, strict=False):
                chunk.scores[SCORE_FIELDS["critic"]] = ref

    def _advantages(self, chunks: list[ScoredChunk], greedy: list[ScoredChunk]) -> tuple[dict[str, float], list[ObjectRef]]:
        coefficient = self.kl.coefficient if self.config.kl.placement == "reward" else 0.0
        build = self.roles.builder.build.options(num_returns=1 + len(self.roles.learners) + len(self.roles.critics))
        metrics, *shards = build.remote(chunks, self.policy_version, coefficient, greedy)
        return get(metrics, what="advantages"), shards

    def _update(self, shards: list[ObjectRef], step: int) -> dict[str, float]:
        """The policy's update, and beside it the critic's where there is one."""
        coefficient = self.kl.coefficient if self.config.kl.placement == "loss" else 0.0
        learners, critics = self.roles.learners, self.roles.critics
        policy = [learner.update.remote(shard, step, coefficient) for learner, shard in zip(learners, shards, strict=False)]
        critic = [actor.update.remote(shard, step) for actor, shard in zip(critics, shards[len(learners) :], strict=True)]
        metrics = get(policy, what="the policy update")[0]
        return metrics | get(critic, what="the critic's update")[0] if critics else metrics

    def sync(self, version: int) -> None:
        """Bring the learner's weights to every rollout engine, as policy version `version`."""
        # The sender has the same limit for each phase; this one holds when a learner rank itself hangs.
        limit = 2 * self.config.weight_sync.timeout_seconds
        get([learner.sync_weights.remote(version) for learner in self.roles.learners], what="weight sync", timeout_seconds=limit)
        self.policy_version = version

    # ------------------------------------------------------------------------------------------------ measurement

    def _keeps_rollouts(self, step: int) -> bool:
        every = self.config.train.save_rollouts_every_steps
        return every > 0 and step % every == 0

    @contextmanager
    def _timed(self, stage: str):
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] = time.perf_counter() - started

    def _work_metrics(self, batch_metrics: dict[str, float]) -> dict[str, float]:
        """Times, throughput, and each role's idle share and memory."""
        seconds = self._seconds
        generated = batch_metrics["response_length/mean"] * self._samples
        trained = generated * self.config.batch.update_epochs
        metrics = {f"time/{stage}_seconds": value for stage, value in seconds.items()} | {
            "throughput/samples_per_second": self._samples / seconds["step"],
            "throughput/generated_tokens_per_second": generated / seconds["generate"],
            "throughput/trained_tokens_per_second": trained / seconds["update"],
        }
        for role, stats in self._role_statistics().items():
            metrics[f"memory/{role}_gib"] = max(s["memory_gib"] for s in stats)
            busy = sum(s["busy_seconds"] for s in stats) / len(stats)
            metrics[f"idle/{role}_fraction"] = min(1.0, max(0.0, 1.0 - busy / seconds["step"]))
        return metrics

    def _role_statistics(self) -> dict[str, list[dict[str, float]]]:
        pending = {role: [handle.stats.remote() for handle in handles] for role, handles in self.roles.by_role.items()}
        return {role: get(refs, what=f"statistics of {role}") for role, refs in pending.items()}


def _wait(refs) -> None:
    refs = list(refs)
    ray.wait(refs, num_returns=len(refs), fetch_local=False)
