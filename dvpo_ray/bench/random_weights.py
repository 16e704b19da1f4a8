"""Models with random weights, for measurements: time and memory of a step depend on shapes, not on what the weights know.

Everything that a step reads is made in one folder: policy, value model, reward model, tokenizer and prompts.
"""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dvpo_ray.config import override_config
from dvpo_ray.config.schema import Config
from dvpo_ray.errors import InputError
from dvpo_ray.files import whole_folder
from dvpo_ray.gvm.artifact import (
    GVMManifest,
    ObjectiveSpec,
    OutcomeSpec,
    TrainingDataSpec,
    chat_template_hash,
    head_spec,
    save_gvm,
    tokenizer_hash,
)
from dvpo_ray.gvm.model import head_parameters, new_value_model
from dvpo_ray.models.loading import default_device, first_line, load_tokenizer, torch_dtype

_HEAD_STD = 0.02


def make_value_model(config: Config, folder: Path, section: Literal["gvm", "reward_model"] = "gvm") -> Path:
    """An untrained value or reward model on the trunk of `model.path`, with a random head.

    Raises:
        InputError: `model.path` is missing or has fewer layers than the section's `num_layers`.
    """
    settings, path = getattr(config, section), config.model.path
    model = new_value_model(path, settings.num_layers, torch_dtype(config.model.dtype), trust_remote_code=config.model.trust_remote_code)
    generator = torch.Generator().manual_seed(config.seed)
    for _, parameter in head_parameters(model):
        torch.nn.init.normal_(parameter, std=_HEAD_STD, generator=generator)
    tokenizer = load_tokenizer(path, config.model.trust_remote_code)
    objective = "monte_carlo" if section == "gvm" else "bradley_terry"
    manifest = GVMManifest(
        base_model=path,
        num_layers=model.config.get_text_config().num_hidden_layers,
        tokenizer_sha256=tokenizer_hash(tokenizer),
        chat_template_sha256=chat_template_hash(tokenizer),
        chat_template=config.model.chat_template,
        head=head_spec(model),
        objective=ObjectiveSpec(name=objective, td_lambda=settings.td_lambda, bradley_terry_weight=0.0, bradley_terry_value="last"),
        outcome=OutcomeSpec(kind="binary", scale=1.0),
        training_data=TrainingDataSpec(path="none: untrained", fingerprint="", pairs=0, heldout_pairs=0),
        heldout_accuracy={},
        heldout_regression={},
    )
    return save_gvm(folder, model, model.state_dict(), tokenizer, manifest)


def with_random_weights(config: Config, architecture: Path, folder: Path, tokenizer: Path | None = None) -> Config:
    """Make checkpoints of an architecture and prompts of `data.max_prompt_tokens` tokens, and point the config at them.

    Args:
        architecture: config.json of a transformers causal language model, or a folder with one.
        folder: gets `policy`, `gvm`, `prompts.jsonl` and `reward_model`; models of equal `num_layers` share one folder, `gvm`.
        tokenizer: folder of the tokenizer; that of `architecture` where it has one, else one of bytes.

    Raises:
        InputError: no such architecture, or a tokenizer with more ids than the model has embeddings.
    """
    model_config = _model_config(architecture)
    chosen = _tokenizer(architecture if tokenizer is None else tokenizer, required=tokenizer is not None)
    vocabulary = model_config.get_text_config().vocab_size
    if len(chosen) > vocabulary:
        raise InputError(
            f"{tokenizer or architecture}: the tokenizer has {len(chosen)} ids, but the model has {vocabulary} embeddings; give --tokenizer"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        setattr(model_config, name, getattr(chosen, name))
    torch.manual_seed(config.seed)
    with torch.device(default_device()):  # billions of weights take minutes on a CPU
        policy = AutoModelForCausalLM.from_config(model_config, dtype=torch_dtype(config.model.dtype))
    with whole_folder(folder / "policy") as draft:
        policy.save_pretrained(draft)
        chosen.save_pretrained(draft)
    del policy
    _write_prompts(config, folder / "prompts.jsonl")
    prompts = {"path": str(folder / "prompts.jsonl"), "heldout_fraction": 0.1}
    config = override_config(
        config,
        [
            f"model.path={json.dumps(str(folder / 'policy'))}",
            "model.chat_template=plain",
            f"data.prompts={json.dumps(prompts)}",
            "data.long_prompt=truncate_left",
        ],
    )
    reward_model = gvm = make_value_model(config, folder / "gvm")
    if config.reward_model.num_layers != config.gvm.num_layers:
        reward_model = make_value_model(config, folder / "reward_model", "reward_model")
    return override_config(config, [f"gvm.path={json.dumps(str(gvm))}", f"reward_model.path={json.dumps(str(reward_model))}"])


def _model_config(architecture: Path) -> PretrainedConfig:
    file = architecture / "config.json" if architecture.is_dir() else architecture
    if not file.is_file():
        raise InputError(f"{architecture}: no config.json there; give the config of a transformers causal language model, or a folder with one")
    try:
        return AutoConfig.from_pretrained(file)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{file}: not an architecture that transformers knows: {first_line(error)}") from error


def _tokenizer(source: Path, *, required: bool) -> PreTrainedTokenizerBase:
    folder = source if source.is_dir() else source.parent
    if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(folder)
    if required:
        raise InputError(f"{source}: no tokenizer there; give a folder with tokenizer.json")
    return byte_tokenizer()


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer whose tokens are the 256 bytes, after `<pad>`, `<s>` and `</s>`."""
    alphabet = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def _write_prompts(config: Config, file: Path) -> None:
    """Distinct prompts of random letters, each longer than `data.max_prompt_tokens`; the encoder cuts them to that length."""
    generator = random.Random(config.seed)
    words = ["".join(generator.choices(string.ascii_lowercase, k=5)) for _ in range(1000)]
    prompts = [" ".join(generator.choices(words, k=config.data.max_prompt_tokens + 1)) for _ in range(2 * config.batch.prompts_per_step + 16)]
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
