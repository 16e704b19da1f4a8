"""What the memory of an actor is spent on, and the bytes of each role before it exists, by arithmetic on shapes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from dvpo_ray.config.schema import DeepSpeedConfig
from dvpo_ray.models.token_log_probs import LOGITS_AT_ONCE
from dvpo_ray.planning.architecture import Architecture

MASTER, MOMENTS, FULL = 4, 8, 4
"""Bytes of an element in float32: of master weights, of Adam's two moments, of gradients."""
ZERO3_STEP_ELEMENTS = 10**9
"""Elements whose gradients ZeRO 3 turns into float32 at a time, DeepSpeed's `sub_group_size`."""
REDUCE_BUCKET_ELEMENTS, ZERO3_LIVE_ELEMENTS = 5 * 10**8, 10**9
"""DeepSpeed's `reduce_bucket_size`, and the elements that ZeRO 3 has gathered at most, its `stage3_max_live_parameters`."""
BLOCK_LOGIT_BYTES = 12
"""Of each logit of the rows that `models.token_log_probs` works on: the logit in float32, its log-softmax, and the probabilities."""
SAMPLING_LOGIT_BYTES = 12
"""Of each float32 logit of the sequences that an engine decodes together: the logit, its log-softmax, and a copy to sample from."""


@dataclass(frozen=True)
class ActorMemory:
    """Bytes of one actor, or of all actors of a role or of a run.

    Attributes:
        parameters, gradients, optimizer, cache: tensors that outlive a micro-batch, in device and in host memory together; gradients at their
            largest in the step.
        activations: peak of the step above model state and cache: what forward and backward passes keep, logits, and the buffers of
            communication; None where it could not be measured.
        offloaded: the part of parameters, gradients and optimizer that is in host memory while a GPU computes.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int | None = 0
    cache: int = 0
    offloaded: int = 0

    @property
    def model_state(self) -> int:
        """Parameters, gradients and optimizer."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """Model state on the device that computes, and activations; the cache is left out, as its size is a setting."""
        return self.model_state - self.offloaded + (self.activations or 0)

    def __add__(self, other: ActorMemory) -> ActorMemory:
        mine, theirs = asdict(self), asdict(other)
        return ActorMemory(**{name: None if None in (mine[name], theirs[name]) else mine[name] + theirs[name] for name in mine})


def trained_state(model: Architecture, element_bytes: int, deepspeed: DeepSpeedConfig, ranks: int) -> ActorMemory:
    """Parameters, gradients and optimizer on one rank, by DeepSpeed's ZeRO stage (Rajbhandari et al. 2020, arXiv 1910.02054, §3).

    Beyond the paper's arithmetic, as DeepSpeed does it: master weights are kept for float32 models too from stage 1 on; in its step
    the optimizer holds a float32 copy of lower gradients; ZeRO 3 keeps small parameters whole on every rank beside their shards.

    Args:
        element_bytes: of the model's dtype.
        ranks: data-parallel workers.
    """
    stage, low_precision = deepspeed.zero_stage, element_bytes < FULL
    share = model.trained / ranks
    if stage == 0:
        gradients = (element_bytes + FULL if low_precision else FULL) * model.trained
        optimizer = (MOMENTS + (MASTER if low_precision else 0)) * model.trained
        return ActorMemory(model.parameters * element_bytes, gradients, optimizer)
    parameters = model.parameters * element_bytes
    if stage == 3:
        parameters = round(element_bytes * (model.parameters / ranks + (model.kept_whole if ranks > 1 else 0)))
    gradients = {
        1: max(element_bytes * model.trained, FULL * share),
        2: FULL * share,
        3: element_bytes * share + FULL * min(share, ZERO3_STEP_ELEMENTS),
    }[stage]
    optimizer, offloaded = round((MASTER + MOMENTS) * share), 0
    if deepspeed.offload_optimizer:
        gradients = (element_bytes + FULL) * share
        staging = round(element_bytes * share) if stage < 3 else 0  # updated weights on their way back
        parameters += staging
        offloaded = optimizer + round(gradients) + staging
    if deepspeed.offload_parameters:  # with ZeRO 3 alone
        offloaded += parameters
    return ActorMemory(parameters, round(gradients), optimizer, offloaded=offloaded)


def logit_bytes(logits: int, element_bytes: int, *, gradients: bool, on_gpu: bool) -> int:
    """Bytes of logits at their peak: the model's, their gradients where there are some, and the block of rows that is worked on."""
    block = min(logits, LOGITS_AT_ONCE["cuda" if on_gpu else "cpu"])
    return (2 if gradients else 1) * element_bytes * logits + BLOCK_LOGIT_BYTES * block


def training_activations(
    saved: int, model: Architecture, element_bytes: int, rows: int, length: int, responses: int, *, checkpointing: bool, on_gpu: bool
) -> int:
    """Peak of forward and backward of one micro-batch above the model's state.

    With gradient checkpointing each layer keeps its input, and one layer at a time is computed again.

    Args:
        saved: what the forward pass keeps without checkpointing.
        length: tokens of a row, prompt and response.
        responses: response tokens of a row, which get logits.
    """
    one_layer = saved // model.layers
    kept = rows * length * model.hidden * element_bytes * model.trained_layers if checkpointing else saved
    return kept + max(one_layer, logit_bytes(rows * responses * model.vocabulary, element_bytes, gradients=True, on_gpu=on_gpu))


def scoring_activations(saved: int, model: Architecture, element_bytes: int, rows: int, responses: int, *, on_gpu: bool) -> int:
    """Peak of one forward pass of a frozen model: a layer at a time, then the logits of the responses."""
    return max(saved // model.layers, logit_bytes(rows * responses * model.vocabulary, element_bytes, gradients=False, on_gpu=on_gpu))


def communication_buffers(model: Architecture, element_bytes: int, deepspeed: DeepSpeedConfig) -> int:
    """Buffers that DeepSpeed takes on a GPU beside the activations: a bucket of gradients from ZeRO 1 on, and with ZeRO 3 whole weights.

    On a CPU they are reserved only, and never touched beyond what is used of them.
    """
    if deepspeed.zero_stage == 0:
        return 0
    gathered = min(model.parameters, ZERO3_LIVE_ELEMENTS) if deepspeed.zero_stage == 3 else 0
    return element_bytes * (REDUCE_BUCKET_ELEMENTS + gathered)


def rows_together(tokens: int, length: int) -> int:
    """Rows of a micro-batch of at most so many tokens."""
    return max(1, tokens // length)
