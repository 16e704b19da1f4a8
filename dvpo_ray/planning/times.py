"""Seconds of a step by stage: operations and bytes, over what a device does of each in a second.

Operations are counted as usual (Kaplan et al. 2020, arXiv 2001.08361, §2.1): two for each weight and token forward, and twice as
many backward, with those of causal attention added. Loading, Python and Ray are not in it, so it is a lower bound for small models.
The speeds of a device come from a table, or are measured in seconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from dvpo_ray.config.algorithms import ALGORITHMS
from dvpo_ray.config.arithmetic import derive_batch
from dvpo_ray.config.schema import Config
from dvpo_ray.errors import ResourceError
from dvpo_ray.gvm.model import keep_first_layers
from dvpo_ray.models.loading import default_device, torch_dtype
from dvpo_ray.planning.architecture import Architecture, policy_plan
from dvpo_ray.planning.memory import GIB, rows_together
from dvpo_ray.planning.placement import GPUS, check_device, choose_transport

ADAM_BYTES = 28
"""Of each trained element in an optimizer step, in float32: weight, gradient and two moments read, weight and moments written."""
SYNC_COPIES = 3
"""Times that each weight is copied on its way to an engine: out of the learner, through the transport, into the engine."""
COMPUTE_SHARE, BANDWIDTH_SHARE = 0.4, 0.6
"""Shares of a GPU's peak that training and scoring of a transformer, and decoding, commonly reach."""
CPU_FLOPS_PER_THREAD, CPU_BYTES_PER_SECOND = 30e9, 10e9


@dataclass(frozen=True)
class Device:
    """What one GPU, or the CPU with the policy's threads, does.

    Attributes:
        name: as `--device` takes it.
        memory_gib: of the GPU; None on a CPU, which uses the node's memory.
        training_flops: floating-point operations a second of forward and backward passes.
        scoring_flops: of forward passes.
        bytes_per_second: at which decoding reads weights and the optimizer its state.
        measured: on this machine, and not taken from the table.
    """

    name: str
    memory_gib: float | None
    training_flops: float
    scoring_flops: float
    bytes_per_second: float
    measured: bool = False


# -------------------------------------------------------------------------------------------------------------- step


def forward_flops(model: Architecture, length: int) -> float:
    """Operations of one token in the decoder layers: the mean over the positions of a row of `length` tokens."""
    return 2 * model.layer_matrices + 2 * length * model.attention_width * model.layers


def logit_flops(model: Architecture) -> float:
    """Operations of the logits of one position."""
    return 2 * model.hidden * model.vocabulary


def stage_seconds(config: Config, models: Mapping[str, Architecture], device: Device) -> dict[str, float]:
    """Seconds of generation, scoring, reference, update and sync, and of the whole `step`, with responses of full length.

    With `placement: separate` the frozen models work beside the engines, so only the scoring of the last chunk counts. On a CPU, or on
    GPUs that they share, the times add up. Learner and critic always share.

    Args:
        models: the model of each role.
    """
    step = _Step(config, device)
    algorithm, samples, epochs = ALGORITHMS[config.algorithm], step.samples, config.batch.update_epochs
    scored = step.scoring(models[algorithm.scorer], config.scorer, samples + step.greedy)
    seconds = {
        "generate": step.generation(models["rollout"]),
        "score": step.visible(config.scorer, (1 + len(config.scorer.ensemble)) * scored),
        "reference": step.visible(config.reference, step.scoring(models["reference"], config.reference, samples)),
    }
    recomputes = config.policy.old_log_probs == "recompute" and epochs * config.batch.minibatches_per_epoch > 1
    updates = [step.update(models["learner"], config.policy, again=1 if recomputes else 0)]
    if "critic" in models:
        seconds["score"] += step.scoring(models["critic"], config.critic, samples)
        updates.append(step.update(models["critic"], config.critic, again=0))
    seconds["update"] = sum(updates)
    synced = models["learner"].trained if choose_transport(config) == "adapters" else models["rollout"].parameters
    seconds["sync"] = SYNC_COPIES * synced * step.element_bytes / device.bytes_per_second
    return seconds | {"step": sum(seconds.values())}


class _Step:
    """Seconds of the parts of a step."""

    def __init__(self, config: Config, device: Device) -> None:
        plan = derive_batch(config)
        self.config, self.device = config, device
        self.samples, self.length = plan.samples_per_step, plan.max_tokens_per_row
        self.responses = config.rollout.max_response_tokens
        self.element_bytes = torch_dtype(config.model.dtype).itemsize
        self.greedy = config.batch.prompts_per_step if ALGORITHMS[config.algorithm].has_greedy_baseline else 0

    def generation(self, model: Architecture) -> float:
        """Prompts at once, then token by token. A decoding step takes as long as reading weights and cache, or as computing if that is longer."""
        rollout, device = self.config.rollout, self.device
        shards = rollout.tensor_parallel_size
        samples = math.ceil((self.samples + self.greedy) / rollout.num_actors)
        prompts = samples * (self.length - self.responses) * forward_flops(model, self.length) / (device.scoring_flops * shards)
        together = min(rollout.max_concurrent_sequences, samples)
        cached = together * (self.length - self.responses / 2) * model.cache_per_token * self.element_bytes
        read = model.parameters * self.element_bytes + cached
        compute = together * (forward_flops(model, self.length) + logit_flops(model))
        token = max(read / device.bytes_per_second, compute / device.scoring_flops) / shards
        return prompts + math.ceil(samples / together) * self.responses * token

    def scoring(self, model: Architecture, role, samples: int) -> float:
        """A forward pass of a role's actors over `samples` rows."""
        return math.ceil(samples / role.num_actors) * sum(self._row_flops(model)) / self.device.scoring_flops

    def visible(self, role, seconds: float) -> float:
        """The part of a frozen model's seconds that is left after the last rollout."""
        if role.gpus_per_actor == 0 or self.config.placement == "colocated":
            return seconds
        return seconds / math.ceil(self.samples / (self.config.rollout.rollouts_per_chunk * role.num_actors))

    def update(self, model: Architecture, role, again: int) -> float:
        """Forward and backward passes of all epochs, and the optimizer steps.

        Args:
            again: forward passes over the batch before the update.
        """
        rows = self.samples / role.num_actors
        layers, logits = self._row_flops(model)
        reached = model.trained_layers / model.layers
        weights = min(1.0, model.trained / max(1, model.layer_matrices))  # share of the gradients of weights that is computed
        backward = reached * layers + weights * layers + (1 + (model.trained == model.parameters)) * logits
        recomputed = reached * layers if role.deepspeed.gradient_checkpointing else 0
        epochs, steps = self.config.batch.update_epochs, self.config.batch.update_epochs * self.config.batch.minibatches_per_epoch
        flops = rows * epochs * (layers + logits + backward + recomputed)
        before = again * rows * (layers + logits) / self.device.scoring_flops
        adam = steps * ADAM_BYTES * model.trained / role.num_actors / self.device.bytes_per_second
        return before + flops / self.device.training_flops + adam

    def _row_flops(self, model: Architecture) -> tuple[float, float]:
        """Operations of a row's forward pass: of the layers, and of the logits of its response."""
        return self.length * forward_flops(model, self.length), self.responses * logit_flops(model)


# ----------------------------------------------------------------------------------------------------------- devices


def choose_device(config: Config, name: str | None) -> Device:
    """The device that the learner computes on: the named GPU, else that of this machine; a CPU if the config asks for no GPU.

    Raises:
        InputError: no such GPU is known, or the config does not compute on such a device.
        ResourceError: the config asks for GPUs, no GPU is named, and this machine has none or one that is not in the table.
    """
    check_device(config, name)
    if config.policy.gpus_per_actor == 0:
        flops = CPU_FLOPS_PER_THREAD * config.policy.threads
        return Device("cpu", None, flops, flops, CPU_BYTES_PER_SECOND)
    if name is not None:
        return _gpu(name)
    if not torch.cuda.is_available():
        raise ResourceError(f"the config computes on GPUs and this machine has none; name one with --device: {', '.join(GPUS)}")
    here = torch.cuda.get_device_properties(0)
    memory_gib, words = here.total_memory / GIB, here.name.lower().replace(" ", "-")
    known = [gpu for gpu in GPUS if gpu.removesuffix("-80gb").removesuffix("-40gb") in words]
    if not known:
        raise ResourceError(f"{here.name}: its speed is not in the table; measure it with --calibrate, or name a GPU like it with --device")
    return replace(_gpu(min(known, key=lambda gpu: abs(GPUS[gpu][0] - memory_gib))), memory_gib=memory_gib)


def _gpu(name: str) -> Device:
    memory_gib, peak_tflops, peak_gb_per_second = GPUS[name]
    flops = COMPUTE_SHARE * peak_tflops * 1e12
    return Device(name, memory_gib, flops, flops, BANDWIDTH_SHARE * peak_gb_per_second * 1e9)


def calibrate(config: Config) -> Device:
    """Measure two decoder layers of the policy on this machine, with the learner's threads and dtype: some seconds.

    Raises:
        InputError: the policy's config.json is missing. ResourceError: the config asks for GPUs and this machine has none.
    """
    on_gpu = config.policy.gpus_per_actor > 0
    if on_gpu and not torch.cuda.is_available():
        raise ResourceError("--calibrate measures this machine, but the config computes on GPUs and there is none here; name one with --device")
    plan = policy_plan(config, trained=False)
    keep_first_layers(plan.model_config, min(2, plan.model_config.get_text_config().num_hidden_layers), "")
    sizes, device = plan.architecture(), default_device() if on_gpu else torch.device("cpu")
    torch.set_num_threads(config.policy.threads)
    with torch.device(device):
        model = plan.build().base_model.train()
    length = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    rows = rows_together(min(2048, config.batch.micro_batch_tokens), length)
    ids = torch.zeros(rows, length, dtype=torch.long, device=device)
    flops = rows * length * forward_flops(sizes, length)

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).last_hidden_state

    training = _seconds(lambda: forward(ids).sum().backward())
    with torch.inference_mode():
        scoring, decoding = _seconds(lambda: forward(ids)), _seconds(lambda: forward(ids[:1, :1]))
    name, memory = ("this GPU", torch.cuda.get_device_properties(0).total_memory / GIB) if on_gpu else ("cpu", None)
    read = sizes.layer_matrices * next(model.parameters()).element_size()
    return Device(name, memory, 3 * flops / training, flops / scoring, read / decoding, measured=True)


def _seconds(work: Callable[[], object]) -> float:
    """The fastest of three rounds after one that warms up: what the machine can do when nothing else runs."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = []
    for _ in range(4):
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])
