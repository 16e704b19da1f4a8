"""The value model: a transformers token classifier with one label, whose logit at a token is the value of the state after it."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForTokenClassification, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from dvpo_ray.errors import InputError
from dvpo_ray.models.cpu_linear import use_fast_linears


def new_value_model(
    path: str,
    num_layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
    keep_head: bool = False,
) -> PreTrainedModel:
    """A value model on the trunk of a causal language model, with a zero head and no dropout.

    From the zero head every value is exactly 0, so that the first targets depend on the outcomes alone.

    Args:
        path: checkpoint folder or hub name of the language model.
        keep_head: the checkpoint is a value model; go on from its head.
        num_layers: keep only the first so many decoder layers; all of them when None.

    Raises:
        InputError: the checkpoint is missing, lacks trunk weights, has no token classifier in transformers, or has fewer layers.
    """
    try:
        config = AutoConfig.from_pretrained(path, num_labels=1, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no checkpoint for the value model: {first_line(error)}") from error
    remove_dropout(config)
    if num_layers is not None:
        keep_first_layers(config, num_layers, path)
    model, report = load_token_classifier(path, config, dtype, attention, trust_remote_code)
    head = [name for name, _ in head_parameters(model)]
    missing = sorted(set(report["missing_keys"]) - set(head))
    if missing:
        raise InputError(f"{path}: the checkpoint lacks {len(missing)} weights of the trunk, first {missing[0]}; give a whole checkpoint")
    if keep_head:
        if report["missing_keys"]:
            raise InputError(f"{path}: the checkpoint has no value head to keep; give a GVM artifact, or leave gvm.keep_head out")
        return model.eval()
    for _, parameter in head_parameters(model):
        nn.init.zeros_(parameter)
    return model.eval()


def load_token_classifier(
    path: str, config: PretrainedConfig, dtype: torch.dtype, attention: str, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, dict]:
    """Load weights quietly and return transformers' loading report instead of printing it.

    The report of a language model's checkpoint always names a new head and an unused output projection, which is how a
    value model begins; the caller decides what else in it is an error.
    """
    verbosity, progress_bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model, report = AutoModelForTokenClassification.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        return use_fast_linears(model), report
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be loaded as a value model: {first_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if progress_bar:
            transformers_logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """The first line of an error's message, for one-line reports."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def head_parameters(model: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
    """The value head's parameters by name: everything outside the trunk (`score.weight` and `score.bias` in most architectures)."""
    trunk = f"{model.base_model_prefix}."
    return [(name, parameter) for name, parameter in model.named_parameters() if not name.startswith(trunk)]


def remove_dropout(config: PretrainedConfig) -> None:
    """Set every dropout of a model config to 0, in place; value targets must not move between two passes."""
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name, value in vars(part).items():
            if isinstance(value, (int, float)) and ("dropout" in name or name.endswith("_pdrop")):
                setattr(part, name, 0.0)
        part.classifier_dropout = 0.0  # absent, transformers would take 0.1


def keep_first_layers(config: PretrainedConfig, num_layers: int, path: str, key: str = "gvm.num_layers") -> None:
    """Truncate a model config to its first decoder layers, in place, with every list that has one entry per layer.

    Args:
        key: setting that the number comes from, for the error.

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
