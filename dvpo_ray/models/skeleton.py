"""Models without weights, on the meta device: what a config asks of a model is checked on them before any actor starts."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, PreTrainedModel

from dvpo_ray.config.schema import LoraConfig, ModelConfig, PolicyConfig
from dvpo_ray.errors import InputError
from dvpo_ray.gvm.model import first_line, keep_first_layers
from dvpo_ray.models.loading import load_model_config
from dvpo_ray.models.trainable import apply_lora, check_lora, train_last_layers


def check_partial_training(model: ModelConfig, policy: PolicyConfig) -> None:
    """Refuse `policy.trainable_layers` and `policy.lora` that the policy does not have.

    Raises:
        InputError: names the key.
    """
    if policy.trainable_layers is None and policy.lora is None:
        return
    config = load_model_config(model.path, model.trust_remote_code)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    if policy.trainable_layers is not None:
        train_last_layers(skeleton, policy.trainable_layers)
    if policy.lora is not None:
        _check_adapters(skeleton, policy.lora, "policy.lora", "CAUSAL_LM")


def check_trunk(path: str, num_layers: int | None, lora: LoraConfig | None, section: str, trust_remote_code: bool) -> None:
    """Refuse layers and adapters that the trunk of a value model does not have.

    Args:
        path: checkpoint that the trunk starts from.
        section: of the config, for the error.

    Raises:
        InputError: names the key.
    """
    config = load_model_config(path, trust_remote_code)
    if num_layers is not None:
        keep_first_layers(config, num_layers, path, key=f"{section}.num_layers")
    if lora is None:
        return
    with torch.device("meta"):
        skeleton = AutoModelForTokenClassification.from_config(config, trust_remote_code=trust_remote_code)
    _check_adapters(skeleton.base_model, lora, f"{section}.lora", None)


def _check_adapters(skeleton: PreTrainedModel, lora: LoraConfig, key: str, task_type: str | None) -> None:
    check_lora(skeleton, lora, key)
    try:
        with torch.device("meta"):
            apply_lora(skeleton, lora, task_type)
    except ValueError as error:  # what else peft does not take
        raise InputError(f"{key}: {first_line(error)}") from error
