"""The actor that trains the Global Value Model: one data-parallel rank under DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass
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
from dvpo_ray.gvm.pairs import PairBatch
from dvpo_ray.gvm.targets import bradley_terry, last_values, mean_values, squared_error, value_targets
from dvpo_ray.models.attention import is_packed
from dvpo_ray.models.deepspeed import loading
from dvpo_ray.models.forward import token_values
from dvpo_ray.models.layouts import Passes, Rows, deal, lay_out, to_device
from dvpo_ray.models.loading import load_tokenizer, rehearse_saving, torch_dtype
from dvpo_ray.models.trainable import apply_lora

SHARES = ("loss", "regression_loss", "bradley_terry_loss", "accuracy")


@dataclass(frozen=True)
class PairRows:
    """Both responses of some pairs of a minibatch, on the device.

    Attributes:
        pairs: their indices in the minibatch.
        rows: whose states are wanted: S of them in R rows.
        lengths: int64 [R], states of each row.
        outcomes: float32 [R], r of each row.
        counts: False if the pairs count elsewhere and run only to keep step with other ranks.
    """

    pairs: np.ndarray
    rows: Rows
    lengths: Tensor
    outcomes: Tensor
    counts: bool


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
        with loading(settings.deepspeed, dtype) as device:
            value_model = new_value_model(start, settings.num_layers, dtype, model.attention, model.trust_remote_code, settings.keep_head, device)
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
        work, shares = self._lay_out(minibatch), []
        result = self._optimizer_step([partial(self._loss, part, minibatch, shares) for part in work])
        sums = dict(zip(SHARES, torch.stack(shares).sum(0).tolist(), strict=True))
        tokens = sum(int(minibatch.pair_lengths[part.pairs].sum()) for part in work if part.counts)
        return sums | {"tokens": tokens, "grad_norm": float(result.grad_norm), "learning_rate": result.learning_rate}

    def _lay_out(self, pairs: PairBatch) -> list[PairRows]:
        """This rank's micro-batches, as many as on every other rank."""
        packed, settings = is_packed(self.model), self.settings
        passes = deal(pairs.pair_lengths if packed else pairs.pair_tokens, settings.num_actors, settings.micro_batch_tokens, packed=packed)[
            self.index
        ]
        rows_of = [(2 * group[:, None] + np.array([0, 1])).reshape(-1) for group in passes.rows]
        states = np.zeros(pairs.batch.num_tokens, dtype=bool)
        states[pairs.batch.state_index] = True
        rows = lay_out(self.model, pairs.batch, Passes(rows_of), states, ahead=False)
        of_rows = to_device([array[group] for group in rows_of for array in (pairs.batch.state_lengths, pairs.outcomes)], rows[0].ids.device)
        working = len(passes.working)
        return [PairRows(passes.rows[i], rows[i], of_rows[2 * i], of_rows[2 * i + 1], i < working) for i in range(len(rows))]

    def _loss(self, part: PairRows, minibatch: PairBatch, shares: list[Tensor]) -> Tensor:
        """A micro-batch's share of the minibatch's loss; 0 for one that runs only to keep step."""
        settings, lengths = self.settings, part.lengths
        values = token_values(self.model, part.rows, run=self.engine)
        response_value = last_values if settings.bradley_terry_value == "last" else mean_values
        chosen, rejected = response_value(values, lengths).view(-1, 2).unbind(1)
        contrast = bradley_terry(chosen, rejected) / minibatch.num_pairs
        if settings.objective == "bradley_terry":
            loss, regression = contrast, torch.zeros_like(contrast)
        else:
            targets = value_targets(settings.objective, values, lengths, part.outcomes, settings.td_lambda)
            regression = squared_error(values, targets) / minibatch.pair_states.sum()
            loss = regression + settings.bradley_terry_weight * contrast
        right = ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).sum() / minibatch.num_pairs
        counts = float(part.counts)
        shares.append(counts * torch.stack([loss, regression, contrast, right]).detach())
        return counts * loss

    # ---------------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(self, heldout: PairBatch) -> list[tuple[np.ndarray, np.ndarray]]:
        """This rank's share of the values: indices of some pairs, and the values of all their states, flat; a collective."""
        self.engine.eval()
        values = [(part, token_values(self.model, part.rows, run=self.engine)) for part in self._lay_out(heldout)]
        self.engine.train()
        return [(part.pairs, of_states.cpu().numpy()) for part, of_states in values if part.counts]

    # ------------------------------------------------------------------------------------------------ artifact

    def save_artifact(self, folder: str, manifest: GVMManifest) -> None:
        """Write the artifact with LoRA merged; a collective of all ranks, written by rank 0."""
        state = self.training.weights_on_first_rank()
        if self.index == 0:
            save_gvm(Path(folder), self.model, state, self._tokenizer(), manifest)

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.config.model.path, self.config.model.trust_remote_code)
