"""The value model: a transformers token classifier with one label. Its logit at a token is the value of the state after the token."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForTokenClassification, PretrainedConfig, PreTrainedModel

from dvpo_ray.config.schema import LoraConfig
from dvpo_ray.errors import InputError
from dvpo_ray.models.cpu_linear import use_fast_linears
from dvpo_ray.models.loading import load_checkpoint, load_model_config
from dvpo_ray.models.trainable import apply_lora


def new_value_model(
    path: str,
    num_layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
    keep_head: bool = False,
) -> PreTrainedModel:
    """A value model on the trunk of a causal language model, with a zero head and no dropout.

    With a zero head every value is exactly 0, so the first targets depend on the outcomes alone.

    Args:
        path: checkpoint folder or hub name of the language model.
        num_layers: keep the first `num_layers` decoder layers; all if None.
        keep_head: the checkpoint is a value model; keep its head.

    Raises:
        InputError: the checkpoint is missing, lacks trunk weights or has fewer layers, or transformers has no token classifier for it.
    """
    config = load_model_config(path, trust_remote_code, num_labels=1)
    remove_dropout(config)
    if num_layers is not None:
        keep_first_layers(config, num_layers, path)
    model, report = load_token_classifier(path, config, dtype, attention, trust_remote_code)
    head = [name for name, _ in head_parameters(model)]
    missing = sorted(set(report["missing_keys"]) - set(head))
    if missing:
        raise InputError(f"{path}: the checkpoint lacks {len(missing)} weights of the trunk, first {missing[0]}; give a complete checkpoint")
    if keep_head:
        if report["missing_keys"]:
            raise InputError(f"{path}: the checkpoint has no value head to keep; give a GVM artifact, or leave out gvm.keep_head")
        return model.eval()
    for _, parameter in head_parameters(model):
        nn.init.zeros_(parameter)
    return model.eval()


def load_token_classifier(
    path: str, config: PretrainedConfig, dtype: torch.dtype, attention: str, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, dict]:
    """Load weights quietly and return the model with transformers' loading report.

    For the checkpoint of a language model the report names a new head and an unused output projection; the caller decides
    which other entries are errors.
    """
    model, report = load_checkpoint(
        "value model",
        path,
        lambda p: AutoModelForTokenClassification.from_pretrained(
            p, config=config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code, output_loading_info=True
        ),
    )
    return use_fast_linears(model), report


def head_parameters(model: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
    """The parameters of the value head by name: all outside the trunk (`score.weight` and `score.bias` in most architectures)."""
    trunk = f"{model.base_model_prefix}."
    return [(name, parameter) for name, parameter in model.named_parameters() if not name.startswith(trunk)]


def remove_dropout(config: PretrainedConfig) -> None:
    """Set every dropout in a model config to 0, in place; values must not differ between two passes."""
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name, value in vars(part).items():
            if isinstance(value, (int, float)) and ("dropout" in name or name.endswith("_pdrop")):
                setattr(part, name, 0.0)
        part.classifier_dropout = 0.0  # transformers takes 0.1 if it is absent


def keep_first_layers(config: PretrainedConfig, num_layers: int, path: str, key: str = "gvm.num_layers") -> None:
    """Truncate a model config to its first decoder layers, in place, and every list with one entry per layer.

    Args:
        key: config key of the number, for the error.

    Raises:
        InputError: the model has fewer layers.
    """
    text = config.get_text_config()
    total = text.num_hidden_layers
    if num_layers > total:
        raise InputError(f"{key} is {num_layers}, but {path} has {total} decoder layers; give {total} or fewer")
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == total and name not in ("architectures", "eos_token_id"):
            setattr(text, name, value[:num_layers])
    text.num_hidden_layers = num_layers


def check_trunk(path: str, num_layers: int | None, lora: LoraConfig | None, section: str, trust_remote_code: bool) -> None:
    """Refuse a number of layers or adapters that do not fit the trunk of a value model, by its config alone.

    Args:
        path: checkpoint that the trunk starts from.
        section: config section, for the error.

    Raises:
        InputError: names the key.
    """
    config = load_model_config(path, trust_remote_code)
    if num_layers is not None:
        keep_first_layers(config, num_layers, path, key=f"{section}.num_layers")
    if lora is not None:
        with torch.device("meta"):
            skeleton = AutoModelForTokenClassification.from_config(config, trust_remote_code=trust_remote_code)
            apply_lora(skeleton.base_model, lora, task_type=None, key=f"{section}.lora")
