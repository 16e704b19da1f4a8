"""Models without weights, on the meta device: what a config asks of a model is checked on them before any actor starts."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from dvpo_ray.config.schema import LoraConfig, ModelConfig, PolicyConfig
from dvpo_ray.errors import InputError
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
        check_adapters(skeleton, policy.lora, "policy.lora", "CAUSAL_LM")


def check_adapters(skeleton: PreTrainedModel, lora: LoraConfig, key: str, task_type: str | None) -> None:
    """Refuse adapters that cannot be laid on a model; the skeleton has them afterwards.

    Args:
        key: of the adapters in the config, for the error.
        task_type: as in `apply_lora`.

    Raises:
        InputError: names the key.
    """
    check_lora(skeleton, lora, key)
    try:
        with torch.device("meta"):
            apply_lora(skeleton, lora, task_type)
    except ValueError as error:  # what else peft does not take
        raise InputError(f"{key}: {str(error).strip().splitlines()[0]}") from error
