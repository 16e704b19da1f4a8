"""PPO's online value model, trained beside the policy under DeepSpeed."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import ray
import torch
import torch.distributed as dist
from ray import ObjectRef
from torch import Tensor

from dvpo_ray.actors.deepspeed_rank import DeepSpeedRank, over_ranks
from dvpo_ray.actors.minibatches import cut_minibatches
from dvpo_ray.batch import Fields, RaggedBatch
from dvpo_ray.config.arithmetic import derive_batch
from dvpo_ray.config.schema import Config
from dvpo_ray.gvm.artifact import load_gvm
from dvpo_ray.gvm.model import new_value_model
from dvpo_ray.models.forward import micro_batches, token_values
from dvpo_ray.models.loading import torch_dtype
from dvpo_ray.models.trainable import disable_dropout
from dvpo_ray.policy.losses import combine_metrics, value_loss


class Critic(DeepSpeedRank):
    """One data-parallel rank. A shard has the token fields `values` (before the update), `returns` and `loss_mask`."""

    role = "critic"

    def __init__(self, config: Config, index: int, run_folder: str) -> None:
        super().__init__(index, run_folder)
        self.config = config
        self.settings = config.critic

    def connect(self, master_addr: str, master_port: int) -> None:
        """Join the other ranks and shard the model."""
        config, dtype = self.config, torch_dtype(self.config.model.dtype)
        self._join(self.settings.num_actors, master_addr, master_port)
        if self.settings.init == "reward_model":
            model, _ = load_gvm(Path(config.reward_model.path), dtype, config.model.attention, trust_remote_code=config.model.trust_remote_code)
            model.requires_grad_(True)
        else:
            model = new_value_model(config.model.path, None, dtype, config.model.attention, config.model.trust_remote_code)
        disable_dropout(model)
        self._shard(model, self.settings, self.settings.deepspeed, dtype, derive_batch(config).optimizer_steps)

    # ------------------------------------------------------------------------------------------------ values

    @torch.no_grad()
    def score(self, chunks: list[ObjectRef]) -> tuple[Fields, ...] | Fields:
        """`values` of the state after every token of each of this rank's chunks of rollouts.

        Args:
            chunks: references to the rollouts that this rank scores. Ranks may have different numbers of them, also 0.

        Returns:
            One result per chunk; call with `num_returns=len(chunks)`.
        """
        batches = ray.get(chunks)
        with self.clock.busy():
            work = [(i, rows) for i, batch in enumerate(batches) for rows in micro_batches(batch.lengths, self.settings.micro_batch_tokens)]
            flat = [np.zeros(batch.num_tokens, np.float32) for batch in batches]
            for i, rows in work:
                scored, index = token_values(self.model, batches[i], rows, run=self.engine)
                flat[i][index.cpu().numpy()] = scored.float().cpu().numpy()
            most = round(over_ranks([len(work)], dist.ReduceOp.MAX)[0])
            for _ in range(most - len(work)):  # ranks run forward together
                token_values(self.model, _IDLE, np.array([0]), run=self.engine)
        scores = tuple(Fields(by_token={"values": values}) for values in flat)
        return scores[0] if len(scores) == 1 else scores

    # ------------------------------------------------------------------------------------------------ update

    def update(self, shard: RaggedBatch, step: int) -> dict[str, float]:
        """Train on this rank's rows of a batch.

        Args:
            step: the step's number; with the seed it decides the minibatches.

        Returns:
            `critic/…` metrics of the whole batch, the same on every rank.
        """
        minibatches, grad_norms = [], []
        with self.clock.busy():
            for minibatch in cut_minibatches(self.config, shard, step, self.index, self.settings.micro_batch_tokens):
                parts: list[dict[str, Tensor]] = []
                loss = partial(self._loss, minibatch.batch, minibatch_tokens=minibatch.tokens, parts=parts)
                result = self._optimizer_step([partial(loss, rows, counts=counts) for rows, counts in minibatch.passes()])
                minibatches.append(combine_metrics(parts))
                grad_norms.append(result.grad_norm)
            ranks: list = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, minibatches)
        whole = [combine_metrics(parts) for parts in zip(*ranks, strict=True)]
        metrics = {name: float(np.mean([m[name] for m in whole])) for name in whole[0]}
        return metrics | {"critic/grad_norm": float(np.mean(grad_norms)), "critic/learning_rate": result.learning_rate}

    def _loss(self, batch: RaggedBatch, rows: np.ndarray, *, minibatch_tokens: int, parts: list[dict[str, Tensor]], counts: bool) -> Tensor:
        micro = batch.select(rows)
        flat_values, index = token_values(self.model, micro, np.arange(micro.num_rows), run=self.engine)
        in_loss = (micro.by_token["loss_mask"] > 0) & counts
        position = np.flatnonzero(in_loss)
        by_position = flat_values[torch.argsort(index)]
        before = torch.from_numpy(position - 1).to(flat_values.device)  # the value of the state that each token was chosen in
        loss, metrics = value_loss(
            by_position[before],
            torch.from_numpy(micro.by_token["values"][position - 1]).to(flat_values.device),
            torch.from_numpy(micro.by_token["returns"][position]).to(flat_values.device),
            minibatch_tokens=minibatch_tokens,
            clip=self.settings.value_clip,
        )
        parts.append(metrics)
        return loss


_IDLE = RaggedBatch.from_rows([[0]], [[]])
