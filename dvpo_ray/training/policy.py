"""`dvpo train`: a policy optimised with the Global Value Model frozen, or by one of the baselines.

    rollout → score ∥ reference → advantage → update → sync

`PolicyTraining.train` is the run and `PolicyLoop.step` is one step of it. The algorithm shows in the roles only: which frozen models
score a rollout, and whether a critic is trained beside the policy. The driver holds references and small numbers; tokens go from the
actor that made them to the actor that needs them. All randomness of a step follows from the seed and the step's number.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import ray
from ray import ObjectRef

from dvpo_ray.actors.experience_builder import ScoredChunk
from dvpo_ray.actors.roles import Roles, started_roles
from dvpo_ray.config import Config
from dvpo_ray.config.algorithms import ALGORITHMS
from dvpo_ray.config.arithmetic import derive_batch
from dvpo_ray.errors import InputError
from dvpo_ray.files import whole_folder
from dvpo_ray.health.alarms import Alarm, HealthMonitor
from dvpo_ray.monitoring.console import RunConsole
from dvpo_ray.policy.kl_controller import AdaptiveKLController
from dvpo_ray.policy.mismatch import check_mismatch
from dvpo_ray.rollouts.pool import RolloutPool
from dvpo_ray.rollouts.schedule import prompt_indices
from dvpo_ray.runtime.cluster import connect, get
from dvpo_ray.training.policy_inputs import Inputs, load_inputs
from dvpo_ray.training.policy_summary import header, summary
from dvpo_ray.training.refresh import Refresher
from dvpo_ray.training.run import Run, check_finite, is_due
from dvpo_ray.training.work import Stopwatch, work_metrics

EXAMPLES_STREAM, REFRESH_STREAM = 1, 2
"""Streams of random numbers beside the one of a step's own rollouts."""


def train(config: Config, resume: bool = False, console: RunConsole | None = None) -> Path:
    """Optimise the policy of a config in `config.out` and return that folder.

    Args:
        resume: continue the run in that folder from its last whole checkpoint.
        console: of a larger run that this is a part of; otherwise the run opens its own.

    Raises:
        InputError, ResourceError: in one line; bad input is found before any actor starts.
    """
    run = Run("train", config, Path(config.out), resume=resume)
    inputs = load_inputs(config)
    training = PolicyTraining(run, inputs)
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    with (
        run.started(config.algorithm.upper(), header(config, inputs), inputs.notes, training.summary, console) as run_console,
        connect(config.ray),
        ExitStack() as actors,
    ):
        with run_console.stage("start of the actors"):
            roles = actors.enter_context(started_roles(training.refresher.scoring_config, str(run.folder), inputs.stop_token_ids, longest))
            run.memory.add_pids(roles.local_pids)
        training.train(PolicyLoop(config, roles, inputs.prompts, inputs.heldout, inputs.manifest.context.examples > 0), run_console)
    return run.folder


# ------------------------------------------------------------------------------------------------------------ the run


class PolicyTraining:
    """One run: its steps, evaluations, checkpoints, refreshes of the value model, and the final policy."""

    def __init__(self, run: Run, inputs: Inputs) -> None:
        self.run = run
        self.config = run.config
        self.inputs = inputs
        self.evaluations: dict[int, dict[str, float]] = {}
        self.health = HealthMonitor(self.config.health)
        self.refresher = Refresher(run, inputs)
        self.refresh_is_due = False
        self._load_state(run.open_checkpoint())

    def train(self, loop: PolicyLoop, console: RunConsole) -> None:
        """All steps from the checkpoint or the start on, and what comes after them."""
        config, run = self.config, self.run
        if run.checkpoint is None:
            self._evaluate(loop, console)
        else:
            self._load_actors(loop)
        with (
            run.metrics_log() as log,
            console.stage("policy optimisation", total=config.train.steps, done=run.last_step, unit="steps") as progress,
        ):
            for step in range(run.last_step + 1, config.train.steps + 1):
                refreshed = self._refresh(loop, console) if self.refresh_is_due else {}
                metrics = loop.step(step)
                health, alarms = self.health.observe(step, metrics)
                log.write(step, metrics | health | refreshed | self.refresher.state.metrics)
                progress.step(step, metrics)
                run.last_step = step
                stops = self._heed(alarms, console)
                if is_due(step, config.evaluation.every_steps):
                    self._evaluate(loop, console)
                if stops or self.refresh_is_due or is_due(step, config.checkpoint.every_steps):
                    self._save(loop)
                if stops:
                    run.outcome = "stopped"
                    break
        if run.last_step not in self.evaluations:
            self._evaluate(loop, console)
        with whole_folder(run.folder / "final") as draft:
            loop.save_policy(draft)

    def summary(self) -> dict:
        """What summary.json says of the run beside what it says of every run."""
        return summary(self.run, self.inputs, self.evaluations, self.health.alarms, self.refresher.state)

    def _evaluate(self, loop: PolicyLoop, console: RunConsole) -> None:
        if not self.inputs.heldout:
            return
        step, prompts = self.run.last_step, len(self.inputs.heldout)
        with console.stage(f"evaluation at step {step}", total=prompts, unit="held-out prompts") as progress:
            result = self.evaluations[step] = loop.evaluate(step)
            progress.advance(prompts, " · ".join(f"{name} {value:.3f}" for name, value in result.items()))

    def _heed(self, alarms: list[Alarm], console: RunConsole) -> bool:
        """Tell the user of the alarms of the last step, and decide what follows it. Returns whether the run stops here."""
        for alarm in alarms:
            console.warn(f"ALARM {alarm.name} at {alarm}")
        goes_on = self.run.last_step < self.config.train.steps
        self.refresh_is_due = goes_on and self.refresher.is_due(self.run.last_step, alarmed=bool(alarms))
        return goes_on and bool(alarms) and self.config.health.on_alarm == "stop"

    def _refresh(self, loop: PolicyLoop, console: RunConsole) -> dict[str, float]:
        """Refresh the GVM between two steps. The checkpoint before it says so: a run that dies waiting for labels goes on here."""
        metrics = self.refresher.refresh(self.run.last_step, lambda prompts, step: loop.sample(prompts, step, REFRESH_STREAM), loop.roles, console)
        self.health.restart()
        self.refresh_is_due = False
        return metrics

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _save(self, loop: PolicyLoop) -> None:
        def write(folder: Path) -> None:
            loop.call_trained("save_checkpoint", folder)
            if self.config.checkpoint.save_pretrained:
                loop.save_policy(folder / "policy")

        state = {
            "kl": loop.kl.state_dict(),
            "health": self.health.state_dict(),
            "refresh": self.refresher.state_dict(),
            "refresh_is_due": self.refresh_is_due,
            "evaluations": {str(step): result for step, result in self.evaluations.items()},
        }
        self.run.save_checkpoint(write, state)

    def _load_state(self, state: dict | None) -> None:
        """Bring what the driver itself knows to the state of a checkpoint, where there is one."""
        if state is None:
            return
        if state["step"] > self.config.train.steps:
            folder = self.run.checkpoint[0]
            raise InputError(
                f"train.steps is {self.config.train.steps}, but {folder} is at step {state['step']}; give {state['step']} or more to resume"
            )
        self.refresher.load_state_dict(state["refresh"])
        self.health.load_state_dict(state["health"])
        self.refresh_is_due = state["refresh_is_due"] and state["step"] < self.config.train.steps
        self.evaluations = {int(step): result for step, result in state["evaluations"].items()}

    def _load_actors(self, loop: PolicyLoop) -> None:
        """Bring every actor to the state of the checkpoint."""
        folder, state = self.run.checkpoint
        loop.call_trained("load_checkpoint", folder)
        loop.kl.load_state_dict(state["kl"])
        loop.sync(state["step"])


# --------------------------------------------------------------------------------------------------------- one step


class PolicyLoop:
    """The steps of a run.

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
        self.pool = RolloutPool(roles.engines, config.seed)
        self._samples = derive_batch(config).samples_per_step
        self._turns = itertools.count()

    def step(self, step: int) -> dict[str, float]:
        """One batch of rollouts and the update on it. Returns the step's metrics."""
        watch = Stopwatch()
        with watch.stage("step"):
            with watch.stage("generate"):
                prompts = self._prompts_of(step)
                examples = self._examples(step) if self.takes_examples else None
                samples = [prompt for prompt in prompts for _ in range(self.config.batch.samples_per_prompt)]
                chunks = self._rollout(samples, step, self.roles.frozen, examples=examples)
                greedy = self._rollout(prompts, step, (self.algorithm.scorer,), greedy=True) if self.algorithm.has_greedy_baseline else []
            with watch.stage("score"):
                self._score_by_critic(chunks)
                _wait(ref for chunk in [*chunks, *greedy] for role, ref in chunk.scores.items() if role != "reference")
            with watch.stage("reference"):
                _wait(chunk.scores["reference"] for chunk in chunks)
            with watch.stage("advantage"):
                batch_metrics, shards = self._advantages(chunks, greedy)
            if is_due(step, self.config.train.save_rollouts_every_steps):
                self.roles.builder.write_rollouts.remote(step)
            with watch.stage("update"):
                update_metrics = self._update(shards, step)
            check_mismatch(update_metrics, self.config.mismatch.max_token_mult_error)
            for trained in ("policy", *(["critic"] if self.roles.critics else [])):
                check_finite(step, update_metrics, trained, trained, dtype=self.config.model.dtype)
            with watch.stage("sync"):
                self.sync(step)
        in_force = {"policy_version": step, "kl/coefficient": self.kl.coefficient}
        self.kl.update(batch_metrics["kl/reference_mean"], self._samples)
        work = work_metrics(watch.seconds, batch_metrics, self._role_statistics(), self._samples, self.config.batch.update_epochs)
        return batch_metrics | update_metrics | work | in_force

    def evaluate(self, step: int) -> dict[str, float]:
        """Sample one response to each held-out prompt and judge it; the sampling seed is the same at every step."""
        chunks = self._rollout(self.heldout, step=0, scored_by=("reference",))
        result = get(self.roles.builder.evaluate.remote(step, chunks), what="evaluation")
        self._role_statistics()  # what was spent here is not part of the next step
        return result

    def sample(self, prompts: Sequence[list[int]], step: int, stream: int) -> list[ScoredChunk]:
        """Rollouts of the current policy that nothing scores."""
        chunks = self._rollout(prompts, step, scored_by=(), stream=stream)
        self._role_statistics()  # what was spent here is not part of the next step
        return chunks

    # ------------------------------------------------------------------------------------------------ the stages

    def _prompts_of(self, step: int) -> list[list[int]]:
        indices = prompt_indices(len(self.prompts), self.config.batch.prompts_per_step, step, self.config.seed)
        return [self.prompts[i] for i in indices]

    def _examples(self, step: int) -> ObjectRef:
        """Fresh rollouts of the current policy to distinct prompts, for the value model to know the policy by."""
        distinct = list(dict.fromkeys(map(tuple, self.prompts)))
        indices = prompt_indices(len(distinct), min(self.config.gvm.context.pool, len(distinct)), step, self.config.seed)
        chunks = self._rollout([list(distinct[i]) for i in dict.fromkeys(indices)], step, scored_by=(), stream=EXAMPLES_STREAM)
        return self.roles.builder.gather.remote(chunks)

    def _rollout(
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

    def _score(self, rollouts: ObjectRef, roles: Sequence[str], examples: ObjectRef | None) -> ScoredChunk:
        turn, scores = next(self._turns), {}
        for role in roles:
            models = self.roles.frozen[role]
            more = (examples,) if role == "scorer" else ()
            scores[role] = models[turn % len(models)].score.remote(rollouts, *more)
        return ScoredChunk(rollouts, scores)

    def _score_by_critic(self, chunks: list[ScoredChunk]) -> None:
        """Values of the online critic, where there is one. All its ranks run forward together, so it takes a step's chunks at once."""
        critics = self.roles.critics
        for i, critic in enumerate(critics):
            mine = chunks[i :: len(critics)]
            refs = critic.score.options(num_returns=max(1, len(mine))).remote([chunk.rollouts for chunk in mine])
            for chunk, ref in zip(mine, [refs] if len(mine) <= 1 else refs, strict=False):
                chunk.scores["critic"] = ref

    def _advantages(self, chunks: list[ScoredChunk], greedy: list[ScoredChunk]) -> tuple[dict[str, float], list[ObjectRef]]:
        """The batch's metrics, and one shard for each rank of the learner and then of the critic."""
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

    # ------------------------------------------------------------------------------------------------- the actors

    def call_trained(self, method: str, folder: Path) -> None:
        """`save_checkpoint` or `load_checkpoint` of every rank of every trained role, in the role's own folder."""
        calls = [getattr(rank, method).remote(str(folder / role)) for role, ranks in self.roles.trained.items() for rank in ranks]
        get(calls, what=f"{'saving' if method.startswith('save') else 'loading'} a checkpoint")

    def save_policy(self, folder: Path) -> None:
        """Write the policy as a Hugging Face checkpoint."""
        get([learner.save_pretrained.remote(str(folder)) for learner in self.roles.learners], what="saving the policy")

    def _role_statistics(self) -> dict[str, list[dict[str, float]]]:
        pending = {role: [handle.stats.remote() for handle in handles] for role, handles in self.roles.by_role.items()}
        return {role: get(refs, what=f"statistics of {role}") for role, refs in pending.items()}


def _wait(refs: Iterable[ObjectRef]) -> None:
    refs = list(refs)
    ray.wait(refs, num_returns=len(refs), fetch_local=False)
