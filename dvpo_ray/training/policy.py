"""`dvpo train`: a policy optimised with the Global Value Model frozen, or by one of the baselines.

    rollout → score ∥ reference → advantage → update → sync

`optimise` is the run and `PolicyLoop.step` is one step of it. The algorithm shows in the roles only: which frozen models score a
rollout, and whether a critic is trained beside the policy. The driver holds references and small numbers; tokens go from the actor
that made them to the actor that needs them. All randomness of a step follows from the seed and the step's number.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from dvpo_ray.actors.experience_builder import ScoredChunk
from dvpo_ray.actors.roles import started_roles
from dvpo_ray.config import Config
from dvpo_ray.errors import DiskFull
from dvpo_ray.files import whole_folder
from dvpo_ray.monitoring.console import RunConsole
from dvpo_ray.policy.mismatch import check_mismatch
from dvpo_ray.runtime.cluster import connect
from dvpo_ray.runtime.fork_server import prepare
from dvpo_ray.runtime.waiting import wait
from dvpo_ray.training.policy_inputs import load_inputs
from dvpo_ray.training.policy_state import PolicyState
from dvpo_ray.training.run import Run, check_finite, is_due
from dvpo_ray.training.stages import Stages
from dvpo_ray.training.work import Stopwatch, work_metrics


def train(config: Config, resume: bool = False, console: RunConsole | None = None) -> Path:
    """Optimise the policy of a config in `config.out` and return that folder.

    Args:
        resume: continue the run in that folder from its last whole checkpoint.
        console: of a larger run that this is a part of; otherwise the run opens its own.

    Raises:
        InputError, ResourceError: in one line; bad input is found before any actor starts.
    """
    prepare(config)
    run = Run("train", config, Path(config.out), resume=resume)
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    is_part = console is not None
    with nullcontext(console) if is_part else RunConsole() as console:
        with console.stage("reading models and prompts", quiet=True):
            inputs = load_inputs(config)
            state = PolicyState(run, inputs)
        start = (state.refresher.scoring_config, str(run.folder), inputs.stop_token_ids, longest)
        with (
            run.started(config.algorithm.upper(), state.header(), inputs.notes, state.summary, console, is_part=is_part),
            console.entering("start of Ray", connect(config.ray, console.say), quiet=True),
            console.entering("start of the actors", started_roles(*start, show=console.starting)) as roles,
        ):
            run.memory.add_pids(roles.local_pids)
            roles.builder.know_prompts.remote(inputs.contents)
            loop = PolicyLoop(config, roles, inputs.prompts, inputs.heldout, inputs.manifest.context.examples > 0)
            optimise(run, state, loop, console)
    return run.folder


def optimise(run: Run, state: PolicyState, loop: PolicyLoop, console: RunConsole) -> None:
    """All steps from the checkpoint or the start on, and what comes after them."""
    config = run.config
    run.expect_checkpoints(loop.checkpoint_bytes(), config.checkpoint.every_steps, config.train.steps)
    if run.checkpoint is None:
        with console.stage("first weights to the engines", quiet=True):
            loop.sync_between_steps(0)  # engines start without weights
    else:
        with console.stage("loading the checkpoint", quiet=True):
            loop.load(*run.checkpoint)
    state.evaluate_if_due(loop, console)
    with (
        run.metrics_log() as log,
        console.stage("policy optimisation", total=config.train.steps, done=run.last_step, unit="steps") as progress,
        run.saved_when_interrupted(loop.save_at_the_end, lambda: loop.state_dict() | state.state_dict(), console),
    ):
        for step in range(run.last_step + 1, config.train.steps + 1):
            refreshed = state.refresh(loop, console)
            experience = loop.collect(step)
            with run.whole_step(console):
                metrics = loop.learn(step, experience)
                health, alarms = state.health.observe(step, metrics)
                log.write(step, metrics | health | refreshed)
                progress.step(step, metrics)
                run.last_step = step
                stops = state.heed(alarms, console)
            state.evaluate_if_due(loop, console)
            is_kept = stops or state.refresh_is_due or is_due(step, config.checkpoint.every_steps)
            if is_kept or step == config.train.steps:
                with console.stage("saving a checkpoint", quiet=True), run.whole_step(console):
                    try:
                        run.save_checkpoint(loop.save, loop.state_dict() | state.state_dict())
                    except DiskFull as full:  # the checkpoint that more steps would start from; the result matters more
                        if is_kept:
                            raise
                        console.warn(f"no checkpoint of the last step, so the run cannot be made longer: {full}")
            if stops:
                run.outcome = "stopped"
                break
        if run.last_step not in state.evaluations:
            state.evaluate(loop, console)
        with console.stage("saving the policy", quiet=True), whole_folder(run.folder / "final") as draft:
            loop.save_policy(draft)
    loop.finish()


@dataclass(frozen=True)
class Experience:
    """The scored rollouts of a step, the greedy responses where the algorithm takes them, and the time so far."""

    chunks: list[ScoredChunk]
    greedy: list[ScoredChunk]
    watch: Stopwatch


class PolicyLoop(Stages):
    """The steps of a run."""

    def step(self, step: int) -> dict[str, float]:
        """One batch of rollouts and the update on it. Returns the step's metrics."""
        return self.learn(step, self.collect(step))

    def collect(self, step: int) -> Experience:
        """The scored rollouts of a step. Nothing that a checkpoint keeps has changed after it."""
        watch = Stopwatch()
        with watch.stage("step"):
            with watch.stage("generate"):
                prompts = self.prompts_of(step)
                examples = self.examples(step) if self.takes_examples else None
                samples = [prompt for prompt in prompts for _ in range(self.config.batch.samples_per_prompt)]
                chunks = self.rollout(samples, step, self.roles.frozen, examples=examples)
                greedy = self.rollout(prompts, step, (self.algorithm.scorer,), greedy=True) if self.algorithm.has_greedy_baseline else []
                self.turns.sampled()
            with watch.stage("score"):
                self.score_by_critic(chunks)
                wait((ref for chunk in [*chunks, *greedy] for role, ref in chunk.scores.items() if role != "reference"), what="scores")
            with watch.stage("reference"):
                wait((chunk.scores["reference"] for chunk in chunks), what="reference log-probs")
                self.turns.scored()
            self.check_start(chunks)
        return Experience(chunks, greedy, watch)

    def learn(self, step: int, experience: Experience) -> dict[str, float]:
        """The update of a step on its rollouts. Returns the step's metrics."""
        watch = experience.watch
        with watch.stage("step"):
            with watch.stage("advantage"):
                batch_metrics, updates = self.advantages(experience.chunks, experience.greedy, step)
            if is_due(step, self.config.train.save_rollouts_every_steps):
                self.write_rollouts(step)
            with watch.stage("update"):
                update_metrics = self.update(updates)
            check_mismatch(update_metrics, self.config.mismatch.max_token_mult_error)
            for trained in ("policy", *(["critic"] if self.roles.critics else [])):
                check_finite(step, update_metrics, trained, trained, dtype=self.config.model.dtype)
            with watch.stage("sync"):
                self.sync(step)
        in_force = {"policy_version": step, "kl/coefficient": self.kl.coefficient}
        self.kl.update(batch_metrics["kl/reference_mean"], self.samples_per_step)
        work = work_metrics(watch.seconds, batch_metrics, self.role_statistics(), self.samples_per_step, self.config.batch.update_epochs)
        return batch_metrics | update_metrics | work | in_force
