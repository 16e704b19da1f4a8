"""The stages of a step as calls to the actors. `dvpo_ray.training.policy` puts them together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from ray import ObjectRef
from ray.actor import ActorHandle

from dvpo_ray.actors.experience_builder import ScoredChunk
from dvpo_ray.actors.roles import Roles
from dvpo_ray.config import Config
from dvpo_ray.config.algorithms import ALGORITHMS
from dvpo_ray.config.arithmetic import derive_batch
from dvpo_ray.policy.kl import AdaptiveKLController
from dvpo_ray.rollouts.pool import RolloutPool
from dvpo_ray.rollouts.schedule import prompt_indices
from dvpo_ray.runtime.checkpoints import trainer_bytes
from dvpo_ray.runtime.room import stop
from dvpo_ray.runtime.waiting import get
from dvpo_ray.training.turns import Turns

EXAMPLES_STREAM = 1
"""Stream of random numbers of the examples of a step; its rollouts have stream 0."""


class Stages:
    """What a step can ask of the actors of a run.

    Attributes:
        kl: the KL coefficient in force.
        policy_version: of the weights that the engines have.
        turns: on GPUs that engines and trained models share.

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
        self.algorithm = ALGORITHMS[config.algorithm]
        self.kl = AdaptiveKLController(config.kl.coefficient, config.kl.adaptive_target_nats, config.kl.adaptive_horizon)
        self.policy_version = 0
        self.start_is_checked = False
        self.pool = RolloutPool(roles.engines, config)
        self.turns = Turns(roles, config.offload != "never")
        self.samples_per_step = derive_batch(config).samples_per_step
        self._turns = itertools.count()
        self._writing: ObjectRef | None = None

    # ------------------------------------------------------------------------------------------------ within a step

    def prompts_of(self, step: int) -> list[list[int]]:
        indices = prompt_indices(len(self.prompts), self.config.batch.prompts_per_step, step, self.config.seed)
        return [self.prompts[i] for i in indices]

    def examples(self, step: int) -> ObjectRef:
        """Fresh rollouts of the current policy to distinct prompts, for the value model to know the policy by."""
        distinct = list(dict.fromkeys(map(tuple, self.prompts)))
        indices = prompt_indices(len(distinct), min(self.config.gvm.context.pool, len(distinct)), step, self.config.seed)
        chunks = self.rollout([list(distinct[i]) for i in dict.fromkeys(indices)], step, scored_by=(), stream=EXAMPLES_STREAM)
        return self.roles.builder.gather.remote(chunks)

    def rollout(
        self,
        prompts: Sequence[list[int]],
        step: int,
        scored_by: Iterable[str],
        *,
        greedy: bool = False,
        examples: ObjectRef | None = None,
        stream: int = 0,
    ) -> list[ScoredChunk]:
        """A response to each prompt; every chunk goes to the frozen models while the next is being sampled.

        Args:
            examples: rollouts for a value model that takes them.
        """
        scored_by = list(scored_by)
        return [self._score(chunk, scored_by, examples) for chunk in self.pool.sample(prompts, step, stream=stream, greedy=greedy)]

    def check_start(self, chunks: list[ScoredChunk]) -> None:
        """Before the first update engine and reference have the same weights: check on the first rollouts that they agree."""
        if self.policy_version == 0 and not self.start_is_checked:
            get(self.roles.builder.check_start.remote(chunks), what="the check of the first rollouts")
        self.start_is_checked = True

    def _score(self, rollouts: ObjectRef, roles: Sequence[str], examples: ObjectRef | None) -> ScoredChunk:
        turn, scores = next(self._turns), {}
        for role in roles:
            models = self.roles.frozen[role]
            more = (examples,) if role == "scorer" else ()
            scores[role] = models[turn % len(models)].score.remote(rollouts, *more)
        return ScoredChunk(rollouts, scores)

    def write_rollouts(self, step: int) -> None:
        """Write the step's batch to the run folder, beside what follows; an error of the last writing is raised here."""
        self.finish()
        self._writing = self.roles.builder.write_rollouts.remote(step)

    def finish(self) -> None:
        """Wait for what is still being written."""
        if self._writing is not None:
            get(self._writing, what="writing the rollouts")
        self._writing = None

    def score_by_critic(self, chunks: list[ScoredChunk]) -> None:
        """Values of the online critic, where there is one. All its ranks run forward together, so it takes a step's chunks at once."""
        critics = self.roles.critics
        for i, critic in enumerate(critics):
            mine = chunks[i :: len(critics)]
            refs = critic.score.options(num_returns=max(1, len(mine))).remote([chunk.rollouts for chunk in mine])
            for chunk, ref in zip(mine, [refs] if len(mine) <= 1 else refs, strict=False):
                chunk.scores["critic"] = ref

    def advantages(self, chunks: list[ScoredChunk], greedy: list[ScoredChunk], step: int) -> tuple[dict[str, float], list[ObjectRef]]:
        """The batch's metrics, and the updates of the learner and of the critic, where there is one."""
        coefficient = self.kl.coefficient if self.config.kl.placement == "reward" else 0.0
        build = self.roles.builder.build.options(num_returns=1 + len(self.roles.trained))
        metrics, *updates = build.remote(chunks, step, self.policy_version, coefficient, greedy)
        return get(metrics, what="advantages"), updates

    def update(self, updates: list[ObjectRef]) -> dict[str, float]:
        """The policy's update, and beside it the critic's where there is one."""
        coefficient = self.kl.coefficient if self.config.kl.placement == "loss" else 0.0
        policy = [learner.update.remote(updates[0], coefficient) for learner in self.roles.learners]
        critic = [critic.update.remote(updates[1]) for critic in self.roles.critics]
        metrics = get(policy, what="the policy update")[0]
        return metrics | get(critic, what="the critic's update")[0] if critic else metrics

    def sync(self, version: int) -> None:
        """Bring the learner's weights to every rollout engine, as policy version `version`. Then the engines can sample."""
        # The sender has the same limit for each phase; this one holds when a learner rank itself hangs.
        limit = 2 * self.config.weight_sync.timeout_seconds
        whole = not self.turns.engines_are_whole
        self.turns.updated()
        get([learner.sync_weights.remote(version, whole) for learner in self.roles.learners], what="weight sync", timeout_seconds=limit)
        self.turns.synced()
        self.policy_version = version

    def sync_between_steps(self, version: int) -> None:
        """`sync`, whose work is not part of the next step."""
        self.sync(version)
        self.role_statistics()

    @contextmanager
    def gpus_lent(self) -> Iterator[None]:
        """For the time of a `with` block others have the memory of the GPUs that engines and trained models share."""
        if not self.roles.takes_turns:
            yield
            return
        with self.turns.lent():
            yield
        self.sync_between_steps(self.policy_version)

    # ------------------------------------------------------------------------------------------------ between steps

    def evaluate(self, step: int) -> dict[str, float]:
        """Sample one response to each held-out prompt and judge it; the sampling seed is the same at every step."""
        chunks = self.rollout(self.heldout, step=0, scored_by=("reference",))
        self.check_start(chunks)
        result = get(self.roles.builder.evaluate.remote(step, chunks), what="evaluation")
        self.role_statistics()  # what was spent here is not part of the next step
        return result

    def sample(self, prompts: Sequence[list[int]], step: int, stream: int) -> list[ScoredChunk]:
        """Rollouts of the current policy that nothing scores."""
        chunks = self.rollout(prompts, step, scored_by=(), stream=stream)
        self.role_statistics()  # what was spent here is not part of the next step
        return chunks

    def save_policy(self, folder: Path) -> None:
        """Write the policy as a Hugging Face checkpoint."""
        with self._trained_on_gpus():
            get([learner.save_pretrained.remote(str(folder)) for learner in self.roles.learners], what="saving the policy")

    def save(self, folder: Path) -> None:
        """Write what the actors hold into a checkpoint's folder, each trained role into its own."""
        with self._trained_on_gpus():
            get([rank.save_checkpoint.remote(str(folder / role)) for role, rank in self._trained()], what="saving a checkpoint")
            if self.config.checkpoint.save_pretrained:
                self.save_policy(folder / "policy")

    def save_at_the_end(self, folder: Path) -> None:
        """`save` of a run that ends at once: engines whose memory the trained models need are stopped, because they may still be sampling."""
        if self.turns.trained_are_away:
            stop(self.roles.engines)
            self.turns.trained_return()
        self.save(folder)

    def checkpoint_bytes(self) -> int:
        """What `save` is going to write."""
        with_policy = self.config.checkpoint.save_pretrained
        firsts = [(role, ranks[0]) for role, ranks in self.roles.trained.items()]
        sizes = [rank.observe.remote(partial(trainer_bytes, with_policy=with_policy and role == "learner")) for role, rank in firsts]
        return sum(get(sizes, what="the size of a checkpoint"))

    @contextmanager
    def _trained_on_gpus(self) -> Iterator[None]:
        """Bring trained models that are in host memory back for the time of a `with` block; the engines sleep meanwhile."""
        away = self.turns.trained_are_away
        if away:
            self.turns.sampled()
        yield
        if away:
            self.sync_between_steps(self.policy_version)

    def state_dict(self) -> dict:
        """What the driver's part of a checkpoint keeps of the loop."""
        return {"kl": self.kl.state_dict()}

    def load(self, folder: Path, state: dict) -> None:
        """Bring the actors and the KL coefficient to the state of a checkpoint."""
        get([rank.load_checkpoint.remote(str(folder / role)) for role, rank in self._trained()], what="loading a checkpoint")
        self.kl.load_state_dict(state["kl"])
        self.sync_between_steps(state["step"])

    def _trained(self) -> list[tuple[str, ActorHandle]]:
        return [(role, rank) for role, ranks in self.roles.trained.items() for rank in ranks]

    def role_statistics(self) -> dict[str, list[dict[str, float]]]:
        """Busy seconds since the last call and memory of every actor, by role."""
        pending = {role: [handle.stats.remote() for handle in handles] for role, handles in self.roles.by_role.items()}
        return {role: get(refs, what=f"statistics of {role}") for role, refs in pending.items()}
