"""What the training of a value model starts from, checked before any actor starts."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForTokenClassification

from dvpo_ray.config.schema import Config, GVMConfig, LoraConfig, RewardModelConfig
from dvpo_ray.errors import InputError
from dvpo_ray.gvm.artifact import MANIFEST, check_files, read_manifest, refuse_as_policy
from dvpo_ray.gvm.model import keep_first_layers
from dvpo_ray.models.loading import load_model_config
from dvpo_ray.models.skeleton import check_adapters


def check_start(config: Config, settings: GVMConfig | RewardModelConfig) -> None:
    """Refuse a start that the training could not have: a damaged artifact, no head to keep, or layers and adapters that the model lacks.

    Args:
        settings: those that the value model is trained by.

    Raises:
        InputError: names the key or the file.
    """
    section = settings.section
    refuse_as_policy(config.model.path, "model.path")
    start = settings.init_from or config.model.path
    folder = Path(start).expanduser()
    if (folder / MANIFEST).is_file():
        check_files(folder, read_manifest(folder))
    elif settings.keep_head:
        named = f"{settings.init_from} is none (it has no {MANIFEST})" if settings.init_from else "it is not set"
        raise InputError(f"{section}.keep_head goes on from the head of a GVM in {section}.init_from, but {named}; give a GVM, or keep_head=false")
    check_trunk(start, settings.num_layers, settings.lora, section, config.model.trust_remote_code)


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
    check_adapters(skeleton.base_model, lora, f"{section}.lora", None)
