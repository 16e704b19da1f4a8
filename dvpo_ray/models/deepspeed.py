"""The training engine: DeepSpeed behind one class, which the actors hold, and the loading of models for it.

DeepSpeed is imported inside the functions: the import takes seconds, and the driver does not need it.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from dvpo_ray.config.schema import DeepSpeedConfig, OptimizerConfig
from dvpo_ray.errors import ResourceError
from dvpo_ray.files import clear_when_full
from dvpo_ray.models.compiling import compile_layers, compiles
from dvpo_ray.models.loading import default_device, each_weight
from dvpo_ray.models.offload import HostMemory
from dvpo_ray.models.trainable import WeightShape, adapter_weights, describe_weights, full_weights

if TYPE_CHECKING:
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

ZERO3_WHOLE_BELOW = 100_000
"""Elements below which ZeRO 3 keeps a parameter whole on every rank, DeepSpeed's `stage3_param_persistence_threshold`."""
REDUCE_BUCKET_ELEMENTS = 10**8
"""Gradients that ranks reduce together from ZeRO 1 on. DeepSpeed's default, five times as many, takes a GiB of a GPU and is no faster."""
STEP_ELEMENTS = 250_000_000
"""Elements whose gradients a step without ZeRO turns from bfloat16 into float32 at a time."""
BUCKET_BYTES = 2**28
"""Weights that ZeRO 3 gathers together, unless something else is asked for."""


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


def _deepspeed_json(deepspeed_config: DeepSpeedConfig, dtype: torch.dtype, max_grad_norm: float = 0.0) -> dict:
    # Without ZeRO and in float32 DeepSpeed would clip but not keep the norm, so `TrainingEngine.step` does both in one pass.
    unclipped = deepspeed_config.zero_stage == 0 and dtype == torch.float32
    zero: dict = {"stage": deepspeed_config.zero_stage, "reduce_bucket_size": REDUCE_BUCKET_ELEMENTS}
    if deepspeed_config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if deepspeed_config.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed requires a number; micro-batches here are cut by tokens, not rows
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0 if unclipped else max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "steps_per_print": 2**31,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU before every forward pass
    }


# ----------------------------------------------------------------------------------------------------------- loading


@contextmanager
def loading(deepspeed_config: DeepSpeedConfig, dtype: torch.dtype, whole_below: int = ZERO3_WHOLE_BELOW) -> Iterator[torch.device]:
    """Within this context a model is loaded for a `TrainingEngine`, on the device that it yields.

    With ZeRO 3 each weight is cut to this rank's part as soon as it is read, so a rank never holds more than its parts and one
    weight. The files are mapped into memory, not read, and only what is used of them takes memory.

    Args:
        whole_below: ZeRO 3 leaves weights with fewer elements whole.
    """
    if deepspeed_config.zero_stage < 3:
        yield default_device()
        return
    import deepspeed

    cutter = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=_deepspeed_json(deepspeed_config, dtype))

    def cut(weight: nn.Parameter) -> None:
        if weight.numel() >= whole_below:
            weight.data = weight.data.to(cutter.local_device)
            cutter._convert_to_deepspeed_param(weight)
            weight.partition()  # `zero.Init` would send it from rank 0 first, but every rank has read the same file

    with each_weight(cut), _tying_whole_weights():
        yield torch.device("cpu")


@contextmanager
def _tying_whole_weights() -> Iterator[None]:
    """transformers ties two weights of a checkpoint if they are equal; within this context it compares them whole."""
    tie_weights = PreTrainedModel.tie_weights

    def tie(model: PreTrainedModel, *args, **kwargs) -> None:
        tied = model.all_tied_weights_keys
        with _gathered([p for name, p in model.named_parameters(remove_duplicate=False) if name in tied or name in tied.values()]):
            tie_weights(model, *args, **kwargs)

    PreTrainedModel.tie_weights = tie
    try:
        yield
    finally:
        PreTrainedModel.tie_weights = tie_weights


def _prepare_the_rest(model: nn.Module, dtype: torch.dtype) -> None:
    """What DeepSpeed leaves alone in a model whose weights are cut already: the dtype of weights that are not, and the place of buffers."""
    for parameter in model.parameters():
        if not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(dtype)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(default_device())


def _gathered(parameters: list[nn.Parameter]):
    """Context in which ZeRO-3 parameters are whole on every rank; ordinary parameters are left alone."""
    import deepspeed

    return deepspeed.zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_id")], modifier_rank=None)


# ------------------------------------------------------------------------------------------------------------ engine


class TrainingEngine:
    """A model under DeepSpeed, with AdamW over its trainable parameters. Every method is a collective of all ranks.

    Attributes:
        model: the model as transformers or peft made it.
        engine: DeepSpeed's engine around it; forward passes go through it.

    Args:
        model: read inside `loading`, where ZeRO 3 has cut its weights.
        total_steps: optimizer steps of the whole run, for the learning-rate schedule.

    Raises:
        ResourceError: see `compile_layers`.
    """

    def __init__(self, model: nn.Module, optimizer: OptimizerConfig, deepspeed_config: DeepSpeedConfig, dtype: torch.dtype, total_steps: int) -> None:
        import deepspeed

        self.model = model
        self.max_grad_norm = optimizer.max_grad_norm
        self.is_cut = deepspeed_config.zero_stage == 3
        self._host = HostMemory(default_device())
        if deepspeed_config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        if deepspeed_config.zero_stage < 3 and compiles(deepspeed_config.compile, total_steps):
            compile_layers(model)
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            _prepare_the_rest(model, dtype)
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
        with _without_first_step():
            self.engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=adamw,
                lr_scheduler=schedule,
                model_parameters=parameters,
                config=_deepspeed_json(deepspeed_config, dtype, optimizer.max_grad_norm),
                dist_init_required=False,
            )
        if dist.get_world_size() == 1 and not self.engine.zero_optimization():
            self.engine.enable_backward_allreduce = False  # nothing to reduce, and DeepSpeed would copy all gradients twice
        if deepspeed_config.zero_stage == 0 and dtype == torch.bfloat16:
            self.engine.optimizer.step = partial(_bfloat16_step, self.engine.optimizer)

    # -------------------------------------------------------------------------------------------------- training

    def step(self, losses: Sequence[Callable[[], Tensor]]) -> StepResult:
        """Accumulate the gradients of several micro-batches and take one optimizer step.

        Args:
            losses: functions that run one micro-batch forward and return its share of the minibatch loss. The shares of all
                micro-batches and ranks add up to that loss. Every rank must pass the same number of functions.
        """
        engine, world_size = self.engine, dist.get_world_size()
        learning_rate = engine.get_lr()[0]
        # Without ZeRO in float16 DeepSpeed's step takes a loss scale out of the gradients that its backward pass has not put in.
        scale = engine.optimizer.loss_scale if engine.fp16_enabled() and not engine.zero_optimization() else 1.0
        for index, loss in enumerate(losses):
            engine.set_gradient_accumulation_boundary(index == len(losses) - 1)
            engine.backward(loss() * (world_size * scale))  # DeepSpeed averages gradients over ranks, but the shares must be summed
        norm = None if engine.gradient_clipping() > 0 else _clip_gradients(self.model, self.max_grad_norm)
        engine.step()
        norm = engine.get_global_grad_norm() if norm is None else norm
        return StepResult(norm if scale == 1.0 else norm / scale, learning_rate)

    # --------------------------------------------------------------------------------------------------- weights

    def weights(self, changing_only: bool = False, bucket_bytes: int = BUCKET_BYTES) -> Iterator[tuple[str, Tensor]]:
        """The whole weights under their checkpoint names, one by one; see `full_weights`."""
        return full_weights(self.model, _gathered if self.is_cut else None, changing_only=changing_only, bucket_bytes=bucket_bytes)

    def describe_weights(self, changing_only: bool = False) -> list[WeightShape]:
        """What `weights` would yield, without gathering anything. No collective."""
        return describe_weights(self.model, changing_only=changing_only)

    def adapters(self) -> Iterator[tuple[str, Tensor]]:
        """The weights of LoRA adapters alone; see `adapter_weights`."""
        return adapter_weights(self.model, _gathered if self.is_cut else None)

    def weights_on_first_rank(self) -> dict[str, Tensor]:
        """The whole weights in the host memory of rank 0; the other ranks help and get none."""
        is_first, kept = dist.get_rank() == 0, {}
        for name, tensor in self.weights():
            if is_first:
                kept[name] = tensor.cpu().clone()
        return kept

    # -------------------------------------------------------------------------------------------------- off-load

    def offload(self, *, parameters: bool = True) -> None:
        """Give the device's memory back until `reload`: the optimizer's state, gradients and buffers, and the parameters if asked for.

        DeepSpeed can do so with ZeRO 1 and 2, with ZeRO 3 only for an AdamW that it compiles itself, and not without ZeRO. No collective.
        """
        weights = [*self.model.buffers(), *(part for p in self.model.parameters() for part in (p.data, getattr(p, "ds_tensor", None)))]
        weights = [weight for weight in weights if weight is not None]
        of_weights = {weight.untyped_storage()._cdata for weight in weights}
        optimizers = [vars(self.engine.optimizer), self.engine.basic_optimizer.state, self.engine.basic_optimizer.param_groups]
        state = [*_tensors_in(optimizers), *(p.grad for p in self.model.parameters() if p.grad is not None)]
        others = [tensor for tensor in state if tensor.untyped_storage()._cdata not in of_weights]
        buckets = [bucket.buffer for bucket in getattr(self.engine.optimizer, "ipg_buckets", {}).values()]
        self._host.take([*others, *weights] if parameters else others, scratch=[buffer for buffer in buckets if isinstance(buffer, Tensor)])

    def reload(self) -> None:
        """Bring back what `offload` has moved away. No collective."""
        self._host.bring_back()

    # ----------------------------------------------------------------------------------------------- checkpoints

    def save(self, folder: str, tag: str) -> None:
        """Write the sharded model, optimizer and schedule under a name."""
        with clear_when_full(Path(folder)):
            self.engine.save_checkpoint(folder, tag=tag, exclude_frozen_parameters=self._has_frozen_parameters)

    def load(self, folder: str, tag: str) -> None:
        """Continue from what `save` wrote.

        Raises:
            ResourceError: there is no checkpoint of this name.
        """
        loaded, _ = self.engine.load_checkpoint(folder, tag=tag, load_module_strict=not self._has_frozen_parameters)
        if loaded is None:
            raise ResourceError(f"{folder}: DeepSpeed found no checkpoint of this {tag}")

    @property
    def _has_frozen_parameters(self) -> bool:
        return any(not parameter.requires_grad for parameter in self.model.parameters())


@contextmanager
def _without_first_step() -> Iterator[None]:
    """Within this context DeepSpeed's optimizer without ZeRO in 16 bit begins without the step that it takes with gradients of zero.

    Adam would count that step, and the first real one be a quarter too short. It takes 20 bytes a weight, more than the training ever does.
    """
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    with mock.patch.object(FP16_UnfusedOptimizer, "initialize_optimizer_states", lambda _: None):
        yield


def _tensors_in(value: object, seen: set[int] | None = None) -> Iterator[Tensor]:
    """All tensors in nested lists and dictionaries, with their gradients."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        if value.is_leaf and value.grad is not None:
            yield value.grad
    elif isinstance(value, dict | list | tuple | deque):
        for item in list(value.values() if isinstance(value, dict) else value):
            yield from _tensors_in(item, seen)


@dataclass(frozen=True)
class StepResult:
    """The global gradient norm of an optimizer step before clipping, and its learning rate.

    The norm may be a scalar tensor, because to read it from a GPU is to wait for the step.
    """

    grad_norm: float | Tensor
    learning_rate: float


def _clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Clip gradients that are whole on every rank to a global norm, in place, and return their norm before clipping."""
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in trained])
    if norm.is_cuda or norm > max_norm:  # on a GPU to ask would wait for the backward pass
        torch.nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return norm


@torch.no_grad()
def _bfloat16_step(optimizer: FP16_UnfusedOptimizer) -> None:
    """The step of DeepSpeed's optimizer without ZeRO in bfloat16, on its own state, with nothing that waits. The numbers
    are the same to float32 rounding.

    DeepSpeed's looks at each gradient for overflow and waits for the answer, then takes norms, copies to float32, scales, and copies
    weights back, one tensor and one kernel at a time: 15 kernels a tensor and one wait for each. Here all of it takes a few kernels for
    all tensors together. AdamW's kernel scales the gradients itself, and it leaves everything as it is if their norm is not finite.
    float32 gradients exist for `STEP_ELEMENTS` at a time, as in ZeRO 3.
    """
    weights = [weight for group in optimizer.fp16_groups for weight in group]
    masters = [master for group in optimizer.fp32_groups for master in group]
    gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)))
    adamw = optimizer.optimizer
    adamw.found_inf = (~norm.isfinite()).float()
    adamw.grad_scale = ((norm + 1e-6) / optimizer.clip_grad).clamp(min=1.0)
    for start, end in _spans([master.numel() for master in masters], STEP_ELEMENTS):
        wide = [torch.empty_like(master) for master in masters[start:end]]
        torch._foreach_copy_(wide, gradients[start:end])
        for master, gradient in zip(masters[start:end], wide, strict=True):
            master.grad = gradient
        adamw.step()
        for master in masters[start:end]:
            master.grad = None
        torch._foreach_copy_(weights[start:end], masters[start:end])
    optimizer.overflow, optimizer._global_grad_norm = False, norm


def _spans(sizes: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Cut a list into neighbouring parts, first and last index, whose sizes add up to `most` at most, or that hold one element."""
    start, filled = 0, 0
    for index, size in enumerate(sizes):
        if index > start and filled + size > most:
            yield start, index
            start, filled = index, 0
        filled += size
    if sizes:
        yield start, len(sizes)
