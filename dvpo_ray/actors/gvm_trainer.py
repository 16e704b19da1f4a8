"""The actor that trains the Global Value Model: one data-parallel rank under DeepSpeed."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dvpo_ray.actors.deepspeed_rank import DeepSpeedRank
from dvpo_ray.config.schema import Config, GVMConfig, RewardModelConfig
from dvpo_ray.gvm.artifact import GVMManifest, HeadSpec, head_spec, save_gvm, save_value_model
from dvpo_ray.gvm.model import new_value_model
from dvpo_ray.gvm.pairs import PairBatch, plan_minibatch
from dvpo_ray.gvm.targets import bradley_terry, last_values, mean_values, squared_error, value_targets
from dvpo_ray.models.deepspeed import gather_parameters
from dvpo_ray.models.forward import token_values
from dvpo_ray.models.loading import load_tokenizer, rehearse_saving, torch_dtype
from dvpo_ray.models.trainable import apply_lora, full_weights

SHARES = ("loss", "regression_loss", "bradley_terry_loss", "accuracy", "tokens")


class GVMTrainer(DeepSpeedRank):
    """One rank. All ranks hold all pairs by reference, and derive from lengths alone who takes which."""

    role = "gvm_trainer"

    def __init__(self, config: Config, settings: GVMConfig | RewardModelConfig, index: int, run_folder: str) -> None:
        super().__init__(index, run_folder)
        self.config = config
        self.settings = settings

    def connect(self, master_addr: str, master_port: int, train: PairBatch, total_steps: int) -> tuple[HeadSpec, int]:
        """Join the other ranks and shard the model; a collective of all ranks.

        Returns:
            The head's entry of the manifest, and the number of decoder layers.
        """
        settings, model = self.settings, self.config.model
        self._join(settings.num_actors, master_addr, master_port)
        dtype = torch_dtype(model.dtype)
        self.train = train
        start = settings.init_from or model.path
        value_model = new_value_model(start, settings.num_layers, dtype, model.attention, model.trust_remote_code, settings.keep_head)
        if self.index == 0:
            rehearse_saving(partial(save_value_model, value_model, {}, self._tokenizer()), self.run_folder, start)
        facts = head_spec(value_model), value_model.config.get_text_config().num_hidden_layers
        if settings.lora is not None:
            # peft changes the trunk in place; the head outside it stays an ordinary trained layer.
            apply_lora(value_model.base_model, settings.lora, task_type=None)
        self._shard(value_model, settings, settings.deepspeed, dtype, total_steps)
        return facts

    # ------------------------------------------------------------------------------------------------ training

    def step(self, pairs: np.ndarray) -> dict[str, float]:
        """One optimizer step on a minibatch of training pairs; a collective of all ranks.

        Returns:
            This rank's share of the minibatch's metrics: the shares of all ranks add up, but for `grad_norm` and
            `learning_rate`, which are the same on all.
        """
        minibatch = self.train.select(pairs)
        shares: list[Tensor] = []
        loss = partial(self._loss, minibatch, shares)
        result = self._optimizer_step([partial(loss, micro) for micro in self._plan(minibatch)])
        sums = dict(zip(SHARES, torch.stack(shares).sum(0).tolist(), strict=True))
        return sums | {"grad_norm": result.grad_norm, "learning_rate": result.learning_rate}

    def _plan(self, pairs: PairBatch) -> list[np.ndarray]:
        """This rank's micro-batches, as many as on every other rank."""
        return plan_minibatch(pairs.pair_tokens, self.settings.num_actors, self.settings.micro_batch_tokens)[self.index]

    def _loss(self, minibatch: PairBatch, shares: list[Tensor], pairs: np.ndarray) -> Tensor:
        """A micro-batch's share of the minibatch's loss; an empty one runs the shortest pair for nothing, to stay in step."""
        settings = self.settings
        micro = minibatch.select(pairs if len(pairs) else [minibatch.pair_tokens.argmin()])
        values, lengths = self._values(micro)
        response_value = last_values if settings.bradley_terry_value == "last" else mean_values
        chosen, rejected = response_value(values, lengths).view(-1, 2).unbind(1)
        contrast = bradley_terry(chosen, rejected) / minibatch.num_pairs
        if settings.objective == "bradley_terry":
            loss, regression = contrast, torch.zeros_like(contrast)
        else:
            targets = value_targets(settings.objective, values, lengths, torch.from_numpy(micro.outcomes).to(values.device), settings.td_lambda)
            regression = squared_error(values, targets) / minibatch.pair_states.sum()
            loss = regression + settings.bradley_terry_weight * contrast
        right = ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).sum() / minibatch.num_pairs
        tokens = torch.tensor(float(micro.batch.num_tokens), device=loss.device)
        counts = float(len(pairs) > 0)
        shares.append(counts * torch.stack([loss, regression, contrast, right, tokens]).detach())
        return counts * loss

    def _values(self, pairs: PairBatch) -> tuple[Tensor, Tensor]:
        """Values of all states, flat [S], and the states of each row [R]."""
        batch = pairs.batch
        values, _ = token_values(self.model, batch, np.arange(batch.num_rows), run=self.engine)
        index = torch.from_numpy(batch.state_index).to(values.device)
        return values[index], torch.from_numpy(batch.state_lengths).to(values.device)

    # ---------------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(self, heldout: PairBatch) -> list[tuple[np.ndarray, np.ndarray]]:
        """This rank's share of the values: indices of some pairs, and the values of all their states, flat; a collective."""
        self.engine.eval()
        parts = []
        for pairs in self._plan(heldout):
            values, _ = self._values(heldout.select(pairs if len(pairs) else [heldout.pair_tokens.argmin()]))
            if len(pairs):
                parts.append((pairs, values.cpu().numpy()))
        self.engine.train()
        return parts

    # ------------------------------------------------------------------------------------------------ artifact

    def save_artifact(self, folder: str, manifest: GVMManifest) -> None:
        """Write the artifact with LoRA merged; a collective of all ranks, written by rank 0."""
        gather = gather_parameters if self.settings.deepspeed.zero_stage == 3 else None
        state = {}
        for name, tensor in full_weights(self.model, gather):
            if self.index == 0:
                state[name] = tensor.cpu().clone()
        if self.index == 0:
            save_gvm(Path(folder), self.model, state, self._tokenizer(), manifest)

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.config.model.path, self.config.model.trust_remote_code)
