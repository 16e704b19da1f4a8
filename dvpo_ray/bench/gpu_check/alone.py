"""Roles one after the other in this process, without Ray: their speed, their memory, and the stages of ZeRO."""

from __future__ import annotations

import gc
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from dvpo_ray.actors.frozen import ReferenceModel, ValueScorer
from dvpo_ray.actors.gvm_trainer import GVMTrainer
from dvpo_ray.actors.policy_learner import PolicyLearner
from dvpo_ray.actors.update_plan import Update, plan_update
from dvpo_ray.batch import RaggedBatch
from dvpo_ray.bench.comparisons import with_learner_fields
from dvpo_ray.bench.gpu_check.figures import Report
from dvpo_ray.bench.gpu_check.shapes import Shape, changed, models_of
from dvpo_ray.bench.memory import read_ledger, start_ledger
from dvpo_ray.bench.random_weights import byte_tokenizer
from dvpo_ray.config.schema import Config
from dvpo_ray.gvm.pairs import PairBatch
from dvpo_ray.models.compiling import STEPS_THAT_PAY, compiles
from dvpo_ray.models.loading import default_device, packs_rows
from dvpo_ray.planning.architecture import Architecture, policy_plan, value_plan
from dvpo_ray.planning.memory import GIB, ActorMemory, predict_roles
from dvpo_ray.planning.times import forward_flops, logit_flops
from dvpo_ray.runtime import process

NOMINAL_FLOPS = 790e12
"""What bfloat16 products of large matrices reach on an H100 or H200."""
TARGETS = {"1b": {"learner": 0.3, "gvm_trainer": 0.3}, "3b": {"learner": 0.4, "gvm_trainer": 0.4, "scorer": 0.5, "reference": 0.5}}
"""Shares of the matrix peak, by shape and role."""
PLAN_ERROR = 0.15
STOP = frozenset({byte_tokenizer().eos_token_id})
COMPILED = {"policy.deepspeed": "learner", "gvm.deepspeed": "gvm_trainer", "scorer": "scorer", "reference": "reference"}
"""The role of each section of the config that can compile layers."""
REPEATS = 2
SAME = {"float32": 1e-4, "bfloat16": 0.02}
"""Largest mean difference of log-probs, in nats, after the same two updates by two ways of sharding, by dtype."""


# ------------------------------------------------------------------------------------------------ in this process


@contextmanager
def in_this_process() -> Iterator[None]:
    """Within this context actors can be made without Ray: their output stays here."""
    with mock.patch.object(process, "redirect_process_output"):
        yield
    clear_card()


def clear_card() -> None:
    """Give back the memory of models that are no longer used, and forget the layers that were compiled for them."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def learner_of(config: Config, folder: Path) -> PolicyLearner:
    """A learner of one rank."""
    learner = PolicyLearner(config, 0, str(folder), STOP)
    learner.connect(("127.0.0.1", _free_port()))
    return learner


def trainer_of(config: Config, folder: Path, pairs: PairBatch) -> GVMTrainer:
    """A trainer of the value model of one rank."""
    trainer = GVMTrainer(config, config.gvm, 0, str(folder))
    trainer.connect("127.0.0.1", _free_port(), pairs, 100)
    return trainer


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def random_batch(shape: Shape, seed: int = 0) -> RaggedBatch:
    """Rows of random bytes with the fields that a learner reads."""
    random = np.random.default_rng(seed)
    prompts, responses = (random.integers(3, 259, (shape.rows_alone, count)).tolist() for count in (shape.prompt_tokens, shape.response_tokens))
    log_probs = np.full((shape.rows_alone, shape.response_tokens), -np.log(shape.vocabulary)).tolist()
    return with_learner_fields(RaggedBatch.from_rows(prompts, responses, by_response_token={"log_probs": log_probs}), seed)


def random_pairs(shape: Shape) -> PairBatch:
    """The same rows as preference pairs."""
    batch = random_batch(shape).only()
    return PairBatch(batch.with_row_fields(outcome=np.tile(np.array([1.0, -1.0], np.float32), shape.rows_alone // 2)))


def planned(config: Config, batch: RaggedBatch, step: int = 1) -> Update:
    """The update of one rank on all rows of a batch."""
    packed = packs_rows(config.model, config.model.path, on_gpu=config.policy.gpus_per_actor > 0)
    return plan_update(batch, config.batch, 1, config.batch.micro_batch_tokens, packed=packed, seed=config.seed, step=step)


# --------------------------------------------------------------------------------------------------------- speed


def matrix_peak() -> float:
    """Operations a second that a product of large matrices reaches on this device, the best of several sizes."""
    device = default_device()
    sizes, dtype, count = ((4096, 8192, 16384), torch.bfloat16, 20) if device.type == "cuda" else ((256,), torch.float32, 2)
    best = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        for repeats in (2, count):  # the first warms up
            _synchronize()
            started = time.perf_counter()
            for _ in range(repeats):
                a @ b
            _synchronize()
            seconds = time.perf_counter() - started
        best = max(best, count * 2 * size**3 / seconds)
    return best


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def model_flops(model: Architecture, batch: RaggedBatch, *, trained: bool) -> float:
    """Operations that a model must do for a batch, as model-FLOPs utilisation counts them (Chowdhery et al. 2022, PaLM, arXiv 2204.02311, B).

    2 for each weight and token forward, with causal attention added (`planning.times.forward_flops`), and twice as many backward: 6N and 2N
    of Kaplan et al. 2020. The output projection counts where a response token is predicted, because it runs nowhere else; what gradient
    checkpointing computes again does not count.
    """
    layers = sum(int(length) * forward_flops(model, int(length)) for length in batch.lengths)
    return (3 if trained else 1) * (layers + int(batch.response_lengths.sum()) * logit_flops(model))


@dataclass(frozen=True)
class _Role:
    """A role to be measured: `make` builds it from a config, `work` is a round."""

    name: str
    model: Architecture
    trained: bool
    make: Callable[[Config], process.Actor]
    work: Callable[[process.Actor], object]


def speed_1b(report: Report) -> None:
    """See `speed`."""
    speed(report, "1b")


def speed_3b(report: Report) -> None:
    """See `speed`."""
    speed(report, "3b")


def speed(report: Report, name: str) -> None:
    """Tokens a second, share of the matrix peak and memory of each role that runs a model, alone on the device, at a shape.

    Layers are compiled where a long run would compile them; those of the frozen models only for the shape that has a target for them.
    """
    shape, config = models_of(report, name)
    compiled = [section for section, role in COMPILED.items() if role in TARGETS[name] and compiles(None, STEPS_THAT_PAY)]
    config = changed(config, *(f"{section}.compile=true" for section in compiled))
    report.figure("compiled layers", ", ".join(compiled) or "none")
    peak = matrix_peak()
    report.figure("matrix product", peak / 1e12, "TFLOP/s")
    batch, pairs, folder = random_batch(shape), random_pairs(shape), report.folder
    policy, value = policy_plan(config, trained=True).architecture(), value_plan(config, "gvm").architecture()
    roles = (
        _Role("learner", policy, True, lambda c: learner_of(c, folder), lambda actor: actor.update(planned(actor.config, batch), 0.0)),
        _Role("gvm_trainer", value, True, lambda c: trainer_of(c, folder, pairs), lambda actor: actor.step(np.arange(pairs.num_pairs))),
        _Role("scorer", value, False, lambda c: ValueScorer(c, 0, str(folder)), lambda actor: actor.score(batch)),
        _Role("reference", policy, False, lambda c: ReferenceModel(c, 0, str(folder), STOP), lambda actor: actor.score(batch)),
    )
    with in_this_process():
        for role in roles:
            with report.part(role.name):
                _measure(report, role, config, batch, peak, TARGETS[name].get(role.name))
            clear_card()


def _measure(report: Report, role: _Role, config: Config, batch: RaggedBatch, peak: float, target: float | None) -> None:
    try:
        measured = _rounds(role, config)
    except torch.OutOfMemoryError:
        measured = None  # the error keeps the model alive, so the next try is outside of it
    if measured is None:
        tokens = config.batch.micro_batch_tokens // 2
        report.figure(f"{role.name}: no memory for micro-batches above", tokens, "tokens")
        config = changed(config, f"batch.micro_batch_tokens={tokens}", f"gvm.micro_batch_tokens={tokens}")
        clear_card()
        measured = _rounds(role, config)
    seconds, memory = measured
    flops = model_flops(role.model, batch, trained=role.trained) / seconds
    report.figure(f"{role.name}: speed", batch.num_tokens / seconds, "tokens/s")
    report.figure(f"{role.name}: of the matrix product", flops / peak, at_least=target)
    report.figure(f"{role.name}: of {NOMINAL_FLOPS / 1e12:g} TFLOP/s", flops / NOMINAL_FLOPS)
    report.figure(f"{role.name}: memory", memory.peak / GIB, "GiB")
    planned = predict_roles(config).get(role.name)  # which has no trainer of value models
    if planned is not None:
        report.figure(f"{role.name}: error of `dvpo plan`", planned.memory.peak / memory.peak - 1, at_most=PLAN_ERROR, at_least=-PLAN_ERROR)


def _rounds(role: _Role, config: Config) -> tuple[float, ActorMemory]:
    """Seconds of the fastest round after one that warms up, and the memory of the rounds."""
    actor = role.make(config)
    role.work(actor)
    actor.observe(start_ledger)
    seconds = []
    for _ in range(REPEATS):
        _synchronize()
        started = time.perf_counter()
        role.work(actor)
        _synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds), actor.observe(read_ledger)


# ------------------------------------------------------------------------------------------------ ZeRO and adapters


def zero(report: Report) -> None:
    """ZeRO 0 to 3 with one rank: after the same two updates all have the same weights; and the same with off-loading."""
    shape, config = models_of(report, "tiny")
    batch, bound = random_batch(shape), SAME[config.model.dtype]
    ways = {f"ZeRO {stage}": [f"policy.deepspeed.zero_stage={stage}"] for stage in (0, 1, 2, 3)}
    ways |= {"ZeRO 3, off-loaded": [*ways["ZeRO 3"], "policy.deepspeed.offload_optimizer=true", "policy.deepspeed.offload_parameters=true"]}
    first: np.ndarray | None = None
    with in_this_process():
        for name, overrides in ways.items():
            with report.part(name):
                learner = learner_of(changed(config, "policy.learning_rate=1e-4", *overrides), report.folder)
                work = planned(learner.config, batch)
                before = learner.old_log_probs(work)
                for _ in range(2):
                    learner.update(work, 0.0)
                after = learner.old_log_probs(work)
                first = after if first is None else first
                moved, apart = (float(np.abs(after - other)[batch.response_mask].mean()) for other in (before, first))
                report.check(name, apart <= min(bound, moved / 2) and moved > 0, f"moved by {moved:.2g}, {apart:.2g} from ZeRO 0, nats")
                del learner
            clear_card()
