"""The sizes of a model that follow from its config.json, counted on a model without weights."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dvpo_ray.config.inputs import is_made, value_model_start
from dvpo_ray.config.schema import Config, ModelConfig, PreferenceTraining
from dvpo_ray.gvm.model import keep_first_layers, value_model_class
from dvpo_ray.models.deepspeed import ZERO3_WHOLE_BELOW
from dvpo_ray.models.loading import load_model_config, torch_dtype
from dvpo_ray.models.trainable import apply_lora, decoder_layers, train_last_layers


@dataclass(frozen=True)
class Architecture:
    """Sizes of one model, in elements unless something else is said.

    Attributes:
        parameters: all, tied ones once.
        trained: those that get gradients.
        kept_whole: those of tensors that ZeRO 3 does not cut.
        layer_matrices: weights of the decoder layers that are multiplied with every token.
        layers: decoder layers.
        trained_layers: decoder layers from the first one that the backward pass reaches.
        hidden: size of a hidden state.
        attention_width: heads times head size.
        cache_per_token: keys and values of one token in all layers.
        vocabulary: logits of one position; 0 for a value model.
    """

    parameters: int
    trained: int
    kept_whole: int
    layer_matrices: int
    layers: int
    trained_layers: int
    hidden: int
    attention_width: int
    cache_per_token: int
    vocabulary: int


@dataclass(frozen=True)
class ModelPlan:
    """A model to be loaded: where its config is and what of it is trained.

    Attributes:
        model_config: transformers' config.
        has_value_head: a value model, else a causal language model.
        settings: dtype and attention.
        policy: the config section with `trainable_layers` and `lora`; None for a model that is frozen or trained whole.
    """

    model_config: PretrainedConfig
    has_value_head: bool
    settings: ModelConfig
    policy: object | None = None

    def build(self) -> PreTrainedModel:
        """The model on the current device, without adapters; `trainable_layers` are applied."""
        options = {"dtype": torch_dtype(self.settings.dtype), "attn_implementation": "sdpa"}
        if self.has_value_head:
            return value_model_class(self.model_config)._from_config(self.model_config, **options)
        model = AutoModelForCausalLM.from_config(self.model_config, **options)
        if self.policy is not None and self.policy.trainable_layers is not None:
            train_last_layers(model, self.policy.trainable_layers)
        return model

    def architecture(self) -> Architecture:
        """Count a model on the meta device, which has shapes and no memory."""
        with torch.device("meta"):
            model = self.build()
            layers = list(decoder_layers(model))
            matrices = sum(p.numel() for layer in layers for p in layer.parameters() if p.dim() > 1)
            if self.policy is not None and self.policy.lora is not None:
                model = apply_lora(model, self.policy.lora)
        parameters, trained = list(model.parameters()), [any(p.requires_grad for p in layer.parameters()) for layer in layers]
        text = self.model_config.get_text_config()
        heads = text.num_attention_heads
        head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
        return Architecture(
            parameters=sum(p.numel() for p in parameters),
            trained=sum(p.numel() for p in parameters if p.requires_grad),
            kept_whole=sum(p.numel() for p in parameters if p.numel() < ZERO3_WHOLE_BELOW),
            layer_matrices=matrices,
            layers=len(layers),
            trained_layers=len(layers) - trained.index(True) if any(trained) else 0,
            hidden=text.hidden_size,
            attention_width=heads * head_size,
            cache_per_token=2 * len(layers) * (getattr(text, "num_key_value_heads", None) or heads) * head_size,
            vocabulary=0 if self.has_value_head else text.vocab_size,
        )

    def saved_bytes(self, rows: int, length: int) -> int:
        """Bytes that a forward pass over `rows` rows of `length` tokens keeps for the backward pass, without logits.

        The model runs on tensors without memory, so the count is that of the real operators on a CPU. Adapters are left out:
        their input is kept either way, and they add only a few columns.
        """
        with FakeTensorMode():
            model = self.build().train()
            weights = {p.untyped_storage()._cdata for p in model.parameters()}
            kept: dict[int, torch.Tensor] = {}

            def keep(tensor: torch.Tensor) -> torch.Tensor:
                storage = tensor.untyped_storage()._cdata
                if storage not in weights:
                    kept[storage] = tensor  # while it is referred to, no other storage gets its address
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                output = model.base_model(input_ids=torch.zeros(rows, length, dtype=torch.long), use_cache=False)
            size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
            del output
        return size

    def working_bytes(self, rows: int, length: int) -> int:
        """Bytes of the largest tensors that are there at a time in a forward pass without gradients, without logits; counted as `saved_bytes`."""
        with FakeTensorMode(), _Alive() as alive, torch.inference_mode():
            model = self.build().eval()
            built = alive.size
            alive.largest = built
            model.base_model(input_ids=torch.zeros(rows, length, dtype=torch.long), use_cache=False)
        return alive.largest - built


class _Alive(TorchDispatchMode):
    """Counts the bytes of tensors that are made within this context, while they live.

    Attributes:
        size: now.
        largest: at its largest.
    """

    def __init__(self) -> None:
        super().__init__()
        self.size = self.largest = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (key := (storage := tensor.untyped_storage())._cdata) not in self._known:
                self._known.add(key)
                self.size += storage.nbytes()
                self.largest = max(self.largest, self.size)
                weakref.finalize(storage, self._forget, key, storage.nbytes())
        return result

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.size -= size


def policy_plan(config: Config, *, trained: bool) -> ModelPlan:
    """The policy as the learner trains it, or its frozen copies."""
    return _plan(config.model.path, config, has_value_head=False, policy=config.policy if trained else None)


def value_plan(config: Config, name: Literal["gvm", "reward_model"]) -> ModelPlan:
    """The GVM or the reward model: its artifact if that exists, else what the config would train.

    Raises:
        InputError: there is no config.json, or the model has fewer layers than `num_layers`.
    """
    section: PreferenceTraining = getattr(config, name)
    if is_made(section.path):
        return _plan(section.path, config)
    _, start = value_model_start(config, name)
    plan = _plan(start, config)
    if section.num_layers is not None:
        keep_first_layers(plan.model_config, section.num_layers, start, key=f"{name}.num_layers")
    return plan


def critic_plan(config: Config) -> ModelPlan:
    """PPO's critic. It starts from the reward model or from the policy, and is trained whole."""
    return value_plan(config, "reward_model") if config.critic.init == "reward_model" else _plan(config.model.path, config)


def _plan(path: str, config: Config, has_value_head: bool = True, policy: object | None = None) -> ModelPlan:
    one_label = load_model_config(path, config.model.trust_remote_code, num_labels=1)  # as in training: the size of a value head
    return ModelPlan(one_label, has_value_head, config.model, policy)
