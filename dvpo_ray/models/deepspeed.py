"""DeepSpeed behind three functions: join the group, build an engine, take one optimizer step over many micro-batches.

DeepSpeed is imported inside the functions: the import takes seconds, and the driver does not need it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dvpo_ray.config.schema import DeepSpeedConfig, OptimizerConfig
from dvpo_ray.models.compiling import compile_layers, compiles

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def init_process_group(rank: int, world_size: int, master_addr: str, master_port: int) -> None:
    """Join the process group of a role's workers: NCCL if this process has a GPU, gloo otherwise."""
    import deepspeed

    # Otherwise DeepSpeed compiles an all-reduce for CPU inference, which training never calls: it takes minutes and a C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    os.environ["LOCAL_RANK"] = "0"  # Ray shows an actor only its own GPU, so it is always the first
    deepspeed.init_distributed(
        dist_backend=backend,
        rank=rank,
        world_size=world_size,
        init_method=f"tcp://{master_addr}:{master_port}",
        auto_mpi_discovery=False,
        verbose=False,
    )


def _schedule(optimizer: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """Learning-rate factor by optimizer step (0-based): linear warm-up, then constant, linear or cosine decay to zero."""
    warmup = round(optimizer.warmup_fraction * total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = (step - warmup) / max(1, total_steps - warmup)
        if optimizer.schedule == "linear":
            return max(0.0, 1.0 - progress)
        if optimizer.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        return 1.0

    return factor


def _deepspeed_json(optimizer: OptimizerConfig, deepspeed_config: DeepSpeedConfig, dtype: torch.dtype) -> dict:
    # Without ZeRO and in float32 DeepSpeed would clip but not keep the norm, so `optimizer_step` does both in one pass.
    unclipped = deepspeed_config.zero_stage == 0 and dtype == torch.float32
    zero: dict = {"stage": deepspeed_config.zero_stage}
    if deepspeed_config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if deepspeed_config.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed requires a number; micro-batches here are cut by tokens, not rows
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0 if unclipped else optimizer.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "steps_per_print": 2**31,
    }


def build_engine(
    model: nn.Module, optimizer: OptimizerConfig, deepspeed_config: DeepSpeedConfig, dtype: torch.dtype, total_steps: int
) -> DeepSpeedEngine:
    """Wrap a model in a DeepSpeed engine with AdamW over its trainable parameters.

    Args:
        total_steps: optimizer steps of the whole run, for the learning-rate schedule.

    Raises:
        ResourceError: see `compile_layers`.
    """
    import deepspeed

    if deepspeed_config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    can_compile = deepspeed_config.zero_stage < 3 and not deepspeed_config.gradient_checkpointing
    if can_compile and compiles(deepspeed_config.compile, total_steps):
        compile_layers(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(
        parameters,
        lr=optimizer.learning_rate,
        betas=optimizer.betas,
        eps=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
        fused=True,  # one pass over weights, gradients and moments: five times as fast on a CPU
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, _schedule(optimizer, total_steps))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=adamw,
        lr_scheduler=schedule,
        model_parameters=parameters,
        config=_deepspeed_json(optimizer, deepspeed_config, dtype),
        dist_init_required=False,
    )
    if dist.get_world_size() == 1 and not engine.zero_optimization():
        engine.enable_backward_allreduce = False  # nothing to reduce, and DeepSpeed would copy all gradients twice
    return engine


@dataclass(frozen=True)
class StepResult:
    """The global gradient norm of an optimizer step before clipping, and its learning rate."""

    grad_norm: float
    learning_rate: float


def optimizer_step(engine: DeepSpeedEngine, losses: Sequence[Callable[[], Tensor]], max_grad_norm: float) -> StepResult:
    """Accumulate the gradients of several micro-batches and take one optimizer step.

    Args:
        losses: functions that run one micro-batch forward and return its share of the minibatch loss. The shares of all
            micro-batches and ranks add up to that loss. Every rank must pass the same number of functions.
        max_grad_norm: as in `build_engine`.
    """
    learning_rate = engine.get_lr()[0]
    world_size = dist.get_world_size()
    for index, loss in enumerate(losses):
        engine.set_gradient_accumulation_boundary(index == len(losses) - 1)
        engine.backward(loss() * world_size)  # DeepSpeed averages gradients over ranks, but the shares must be summed
    if engine.gradient_clipping() > 0:
        engine.step()
        return StepResult(float(engine.get_global_grad_norm()), learning_rate)
    norm = _clip_gradients(engine.module, max_grad_norm)
    engine.step()
    return StepResult(norm, learning_rate)


def _clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Clip gradients that are whole on every rank to a global norm, in place, and return their norm before clipping."""
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in trained])
    if norm > max_norm:
        torch.nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return float(norm)


def gather_parameters(parameters: list[nn.Parameter]):
    """Context in which ZeRO-3 parameters are whole on every rank; ordinary parameters are left alone."""
    import deepspeed

    return deepspeed.zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_id")], modifier_rank=None)
