"""Every setting of a run, with its default, its unit and its meaning.

This module imports neither torch nor ray, so that `--help`, `--dry-run` and editors are instant.
Units are part of the names (`_tokens`, `_seconds`, `_gib`, `_mib`). Batch sizes are written once, in `batch`;
everything derived from them is computed in `dvpo_ray.config.arithmetic`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from dvpo_ray.config.health import HealthConfig, RefreshConfig
from dvpo_ray.config.pieces import DeepSpeedConfig, LoraConfig, OptimizerConfig, RoleConfig
from dvpo_ray.config.section import Count, Fraction, NonEmpty, NonNegative, Positive, Probability, Section
from dvpo_ray.config.trl_stages import DPOConfig, SFTStageConfig

Dtype = Literal["float32", "bfloat16", "float16"]
RAY_ADDRESS = re.compile(r"auto|local|(ray://)?([^\s:/\[\]]+|\[[0-9A-Fa-f:.]+\]):\d{1,5}")

# --------------------------------------------------------------------------------------------- models and data


class ModelConfig(Section):
    """The SFT checkpoint that the policy, the reference and the Global Value Model start from."""

    path: NonEmpty = Field(description="Checkpoint folder or hub name of the SFT model.")
    dtype: Dtype = Field("bfloat16", description="Dtype of the weights in every role. Use float32 on CPU.")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa", description="Attention implementation of transformers in the learner, the reference and the scorer."
    )
    chat_template: Literal["auto", "plain"] = Field(
        "auto",
        description="`auto` formats messages with the tokenizer's chat template where it has one; `plain` joins texts as they are.",
    )
    trust_remote_code: bool = Field(False, description="Allow model code from the checkpoint to run.")


class PreferenceData(Section):
    """Preference pairs for the Global Value Model."""

    path: NonEmpty = Field(description="JSONL, JSON or Parquet file, folder, hub name, or `ultrafeedback` / `ultrafeedback_binarized`.")
    split: NonEmpty = Field("train", description="Split of a hub data set.")
    heldout_path: NonEmpty | None = Field(None, description="Held-out pairs. Without it, `heldout_fraction` of the prompts is held out.")
    heldout_split: NonEmpty | None = Field(None, description="Split of `heldout_path`, or of `path` when only this is set.")
    heldout_fraction: Fraction = Field(0.1, description="Share of the prompts (never of the pairs) held out from `path`.")
    min_score_gap: NonNegative = Field(0.0, description="Drop scored pairs whose two scores are closer than this.")
    limit: Count | None = Field(None, description="Use only the first so many training pairs.")


class PromptData(Section):
    """Prompts for policy optimisation and for evaluation."""

    path: NonEmpty = Field(description="Prompt set, or a preference set whose prompts are used.")
    split: NonEmpty = Field("train", description="Split of a hub data set.")
    heldout_path: NonEmpty | None = Field(None, description="Prompts for the evaluation before and after. Else a share of `path`.")
    heldout_split: NonEmpty | None = Field(None, description="Split of `heldout_path`, or of `path` when only this is set.")
    heldout_fraction: Fraction = Field(0.1, description="Share of the distinct prompts held out from `path`.")
    limit: Count | None = Field(None, description="Use only the first so many training prompts.")


class DataConfig(Section):
    """What is read, how long a row may be, and what happens to a bad row."""

    preferences: PreferenceData | None = None
    prompts: PromptData | None = None
    sft: NonEmpty | None = Field(None, description="Instruction-answer rows for `dvpo sft`, in TRL's SFT layouts.")
    max_prompt_tokens: Count = Field(1024, description="Longer prompts are handled by `long_prompt`.")
    max_response_tokens: Count = Field(1024, description="Responses of preference pairs longer than this are handled by `long_response`.")
    long_prompt: Literal["truncate_left", "drop", "error"] = Field(
        "truncate_left", description="A prompt over the limit: keep its last tokens, drop the row (counted), or stop."
    )
    long_response: Literal["truncate", "drop", "error"] = Field(
        "error", description="A preference response over the limit: cut it (then it has no terminal state), drop the row (counted), or stop."
    )
    on_bad_row: Literal["error", "skip"] = Field("error", description="Stop at the first bad row, or skip, count and list bad rows.")


# --------------------------------------------------------------------------------------------------------- stages


class ContextConfig(Section):
    """Trajectory conditioning of the Global Value Model: examples of a policy's answers before each prompt make the values that policy's."""

    examples: Annotated[int, Field(ge=0)] = Field(
        0, description="Examples before each prompt, by the model that wrote the response; 0: none. A trained GVM keeps its own number."
    )
    max_tokens: Count = Field(512, description="An example with more tokens, prompt and response, is not used. A trained GVM keeps its own limit.")
    pool: Count = Field(8, description="Rollouts of the current policy that each step of policy optimisation samples to draw the examples from.")


class PreferenceTraining(RoleConfig, OptimizerConfig):
    """Training of a model with a value head on preference pairs, and the artifact that `dvpo train` loads."""

    path: NonEmpty | None = Field(None, description="Artifact that `dvpo train` freezes.")
    init_from: NonEmpty | None = Field(None, description="Checkpoint the trunk starts from; `model.path` when not set. Must share its tokenizer.")
    num_layers: Count | None = Field(None, description="Keep only the first so many decoder layers of the trunk.")
    epochs: Positive = Field(1.0, description="Passes over the training pairs.")
    pairs_per_step: Count = Field(32, description="Preference pairs in one optimizer step, over all workers.")
    micro_batch_tokens: Count = Field(8192, description="Padded tokens in one forward and backward pass of a worker.")
    checkpoint_every_steps: Count = Field(200, description="Optimizer steps between checkpoints.")
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    lora: LoraConfig | None = None


class GVMConfig(PreferenceTraining):
    """Training of the Global Value Model (`dvpo gvm train`) and the artifact that `dvpo train` loads."""

    section: ClassVar[Literal["gvm"]] = "gvm"

    path: NonEmpty | None = Field(
        None, description="GVM artifact that `dvpo train` freezes. Without it `dvpo train` needs one from `dvpo gvm train`."
    )
    learning_rate: Positive = Field(1.41e-5, description="Peak learning rate (the released code's default).")
    objective: Literal["td0", "td_lambda", "monte_carlo", "bradley_terry"] = Field(
        "monte_carlo",
        description="Target of the value regression. `bradley_terry` has none: it ranks the pairs by their last values, which makes a reward model "
        "(`dvpo rm train` sets it) and no value model.",
    )
    td_lambda: Probability = Field(0.95, description="Trace decay of `td_lambda`.")
    outcome: Literal["binary", "score"] = Field("binary", description="+1 chosen / -1 rejected, or the data's score per response.")
    outcome_scale: Positive = Field(1.0, description="Scores are multiplied by this before they become targets.")
    bradley_terry_weight: NonNegative = Field(0.0, description="Weight of the Bradley-Terry term on each pair; 0 leaves it out.")
    bradley_terry_value: Literal["last", "mean"] = Field("last", description="The value of a response that the Bradley-Terry term compares.")
    keep_head: bool = Field(False, description="Go on from the value head of `init_from`, which must be a GVM artifact, instead of zero.")
    context: ContextConfig = ContextConfig()
    refresh_every_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="`dvpo train` retrains the GVM on new preferences over the current policy's samples every so many steps; 0: never."
    )
    refresh: RefreshConfig = RefreshConfig()


class RewardModelConfig(PreferenceTraining):
    """Training of a Bradley-Terry reward model (`dvpo rm train`), which every algorithm but `dvpo` takes its rewards from."""

    section: ClassVar[Literal["reward_model"]] = "reward_model"
    # A reward model is a value model of which the last value alone is trained, by the Bradley-Terry loss on the two of a pair
    # (Bradley & Terry 1952; Ouyang et al. 2022, arXiv 2203.02155, eq. 1).
    objective: ClassVar[Literal["bradley_terry"]] = "bradley_terry"
    bradley_terry_value: ClassVar[Literal["last"]] = "last"
    bradley_terry_weight: ClassVar[float] = 0.0
    td_lambda: ClassVar[float] = 0.95
    outcome: ClassVar[Literal["binary"]] = "binary"
    outcome_scale: ClassVar[float] = 1.0
    keep_head: ClassVar[bool] = False
    context: ClassVar[ContextConfig] = ContextConfig()

    path: NonEmpty | None = Field(
        None, description="Reward model that `dvpo train` freezes: made by `dvpo rm train`, or a GVM, whose last value is read."
    )
    learning_rate: Positive = Field(1e-5, description="Peak learning rate.")


class RolloutConfig(RoleConfig):
    """The engines that sample responses from the current policy."""

    backend: Literal["vllm", "transformers"] = Field("vllm", description="`transformers` is slow and for machines without vLLM.")
    tensor_parallel_size: Count = Field(1, description="GPUs that one vLLM engine shards its weights over.")
    max_response_tokens: Count = Field(1024, description="A response that reaches this length is cut off there.")
    min_response_tokens: Annotated[int, Field(ge=0)] = Field(0, description="EOS is not sampled before this many tokens.")
    temperature: Positive = Field(1.0, description="Log-probs are those of the tempered distribution.")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="Below 1 the engine's log-probs are renormalised and importance ratios are biased."
    )
    max_concurrent_sequences: Count = Field(256, description="Sequences that an engine decodes at the same time.")
    rollouts_per_chunk: Count = Field(16, description="Finished rollouts that leave an engine together to be scored.")
    kv_cache_gib: Count = Field(1, description="vLLM's KV cache where it runs on CPU; on a GPU gpu_memory_utilization decides.")
    gpu_memory_utilization: Fraction = Field(0.85, description="Share of the GPU that vLLM may take.")
    enforce_eager: bool = Field(
        True,
        description="Run vLLM without compiling the model and without CUDA graphs. `false`: half a minute more at the start, faster decoding "
        "after it. On a CPU it needs a C++ compiler.",
    )
    start_timeout_seconds: Positive = Field(900.0, description="How long an engine may take to start.")


class ScorerConfig(RoleConfig):
    """A frozen model that scores finished rollouts: the GVM or the reward model, or the reference policy."""

    micro_batch_tokens: Count = Field(16384, description="Padded tokens in one forward pass.")
    compile: bool = Field(
        False, description="Run the decoder layers through `torch.compile`; the first passes take half a minute. On a CPU it needs a C++ compiler."
    )


class ValueScorerConfig(ScorerConfig):
    """The frozen model that scores finished rollouts: the Global Value Model, or a baseline's reward model."""

    ensemble: list[NonEmpty] = Field([], description="Further GVM artifacts, whose disagreement with `gvm.path` is measured (`health/disagreement`).")


class CriticConfig(RoleConfig, OptimizerConfig):
    """The online value model of `algorithm: ppo`, trained beside the policy with as many epochs and minibatches."""

    learning_rate: Positive = Field(5e-6, description="Peak learning rate.")
    init: Literal["reward_model", "policy"] = Field(
        "reward_model", description="Start from the reward model, head included, or from the SFT model with a zero head."
    )
    value_clip: Positive | None = Field(
        0.2, description="Clip new values to this distance from the old ones in the loss (PPO); not set: no clipping."
    )
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
    trainable_layers: Count | None = Field(None, description="Train only the last so many decoder layers (and the final norm).")

    @model_validator(mode="after")
    def _one_kind_of_partial_training(self) -> PolicyConfig:
        if self.lora is not None and self.trainable_layers is not None:
            raise ValueError("set lora or trainable_layers, not both (lora.layers chooses the adapted layers)")
        return self


class AdvantageConfig(Section):
    """How values and rewards become token advantages; see docs/method.md."""

    mode: Literal["static_q", "td", "gae", "release"] = Field(
        "release",
        description="With v[t] the value after t response tokens: `static_q` v[t]; `td` v[t] - v[t-1]; `gae` their discounted sum; "
        "`release` the published code's whitened variant. Read by `algorithm: dvpo` alone.",
    )
    gae_lambda: Probability = Field(1.0, description="Trace decay of `gae` and of `algorithm: ppo`. `release` always uses 0.95, as released.")
    whiten: bool = Field(True, description="Whiten over the response tokens of the whole batch. `release` always does, `grpo` and `rloo` never.")
    truncated: Literal["bootstrap", "mask", "penalty"] = Field(
        "bootstrap",
        description="A response cut off at the length limit: bootstrap from its last value, leave it out of the loss, or "
        "subtract `truncation_penalty` from its last value. A reward model scores it like any other, so with rewards there is no bootstrap.",
    )
    truncation_penalty: NonNegative = Field(0.0, description="What `truncated: penalty` subtracts.")
    disagreement_coefficient: NonNegative = Field(
        0.0, description="Multiply each advantage by 1 / (1 + c * disagreement / std of the values), with the disagreement of `scorer.ensemble`."
    )


class KLConfig(Section):
    """The pull towards the reference policy."""

    placement: Literal["reward", "loss", "off"] = Field("reward", description="A per-token penalty inside the advantage, a loss term, or none.")
    coefficient: NonNegative = Field(0.05, description="Weight of the KL penalty, the beta of the paper.")
    estimator: Literal["k1", "k2", "k3"] = Field("k3", description="Estimator of the loss term (Schulman 2020). The reward penalty is always k1.")
    adaptive_target_nats: Positive | None = Field(
        None, description="Adapt the coefficient towards this sequence KL (Ziegler et al. 2019); not set: constant."
    )
    adaptive_horizon: Positive = Field(10_000.0, description="Samples over which the adaptive coefficient reacts.")


class MismatchConfig(Section):
    """What happens when the engine's and the learner's log-probs differ."""

    importance_cap: Positive = Field(2.0, description="Truncated importance sampling: weights learner/engine are capped at this.")
    max_token_mult_error: Positive | None = Field(
        1.5, description="Stop when the batch's mean token-level multiplicative error exceeds this; not set: never stop."
    )


class BatchConfig(Section):
    """The one vocabulary of batch sizes."""

    prompts_per_step: Count = Field(128, description="Prompts that one step samples responses to.")
    samples_per_prompt: Count = Field(1, description="Responses sampled to each prompt.")
    update_epochs: Count = Field(1, description="Passes over each rollout batch.")
    minibatches_per_epoch: Count = Field(1, description="Optimizer steps in one pass.")
    micro_batch_tokens: Count = Field(8192, description="Padded tokens in one forward and backward pass of a learner worker.")


class WeightSyncConfig(Section):
    """How new weights reach the rollout engines."""

    transport: Literal["auto", "object_store", "nccl", "ipc"] = Field(
        "auto", description="`auto`: NCCL between GPUs, CUDA IPC on a shared GPU, the Ray object store otherwise."
    )
    bucket_mib: Positive = Field(256.0, description="Weights travel in buckets of this size.")
    timeout_seconds: Positive = Field(600.0, description="A sync that takes longer fails by name.")
    checksum: bool = Field(False, description="Verify every bucket of the object-store transport with CRC-32.")


class CheckpointConfig(Section):
    """Checkpoints of the learner, the optimizer, the data position and all random states."""

    every_steps: Count = Field(50, description="Steps between checkpoints.")
    keep: Count = Field(2, description="Older checkpoints are removed.")
    save_pretrained: bool = Field(
        False, description="Also write the policy of each checkpoint of `dvpo train` as a Hugging Face model, in `policy/`."
    )


class EvaluationConfig(Section):
    """The gold judge and the held-out prompts it judges; independent of the GVM."""

    judge: Literal["vader", "none"] = Field("none", description="`vader` scores the sentiment of a response by a lexicon.")
    prompts: Count = Field(256, description="Held-out prompts judged before and after training.")
    every_steps: Annotated[int, Field(ge=0)] = Field(0, description="Also evaluate every so many steps; 0: only before and after.")


class RayConfig(Section):
    """The Ray cluster that the run joins or starts."""

    address: str | None = Field(None, description="Address of a running cluster; not set: join the one of this job, else start a local one.")
    num_cpus: Count | None = Field(None, description="CPUs of a local cluster that is started here.")
    num_gpus: Annotated[int, Field(ge=0)] | None = Field(None, description="GPUs of a local cluster that is started here.")
    object_store_gib: Positive | None = Field(None, description="Object store of a local cluster that is started here.")
    dashboard: bool = Field(False, description="Serve the dashboard of a local cluster that is started here.")
    placement_timeout_seconds: Positive = Field(300.0, description="How long to wait for the cluster to have room.")
    autoscaling: bool = Field(False, description="The cluster can grow: wait for room even if it has too little in all.")
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK"] = Field("PACK", description="How Ray spreads the actors over nodes.")

    @field_validator("address")
    @classmethod
    def _is_an_address(cls, address: str | None) -> str | None:
        if address is not None and not RAY_ADDRESS.fullmatch(address):
            raise ValueError(f"'{address}' is no address of a Ray cluster; expected HOST:PORT, ray://HOST:PORT or auto")
        return address


class TrainConfig(Section):
    """How long policy optimisation runs and what it keeps."""

    steps: Count = Field(100, description="Steps of the run: rollout, scoring, update, weight sync.")
    save_rollouts_every_steps: Annotated[int, Field(ge=0)] = Field(1, description="Write `rollouts/step_*.jsonl` every so many steps; 0: never.")
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(["tensorboard"], description="Where metrics go besides metrics.jsonl.")


class Config(Section):
    """A whole run, from preference data to a better policy."""

    name: str = Field("dvpo", pattern=r"^[A-Za-z0-9._-]+$", description="Name of the run, in its folder and in the trackers.")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="Seed of data order, sampling and initialisation.")
    out: NonEmpty | None = Field(None, description="Run folder; not set: `runs/<name>-<time>`.")
    algorithm: Literal["dvpo", "ppo", "grpo", "rloo", "remax", "reinforce"] = Field(
        "dvpo", description="The method of `dvpo train`: the frozen GVM, or a baseline that takes rewards from `reward_model.path`."
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

    @model_validator(mode="after")
    def _lengths_agree(self) -> Config:
        if self.rollout.min_response_tokens > self.rollout.max_response_tokens:
            raise ValueError(
                f"rollout.min_response_tokens ({self.rollout.min_response_tokens}) is above "
                f"rollout.max_response_tokens ({self.rollout.max_response_tokens})"
            )
        if self.rollout.tensor_parallel_size > 1 and self.rollout.backend != "vllm":
            raise ValueError("rollout.tensor_parallel_size above 1 needs rollout.backend vllm")
        return self

    @model_validator(mode="after")
    def _disagreement_has_an_ensemble(self) -> Config:
        if self.scorer.ensemble and self.algorithm != "dvpo":
            raise ValueError(f"scorer.ensemble holds value models, which algorithm {self.algorithm} has none of; remove it")
        named = [Path(path) for path in (self.gvm.path, *self.scorer.ensemble) if path is not None]
        twice = next((path for i, path in enumerate(named) if path in named[:i]), None)
        if twice is not None:
            raise ValueError(f"scorer.ensemble: {twice} is named twice, here or by gvm.path; give GVM artifacts that can disagree")
        if self.advantage.disagreement_coefficient > 0 and not self.scorer.ensemble:
            raise ValueError("advantage.disagreement_coefficient needs scorer.ensemble: at least one more GVM artifact")
        return self

    @model_validator(mode="after")
    def _refresh_has_a_source(self) -> Config:
        if self.gvm.refresh_every_steps == 0 and self.health.on_alarm != "refresh":
            return self
        asked = "gvm.refresh_every_steps" if self.gvm.refresh_every_steps else "health.on_alarm: refresh"
        refresh = self.gvm.refresh
        if self.algorithm != "dvpo":
            raise ValueError(f"{asked} retrains the Global Value Model, which algorithm {self.algorithm} does not use")
        if refresh.source is None:
            raise ValueError(f"{asked} needs gvm.refresh.source: judge, file or endpoint")
        if refresh.source == "judge" and self.evaluation.judge == "none":
            raise ValueError("gvm.refresh.source judge needs evaluation.judge")
        if refresh.source == "endpoint" and refresh.url is None:
            raise ValueError("gvm.refresh.source endpoint needs gvm.refresh.url")
        return self
