"""The actor that trains the policy. It does not know the algorithm: tokens arrive with their advantages."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch.distributed as dist
from ray.actor import ActorHandle
from torch import Tensor

from dvpo_ray.actors.deepspeed_rank import DeepSpeedRank
from dvpo_ray.actors.tally import Tally
from dvpo_ray.actors.update_plan import OptimizerStep, Update
from dvpo_ray.config.arithmetic import derive_batch
from dvpo_ray.config.schema import Config
from dvpo_ray.files import clear_when_full
from dvpo_ray.models.deepspeed import loading
from dvpo_ray.models.forward import MinLength, log_probs_of, response_log_probs
from dvpo_ray.models.layouts import Rows, lay_out
from dvpo_ray.models.loading import load_policy, load_tokenizer, rehearse_saving, save_policy, torch_dtype
from dvpo_ray.models.trainable import apply_lora, disable_dropout, train_last_layers
from dvpo_ray.planning.placement import choose_transport
from dvpo_ray.policy.losses import policy_loss, truncated_importance_weights
from dvpo_ray.policy.mismatch import mismatch_shares
from dvpo_ray.sync.transports import make_sender

LOSS_FIELDS = ("advantages", "log_probs", "reference_log_probs", "old_log_probs")
"""Token fields that the loss reads."""


class PolicyLearner(DeepSpeedRank):
    """One data-parallel rank of the policy under DeepSpeed.

    A batch has the token fields `advantages`, `loss_mask`, `log_probs` (the rollout engine's) and `reference_log_probs`.

    Args:
        stop_token_ids: tokens that end a response.
    """

    role = "learner"

    def __init__(self, config: Config, index: int, run_folder: str, stop_token_ids: frozenset[int] = frozenset()) -> None:
        super().__init__(index, run_folder)
        if choose_transport(config) in ("nccl", "ipc"):
            import dvpo_ray.sync.vllm_transports  # noqa: F401 - vLLM, which takes seconds, while the engines start
        self.config = config
        self.sampled = {
            "temperature": config.rollout.temperature,
            "min_length": MinLength.of(config.rollout.min_response_tokens, stop_token_ids),
        }

    # ------------------------------------------------------------------------------------------------- set-up

    def connect(self, meeting: tuple[str, int]) -> None:
        """Join the other ranks and shard the model.

        Args:
            meeting: of `rendezvous`.
        """
        config = self.config
        self._join(config.policy.num_actors, *meeting)
        dtype = torch_dtype(config.model.dtype)
        with loading(config.policy.deepspeed, dtype) as device:
            model = load_policy(config.model, device, packs=True)
        disable_dropout(model)
        if config.policy.trainable_layers is not None:
            train_last_layers(model, config.policy.trainable_layers)
        if config.policy.lora is not None:
            model = apply_lora(model, config.policy.lora)
        self._shard(model, config.policy, config.policy.deepspeed, dtype, derive_batch(config).optimizer_steps)
        if self.index == 0:
            rehearse_saving(partial(self._save, {}), self.run_folder, config.model.path)

    def open_channel(self, engines: list[ActorHandle], transport: str) -> None:
        """Open the channel to the rollout engines; a collective of all ranks."""
        self.sender = make_sender(transport, self.config, engines, self.training, self.index)

    def _save(self, weights: dict[str, Tensor], folder: Path) -> None:
        base = self.model.get_base_model() if self.config.policy.lora is not None else self.model
        tokenizer = load_tokenizer(self.config.model.path, self.config.model.trust_remote_code)
        save_policy(base, weights, tokenizer, self.config.model, folder)

    # ------------------------------------------------------------------------------------------------- update

    def update(self, update: Update, kl_loss_coefficient: float) -> dict[str, float]:
        """Train on this rank's part of a batch; a collective of all ranks.

        Args:
            update: the batch and the plan of all ranks.
            kl_loss_coefficient: weight of the KL loss term, 0 when KL is in the reward or off.

        Returns:
            `policy/…` and `mismatch/…` metrics of the whole batch, the same on every rank.
        """
        with self.clock.busy():
            batch, plan = update.batch, update.plans[self.index]
            if self.config.policy.old_log_probs == "rollout":
                batch = batch.with_token_fields(old_log_probs=batch.by_token["log_probs"])
            elif len(plan.steps) > 1:
                batch = batch.with_token_fields(old_log_probs=self.old_log_probs(update))
            # Otherwise the ratio is 1 at the only optimizer step, and its own forward pass gives the old log-probs.
            tally = Tally()
            fields = [name for name in LOSS_FIELDS if name in batch.by_token]
            mask, steps = batch.by_token["loss_mask"] > 0, len(plan.steps)
            for number, step in enumerate(plan.steps):
                passes = lay_out(self.model, batch, step.passes, mask, ahead=True, fields=fields)
                loss = partial(self._loss, step, kl_coefficient=kl_loss_coefficient, tally=tally, steps=steps, first=number == 0)
                result = self._optimizer_step([partial(loss, rows) for rows in passes])
                tally.end_step(result.grad_norm)
            metrics, norm = tally.of_all_ranks()
            metrics["mismatch/token_mult_error"] = 1.0 + metrics.pop("mismatch/token_mult_excess")
            return metrics | {"policy/grad_norm": norm, "policy/learning_rate": result.learning_rate}

    def old_log_probs(self, update: Update) -> np.ndarray:
        """Log-probability of every response token under the current weights, float32 [N], 0 on prompts: each rank computes its share."""
        flat = log_probs_of(self.model, update.batch, update.plans[self.index].before, **self.sampled, run=self.engine)
        dist.all_reduce(flat)
        return flat.cpu().numpy()

    def _loss(self, step: OptimizerStep, rows: Rows, *, kl_coefficient: float, tally: Tally, steps: int, first: bool) -> Tensor:
        settings = self.config.policy
        out = response_log_probs(self.model, rows, **self.sampled, entropy_gradient=settings.entropy_coefficient > 0, run=self.engine)
        old = rows.fields.get("old_log_probs", out.log_probs.detach())
        corrected = settings.old_log_probs == "recompute"
        loss, metrics = policy_loss(
            out.log_probs,
            old,
            rows.fields["advantages"],
            minibatch_tokens=step.tokens,
            clip_epsilon=settings.clip_epsilon,
            weights=truncated_importance_weights(old, rows.fields["log_probs"], self.config.mismatch.importance_cap) if corrected else None,
            reference_log_probs=rows.fields["reference_log_probs"] if kl_coefficient else None,
            kl_coefficient=kl_coefficient,
            kl_estimator=self.config.kl.estimator,
            entropy=out.entropy,
            entropy_coefficient=settings.entropy_coefficient,
        )
        tally.add(metrics, steps=steps)
        if first:  # the learner still has the weights that the engine sampled with
            tally.add(mismatch_shares(out.log_probs.detach(), rows.fields["log_probs"], step.tokens), steps=1)
        return loss

    # ------------------------------------------------------------------------- weights, checkpoints, final model

    def sync_weights(self, version: int, whole: bool) -> None:
        """Bring the current weights to all rollout engines as policy version `version`; a collective of all ranks.

        Args:
            whole: all weights travel, because an engine has none: at the start, and after a sleep. Otherwise those that training
                changes. With the transport `adapters` engines never lose the others, and those never travel.
        """
        with self.clock.busy():
            self.sender.send(version, changing_only=not whole)

    def save_pretrained(self, folder: str) -> None:
        """Write a Hugging Face checkpoint with its tokenizer, LoRA merged; a collective of all ranks, written by rank 0."""
        weights = self.training.weights_on_first_rank()
        if self.index == 0:
            with clear_when_full(Path(folder)):
                self._save(weights, Path(folder))
