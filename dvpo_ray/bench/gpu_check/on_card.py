"""What is proven and measured on the roles of a card."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from functools import partial

import numpy as np
import ray
import torch
from ray.actor import ActorHandle

from dvpo_ray.actors.policy_learner import PolicyLearner
from dvpo_ray.actors.rollout_engine import RolloutEngine
from dvpo_ray.actors.update_plan import Update
from dvpo_ray.batch import RaggedBatch
from dvpo_ray.bench.bare import generate_by_vllm
from dvpo_ray.bench.comparisons import with_learner_fields
from dvpo_ray.bench.gpu_check.alone import planned
from dvpo_ray.bench.gpu_check.card import TEMPERATURE, Card, beside, connected, forget_prompts, started_card
from dvpo_ray.bench.gpu_check.figures import Report
from dvpo_ray.bench.ledger import memory_by_role
from dvpo_ray.bench.ledger_results import algorithm_results, ledger_results
from dvpo_ray.bench.measure import Sample, compare, take_turns
from dvpo_ray.bench.overhead import StepProfile, profile_loop
from dvpo_ray.config.algorithms import ALGORITHMS
from dvpo_ray.config.arithmetic import derive_batch
from dvpo_ray.monitoring.metrics import MetricsLog
from dvpo_ray.planning.memory import GIB, ActorMemory, predict_roles
from dvpo_ray.planning.placement import choose_transport
from dvpo_ray.policy.mismatch import START_BOUNDS
from dvpo_ray.rollouts.schedule import sampling_seed
from dvpo_ray.runtime.room import stop
from dvpo_ray.runtime.waiting import get
from dvpo_ray.training.policy import PolicyLoop

START_SECONDS, ENGINE_RATIO, OVERHEAD, PLAN_ERROR = 40.0, 0.95, 0.03, 0.15
SYNC_TARGETS = {"ipc": 50.0, "object_store": 1.5}
"""GB/s of all weights, after the first time."""
FREED = 0.9
"""Share of an engine's weights and cache that its sleep must free."""
SLEEPS = 3
"""Tries to see that: other steps on the card take memory at the same time."""
SAME = 1e-4
"""Nats that two forward passes over the same rows with the same weights may differ by."""
SYNCS, ENGINE_ROUNDS, STEPS = 3, 1, 2


def loops(report: Report) -> None:
    """Every algorithm, LoRA, another temperature, transports, sleep, checkpoints: on a tiny model, with one start."""
    with started_card(report, "tiny", "rollout.enforce_eager=true", adapters=True) as card:
        for name, proof in PROOFS.items():
            with report.part(name):
                proof(card)


def costs_1b(report: Report) -> None:
    """A step at the shape 1B: the engine against bare vLLM, sync, memory by role, and DVPO against PPO."""
    # Both trained models are on one card: without checkpointing there would be no room for their activations.
    more = ["rollout.enforce_eager=false"] if report.on_gpu else []
    checkpointing = [f"{role}.deepspeed.gradient_checkpointing=true" for role in ("policy", "critic")]
    with started_card(report, "1b", *more, *checkpointing, adapters=False) as card:
        for what, measure in MEASUREMENTS.items():
            with report.part(what):
                measure(card)


# --------------------------------------------------------------------------------------------------------- proofs


def first_rollouts(card: Card) -> None:
    """The first weights arrive: engine and reference model agree on the first rollouts."""
    report, loop = card.report, card.loop("dvpo")
    started = time.perf_counter()
    loop.sync_between_steps(0)
    report.figure("first weights to the engine", time.perf_counter() - started, "s")
    chunks = loop.rollout(card.prompts(0), 0, loop.roles.frozen)
    report.figure("first rollouts, from the command", time.time() - card.began, "s", at_most=START_SECONDS if card.is_measured else None)
    loop.check_start(chunks)
    report.check("engine and reference model agree at the start", True, "yes")


def algorithms(card: Card) -> None:
    """Two steps of each."""
    for name in ALGORITHMS:
        with card.report.part(name):
            loop = card.loop(name)
            _check_steps(card.report, f"{name}, {card.config.model.dtype}", [card.step(loop) for _ in range(2)])


def adapters(card: Card) -> None:
    """Two steps of a LoRA learner at a temperature, whose engine gets merged weights through the object store, and two more with an engine
    that gets the adapters alone, and that keeps its model in its sleep."""
    loop = PolicyLoop(card.other_config, card.others, card.inputs.prompts, [])
    loop.sync_between_steps(0)
    _check_steps(card.report, f"LoRA, temperature {TEMPERATURE:g}", [loop.step(number) for number in (1, 2)])
    (learner,), (engine,) = card.adapted.learners, card.adapted.engines
    get(learner.open_channel.remote([engine], "adapters"), what="the channel to the engine with adapters")
    loop = PolicyLoop(card.other_config, card.adapted, card.inputs.prompts, [])
    loop.start_is_checked = True  # its weights are not those of the reference model
    loop.sync_between_steps(2)
    _check_steps(card.report, "LoRA, adapters alone", [loop.step(number) for number in (3, 4)])
    before = card.greedy(engine)
    get(engine.sleep.remote(), what="the engine's sleep")
    for part in ("weights", "cache"):
        get(engine.wake.remote(part), what="waking the engine")
    card.report.check("the same greedy tokens after a sleep with adapters", np.array_equal(before, card.greedy(engine)), f"{len(before)} tokens")


def _check_steps(report: Report, name: str, steps: Sequence[dict[str, float]]) -> None:
    """The steps themselves refuse numbers that are not finite; here the engine must still agree with the learner after the first update."""
    last = steps[-1]
    apart, norm = last["mismatch/log_prob_abs_mean"], last["policy/grad_norm"]
    found = f"gradient {norm:.2g}, engine apart {apart:.2g} nats, {last['time/step_seconds']:.2f} s"
    report.check(name, norm > 0 and apart <= max(bound for bound, _ in START_BOUNDS.values()), found)


def transports(card: Card) -> None:
    """All weights, by the transport of the card and through the object store; the engines' tokens show that they arrive."""
    ways = {choose_transport(card.config): None, "object_store": card.others.engines}
    for transport, engines in ways.items():
        with card.report.part(f"sync, {transport}"):
            seconds, size = card.sync(engines, transport, SYNCS)
            card.report.figure(f"sync, {transport}: first", size / 1e9 / seconds[0], "GB/s")
            target = SYNC_TARGETS.get(transport) if card.is_measured else None
            card.report.figure(f"sync, {transport}: later", size / 1e9 / min(seconds[1:]), "GB/s", at_least=target)
            card.report.figure(f"sync, {transport}: a later one", min(seconds[1:]), "s")


def sleep(card: Card) -> None:
    """Sleep frees the card; after waking and a sync the engine says the same. Without a GPU there is only the sync."""
    before = card.greedy()
    if card.report.on_gpu:
        held, freed = get(card.engine.observe.remote(engine_bytes), what="the engine's memory"), 0
        for _ in range(SLEEPS):
            used = _used_bytes()
            get(card.engine.sleep.remote(), what="the engine's sleep")
            freed = used - _used_bytes()
            if freed >= FREED * held:
                break
            for part in ("weights", "cache"):
                get(card.engine.wake.remote(part), what="waking the engine")
        card.report.check("sleep frees the card", freed >= FREED * held, f"{freed / GIB:.2f} GiB of {held / GIB:.2f} GiB")
        get(card.engine.wake.remote("weights"), what="waking the engine")
        card.sync()
        get(card.engine.wake.remote("cache"), what="waking the engine")
    else:
        card.sync()
    card.report.check("the same greedy tokens after a whole sync", np.array_equal(before, card.greedy()), f"{len(before)} tokens")


def engine_bytes(engine: RolloutEngine) -> int:
    """Inside an engine: bytes of its weights and of its cache."""
    from dvpo_ray.bench.memory import model_state

    return sum(part.total for part in model_state(engine).values())


def _used_bytes() -> int:
    """Of the card, by all processes."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def offload(card: Card) -> None:
    """The learner and a frozen model go to host memory, and come back as they were."""
    work, reference = _work(card, card.loop("dvpo")), card.roles.by_role["reference"][0]
    reference_log_probs = lambda: get(reference.score.remote(work.batch), what="log-probs").by_token["reference_log_probs"]  # noqa: E731
    for name, actor, result in (("learner", card.learner, lambda: _log_probs(card, work)), ("reference", reference, reference_log_probs)):
        before, held = result(), _reserved(card, actor)
        with card.learner_here():
            get(actor.offload.remote(), what="off-loading")
            left = _reserved(card, actor)
            get(actor.reload.remote(), what="its way back")
        apart = float(np.abs(result() - before).max())
        found = f"{left / GIB:.2f} GiB left of {held / GIB:.2f}, {apart:.2g} nats apart"
        card.report.check(f"off-load: {name}", apart < SAME and left <= held / 2, found)


def _reserved(card: Card, actor: ActorHandle) -> int:
    """Bytes of the card that torch has in an actor; 0 without a GPU."""
    return get(actor.gpu_memory.remote(), what="its memory")[2] if card.report.on_gpu else 0


def _work(card: Card, loop: PolicyLoop) -> Update:
    """An update on new rollouts."""
    chunks = loop.rollout(card.prompts(0), card.version, scored_by=())
    batch = RaggedBatch.concatenate(ray.get([chunk.rollouts for chunk in chunks])).sorted_by_id()
    return planned(card.config, with_learner_fields(batch, card.config.seed))


def checkpoint(card: Card) -> None:
    """Save, train on, kill the learner, start another and load: the weights are those that were saved, in learner and engine."""
    loop, folder = card.loop("dvpo"), card.report.folder / "checkpoint"
    work = _work(card, loop)
    loop.save(folder)
    state = {"step": card.version, **loop.state_dict()}
    saved, tokens = _log_probs(card, work), card.greedy()
    card.step(loop)
    trained = _log_probs(card, work)
    stop([card.learner])
    again = beside(card.report, PolicyLearner, "policy", card.config, str(card.report.folder / "again"), card.inputs.stop_token_ids)
    connected(again, [card.engine], choose_transport(card.config))
    card.roles.by_role["learner"] = loop.roles.by_role["learner"] = [again]
    loop.load(folder, state)
    card.version = loop.policy_version
    moved, apart = (float(np.abs(one - saved).max()) for one in (trained, _log_probs(card, work)))
    card.report.check("checkpoint, kill, resume: the learner", apart < 0.01 * moved, f"{apart:.2g} from the saved log-probs, {moved:.2g} before")
    card.report.check("checkpoint, kill, resume: the engine", np.array_equal(tokens, card.greedy()), f"{len(tokens)} greedy tokens")
    _check_steps(card.report, "a step after it", [card.step(loop)])


def _log_probs(card: Card, work: Update) -> np.ndarray:
    with card.learner_here():
        return get(card.learner.old_log_probs.remote(work), what="log-probs")


# ---------------------------------------------------------------------------------------------------- measurements


def engine_speed(card: Card) -> None:
    """Generated tokens a second of the engine's stream, as the driver sees it, against vLLM's own `generate` on the same engine."""
    engine, seed = card.engine, card.config.seed

    def stream(round_: int) -> Sample:
        prompts = card.prompts(round_)
        get(engine.observe.remote(forget_prompts), what="the engine")
        started = time.perf_counter()
        chunks = list(engine.generate.remote(prompts, round_, list(range(len(prompts))), sampling_seed(seed, round_, 0)))
        seconds = time.perf_counter() - started
        return Sample(sum(int(chunk.response_lengths.sum()) for chunk in ray.get(chunks)), seconds)

    def bare(round_: int) -> Sample:
        return get(engine.observe.remote(bare_sample, card.prompts(round_)), what="vLLM's generate")

    result = compare("engine", ENGINE_RATIO, take_turns({"product": stream, "bare vLLM": bare}, ENGINE_ROUNDS))
    card.report.figure("engine", result["product"]["median"], "tokens/s")
    card.report.figure("bare vLLM", result["bare"]["bare vLLM"]["median"], "tokens/s")
    card.report.figure("engine / bare vLLM", result["ratio"], at_least=ENGINE_RATIO)


def bare_sample(engine: RolloutEngine, prompts: Sequence[Sequence[int]]) -> Sample:
    """Inside an engine: a response to each prompt by vLLM alone."""
    forget_prompts(engine)
    started = time.perf_counter()
    tokens = generate_by_vllm(engine, prompts)
    return Sample(tokens, time.perf_counter() - started)


def against_ppo(card: Card) -> None:
    """Steps of PPO and of DVPO: stages, what is outside of them, memory by role against the plan, and the ratios of the two."""
    report, measured = card.report, {}
    stop(card.others.engines)
    for algorithm in ("ppo", "dvpo"):
        if algorithm == "dvpo":
            stop([*card.roles.by_role["critic"], *card.roles.by_role["reward_model"]])
        loop, memory = card.loop(algorithm), dict[str, ActorMemory]()
        numbers = range(card.version + 1, card.version + 1 + STEPS)
        with MetricsLog(report.folder / algorithm, [], config={}) as log:
            steps = profile_loop(loop, log, numbers, around_last_step=partial(memory_by_role, memory))
        card.version = numbers[-1]
        planned = {role: plan.memory for role, plan in predict_roles(loop.config).items()}
        one = measured[algorithm] = algorithm_results(derive_batch(loop.config).samples_per_step, [StepProfile(steps, 0.0)], memory, planned)
        report.figure(f"{algorithm}: a step", one["step_seconds"]["median"], "s")
        for stage, seconds in one["stage_seconds"].items():
            report.figure(f"{algorithm}: {stage}", seconds, "s")
        overhead = statistics.median(step.overhead for step in steps)
        report.figure(f"{algorithm}: outside of the stages", overhead, "of a step", at_most=OVERHEAD if card.is_measured else None)
        for role, found in memory.items():
            error = planned[role].peak / found.peak - 1 if found.peak else math.nan
            bounds = {"at_least": -PLAN_ERROR, "at_most": PLAN_ERROR} if card.is_measured else {}
            report.figure(f"{algorithm}: {role}, peak without cache", found.peak / GIB, "GiB")
            report.figure(f"{algorithm}: {role}, error of `dvpo plan`", error, **bounds)
    for target in ledger_results(measured, {}, on_gpu=True)["targets"]:
        name = {"step": "step", "peak": "peak without cache"}[target["quantity"]]
        report.figure(f"dvpo / ppo: {name}", target["ratio"], at_most=target["limit"] if card.is_measured else None)


PROOFS = {
    "first rollouts": first_rollouts,
    "algorithms": algorithms,
    "adapters": adapters,
    "transports": transports,
    "sleep": sleep,
    "offload": offload,
    "checkpoint": checkpoint,
}
MEASUREMENTS = {"first rollouts": first_rollouts, "transports": transports, "engine": engine_speed, "dvpo against ppo": against_ppo}
