"""Every setting of a run, with its default, its unit and its meaning.

This module imports neither torch nor ray, so that `--help`, `--dry-run` and editors are instant.
Units are part of the names (`_tokens`, `_seconds`, `_gib`, `_mib`). Batch sizes are written once, in `batch`;
`dvpo_ray.config.arithmetic` computes everything that is derived from them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from dvpo_ray.config.paths import in_home, model_here

Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
NonEmpty = Annotated[str, Field(min_length=1)]
PathText = Annotated[NonEmpty, AfterValidator(in_home)]
Dtype = Literal["float32", "bfloat16", "float16"]

_URL = re.compile(r"https?://[^\s/?#:]\S*")
_RAY_ADDRESS = re.compile(r"auto|local|(ray://)?([^\s:/\[\]]+|\[[0-9A-Fa-f:.]+\]):\d{1,5}")


class Section(BaseModel):
    """A group of settings. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


# ------------------------------------------------------------------------------- shared by several stages and roles


class LoraConfig(Section):
    """Low-rank adapters through peft."""

    rank: Count = Field(16, description="Rank of the update of each adapted matrix.")
    alpha: Positive = Field(32.0, description="Updates are scaled by `alpha / rank`.")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="Dropout on the inputs of the adapters.")
    target_modules: str | list[str] = Field("all-linear", description="peft's `target_modules`.")
    layers: list[int] | None = Field(None, description="Decoder layers that get adapters; not set: all.")


class OptimizerConfig(Section):
    """AdamW and its schedule. A stage that trains inherits these, so that its keys are `policy.learning_rate` and the like."""

    learning_rate: Positive = Field(1e-6, description="Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="Decay of the learning rate after the warm-up.")
    warmup_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="Share of the optimizer steps spent warming up.")
    weight_decay: NonNegative = Field(0.0, description="AdamW's decoupled weight decay.")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), description="AdamW's decay rates of the first and second moment.")
    epsilon: Positive = Field(1e-8, description="AdamW's term in the denominator.")
    max_grad_norm: Positive = Field(1.0, description="Gradients are clipped to this global norm.")


class DeepSpeedConfig(Section):
    """How DeepSpeed shards and stores a model that is trained."""

    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="Sharded over the workers: 1 optimizer state; 2 also gradients; 3 also parameters.")
    offload_optimizer: bool = Field(False, description="Keep optimizer state in host memory (ZeRO 1-3).")
    offload_parameters: bool = Field(False, description="Keep parameters in host memory (ZeRO 3).")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")
    compile: bool | None = Field(
        None,
        description="Compile the decoder layers (`torch.compile`): the start takes half a minute longer, steps are faster. "
        "On a CPU it needs a C++ compiler. Not with ZeRO 3. Not set: on GPUs, from 200 optimizer steps on.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> DeepSpeedConfig:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("offload_parameters needs zero_stage 3")
        if self.compile and self.zero_stage == 3:
            raise ValueError("compile needs zero_stage 0, 1 or 2; with 3 a layer's weights are gathered as it runs")
        return self


class RoleConfig(Section):
    """How many actors a role has and what each one occupies."""

    num_actors: Count = Field(1, description="Actors of this role.")
    cpus_per_actor: NonNegative = Field(1.0, description="Ray CPUs reserved for each actor.")
    gpus_per_actor: CountOrZero = Field(
        0, description="GPUs of each actor, of a vLLM engine times `rollout.tensor_parallel_size`; 0: it computes on the CPU. See `placement`."
    )
    threads: Count = Field(1, description="OpenMP threads of each actor. Busy actors together should have as many threads as there are cores.")

    @field_validator("gpus_per_actor", mode="before")
    @classmethod
    def _whole_gpus(cls, gpus: object) -> object:
        if isinstance(gpus, float):
            if not gpus.is_integer():
                raise ValueError(
                    f"{gpus:g} of a GPU; expected a whole number: with placement: colocated, actors with gpus_per_actor: 1 share a GPU and take turns"
                )
            return int(gpus)
        return gpus


# --------------------------------------------------------------------------------------------- models and data


class ModelConfig(Section):
    """The SFT checkpoint that the policy, the reference and the Global Value Model start from."""

    path: Annotated[PathText, AfterValidator(model_here)] = Field(
        description="Checkpoint folder or hub name of the SFT model. The name of the quickstart's model means the folder that the quickstart made."
    )
    dtype: Dtype = Field("bfloat16", description="Dtype of the weights in every role. Use float32 on CPU.")
    attention: Literal["auto", "varlen", "sdpa", "eager"] = Field(
        "auto",
        description="Attention in every role but the engine. `varlen` packs rows one after the other, without padding; `sdpa` and `eager` pad. "
        "`auto`: `varlen` for 16-bit models on GPUs if it can compute the model, else `sdpa`.",
    )
    chat_template: Literal["auto", "plain"] = Field(
        "auto", description="`auto` uses the tokenizer's chat template if there is one; `plain` joins texts as they are."
    )
    trust_remote_code: bool = Field(False, description="Allow model code from the checkpoint to run.")


class SplitData(Section):
    """Rows to train on and rows to hold out."""

    path: PathText
    split: NonEmpty = Field("train", description="Split of a hub data set.")
    heldout_path: PathText | None = Field(None, description="Held-out rows; not set: `heldout_fraction` of the prompts in `path`.")
    heldout_split: NonEmpty | None = Field(None, description="Split of `heldout_path`, or of `path` if only this is set.")
    heldout_fraction: Fraction = Field(0.1, description="Share of the distinct prompts (not of the rows) held out from `path`.")
    limit: Count | None = Field(None, description="Use only this many training rows, from the first.")

    @property
    def holds_out_a_share(self) -> bool:
        """Whether the held-out rows are `heldout_fraction` of the prompts in `path`, and not a set of their own."""
        return self.heldout_path is None and self.heldout_split is None


class PreferenceData(SplitData):
    """Preference pairs for the Global Value Model."""

    path: PathText = Field(description="JSONL, JSON or Parquet file, folder, hub name, or `ultrafeedback` / `ultrafeedback_binarized`.")
    min_score_gap: NonNegative = Field(0.0, description="Drop scored pairs whose two scores are closer than this.")


class PromptData(SplitData):
    """Prompts for policy optimisation and for evaluation."""

    path: PathText = Field(description="Prompt set, or a preference set whose prompts are used.")


class DataConfig(Section):
    """What is read, how long a row may be, and what happens to a bad row."""

    preferences: PreferenceData | None = None
    prompts: PromptData | None = None
    sft: PathText | None = Field(None, description="Instruction-answer rows for `dvpo sft`, in TRL's SFT layouts.")
    max_prompt_tokens: Count = Field(1024, description="`long_prompt` says what happens to longer prompts.")
    max_response_tokens: Count = Field(1024, description="`long_response` says what happens to longer responses of preference pairs.")
    long_prompt: Literal["truncate_left", "drop", "error"] = Field(
        "truncate_left", description="A prompt over the limit: keep its last tokens, drop the row (counted), or stop."
    )
    long_response: Literal["truncate", "drop", "error"] = Field(
        "error", description="A preference response over the limit: cut it (then it has no terminal state), drop the row (counted), or stop."
    )
    on_bad_row: Literal["error", "skip"] = Field("error", description="Stop at the first bad row, or skip bad rows and count them.")


# --------------------------------------------------------------------------------------------------------- stages


class TRLStageConfig(Section):
    """A stage that a trainer of TRL runs in one process."""

    learning_rate: Positive = Field(2e-5, description="Peak learning rate; it decays linearly.")
    epochs: Positive = Field(1.0, description="Passes over the rows.")
    batch_size: Count = Field(8, description="Rows in one forward and backward pass.")
    gradient_accumulation_steps: Count = Field(1, description="Forward and backward passes in one optimizer step.")


class SFTStageConfig(TRLStageConfig):
    """`dvpo sft`: the supervised warm start, by TRL's SFTTrainer."""

    max_tokens: Count = Field(1024, description="Longer rows are cut off at the end.")


class DPOConfig(TRLStageConfig):
    """`dvpo dpo`: Direct Preference Optimization on `data.preferences`, a baseline without rollouts, by TRL's DPOTrainer."""

    learning_rate: Positive = Field(1e-6, description="Peak learning rate; it decays linearly.")
    batch_size: Count = Field(8, description="Pairs in one forward and backward pass.")
    beta: Positive = Field(0.1, description="Weight of the implied KL to the reference (Rafailov et al. 2023, arXiv 2305.18290).")


class ContextConfig(Section):
    """Trajectory conditioning: with examples of a policy's answers before each prompt, the Global Value Model gives the values of that policy."""

    examples: CountOrZero = Field(0, description="Examples before each prompt; 0: none. A trained GVM keeps its own number.")
    max_tokens: Count = Field(512, description="Longest example (prompt and response) that is used. A trained GVM keeps its own limit.")
    pool: Count = Field(8, description="Rollouts of the current policy that each training step samples to draw examples from.")


class RefreshConfig(Section):
    """Where new preferences on the current policy's samples come from, and how the Global Value Model is trained on them."""

    source: Literal["judge", "file", "endpoint"] | None = Field(
        None,
        description="Who labels the pairs. `judge`: the one of `evaluation`. `file`: a person reads `to_label.jsonl` in the run folder and "
        "writes `labels.jsonl`. `endpoint`: a URL that takes pairs by HTTP POST. Not set: no refresh.",
    )
    prompts: Count = Field(64, description="Training prompts that the current policy answers for one refresh.")
    samples_per_prompt: Annotated[int, Field(ge=2)] = Field(4, description="Responses to each of these prompts.")
    pairs_per_prompt: Count = Field(2, description="Most pairs of one prompt; a response is in one pair only.")
    min_score_gap: NonNegative = Field(0.05, description="Leave out the judge's pairs whose scores are closer than this.")
    heldout_fraction: Fraction = Field(0.1, description="Share of the prompts whose pairs measure the new GVM and never train it.")
    old_pairs_per_new: NonNegative = Field(1.0, description="Old pairs for each new training pair, from `data.preferences` and earlier refreshes.")
    epochs: Positive = Field(1.0, description="Passes over the new and the old pairs. Training starts from the last GVM.")
    timeout_seconds: Positive = Field(86400.0, description="How long `file` waits for the last label.")
    url: str | None = Field(None, description="Address that `endpoint` posts pairs to, `http://` or `https://`.")
    request_timeout_seconds: Positive = Field(60.0, description="How long one answer of the endpoint may take.")
    pairs_per_request: Count = Field(16, description="Pairs in one request to the endpoint.")
    retries: CountOrZero = Field(4, description="How often a failed request is sent again, after 1, 2, 4 ... seconds.")

    @field_validator("url")
    @classmethod
    def _is_a_url(cls, url: str | None) -> str | None:
        if url is not None and not _URL.fullmatch(url):
            raise ValueError(f"'{url}' is not a URL; expected http://HOST/PATH or https://HOST/PATH")
        return url


class PreferenceTraining(RoleConfig, OptimizerConfig):
    """Training of a model with a value head on preference pairs, and the artifact that `dvpo train` loads."""

    path: PathText | None = Field(None, description="Artifact that `dvpo train` loads and freezes.")
    init_from: PathText | None = Field(None, description="Checkpoint that the trunk starts from, with the same tokenizer; not set: `model.path`.")
    num_layers: Count | None = Field(None, description="Keep only this many decoder layers of the trunk, from the first.")
    epochs: Positive = Field(1.0, description="Passes over the training pairs.")
    pairs_per_step: Count = Field(32, description="Preference pairs in one optimizer step, over all workers.")
    micro_batch_tokens: Count = Field(8192, description="Padded tokens in one forward and backward pass of a worker.")
    checkpoint_every_steps: Count = Field(200, description="Optimizer steps between checkpoints.")
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    lora: LoraConfig | None = None


class GVMConfig(PreferenceTraining):
    """Training of the Global Value Model (`dvpo gvm train`) and the artifact that `dvpo train` loads."""

    section: ClassVar[Literal["gvm"]] = "gvm"

    path: PathText | None = Field(None, description="GVM artifact, made by `dvpo gvm train`, that `dvpo train` loads and freezes.")
    learning_rate: Positive = Field(1.41e-5, description="Peak learning rate (the released code's default).")
    objective: Literal["td0", "td_lambda", "monte_carlo", "bradley_terry"] = Field(
        "monte_carlo",
        description="Target of the value regression. `bradley_terry` ranks pairs by their last values instead: that trains a reward model, "
        "not a value model (`dvpo rm train` sets it).",
    )
    td_lambda: Probability = Field(0.95, description="Trace decay of `td_lambda`.")
    outcome: Literal["binary", "score"] = Field("binary", description="+1 chosen / -1 rejected, or the data's score per response.")
    outcome_scale: Positive = Field(1.0, description="Scores are multiplied by this before they become targets.")
    bradley_terry_weight: NonNegative = Field(0.0, description="Weight of the Bradley-Terry term on each pair; 0 leaves it out.")
    bradley_terry_value: Literal["last", "mean"] = Field("last", description="The value of a response that the Bradley-Terry term compares.")
    keep_head: bool = Field(False, description="Start from the value head of `init_from`, which must be a GVM artifact, instead of from zero.")
    context: ContextConfig = ContextConfig()
    refresh_every_steps: CountOrZero = Field(0, description="Refresh the GVM every this many steps of `dvpo train`; 0: never.")
    refresh: RefreshConfig = RefreshConfig()


class RewardModelConfig(PreferenceTraining):
    """Training of a Bradley-Terry reward model (`dvpo rm train`). Every algorithm but `dvpo` takes its rewards from it."""

    section: ClassVar[Literal["reward_model"]] = "reward_model"
    # A reward model is a value model whose last value alone is trained, by the Bradley-Terry loss on the two responses of a pair
    # (Bradley & Terry 1952; Ouyang et al. 2022, arXiv 2203.02155, eq. 1).
    objective: ClassVar[Literal["bradley_terry"]] = "bradley_terry"
    bradley_terry_value: ClassVar[Literal["last"]] = "last"
    bradley_terry_weight: ClassVar[float] = 0.0
    td_lambda: ClassVar[float] = 0.95
    outcome: ClassVar[Literal["binary"]] = "binary"
    outcome_scale: ClassVar[float] = 1.0
    keep_head: ClassVar[bool] = False
    context: ClassVar[ContextConfig] = ContextConfig()

    path: PathText | None = Field(None, description="Reward model that `dvpo train` loads and freezes; or a GVM, whose last value is read.")
    learning_rate: Positive = Field(1e-5, description="Peak learning rate.")


# ---------------------------------------------------------------------------------------- roles of `dvpo train`


class RolloutConfig(RoleConfig):
    """The engines that sample responses from the current policy."""

    backend: Literal["vllm", "transformers"] = Field("vllm", description="`transformers` is slow; it is for machines without vLLM.")
    tensor_parallel_size: Count = Field(1, description="GPUs that one vLLM engine shards its weights over.")
    max_response_tokens: Count = Field(1024, description="A response that reaches this length is cut off there.")
    min_response_tokens: CountOrZero = Field(0, description="EOS is not sampled before this many tokens.")
    temperature: Positive = Field(1.0, description="Log-probs are those of the tempered distribution.")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="For `dvpo eval` alone; `dvpo train` refuses a value below 1, which would bias its importance ratios."
    )
    max_concurrent_sequences: Count = Field(256, description="Sequences that an engine decodes at the same time.")
    rollouts_per_chunk: Count = Field(16, description="Finished rollouts that an engine hands on for scoring at a time.")
    max_batched_tokens: Count | None = Field(
        None,
        description="Tokens of prompts and responses that vLLM computes in one pass. null: its choice for throughput, 16384 on a GPU "
        "with 70 GiB or more, 8192 on a smaller one and on an A100, 4096 on a CPU.",
    )
    kv_cache_gib: Positive | None = Field(
        None,
        description="vLLM's KV cache, in each of its processes. null: 1 GiB on a CPU; on a GPU what the plan leaves where roles share it, "
        "else what `gpu_memory_utilization` leaves.",
    )
    gpu_memory_utilization: Fraction = Field(0.85, description="Share of the GPU that vLLM may take; with `kv_cache_gib` it means nothing.")
    enforce_eager: bool | None = Field(
        None,
        description="Run vLLM without compilation and CUDA graphs. null: true on a CPU, false on a GPU. `false`: the start takes half a "
        "minute longer, decoding is faster. On a CPU it needs a C++ compiler.",
    )
    start_timeout_seconds: Positive = Field(900.0, description="How long an engine may take to start.")

    @property
    def is_eager(self) -> bool:
        """What `enforce_eager` means here."""
        return self.gpus_per_actor == 0 if self.enforce_eager is None else self.enforce_eager

    @property
    def given_cache_gib(self) -> float | None:
        """Size of vLLM's KV cache where it is not measured; None where vLLM measures what is left of the GPU."""
        return 1.0 if self.kv_cache_gib is None and self.gpus_per_actor == 0 else self.kv_cache_gib

    @model_validator(mode="after")
    def _a_pass_has_room_for_every_sequence(self) -> RolloutConfig:
        if self.max_batched_tokens is not None and self.max_batched_tokens < self.max_concurrent_sequences:
            raise ValueError(f"max_batched_tokens must be at least max_concurrent_sequences, {self.max_concurrent_sequences}")
        return self


class ScorerConfig(RoleConfig):
    """A frozen model that scores finished rollouts: the GVM, the reward model, or the reference policy."""

    micro_batch_tokens: Count = Field(16384, description="Padded tokens in one forward pass.")
    compile: bool | None = Field(
        None,
        description="Compile the decoder layers (`torch.compile`), in half a minute. On a CPU it needs a C++ compiler. "
        "Not set: on GPUs, from 200 steps on.",
    )


class ValueScorerConfig(ScorerConfig):
    """The frozen model that scores finished rollouts: the Global Value Model, or a baseline's reward model."""

    ensemble: list[PathText] = Field([], description="More GVM artifacts; their disagreement with `gvm.path` is measured (`health/disagreement`).")


class CriticConfig(RoleConfig, OptimizerConfig):
    """The online value model of `algorithm: ppo`, trained beside the policy with as many epochs and minibatches."""

    learning_rate: Positive = Field(5e-6, description="Peak learning rate.")
    init: Literal["reward_model", "policy"] = Field(
        "reward_model", description="Start from the reward model and its head, or the SFT model and a zero head."
    )
    value_clip: Positive | None = Field(0.2, description="The loss clips new values to this distance from the old ones (PPO); null: no clipping.")
    micro_batch_tokens: Count = Field(8192, description="Padded tokens in one forward and backward pass of a worker.")
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()


class PolicyConfig(RoleConfig, OptimizerConfig):
    """The DeepSpeed learner: PPO's clipped surrogate on token advantages."""

    clip_epsilon: Fraction = Field(0.2, description="Clipping range of the probability ratio (PPO, Schulman et al. 2017).")
    entropy_coefficient: NonNegative = Field(0.0, description="Weight of the entropy bonus.")
    old_log_probs: Literal["recompute", "rollout"] = Field(
        "recompute",
        description="Denominator of the ratio: recomputed by the learner before the first update (corrected by truncated importance "
        "sampling), or the rollout engine's own.",
    )
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    lora: LoraConfig | None = None
    trainable_layers: Count | None = Field(None, description="Train only this many decoder layers, from the last, and the final norm.")

    @model_validator(mode="after")
    def _one_kind_of_partial_training(self) -> PolicyConfig:
        if self.lora is not None and self.trainable_layers is not None:
            raise ValueError("set lora or trainable_layers, not both (lora.layers chooses the adapted layers)")
        if self.lora is not None and self.lora.dropout > 0:
            raise ValueError("lora.dropout must be 0: the policy that is trained would not be the one that sampled (gvm.lora.dropout may be set)")
        return self


# ---------------------------------------------------------------------------------------------- a training step


class AdvantageConfig(Section):
    """How values and rewards become token advantages; see docs/method.md."""

    mode: Literal["static_q", "td", "gae", "release"] = Field(
        "release",
        description="With v[t] the value after t response tokens: `static_q` v[t]; `td` v[t] - v[t-1]; `gae` their discounted sum; "
        "`release` the published code's whitened variant. For `algorithm: dvpo` only.",
    )
    gae_lambda: Probability = Field(1.0, description="Trace decay of `gae` and of `algorithm: ppo`. `release` always uses 0.95, as published.")
    whiten: bool = Field(True, description="Whiten over the response tokens of the whole batch. `release` always does, `grpo` and `rloo` never.")
    value_whitening: Literal["row", "batch"] = Field(
        "row",
        description="The values that `release` whitens together: those of each `row`, as the authors ran it, or those of the whole `batch`. "
        "Only `release` reads it.",
    )
    truncated: Literal["bootstrap", "mask", "penalty"] = Field(
        "bootstrap",
        description="A response cut off at the length limit: bootstrap from its last value, leave it out of the loss, or "
        "subtract `truncation_penalty` from its last value. With a reward model there is no bootstrap: it scores cut-off responses like others.",
    )
    truncation_penalty: NonNegative = Field(0.0, description="What `truncated: penalty` subtracts.")
    disagreement_coefficient: NonNegative = Field(
        0.0, description="c: each advantage is multiplied by 1 / (1 + c * disagreement of `scorer.ensemble` / std of the values)."
    )


class KLConfig(Section):
    """The pull towards the reference policy."""

    placement: Literal["reward", "loss", "off"] = Field("reward", description="A per-token penalty inside the advantage, a loss term, or none.")
    coefficient: NonNegative = Field(0.05, description="Weight of the KL penalty, the beta of the paper.")
    estimator: Literal["k1", "k2", "k3"] = Field("k3", description="Estimator of the loss term (Schulman 2020). The reward penalty is always k1.")
    adaptive_target_nats: Positive | None = Field(
        None, description="Sequence KL that the coefficient adapts to (Ziegler et al. 2019); not set: constant."
    )
    adaptive_horizon: Positive = Field(10_000.0, description="Samples over which the adaptive coefficient reacts.")


class MismatchConfig(Section):
    """What happens when the engine's and the learner's log-probs differ."""

    importance_cap: Positive = Field(2.0, description="Truncated importance sampling: weights learner/engine are capped at this.")
    max_token_mult_error: Positive | None = Field(1.5, description="Stop if the batch's mean multiplicative token error is above this; null: never.")


class BatchConfig(Section):
    """The sizes of a batch of rollouts. All other batch sizes follow from these."""

    prompts_per_step: Count = Field(128, description="Prompts of one step.")
    samples_per_prompt: Count = Field(1, description="Responses sampled to each prompt.")
    update_epochs: Count = Field(1, description="Passes over each rollout batch.")
    minibatches_per_epoch: Count = Field(1, description="Optimizer steps in one pass.")
    micro_batch_tokens: Count = Field(8192, description="Padded tokens in one forward and backward pass of a learner worker.")


class WeightSyncConfig(Section):
    """How new weights reach the rollout engines."""

    transport: Literal["auto", "object_store", "nccl", "ipc", "adapters"] = Field(
        "auto",
        description="`auto`: CUDA IPC where each engine shares its GPU with a rank of the learner, NCCL where they share none, the Ray object "
        "store otherwise. `adapters`: the adapters of `policy.lora` alone, through the object store; vLLM adds them to the model as it computes.",
    )
    bucket_mib: Positive = Field(
        256.0,
        description="Weights travel in buckets of this size, or of the largest weight's if that is larger. `ipc` takes two buckets of the "
        "shared GPU during a sync, `nccl` two on either side.",
    )
    timeout_seconds: Positive = Field(600.0, description="A sync that takes longer ends the run with an error.")
    checksum: bool = Field(False, description="Verify every bucket of the object-store transport with CRC-32.")


# ---------------------------------------------------------------------------------------------------- a whole run


class TrainConfig(Section):
    """How long policy optimisation runs and what it keeps."""

    steps: Count = Field(100, description="Steps of the run: rollout, scoring, update, weight sync.")
    save_rollouts_every_steps: CountOrZero = Field(1, description="Write `rollouts/step_*.jsonl` every this many steps; 0: never.")
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(["tensorboard"], description="Where metrics go besides metrics.jsonl.")


class CheckpointConfig(Section):
    """Checkpoints of the learner, the optimizer, the data position and all random states."""

    every_steps: Count = Field(50, description="Steps between checkpoints. A run of `dvpo train` also saves its last step.")
    keep: Count = Field(2, description="How many checkpoints are kept; older ones are removed.")
    save_pretrained: bool = Field(False, description="Also write the policy of each checkpoint as a Hugging Face model, in `policy/`.")


class EvaluationConfig(Section):
    """The gold judge and the held-out prompts it judges; independent of the GVM."""

    judge: Literal["vader", "none"] = Field("none", description="`vader` scores the sentiment of a response by a lexicon.")
    prompts: Count = Field(256, description="Held-out prompts judged before and after training.")
    every_steps: CountOrZero = Field(0, description="Also evaluate every this many steps; 0: only before and after.")


class HealthConfig(Section):
    """Alarms on the value or reward estimate that the policy is optimised towards. A rule with a null threshold is off."""

    window_steps: Annotated[int, Field(ge=3)] = Field(10, description="Steps that a rule judges together. After an alarm it is silent for as many.")
    on_alarm: Literal["warn", "refresh", "stop"] = Field(
        "warn",
        description="`warn` only; `refresh` also refreshes the GVM before the next step (`gvm.refresh`); `stop` ends the run with a "
        "checkpoint, an evaluation and the final model.",
    )
    trend_significance: Positive | None = Field(
        2.5, description="Alarm when the estimate rises and the gold score falls, each by more than this many standard errors of its slope."
    )
    max_gold_divergence: Positive | None = Field(
        1.0,
        description="Alarm when the estimate has gained this many standard deviations more than the gold score, since the start or the last refresh.",
    )
    min_gold_correlation: Annotated[float, Field(ge=-1.0, le=1.0)] | None = Field(
        0.1, description="Alarm when estimate and gold score correlate less than this."
    )
    max_value_bias: Positive | None = Field(
        0.5, description="Alarm when the third of the responses farthest from the reference is overrated by more standard deviations than this."
    )
    max_calibration_error: Positive | None = Field(
        None,
        description="Alarm when values in the last third of a response differ from the final estimate by more than this (in units of value). "
        "Needs no gold judge.",
    )
    max_cut_off_fraction: Fraction | None = Field(
        0.5,
        description="Say once if more than this share of a step's responses is cut off at `rollout.max_response_tokens`. `on_alarm` does not apply.",
    )


class RayConfig(Section):
    """The Ray cluster that the run joins, or the local one that it starts."""

    address: str | None = Field(
        None, description="Address of a running cluster; not set: RAY_ADDRESS, which a Ray job has. Neither, or `local`: start Ray on this machine."
    )
    num_cpus: Count | None = Field(None, description="CPUs of the local cluster.")
    num_gpus: CountOrZero | None = Field(None, description="GPUs of the local cluster.")
    object_store_gib: Positive | None = Field(None, description="Object store of the local cluster.")
    dashboard: bool = Field(False, description="Serve the dashboard of the local cluster.")
    placement_timeout_seconds: Positive = Field(300.0, description="How long to wait for the cluster to have room.")
    wait_timeout_seconds: Positive = Field(3600.0, description="How long any other answer of an actor may take; then the run ends with an error.")
    autoscaling: bool = Field(False, description="The cluster can grow: wait for room even if it is too small as a whole.")
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK"] = Field("PACK", description="How Ray spreads the actors over nodes.")

    @field_validator("address")
    @classmethod
    def _is_an_address(cls, address: str | None) -> str | None:
        if address is not None and not _RAY_ADDRESS.fullmatch(address):
            raise ValueError(f"'{address}' is not the address of a Ray cluster; expected HOST:PORT, ray://HOST:PORT, auto or local")
        return address


class TerminationConfig(Section):
    """What a run does when SIGTERM, SIGHUP or Ctrl-C ends it: it finishes the step's update and saves a checkpoint."""

    grace_seconds: Positive = Field(
        25.0, description="How long this may take after SIGTERM or SIGHUP; schedulers commonly kill a job after 30 seconds. Ctrl-C has no limit."
    )


class Config(Section):
    """A whole run, from preference data to a better policy."""

    name: str = Field("dvpo", pattern=r"^[A-Za-z0-9._-]+$", description="Name of the run, in its folder and in the trackers.")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="Seed of data order, sampling and initialisation.")
    out: PathText | None = Field(None, description="Run folder; not set: `runs/<name>-<time>`.")
    algorithm: Literal["dvpo", "ppo", "grpo", "rloo", "remax", "reinforce"] = Field(
        "dvpo", description="The method of `dvpo train`: the frozen GVM, or a baseline that takes rewards from `reward_model.path`."
    )
    placement: Literal["colocated", "separate"] = Field(
        "colocated",
        description="Roles with GPUs: `colocated` on the same ones, from the first on; engines and trained models take turns there. `separate`: "
        "engines, frozen models, and trained models each have GPUs of their own.",
    )
    offload: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Where engines and trained models share GPUs: who has no work moves to host memory if GPU memory is short (`auto`), "
        "always, or never.",
    )
    model: ModelConfig
    data: DataConfig = DataConfig()
    sft: SFTStageConfig = SFTStageConfig()
    gvm: GVMConfig = GVMConfig()
    rollout: RolloutConfig = RolloutConfig()
    scorer: ValueScorerConfig = ValueScorerConfig()
    reference: ScorerConfig = Field(ScorerConfig(), description="The frozen copy of the SFT model that KL is measured from.")
    policy: PolicyConfig = PolicyConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    critic: CriticConfig = CriticConfig()
    dpo: DPOConfig = DPOConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    kl: KLConfig = KLConfig()
    mismatch: MismatchConfig = MismatchConfig()
    batch: BatchConfig = BatchConfig()
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    health: HealthConfig = HealthConfig()
    ray: RayConfig = RayConfig()
    termination: TerminationConfig = TerminationConfig()

    @model_validator(mode="after")
    def _settings_agree(self) -> Config:
        least, most = self.rollout.min_response_tokens, self.rollout.max_response_tokens
        if least > most:
            raise ValueError(f"rollout.min_response_tokens ({least}) is above rollout.max_response_tokens ({most})")
        if self.rollout.tensor_parallel_size > 1 and self.rollout.backend != "vllm":
            raise ValueError("rollout.tensor_parallel_size above 1 needs rollout.backend vllm")
        if self.scorer.ensemble and self.algorithm != "dvpo":
            raise ValueError(f"scorer.ensemble holds value models, but algorithm {self.algorithm} uses none; remove it")
        named = [Path(path) for path in (self.gvm.path, *self.scorer.ensemble) if path is not None]
        for path in named:
            if named.count(path) > 1:
                raise ValueError(f"scorer.ensemble: {path} is named twice, here or by gvm.path; name each GVM artifact once")
        if self.advantage.disagreement_coefficient > 0 and not self.scorer.ensemble:
            raise ValueError("advantage.disagreement_coefficient needs at least one more GVM artifact in scorer.ensemble")
        if self.gvm.refresh_every_steps:
            self._check_refresh("gvm.refresh_every_steps")
        elif self.health.on_alarm == "refresh":
            self._check_refresh("health.on_alarm: refresh")
        return self

    def _check_refresh(self, asked: str) -> None:
        refresh = self.gvm.refresh
        if self.algorithm != "dvpo":
            raise ValueError(f"{asked} retrains the Global Value Model, but algorithm {self.algorithm} does not use one")
        if refresh.source is None:
            raise ValueError(f"{asked} needs gvm.refresh.source: judge, file or endpoint")
        if refresh.source == "judge" and self.evaluation.judge == "none":
            raise ValueError("gvm.refresh.source judge needs evaluation.judge")
        if refresh.source == "endpoint" and refresh.url is None:
            raise ValueError("gvm.refresh.source endpoint needs gvm.refresh.url")
