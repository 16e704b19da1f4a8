"""The actor that trains the policy. It does not know the algorithm: tokens arrive with their advantages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from torch import Tensor

from dvpo_ray.actors.deepspeed_rank import DeepSpeedRank
from dvpo_ray.actors.minibatches import Minibatch, cut_minibatches
from dvpo_ray.batch import RaggedBatch
from dvpo_ray.config.arithmetic import derive_batch
from dvpo_ray.config.schema import Config
from dvpo_ray.files import clear_when_full
from dvpo_ray.models.deepspeed import gather_parameters
from dvpo_ray.models.forward import MinLength, batch_log_probs, response_log_probs
from dvpo_ray.models.loading import load_policy, load_tokenizer, rehearse_saving, save_policy, torch_dtype
from dvpo_ray.models.trainable import apply_lora, disable_dropout, full_weights, train_last_layers
from dvpo_ray.policy.losses import combine_metrics, policy_loss, truncated_importance_weights
from dvpo_ray.policy.mismatch import mismatch_metrics
from dvpo_ray.sync.transports import make_sender


class PolicyLearner(DeepSpeedRank):
    """One data-parallel rank of the policy under DeepSpeed.

    A shard has the token fields `advantages`, `loss_mask`, `log_probs` (the rollout engine's) and
    `reference_log_probs`; every rank gets the same number of rows.

    Args:
        stop_token_ids: tokens that end a response.
    """

    role = "learner"

    def __init__(self, config: Config, index: int, run_folder: str, stop_token_ids: frozenset[int] = frozenset()) -> None:
        super().__init__(index, run_folder)
        self.config = config
        self.sampled = {
            "temperature": config.rollout.temperature,
            "min_length": MinLength.of(config.rollout.min_response_tokens, stop_token_ids),
        }
        self.micro_batch_tokens = config.batch.micro_batch_tokens
        self.optimizer_steps_per_batch = config.batch.update_epochs * config.batch.minibatches_per_epoch

    # ------------------------------------------------------------------------------------------------- set-up

    def connect(self, master_addr: str, master_port: int, engines: list[ActorHandle], transport: str) -> None:
        """Join the other ranks, shard the model, and open the channel to the rollout engines."""
        config = self.config
        self._join(config.policy.num_actors, master_addr, master_port)
        model = load_policy(config.model)
        disable_dropout(model)
        if config.policy.trainable_layers is not None:
            train_last_layers(model, config.policy.trainable_layers)
        if config.policy.lora is not None:
            model = apply_lora(model, config.policy.lora)
        self._shard(model, config.policy, config.policy.deepspeed, torch_dtype(config.model.dtype), derive_batch(config).optimizer_steps)
        if self.index == 0:
            rehearse_saving(partial(self._save, {}), self.run_folder, config.model.path)
        self.sender = make_sender(transport, config, engines, self._weights, self.index)
        self.engines_are_whole = False

    def _save(self, weights: dict[str, Tensor], folder: Path) -> None:
        base = self.model.get_base_model() if self.config.policy.lora is not None else self.model
        tokenizer = load_tokenizer(self.config.model.path, self.config.model.trust_remote_code)
        save_policy(base, weights, tokenizer, self.config.model, folder)

    def _weights(self, changing_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        gather = gather_parameters if self.config.policy.deepspeed.zero_stage == 3 else None
        return full_weights(self.model, gather, changing_only=changing_only)

    # ------------------------------------------------------------------------------------------------- update

    def update(self, shard: RaggedBatch, step: int, kl_loss_coefficient: float) -> dict[str, float]:
        """Train on this rank's rows of a batch; a collective of all ranks.

        Args:
            step: the step's number; with the seed it decides the minibatches.
            kl_loss_coefficient: weight of the KL loss term, 0 when KL is in the reward or off.

        Returns:
            `policy/…` and `mismatch/…` metrics of the whole batch, the same on every rank.
        """
        with self.clock.busy():
            if self.config.policy.old_log_probs == "rollout":
                shard = shard.with_token_fields(old_log_probs=shard.by_token["log_probs"])
            elif self.optimizer_steps_per_batch > 1:
                shard = shard.with_token_fields(old_log_probs=self.log_probs(shard))
            # Otherwise the ratio is 1 at the only optimizer step, and its own forward pass gives the old log-probs.
            tally = _Tally()
            for minibatch in cut_minibatches(self.config, shard, step, self.index, self.micro_batch_tokens):
                result = self._optimizer_step(self._losses(minibatch, kl_loss_coefficient, tally))
                tally.end_minibatch(result.grad_norm)
            return tally.of_all_ranks() | {"policy/learning_rate": result.learning_rate}

    def log_probs(self, batch: RaggedBatch) -> np.ndarray:
        """Log-probability of every response token under the current weights, float32 [N], 0 on prompts."""
        return batch_log_probs(self.model, batch, self.micro_batch_tokens, **self.sampled, run=self.engine)

    def _losses(self, minibatch: Minibatch, kl_coefficient: float, tally: _Tally) -> list[Callable[[], Tensor]]:
        """One loss function per pass; every rank has the same number of them."""
        loss = partial(self._loss, minibatch.batch, minibatch_tokens=minibatch.tokens, kl_coefficient=kl_coefficient, tally=tally)
        return [partial(loss, rows, counts=counts) for rows, counts in minibatch.passes()]

    def _loss(self, batch: RaggedBatch, rows: np.ndarray, *, minibatch_tokens: int, kl_coefficient: float, tally: _Tally, counts: bool) -> Tensor:
        settings = self.config.policy
        out = response_log_probs(
            self.model,
            batch,
            rows,
            **self.sampled,
            entropy_gradient=settings.entropy_coefficient > 0,
            run=self.engine,
        )
        index = out.token_index.cpu().numpy()
        in_loss = (batch.by_token["loss_mask"][index] > 0) & counts
        keep = torch.from_numpy(in_loss).to(out.log_probs.device)
        new = out.log_probs[keep]

        def field(name: str) -> Tensor:
            return torch.from_numpy(batch.by_token[name][index[in_loss]]).to(new.device)

        engine_log_probs = field("log_probs")
        old = field("old_log_probs") if "old_log_probs" in batch.by_token else new.detach()
        corrected = settings.old_log_probs == "recompute"
        loss, metrics = policy_loss(
            new,
            old,
            field("advantages"),
            minibatch_tokens=minibatch_tokens,
            clip_epsilon=settings.clip_epsilon,
            weights=truncated_importance_weights(old, engine_log_probs, self.config.mismatch.importance_cap) if corrected else None,
            reference_log_probs=field("reference_log_probs") if kl_coefficient else None,
            kl_coefficient=kl_coefficient,
            kl_estimator=self.config.kl.estimator,
            entropy=out.entropy[keep],
            entropy_coefficient=settings.entropy_coefficient,
        )
        tally.add(metrics, new, engine_log_probs)
        return loss

    # ------------------------------------------------------------------------- weights, checkpoints, final model

    def sync_weights(self, version: int) -> None:
        """Bring the current weights to all rollout engines as policy version `version`; a collective of all ranks.

        The first time all weights travel, because the engines start without any. Later those that training changes do.
        """
        with self.clock.busy():
            self.sender.send(version, changing_only=self.engines_are_whole)
            self.engines_are_whole = True

    def save_pretrained(self, folder: str) -> None:
        """Write a Hugging Face checkpoint with its tokenizer, LoRA merged; a collective of all ranks, written by rank 0."""
        weights = {}
        for name, tensor in self._weights():
            if self.index == 0:
                weights[name] = tensor.cpu().clone()
        if self.index == 0:
            with clear_when_full(Path(folder)):
                self._save(weights, Path(folder))


class _Tally:
    """Metrics of one `update`: collected by micro-batch, combined over minibatches and ranks at the end."""

    def __init__(self) -> None:
        self._parts: list[dict[str, Tensor]] = []
        self._minibatches: list[dict[str, float]] = []
        self._grad_norms: list[float] = []
        self._unchanged: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, metrics: dict[str, Tensor], learner_log_probs: Tensor, engine_log_probs: Tensor) -> None:
        """Take in a micro-batch. Before the first optimizer step the learner has the weights that the engine sampled with."""
        self._parts.append(metrics)
        if not self._minibatches:
            self._unchanged.append((learner_log_probs.detach().cpu().numpy(), engine_log_probs.cpu().numpy()))

    def end_minibatch(self, grad_norm: float) -> None:
        self._minibatches.append(combine_metrics(self._parts))
        self._grad_norms.append(grad_norm)
        self._parts = []

    def of_all_ranks(self) -> dict[str, float]:
        """Each minibatch summed over the ranks, then the mean over minibatches (the maximum for `*_max`)."""
        ranks: list = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, (self._minibatches, self._unchanged))
        whole = [combine_metrics(parts) for parts in zip(*(minibatches for minibatches, _ in ranks), strict=True)]
        metrics = {name: float((np.max if name.endswith("_max") else np.mean)([m[name] for m in whole])) for name in whole[0]}
        learner, engine = (np.concatenate(side) for side in zip(*(pair for _, pairs in ranks for pair in pairs), strict=True))
        return metrics | {"policy/grad_norm": float(np.mean(self._grad_norms))} | mismatch_metrics(learner, engine)
