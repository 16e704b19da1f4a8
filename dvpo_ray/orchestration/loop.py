"""Policy optimisation with the Global Value Model frozen.

    rollout → score ∥ reference → advantage → update → sync

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
from dvpo_ray.config.arithmetic import derive_batch
from dvpo_ray.config.schema import Config
from dvpo_ray.orchestration.cluster import get
from dvpo_ray.orchestration.roles import Roles
from dvpo_ray.orchestration.schedule import prompt_indices, sampling_seed
from dvpo_ray.policy.kl import AdaptiveKLController
from dvpo_ray.policy.mismatch import check_mismatch


class Loop:
    """The steps of one run. All randomness follows from the seed and the step's number.

    Args:
        prompts: token ids of the training prompts.
        heldout: token ids of the held-out prompts that evaluations sample from.
    """

    def __init__(self, config: Config, roles: Roles, prompts: Sequence[list[int]], heldout: Sequence[list[int]]) -> None:
        self.config = config
        self.roles = roles
        self.prompts = prompts
        self.heldout = heldout
        self.kl = AdaptiveKLController(config.kl.coefficient, config.kl.adaptive_target_nats, config.kl.adaptive_horizon)
        self.policy_version = 0
        self._samples = derive_batch(config).samples_per_step
        self._seconds: dict[str, float] = {}
        self._next_scorer = itertools.cycle(roles.scorers)
        self._next_reference = itertools.cycle(roles.references)

    def step(self, step: int) -> dict[str, float]:
        """One batch of rollouts and the update on it. Returns the step's metrics."""
        self._seconds = {}
        with self._timed("step"):
            with self._timed("generate"):
                chunks = self._rollout(self._prompts_of(step), step)
            with self._timed("score"):
                _wait(chunk.scores["values"] for chunk in chunks)
            with self._timed("reference"):
                _wait(chunk.scores["reference_log_probs"] for chunk in chunks)
            with self._timed("advantage"):
                batch_metrics, shards = self._advantages(chunks)
            if self._keeps_rollouts(step):
                self.roles.builder.write_rollouts.remote(step)
            with self._timed("update"):
                update_metrics = self._update(shards, step)
            check_mismatch(update_metrics, self.config.mismatch.max_token_mult_error)
            with self._timed("sync"):
                self.sync(step)
        in_force = {"policy_version": step, "kl/coefficient": self.kl.coefficient}
        self.kl.update(batch_metrics["kl/reference_mean"], self._samples)
        return batch_metrics | update_metrics | self._work_metrics(batch_metrics) | in_force

    def evaluate(self, step: int) -> dict[str, float]:
        """Sample one response to each held-out prompt and judge it; the sampling seed is the same at every step."""
        chunks = self._rollout(self.heldout, step=0, values=False)
        result = get(self.roles.builder.evaluate.remote(step, chunks), what="evaluation")
        self._role_statistics()  # what was spent here is no part of the next step
        return result

    # ------------------------------------------------------------------------------------------------ the stages

    def _prompts_of(self, step: int) -> list[list[int]]:
        batch = self.config.batch
        indices = prompt_indices(len(self.prompts), batch.prompts_per_step, step, self.config.seed)
        return [self.prompts[i] for i in indices for _ in range(batch.samples_per_prompt)]

    def _rollout(self, prompts: Sequence[list[int]], step: int, values: bool = True) -> list[ScoredChunk]:
        """Sample responses on all engines; every chunk goes to the frozen models while the next is being sampled."""
        streams = []
        for i, engine in enumerate(self.roles.engines):
            rows = range(i, len(prompts), len(self.roles.engines))
            seed = sampling_seed(self.config.seed, step, i)
            streams.append(engine.generate.remote([prompts[row] for row in rows], list(rows), seed))
        chunks = []
        while streams:
            ready, _ = ray.wait(streams, num_returns=1, fetch_local=False)
            for stream in ready:
                rollouts = next(stream, None)
                if rollouts is None:
                    streams.remove(stream)
                else:
                    chunks.append(self._score(rollouts, values))
        return chunks

    def _score(self, rollouts: ObjectRef, values: bool) -> ScoredChunk:
        scores = {"reference_log_probs": next(self._next_reference).log_probs.remote(rollouts)}
        if values:
            scores["values"] = next(self._next_scorer).score.remote(rollouts)
        return ScoredChunk(rollouts, scores)

    def _advantages(self, chunks: list[ScoredChunk]) -> tuple[dict[str, float], list[ObjectRef]]:
        coefficient = self.kl.coefficient if self.config.kl.placement == "reward" else 0.0
        ranks = len(self.roles.learners)
        build = self.roles.builder.build.options(num_returns=1 + ranks)
        metrics, *shards = build.remote(chunks, self.policy_version, coefficient, ranks)
        return get(metrics, what="advantages"), shards

    def _update(self, shards: list[ObjectRef], step: int) -> dict[str, float]:
        coefficient = self.kl.coefficient if self.config.kl.placement == "loss" else 0.0
        updates = [learner.update.remote(shard, step, coefficient) for learner, shard in zip(self.roles.learners, shards, strict=True)]
        return get(updates, what="the policy update")[0]

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
        pending = {role: [handle.stats.remote() for handle in handles] for role, handles in self.roles.by_role().items()}
        return {role: get(refs, what=f"statistics of {role}") for role, refs in pending.items()}


def _wait(refs) -> None:
    refs = list(refs)
    ray.wait(refs, num_returns=len(refs), fetch_local=False)
