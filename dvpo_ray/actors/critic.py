"""PPO's online value model, trained beside the policy under DeepSpeed."""

from __future__ import annotations

from functools import partial

import numpy as np
import ray
import torch
import torch.distributed as dist
from ray import ObjectRef
from torch import Tensor

from dvpo_ray.actors.deepspeed_rank import DeepSpeedRank, over_ranks
from dvpo_ray.actors.tally import Tally
from dvpo_ray.actors.update_plan import Update
from dvpo_ray.batch import Fields, RaggedBatch
from dvpo_ray.config.arithmetic import derive_batch
from dvpo_ray.config.schema import Config
from dvpo_ray.gvm.artifact import load_gvm
from dvpo_ray.gvm.model import new_value_model
from dvpo_ray.models.attention import is_packed
from dvpo_ray.models.deepspeed import loading
from dvpo_ray.models.forward import token_values, values_of
from dvpo_ray.models.layouts import Passes, Rows, lay_out, micro_batches
from dvpo_ray.models.loading import torch_dtype
from dvpo_ray.models.trainable import disable_dropout
from dvpo_ray.policy.losses import value_loss


class Critic(DeepSpeedRank):
    """One data-parallel rank. A batch has the token fields `values` (before the update), `returns` and `loss_mask`."""

    role = "critic"

    def __init__(self, config: Config, index: int, run_folder: str) -> None:
        super().__init__(index, run_folder)
        self.config = config
        self.settings = config.critic

    def connect(self, meeting: tuple[str, int]) -> None:
        """Join the other ranks and shard the model; `meeting` is that of `rendezvous`."""
        config, dtype = self.config, torch_dtype(self.config.model.dtype)
        self._join(self.settings.num_actors, *meeting)
        how = {"dtype": dtype, "attention": config.model.attention, "trust_remote_code": config.model.trust_remote_code}
        with loading(self.settings.deepspeed, dtype) as device:
            if self.settings.init == "reward_model":
                model = load_gvm(config.reward_model.path, **how, device=device)[0].requires_grad_(True)
            else:
                model = new_value_model(config.model.path, **how, device=device)
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
            groups = [micro_batches(batch.lengths, self.settings.micro_batch_tokens, packed=is_packed(self.model)) for batch in batches]
            flat = [values_of(self.model, batch, Passes(rows), run=self.engine) for batch, rows in zip(batches, groups, strict=True)]
            passes = sum(map(len, groups))
            most = round(over_ranks([passes], dist.ReduceOp.MAX)[0])
            for _ in range(most - passes):  # ranks run forward together
                values_of(self.model, _IDLE, Passes([np.array([0])]), run=self.engine)
        scores = tuple(Fields(by_token={"values": values}) for values in [values.cpu().numpy() for values in flat])
        return scores[0] if len(scores) == 1 else scores

    # ------------------------------------------------------------------------------------------------ update

    def update(self, update: Update) -> dict[str, float]:
        """Train on this rank's part of a batch; a collective of all ranks.

        Args:
            update: the batch and the plan of all ranks.

        Returns:
            `critic/…` metrics of the whole batch, the same on every rank.
        """
        with self.clock.busy():
            batch, plan, tally = update.batch, update.plans[self.index], Tally()
            # The value of the state that a token was chosen in is at the token before it.
            batch = batch.with_token_fields(values=np.concatenate([[0], batch.by_token["values"][:-1]]).astype(np.float32))
            for step in plan.steps:
                passes = lay_out(self.model, batch, step.passes, batch.by_token["loss_mask"] > 0, ahead=True, fields=("values", "returns"))
                result = self._optimizer_step([partial(self._loss, rows, step.tokens, tally, len(plan.steps)) for rows in passes])
                tally.end_step(result.grad_norm)
            metrics, norm = tally.of_all_ranks()
        return metrics | {"critic/grad_norm": norm, "critic/learning_rate": result.learning_rate}

    def _loss(self, rows: Rows, tokens: int, tally: Tally, steps: int) -> Tensor:
        loss, metrics = value_loss(
            token_values(self.model, rows, run=self.engine),
            rows.fields["values"],
            rows.fields["returns"],
            minibatch_tokens=tokens,
            clip=self.settings.value_clip,
        )
        tally.add(metrics, steps=steps)
        return loss


_IDLE = RaggedBatch.from_rows([[0]], [[]])
