"""Memory of each role before it exists: arithmetic on the config and on the config.json of its models."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from dvpo_ray.config.algorithms import ALGORITHMS
from dvpo_ray.config.arithmetic import derive_batch
from dvpo_ray.config.schema import Config, DeepSpeedConfig
from dvpo_ray.models.deepspeed import REDUCE_BUCKET_ELEMENTS, STEP_ELEMENTS
from dvpo_ray.models.head import BLOCK_LOGITS, KEPT_BYTES
from dvpo_ray.models.loading import torch_dtype
from dvpo_ray.models.token_log_probs import LOGITS_AT_ONCE
from dvpo_ray.planning.architecture import Architecture, ModelPlan, critic_plan, policy_plan, value_plan
from dvpo_ray.planning.placement import adapter_rank, choose_transport, plan_placement, shares_gpus

GIB = 2**30
MASTER, MOMENTS, FULL = 4, 8, 4
"""Bytes of an element in float32: of master weights, of Adam's two moments, of gradients."""
ZERO3_STEP_ELEMENTS = 10**9
"""Elements whose gradients ZeRO 3 turns into float32 at a time, DeepSpeed's `sub_group_size`."""
ZERO3_LIVE_ELEMENTS = 10**9
"""The most elements that ZeRO 3 has gathered, DeepSpeed's `stage3_max_live_parameters`."""
BLOCK_LOGIT_BYTES = 12
"""Of each logit of the rows that `models.token_log_probs` works on: the logit in float32, its log-softmax, the probabilities."""
SAMPLING_LOGIT_BYTES = 12
"""Of each float32 logit of the sequences that an engine decodes together: the logit, its log-softmax, a copy to sample from."""
PROCESS_BYTES = {"cpu": round(0.45 * GIB), "gpu": round(0.6 * GIB)}
"""Of a process before it holds a model: libraries on a CPU, the CUDA context and its kernels on a GPU."""
BLOCK_TOKENS = 16
"""vLLM gives out its cache in blocks of so many tokens, and keeps one block for itself."""
PASS_TOKENS = 16384
"""The most tokens that vLLM computes in one pass on a GPU unless something else is asked for."""
GRAPH_LAYER_BYTES = 2**19
"""Of each decoder layer in each of an engine's CUDA graphs. vLLM's own log has 0.21 GiB for 35 graphs of Llama 3.2 1B, which is 0.4 MiB."""
LARGEST_GRAPH = 512
"""Tokens up to which vLLM captures CUDA graphs unasked."""


@dataclass(frozen=True)
class ActorMemory:
    """Bytes of one actor, or of all actors of a role or of a run.

    Attributes:
        parameters, gradients, optimizer, cache: tensors that outlive a micro-batch, in device and host memory together;
            gradients at their largest in the step.
        activations: peak of the step above model state and cache: what forward and backward passes keep, logits, and
            communication buffers. None when it could not be measured.
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
        """Model state on the device that computes, and activations. The cache is left out: its size is a setting."""
        return self.model_state - self.offloaded + (self.activations or 0)

    def __add__(self, other: ActorMemory) -> ActorMemory:
        mine, theirs = asdict(self), asdict(other)
        return ActorMemory(**{name: None if None in (mine[name], theirs[name]) else mine[name] + theirs[name] for name in mine})


@dataclass(frozen=True)
class RolePlan:
    """One role before it exists.

    Attributes:
        model: the sizes of its model.
        actors: how many there are.
        per_actor: memory of one of them.
        sequences: that an engine decodes together in a step.
        sequences_at_most: that it decodes together when it has more prompts, as in an evaluation; its cache is for so many.
        sleeps: it can free its GPU of weights and cache.
        graphs: bytes of its CUDA graphs on each of its GPUs, which it keeps in its sleep.
    """

    model: Architecture
    actors: int
    per_actor: ActorMemory
    sequences: int = 1
    sequences_at_most: int = 1
    sleeps: bool = False
    graphs: int = 0

    @property
    def memory(self) -> ActorMemory:
        """Of all actors together."""
        return sum([self.per_actor] * self.actors, ActorMemory())


# ---------------------------------------------------------------------------------------------------------- formulas


def trained_state(model: Architecture, element_bytes: int, deepspeed: DeepSpeedConfig, ranks: int) -> ActorMemory:
    """Parameters, gradients and optimizer on one rank, by ZeRO stage (Rajbhandari et al. 2020, arXiv 1910.02054, §3).

    DeepSpeed does more than the paper's arithmetic: from stage 1 on it keeps master weights for float32 models too. In its
    step the optimizer holds a float32 copy of lower gradients: without ZeRO and with ZeRO 3 of a part of them at a time. ZeRO 3 keeps
    small parameters whole on every rank.

    Args:
        element_bytes: of the model's dtype.
        ranks: data-parallel workers.
    """
    stage, low_precision = deepspeed.zero_stage, element_bytes < FULL
    share = model.trained / ranks
    if stage == 0:
        gradients = element_bytes * model.trained + (FULL * min(model.trained, STEP_ELEMENTS) if low_precision else 0)
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


def logit_bytes(logits: int, element_bytes: int, *, gradients: bool, on_gpu: bool, whole: bool = False) -> int:
    """Bytes of logits at their peak: the model's, their gradients if there are any, and the block of rows that is worked on.

    Args:
        whole: the logits exist as a whole however many they are; otherwise on a GPU a part of many at a time (`models.head`).
    """
    if on_gpu and not whole and logits * element_bytes > KEPT_BYTES:
        logits = BLOCK_LOGITS
    block = min(logits, LOGITS_AT_ONCE["cuda" if on_gpu else "cpu"])
    return (2 if gradients else 1) * element_bytes * logits + BLOCK_LOGIT_BYTES * block


def training_activations(
    saved: int, model: Architecture, element_bytes: int, rows: int, length: int, responses: int, *, deepspeed: DeepSpeedConfig, on_gpu: bool
) -> int:
    """Peak of forward and backward of one micro-batch above the model's state.

    With gradient checkpointing each layer keeps its input, and one layer at a time is computed again. With ZeRO 3 the output projection
    runs inside the forward pass, so the logits exist as a whole.

    Args:
        saved: what the forward pass keeps without checkpointing.
        length: tokens of a row, prompt and response.
        responses: response tokens of a row, which get logits.
    """
    kept = rows * length * model.hidden * element_bytes * model.trained_layers if deepspeed.gradient_checkpointing else saved
    whole = deepspeed.zero_stage == 3
    logits = logit_bytes(rows * responses * model.vocabulary, element_bytes, gradients=True, on_gpu=on_gpu, whole=whole)
    return kept + max(saved // model.layers, logits)


def scoring_activations(working: int, model: Architecture, element_bytes: int, rows: int, responses: int, *, on_gpu: bool) -> int:
    """Peak of one forward pass of a frozen model: a layer at a time, with `working` bytes, then the logits of the responses."""
    return max(working, logit_bytes(rows * responses * model.vocabulary, element_bytes, gradients=False, on_gpu=on_gpu))


def communication_buffers(model: Architecture, element_bytes: int, deepspeed: DeepSpeedConfig) -> int:
    """DeepSpeed's buffers on a GPU: a bucket of gradients from ZeRO 1 on, and whole weights with ZeRO 3.

    On a CPU they don't count: DeepSpeed reserves them, but touches only what it uses.
    """
    if deepspeed.zero_stage == 0:
        return 0
    gathered = min(model.parameters, ZERO3_LIVE_ELEMENTS) if deepspeed.zero_stage == 3 else 0
    return element_bytes * (REDUCE_BUCKET_ELEMENTS + gathered)


def graph_bytes(layers: int, sequences: int) -> int:
    """CUDA graphs of an engine that decodes so many sequences together: of whole passes that only decode, and in pieces of all small passes."""
    largest = max(sequences, min(2 * sequences, LARGEST_GRAPH))
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, largest + 1, 16)]
    return layers * GRAPH_LAYER_BYTES * (sum(size <= largest for size in sizes) + sum(size <= sequences for size in sizes))


def rows_together(tokens: int, length: int) -> int:
    """Rows of `length` tokens in a micro-batch of at most `tokens` tokens."""
    return max(1, tokens // length)


# ------------------------------------------------------------------------------------------------------------- roles


def predict_roles(config: Config, gpu_memory_gib: float | None = None) -> dict[str, RolePlan]:
    """Memory of every role of a config's algorithm, by the names that placement and metrics use.

    Args:
        gpu_memory_gib: of the GPU that rollout engines run on. Without it their cache on a GPU of their own is unknown, and given as 0.
            On a GPU that they share it is what they need at most.

    Raises:
        InputError: a model's config.json is missing or of an unknown architecture.
    """
    algorithm, predict = ALGORITHMS[config.algorithm], _Prediction(config)
    frozen, scorer = policy_plan(config, trained=False), value_plan(config, algorithm.section)
    learner = predict.trained(policy_plan(config, trained=True), config.policy, config.batch.micro_batch_tokens)
    roles = {
        "rollout": predict.engine(frozen.architecture(), gpu_memory_gib, learner.model.trained),
        algorithm.scorer: predict.frozen(scorer, config.scorer, copies=1 + len(config.scorer.ensemble)),
        "reference": predict.frozen(frozen, config.reference, responses=config.rollout.max_response_tokens),
        "learner": learner,
    }
    if algorithm.has_critic:
        roles["critic"] = predict.trained(critic_plan(config), config.critic, config.critic.micro_batch_tokens)
    return roles


class _Prediction:
    """Memory of roles, by what all roles of a step have in common."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.batch = derive_batch(config)
        self.length = self.batch.max_tokens_per_row
        self.responses = config.rollout.max_response_tokens
        self.element_bytes = torch_dtype(config.model.dtype).itemsize

    def trained(self, plan: ModelPlan, role, micro_batch_tokens: int) -> RolePlan:
        model, deepspeed, on_gpu = plan.architecture(), role.deepspeed, role.gpus_per_actor > 0
        minibatch = -(-self.batch.rows_per_minibatch // role.num_actors)
        rows = min(rows_together(micro_batch_tokens, self.length), max(1, minibatch))
        sizes = model, self.element_bytes, rows, self.length, self.responses
        saved = plan.saved_bytes(rows, self.length)
        activations = training_activations(saved, *sizes, deepspeed=deepspeed, on_gpu=on_gpu)
        if on_gpu:
            activations += communication_buffers(model, self.element_bytes, deepspeed)
        state = trained_state(model, self.element_bytes, deepspeed, role.num_actors)
        return RolePlan(model, role.num_actors, replace(state, activations=activations))

    def frozen(self, plan: ModelPlan, role, *, responses: int = 0, copies: int = 1) -> RolePlan:
        """A frozen model with logits for `responses` tokens of a row, or several of its size that score one after the other."""
        model, on_gpu = plan.architecture(), role.gpus_per_actor > 0
        chunk = min(self.config.rollout.rollouts_per_chunk, self.batch.samples_per_step)
        rows = min(rows_together(role.micro_batch_tokens, self.length), chunk)
        activations = scoring_activations(plan.working_bytes(rows, self.length), model, self.element_bytes, rows, responses, on_gpu=on_gpu)
        return RolePlan(model, role.num_actors, ActorMemory(copies * model.parameters * self.element_bytes, activations=activations))

    def engine(self, model: Architecture, gpu_memory_gib: float | None, trained: int) -> RolePlan:
        """A rollout engine with all of its tensor-parallel shards.

        Args:
            trained: parameters that the learner trains.
        """
        rollout, lora, transport = self.config.rollout, self.config.policy.lora, choose_transport(self.config)
        parameters = model.parameters * self.element_bytes
        if transport == "adapters":
            parameters += trained * adapter_rank(lora) // lora.rank * self.element_bytes
        together = min(rollout.max_concurrent_sequences, self.batch.max_samples_per_engine)
        # New weights arrive in buckets beside the engine's own; with CUDA IPC the engine reads the learner's.
        bucket = min(parameters, round(self.config.weight_sync.bucket_mib * 2**20))
        arriving = 0 if transport in ("ipc", "adapters") else bucket
        if rollout.backend == "transformers":  # it keeps the logits of every step, and the cache lives as long as the batch
            kept = together * self.length * model.cache_per_token * self.element_bytes + together * self.responses * model.vocabulary * 4
            return RolePlan(model, rollout.num_actors, ActorMemory(parameters, activations=kept + arriving))
        working = max(together * model.vocabulary * SAMPLING_LOGIT_BYTES, self._one_layer(model) if rollout.gpus_per_actor else 0)
        graphs = graph_bytes(model.layers, rollout.max_concurrent_sequences) if rollout.gpus_per_actor and not rollout.is_eager else 0
        if rollout.given_cache_gib is not None:
            cache = round(rollout.given_cache_gib * GIB) * rollout.tensor_parallel_size
        elif shares_gpus(plan_placement(self.config)):
            blocks = rollout.max_concurrent_sequences * -(-self.length // BLOCK_TOKENS) + 1
            cache = blocks * BLOCK_TOKENS * model.cache_per_token * self.element_bytes
        elif gpu_memory_gib is None:
            cache = 0
        else:
            granted = rollout.gpu_memory_utilization * gpu_memory_gib * GIB * rollout.tensor_parallel_size
            cache = max(0, round(granted - parameters - working - graphs * rollout.tensor_parallel_size))
        memory = ActorMemory(parameters, activations=working + arriving, cache=cache)
        sleeps = rollout.gpus_per_actor > 0
        return RolePlan(model, rollout.num_actors, memory, together, rollout.max_concurrent_sequences, sleeps, graphs)

    def _one_layer(self, model: Architecture) -> int:
        """What a layer computes in an engine's largest pass over prompts: the results of its matrices."""
        rollout, prompts = self.config.rollout, self.config.rollout.max_concurrent_sequences * self.config.data.max_prompt_tokens
        tokens = min(rollout.max_batched_tokens or PASS_TOKENS, prompts)
        return tokens * self.element_bytes * model.layer_matrices // (model.layers * model.hidden)
