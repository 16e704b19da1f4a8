"""Settings of the stages that a trainer of TRL runs."""

from __future__ import annotations

from pydantic import Field

from dvpo_ray.config.section import Count, Positive, Section


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
    beta: Positive = Field(0.1, description="Weight of the KL to the reference that the loss stands for (Rafailov et al. 2023, arXiv 2305.18290).")
