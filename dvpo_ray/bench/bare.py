"""The bare side of the comparisons: vLLM, transformers and torch, used as one would by hand, each in an actor like its counterpart's."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from dvpo_ray.actors.rollout_engine import make_backend
from dvpo_ray.batch import RaggedBatch
from dvpo_ray.bench.measure import Sample
from dvpo_ray.config.schema import Config
from dvpo_ray.gvm.artifact import load_gvm_of_run
from dvpo_ray.models.layouts import micro_batches
from dvpo_ray.models.loading import default_device, load_policy
from dvpo_ray.models.trainable import apply_lora, disable_dropout, train_last_layers
from dvpo_ray.runtime.process import Actor

LAYOUTS = ("packed", "padded")
"""How ragged rows are laid out for a plain transformers model. The faster one on the machine at hand is the baseline."""


# --------------------------------------------------------------------------------------------------------- rollouts


class BareRollout(Actor):
    """The generation library's own offline `generate`, on an engine that is built like the rollout engine's."""

    role = "bare_rollout"

    def __init__(self, config: Config, index: int, run_folder: str, *engine_arguments) -> None:
        super().__init__(index, run_folder)
        self.backend = make_backend(config, *engine_arguments)

    def generate(self, prompts: Sequence[Sequence[int]], seed: int) -> Sample:
        """Sample one response to each prompt; counts response tokens, stop tokens included."""
        torch.manual_seed(seed)
        started = time.perf_counter()
        tokens = generate_by_vllm(self, prompts) if hasattr(self.backend, "llm") else self._by_transformers(prompts)
        return Sample(tokens, time.perf_counter() - started)

    def _by_transformers(self, prompts: Sequence[Sequence[int]]) -> int:
        model, size = self.backend.model, self.backend.batch_size
        settings = copy.deepcopy(self.backend.sampling)
        settings.update(return_dict_in_generate=False, output_logits=False)
        stop = torch.tensor(sorted(self.backend.stop_token_ids), device=model.device)
        tokens = 0
        for batch in (prompts[start : start + size] for start in range(0, len(prompts), size)):
            width = max(map(len, batch))
            ids = torch.tensor([[self.backend.pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in batch], device=model.device)
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch], device=model.device)
            sampled = model.generate(ids, attention_mask=mask, generation_config=settings)[:, width:]
            stopped = torch.isin(sampled, stop).long().cumsum(-1)
            tokens += int((stopped.cumsum(-1) <= 1).sum())
        return tokens


def generate_by_vllm(actor, prompts: Sequence[Sequence[int]]) -> int:
    """Response tokens that vLLM's own `generate` makes on the engine of an actor, `RolloutEngine` or `BareRollout`."""
    requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    return sum(len(output.outputs[0].token_ids) for output in actor.backend.llm.generate(requests, actor.backend.params, use_tqdm=False))


# ---------------------------------------------------------------------------------------------------------- layouts


@dataclass(frozen=True)
class ModelInputs:
    """Some rows of a batch as the inputs of one forward pass.

    Attributes:
        input_ids: int64 [B, L].
        position_ids: int64 [B, L], starting at 0 again at every packed row; None where each row of the tensor is one row.
        predicts: bool [B, L], the next token is a response token of the same row.
        targets: int64 [n], those response tokens.
        token_index: int64 [n], their positions in the batch's flat arrays.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    predicts: Tensor
    targets: Tensor
    token_index: Tensor


def lay_out(batch: RaggedBatch, rows: np.ndarray, layout: str, max_tokens: int, device: torch.device | str) -> list[ModelInputs]:
    """Micro-batches of the given rows, of at most `max_tokens` tokens each, padding included.

    Args:
        layout: `packed` puts rows one after the other into one sequence (transformers keeps them apart by their positions);
            `padded` puts rows of like length under each other, padded on the right.
    """
    lengths = batch.lengths[rows]
    groups = micro_batches(lengths, max_tokens) if layout == "padded" else _packed_groups(lengths, max_tokens)
    return [_model_inputs(batch, rows[group], layout, device) for group in groups]


def _packed_groups(lengths: np.ndarray, max_tokens: int) -> list[list[int]]:
    groups: list[list[int]] = [[]]
    for row in range(len(lengths)):
        if groups[-1] and lengths[groups[-1]].sum() + lengths[row] > max_tokens:
            groups.append([])
        groups[-1].append(row)
    return groups


def _model_inputs(batch: RaggedBatch, rows: np.ndarray, layout: str, device: torch.device | str) -> ModelInputs:
    lengths = batch.lengths[rows]
    column = np.arange(lengths.max())
    index = np.where(column < lengths[:, None], batch.offsets[rows][:, None] + column, -1)  # -1 on padding
    positions = None
    if layout == "packed":
        positions = torch.from_numpy(np.nonzero(index >= 0)[1][None]).to(device)
        index = index[index >= 0][None]
    is_response = (index >= 0) & batch.response_mask[index]
    predicts = np.pad(is_response[:, 1:], ((0, 0), (0, 1)))
    response = index[is_response]
    arrays = (predicts, batch.tokens[response], response)
    input_ids = torch.from_numpy(np.where(index >= 0, batch.tokens[index], 0)).to(device)
    return ModelInputs(input_ids, positions, *(torch.from_numpy(array).to(device) for array in arrays))


# ----------------------------------------------------------------------------------------- frozen models and learner


class BareFrozen(Actor):
    """Plain forward passes over all rows of a batch."""

    section: str

    def __init__(self, config: Config, index: int, run_folder: str) -> None:
        super().__init__(index, run_folder)
        self.max_tokens, self.device = getattr(config, self.section).micro_batch_tokens, default_device()
        self.temperature = config.rollout.temperature
        self.model = self.load(config)

    def forward(self, batch: RaggedBatch, layout: str) -> Sample:
        """All rows once; laying them out is not timed."""
        prepared = lay_out(batch, np.arange(batch.num_rows), layout, self.max_tokens, self.device)
        with torch.inference_mode():
            started = _now()
            for inputs in prepared:
                self.run(inputs)
            return Sample(batch.num_tokens, _now() - started)


class BareReference(BareFrozen):
    """Log-probs of the response tokens under the policy."""

    role, section = "bare_reference", "reference"

    def load(self, config: Config) -> nn.Module:
        return load_policy(config.model, self.device)

    def run(self, inputs: ModelInputs) -> Tensor:
        return response_log_probs(self.model, inputs, self.temperature)


class BareScorer(BareFrozen):
    """Values of all tokens by the value model."""

    role, section = "bare_scorer", "scorer"

    def load(self, config: Config) -> nn.Module:
        # With `varlen` it would need the bounds of rows, and here transformers keeps them apart.
        return load_gvm_of_run(config.model.model_copy(update={"attention": "sdpa"}), config.gvm.path)[0]

    def run(self, inputs: ModelInputs) -> Tensor:
        return _run(self.model, inputs).logits


class BareLearner(Actor):
    """Forward, backward and AdamW on a plain model: no DeepSpeed, no metrics, no clipping of gradients.

    It trains the parameters that the config names (all, the last layers, LoRA) with the config's gradient checkpointing.
    """

    role = "bare_learner"

    def __init__(self, config: Config, index: int, run_folder: str) -> None:
        super().__init__(index, run_folder)
        self.max_tokens, self.device = config.batch.micro_batch_tokens, default_device()
        self.temperature = config.rollout.temperature
        self.clip_epsilon = config.policy.clip_epsilon
        self.model = _trainable_policy(config).to(self.device).train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=config.policy.learning_rate, fused=True)

    def train(self, batch: RaggedBatch, minibatches: list[np.ndarray], layout: str) -> Sample:
        """An optimizer step on each minibatch (row indices). Laying rows out is not timed."""
        prepared = [lay_out(batch, rows, layout, self.max_tokens, self.device) for rows in minibatches]
        fields = {name: torch.from_numpy(batch.by_token[name].copy()).to(self.device) for name in ("log_probs", "advantages")}
        started = _now()
        for micro in prepared:
            tokens = sum(len(inputs.targets) for inputs in micro)
            for inputs in micro:
                (self._loss(inputs, fields) / tokens).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return Sample(int(sum(batch.lengths[rows].sum() for rows in minibatches)), _now() - started)

    def _loss(self, inputs: ModelInputs, fields: dict[str, Tensor]) -> Tensor:
        """PPO's clipped surrogate, summed over the response tokens."""
        ratio = (response_log_probs(self.model, inputs, self.temperature) - fields["log_probs"][inputs.token_index]).exp()
        advantages = fields["advantages"][inputs.token_index]
        clipped = ratio.clamp(1 - self.clip_epsilon, 1 + self.clip_epsilon)
        return -torch.minimum(ratio * advantages, clipped * advantages).sum()


def response_log_probs(model: nn.Module, inputs: ModelInputs, temperature: float) -> Tensor:
    """Log-probability of each response token, float32 [n]; logits are computed only where a response token is predicted."""
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = _run(causal_lm.base_model, inputs).last_hidden_state[inputs.predicts]
    logits = causal_lm.get_output_embeddings()(hidden).float()
    return -F.cross_entropy(logits / temperature if temperature != 1.0 else logits, inputs.targets, reduction="none")


def _run(model: nn.Module, inputs: ModelInputs):
    return model(input_ids=inputs.input_ids, position_ids=inputs.position_ids, use_cache=False)


def _trainable_policy(config: Config) -> nn.Module:
    model, policy = load_policy(config.model), config.policy
    disable_dropout(model)
    if policy.trainable_layers is not None:
        train_last_layers(model, policy.trainable_layers)
    if policy.lora is not None:
        model = apply_lora(model, policy.lora)
    if policy.deepspeed.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def _now() -> float:
    """Seconds, when all work on the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
