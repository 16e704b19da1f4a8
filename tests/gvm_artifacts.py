"""GVM artifacts for tests, made without training."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer

from dvpo_ray.gvm.artifact import GVMManifest, ObjectiveSpec, OutcomeSpec, TrainingDataSpec, chat_template_hash, head_spec, save_gvm, tokenizer_hash
from dvpo_ray.gvm.model import new_value_model


def manifest_for(model, tokenizer, **changes) -> GVMManifest:
    """A manifest like that of a training."""
    entries = {
        "base_model": "tiny",
        "num_layers": 2,
        "tokenizer_sha256": tokenizer_hash(tokenizer),
        "chat_template_sha256": chat_template_hash(tokenizer),
        "chat_template": "auto",
        "head": head_spec(model),
        "objective": ObjectiveSpec(name="monte_carlo", td_lambda=0.95, bradley_terry_weight=0.0, bradley_terry_value="last"),
        "outcome": OutcomeSpec(kind="binary", scale=1.0),
        "training_data": TrainingDataSpec(path="pairs.jsonl", fingerprint="0" * 64, pairs=8, heldout_pairs=4),
        "heldout_accuracy": {"mean": 0.7, "last": 0.75},
        "heldout_regression": {"mse": 0.9, "explained_variance": 0.1},
    }
    return GVMManifest(**entries | changes)


def make_gvm(folder: Path, base: Path, bias: float = 0.25, **changes) -> Path:
    """An artifact on a base model, with a random head, so that its values vary around the bias."""
    torch.manual_seed(1)
    model = new_value_model(str(base))
    torch.nn.init.normal_(model.score.weight, std=0.1)
    torch.nn.init.constant_(model.score.bias, bias)
    tokenizer = AutoTokenizer.from_pretrained(base)
    return save_gvm(folder, model, model.state_dict(), tokenizer, manifest_for(model, tokenizer, **changes))
