"""The frozen models: the Global Value Model, a baseline's reward model, and the reference policy."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from dvpo_ray.actors.memory import ModelState
from dvpo_ray.actors.process import Actor
from dvpo_ray.batch import RaggedBatch
from dvpo_ray.config.schema import Config
from dvpo_ray.gvm.artifact import GVMManifest, load_gvm_of_run
from dvpo_ray.gvm.context import rollout_values
from dvpo_ray.gvm.trajectories import Trajectories
from dvpo_ray.health.disagreement import ensemble_std
from dvpo_ray.models.compiling import compile_layers
from dvpo_ray.models.forward import batch_log_probs, batch_values
from dvpo_ray.models.loading import default_device, load_policy
from dvpo_ray.models.memory import parameter_bytes


class FrozenModel(Actor):
    """A model that is never trained: all of its state is its weights."""

    model: PreTrainedModel

    def model_state(self) -> ModelState:
        return ModelState(parameters=parameter_bytes(self.model, default_device()))


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
        if config.scorer.compile:
            compile_layers(model, "scorer.compile")
        return model, manifest

    def _artifact(self, config: Config) -> str:
        return config.gvm.path

    @torch.inference_mode()
    def score(self, batch: RaggedBatch, examples: RaggedBatch | None = None) -> np.ndarray:
        """Value of the state after every token, prompt and response, float32 [N].

        Args:
            examples: other rollouts of the current policy, of which a model with a context puts some before each row.
        """
        with self.clock.busy():
            return self._values(self.model, batch, examples)

    @torch.inference_mode()
    def disagreement(self, batch: RaggedBatch, values: np.ndarray, examples: RaggedBatch | None = None) -> np.ndarray:
        """Standard deviation of the value after every token over this model and those of `scorer.ensemble`, float32 [N].

        Args:
            values: what `score` returned for the batch and the examples.
        """
        with self.clock.busy():
            return ensemble_std([values, *(self._values(model, batch, examples) for model in self.others)])

    @torch.inference_mode()
    def accuracy(self, pairs: Trajectories) -> float:
        """Share of preference pairs whose chosen response has the higher last value; a tie counts half."""
        with self.clock.busy():
            values = batch_values(self.model, pairs.batch, self.max_tokens)
            chosen, rejected = values[pairs.batch.offsets[1:] - 1].reshape(-1, 2).T
            return float(np.mean((chosen > rejected) + 0.5 * (chosen == rejected)))

    def _values(self, model: PreTrainedModel, batch: RaggedBatch, examples: RaggedBatch | None) -> np.ndarray:
        return rollout_values(model, batch, self.max_tokens, self.manifest.context, examples, self.seed)


class RewardScorer(ValueScorer):
    """The frozen reward model of a baseline. Its value after the last token is the response's reward; no other number counts."""

    role = "reward_model"

    def _artifact(self, config: Config) -> str:
        return config.reward_model.path


class ReferenceModel(FrozenModel):
    """The frozen copy of the policy that KL is measured from."""

    role = "reference"

    def __init__(self, config: Config, index: int, run_folder: str) -> None:
        super().__init__(index, run_folder)
        self.max_tokens = config.reference.micro_batch_tokens
        self.temperature = config.rollout.temperature
        self.model = load_policy(config.model, default_device())
        if config.reference.compile:
            compile_layers(self.model, "reference.compile")

    @torch.inference_mode()
    def score(self, batch: RaggedBatch) -> np.ndarray:
        """Log-probability of every response token, float32 [N], 0 on prompts."""
        with self.clock.busy():
            return batch_log_probs(self.model, batch, self.max_tokens, self.temperature)
