"""The bare side of the learner and of the frozen models: transformers and torch, as one would write them by hand."""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.bench.layouts import ModelInputs, lay_out
from dvpo_ray.bench.measure import Sample
from dvpo_ray.config.schema import Config
from dvpo_ray.gvm.artifact import load_gvm_of_run
from dvpo_ray.models.loading import default_device, load_policy
from dvpo_ray.models.trainable import apply_lora, disable_dropout, train_last_layers
from dvpo_ray.runtime.process import Actor


class BareLearner(Actor):
    """Forward, backward and AdamW on a plain model: no DeepSpeed, no metrics, no clipping of gradients.

    It trains the parameters that the config says (all, the last layers, LoRA) with the config's gradient checkpointing.
    """

    role = "bare_learner"

    def __init__(self, config: Config, index: int, run_folder: str) -> None:
        super().__init__(index, run_folder)
        self.max_tokens = config.batch.micro_batch_tokens
        self.temperature = config.rollout.temperature
        self.clip_epsilon = config.policy.clip_epsilon
        self.device = default_device()
        self.model = _trainable_policy(config).to(self.device).train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=config.policy.learning_rate, fused=True)

    def train(self, batch: RaggedBatch, minibatches: list[np.ndarray], layout: str) -> Sample:
        """An optimizer step on each minibatch (row indices). Laying rows out isn't timed."""
        prepared = [lay_out(batch, rows, layout, self.max_tokens, self.device) for rows in minibatches]
        fields = {name: torch.from_numpy(batch.by_token[name].copy()).to(self.device) for name in ("log_probs", "advantages")}
        started = _now()
        for micro_batches in prepared:
            tokens = sum(len(inputs.targets) for inputs in micro_batches)
            for inputs in micro_batches:
                (self._loss(inputs, fields) / tokens).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        seconds = _now() - started
        return Sample(int(sum(batch.lengths[rows].sum() for rows in minibatches)), seconds)

    def _loss(self, inputs: ModelInputs, fields: dict[str, Tensor]) -> Tensor:
        """PPO's clipped surrogate, summed over the response tokens."""
        ratio = (response_log_probs(self.model, inputs, self.temperature) - fields["log_probs"][inputs.token_index]).exp()
        advantages = fields["advantages"][inputs.token_index]
        clipped = ratio.clamp(1 - self.clip_epsilon, 1 + self.clip_epsilon)
        return -torch.minimum(ratio * advantages, clipped * advantages).sum()


class BareReference(Actor):
    """Log-probs of the response tokens by a plain forward pass of the policy."""

    role = "bare_reference"

    def __init__(self, config: Config, index: int, run_folder: str) -> None:
        super().__init__(index, run_folder)
        self.max_tokens = config.reference.micro_batch_tokens
        self.temperature = config.rollout.temperature
        self.device = default_device()
        self.model = load_policy(config.model, self.device)

    def forward(self, batch: RaggedBatch, layout: str) -> Sample:
        """All rows once; laying them out isn't timed."""
        return _timed_forward(batch, layout, self.max_tokens, self.device, lambda inputs: response_log_probs(self.model, inputs, self.temperature))


class BareScorer(Actor):
    """Values of all tokens by a plain forward pass of the value model."""

    role = "bare_scorer"

    def __init__(self, config: Config, index: int, run_folder: str) -> None:
        super().__init__(index, run_folder)
        self.max_tokens = config.scorer.micro_batch_tokens
        self.device = default_device()
        self.model, _ = load_gvm_of_run(config.model, config.gvm.path)

    def forward(self, batch: RaggedBatch, layout: str) -> Sample:
        """All rows once; laying them out isn't timed."""
        return _timed_forward(batch, layout, self.max_tokens, self.device, lambda inputs: _run(self.model, inputs).logits)


def response_log_probs(model: nn.Module, inputs: ModelInputs, temperature: float) -> Tensor:
    """Log-probability of each response token, float32 [n]; logits are computed where a response token is predicted only."""
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = _run(causal_lm.base_model, inputs).last_hidden_state[inputs.predicts]
    logits = causal_lm.get_output_embeddings()(hidden).float()
    return -F.cross_entropy(logits / temperature if temperature != 1.0 else logits, inputs.targets, reduction="none")


def _run(model: nn.Module, inputs: ModelInputs):
    return model(input_ids=inputs.input_ids, position_ids=inputs.position_ids, use_cache=False)


def _trainable_policy(config: Config) -> nn.Module:
    model = load_policy(config.model)
    disable_dropout(model)
    policy = config.policy
    if policy.trainable_layers is not None:
        train_last_layers(model, policy.trainable_layers)
    if policy.lora is not None:
        model = apply_lora(model, policy.lora)
    if policy.deepspeed.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def _timed_forward(batch: RaggedBatch, layout: str, max_tokens: int, device: torch.device, forward) -> Sample:
    prepared = lay_out(batch, np.arange(batch.num_rows), layout, max_tokens, device)
    with torch.inference_mode():
        started = _now()
        for inputs in prepared:
            forward(inputs)
        return Sample(batch.num_tokens, _now() - started)


def _now() -> float:
    """Seconds, when all work on the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
