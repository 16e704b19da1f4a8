"""The frozen models: the Global Value Model, a baseline's reward model, and the reference policy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from transformers import PreTrainedModel

from dvpo_ray.batch import Fields, RaggedBatch
from dvpo_ray.config.schema import Config
from dvpo_ray.gvm.artifact import GVMManifest, load_gvm_of_run
from dvpo_ray.gvm.context import rollout_values
from dvpo_ray.gvm.pairs import PairBatch
from dvpo_ray.health.diagnostics import ensemble_std
from dvpo_ray.models.compiling import compile_layers, compiles
from dvpo_ray.models.forward import MinLength, batch_log_probs, batch_values, check_rows_apart
from dvpo_ray.models.loading import default_device, load_policy
from dvpo_ray.models.offload import HostMemory
from dvpo_ray.runtime.process import Actor


class FrozenModel(Actor):
    """A model that is never trained, or several."""

    model: PreTrainedModel
    others: Sequence[PreTrainedModel] = ()

    def offload(self) -> None:
        """Give the memory of the weights back until `reload`."""
        self._host.take(parameter.data for model in (self.model, *self.others) for parameter in model.parameters())

    def reload(self) -> None:
        """Bring the weights back to the GPU."""
        self._host.bring_back()

    @cached_property
    def _host(self) -> HostMemory:
        return HostMemory(default_device())


class ValueScorer(FrozenModel):
    """The frozen Global Value Model: V after each token."""

    role = "scorer"

    def __init__(self, config: Config, index: int, run_folder: str) -> None:
        super().__init__(index, run_folder)
        self.max_tokens = config.scorer.micro_batch_tokens
        self.seed = config.seed
        self.model, self.manifest = self._load(config, self._artifact(config))
        self.others = [self._load(config, path)[0] for path in config.scorer.ensemble]

    def _load(self, config: Config, path: str) -> tuple[PreTrainedModel, GVMManifest]:
        model, manifest = load_gvm_of_run(config.model, path)
        check_rows_apart(model)
        if compiles(config.scorer.compile, config.train.steps):
            compile_layers(model, "scorer.compile")
        return model, manifest

    def _artifact(self, config: Config) -> str:
        return config.gvm.path

    @torch.inference_mode()
    def score(self, batch: RaggedBatch, examples: RaggedBatch | None = None) -> Fields:
        """Values of every token, prompt and response.

        Args:
            examples: other rollouts of the current policy. A model with a context puts some of them before each row.

        Returns:
            `values`, of the state after each token; with `scorer.ensemble` also `disagreement`, the standard deviation of that
            value over this model and the others.
        """
        with self.clock.busy():
            values = self._values(self.model, batch, examples)
            if not self.others:
                return Fields(by_token={"values": values})
            everyones = [values, *(self._values(model, batch, examples) for model in self.others)]
            return Fields(by_token={"values": values, "disagreement": ensemble_std(everyones)})

    @torch.inference_mode()
    def accuracy(self, pairs: PairBatch) -> float:
        """Share of preference pairs whose chosen response has the higher last value; a tie counts half."""
        with self.clock.busy():
            values = batch_values(self.model, pairs.batch, self.max_tokens)
            chosen, rejected = values[pairs.batch.offsets[1:] - 1].reshape(-1, 2).T
            return float(np.mean((chosen > rejected) + 0.5 * (chosen == rejected)))

    def _values(self, model: PreTrainedModel, batch: RaggedBatch, examples: RaggedBatch | None) -> np.ndarray:
        return rollout_values(model, batch, self.max_tokens, self.manifest.context, examples, self.seed)


class RewardScorer(ValueScorer):
    """The frozen reward model of a baseline. Its value after the last token is the reward of the response; its other values are not used."""

    role = "reward_model"

    def _artifact(self, config: Config) -> str:
        return config.reward_model.path

    @torch.inference_mode()
    def score(self, batch: RaggedBatch) -> Fields:
        """`rewards`, float64 [R]: one number for each response."""
        with self.clock.busy():
            values = self._values(self.model, batch, examples=None)
            return Fields(by_row={"rewards": values[batch.offsets[1:] - 1].astype(np.float64)})


class ReferenceModel(FrozenModel):
    """The frozen copy of the policy. KL is measured from it.

    Args:
        stop_token_ids: tokens that end a response.
    """

    role = "reference"

    def __init__(self, config: Config, index: int, run_folder: str, stop_token_ids: frozenset[int] = frozenset()) -> None:
        super().__init__(index, run_folder)
        self.max_tokens = config.reference.micro_batch_tokens
        self.temperature = config.rollout.temperature
        self.min_length = MinLength.of(config.rollout.min_response_tokens, stop_token_ids)
        self.model = load_policy(config.model, default_device(), packs=True)
        check_rows_apart(self.model)
        if compiles(config.reference.compile, config.train.steps):
            compile_layers(self.model, "reference.compile")

    @torch.inference_mode()
    def score(self, batch: RaggedBatch) -> Fields:
        """`reference_log_probs` of the response tokens, 0 on prompts."""
        with self.clock.busy():
            log_probs = batch_log_probs(self.model, batch, self.max_tokens, self.temperature, min_length=self.min_length)
            return Fields(by_token={"reference_log_probs": log_probs})
