"""Groups of settings that several stages and roles share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dvpo_ray.config.section import Count, Fraction, NonNegative, Positive, Section


class LoraConfig(Section):
    """Low-rank adapters through peft."""

    rank: Count = Field(16, description="Rank of the update of each adapted matrix.")
    alpha: Positive = Field(32.0, description="Updates are scaled by `alpha / rank`.")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="Dropout on the adapters' inputs.")
    target_modules: str | list[str] = Field("all-linear", description="peft's `target_modules`.")
    layers: list[int] | None = Field(None, description="Decoder layers that get adapters; all of them when not set.")


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

    zero_stage: Literal[0, 1, 2, 3] = Field(
        0, description="Shard over the workers: 1 optimizer state, 2 also gradients, 3 also parameters; 0 nothing."
    )
    offload_optimizer: bool = Field(False, description="Keep optimizer state in host memory (ZeRO 1-3).")
    offload_parameters: bool = Field(False, description="Keep parameters in host memory (ZeRO 3).")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")
    compile: bool = Field(
        False,
        description="Run the decoder layers through `torch.compile`: half a minute more at the start, faster steps after it. "
        "On a CPU it needs a C++ compiler. Not with ZeRO 3 or gradient checkpointing.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> DeepSpeedConfig:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("offload_parameters needs zero_stage 3")
        if self.compile and self.zero_stage == 3:
            raise ValueError("compile needs zero_stage 0, 1 or 2: with 3 a layer's weights are gathered as it runs")
        if self.compile and self.gradient_checkpointing:
            raise ValueError("set compile or gradient_checkpointing, not both: a recomputed layer runs uncompiled")
        return self


class RoleConfig(Section):
    """How many actors a role has and what each one occupies."""

    num_actors: Count = Field(1, description="Actors of this role.")
    cpus_per_actor: NonNegative = Field(1.0, description="Ray CPUs reserved for each actor.")
    gpus_per_actor: NonNegative = Field(0.0, description="Ray GPUs reserved for each actor; a fraction shares a GPU.")
    threads: Count = Field(1, description="OpenMP threads of each actor. Keep the sum of busy actors at the number of cores.")
