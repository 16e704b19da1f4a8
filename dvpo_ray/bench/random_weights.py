"""Checkpoints of any architecture with random weights, for measurements of shapes that need not be downloaded.

Random weights cost the same time and memory as trained ones. Everything that a step reads is made in one folder: policy,
value model, reward model, tokenizer and prompts.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from dvpo_ray.config.schema import Config
from dvpo_ray.errors import InputError
from dvpo_ray.files import whole_folder
from dvpo_ray.gvm.artifact import (
    MANIFEST,
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
from dvpo_ray.models.loading import first_line, torch_dtype

_HEAD_STD = 0.02
_HELDOUT_SHARE = 0.1
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def with_random_weights(config: Config, architecture: Path, folder: Path, tokenizer: Path | None = None) -> Config:
    """Make checkpoints of an architecture and prompts of `data.max_prompt_tokens` tokens, and point the config at them.

    Args:
        architecture: config.json of a transformers causal language model, or a folder with one.
        folder: gets `policy`, `gvm`, `reward_model` and `prompts.jsonl`; the value model has `gvm.num_layers` layers and the reward
            model `reward_model.num_layers`.
        tokenizer: folder of the tokenizer; that of `architecture` where it has one, else one of bytes.

    Raises:
        InputError: no such architecture, or a tokenizer with ids that the model has no embedding of.
    """
    model_config = _model_config(architecture)
    chosen = _tokenizer(architecture if tokenizer is None else tokenizer, required=tokenizer is not None)
    vocabulary = model_config.get_text_config().vocab_size
    if len(chosen) > vocabulary:
        raise InputError(
            f"{tokenizer or architecture}: the tokenizer has {len(chosen)} ids, but the model has {vocabulary} embeddings; give --tokenizer"
        )
    folder.mkdir(parents=True, exist_ok=True)
    policy = _make_policy(config, model_config, chosen, folder / "policy")
    gvm = _make_value_model(config, policy, chosen, config.gvm.num_layers, _REGRESSION, folder / "gvm")
    if config.reward_model.num_layers == config.gvm.num_layers:
        reward_model = _as_reward_model(gvm, folder / "reward_model")
    else:
        reward_model = _make_value_model(config, policy, chosen, config.reward_model.num_layers, _RANKING, folder / "reward_model")
    prompts = _make_prompts(config, folder / "prompts.jsonl")
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": str(policy), "chat_template": "plain"}),
            "gvm": config.gvm.model_copy(update={"path": str(gvm)}),
            "reward_model": config.reward_model.model_copy(update={"path": str(reward_model)}),
            "data": config.data.model_copy(update={"prompts": prompts, "long_prompt": "truncate_left"}),
        }
    )


def _model_config(architecture: Path) -> PretrainedConfig:
    file = architecture / "config.json" if architecture.is_dir() else architecture
    if not file.is_file():
        raise InputError(f"{architecture}: no config.json there; give the config of a transformers causal language model, or a folder with one")
    try:
        return AutoConfig.from_pretrained(file)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{file}: no architecture that transformers knows: {first_line(error)}") from error


# ------------------------------------------------------------------------------------------------------ tokenizer


def _tokenizer(source: Path, *, required: bool) -> PreTrainedTokenizerBase:
    folder = source if source.is_dir() else source.parent
    if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(folder)
    if required:
        raise InputError(f"{source}: no tokenizer there; give a folder with tokenizer.json")
    return byte_tokenizer()


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer whose tokens are the 256 bytes, after `<pad>`, `<s>` and `</s>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    vocabulary = {token: index for index, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


# ---------------------------------------------------------------------------------------------------- checkpoints

_REGRESSION = ObjectiveSpec(name="monte_carlo", td_lambda=0.95, bradley_terry_weight=0.0, bradley_terry_value="last")
_RANKING = _REGRESSION.model_copy(update={"name": "bradley_terry"})


def _make_policy(config: Config, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """The checkpoint of the policy with the special tokens of its tokenizer."""
    model_config.eos_token_id, model_config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model_config.bos_token_id = tokenizer.bos_token_id
    torch.manual_seed(config.seed)
    model = AutoModelForCausalLM.from_config(model_config, dtype=torch_dtype(config.model.dtype))
    with whole_folder(folder) as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
    return folder


def _make_value_model(
    config: Config, policy: Path, tokenizer: PreTrainedTokenizerBase, num_layers: int | None, objective: ObjectiveSpec, folder: Path
) -> Path:
    """An artifact on the policy's trunk, as training would begin it, with a random head."""
    model = new_value_model(str(policy), num_layers, torch_dtype(config.model.dtype))
    for _, parameter in head_parameters(model):
        nn.init.normal_(parameter, std=_HEAD_STD)
    manifest = GVMManifest(
        base_model=str(policy),
        num_layers=model.config.get_text_config().num_hidden_layers,
        tokenizer_sha256=tokenizer_hash(tokenizer),
        chat_template_sha256=chat_template_hash(tokenizer),
        chat_template="plain",
        head=head_spec(model),
        objective=objective,
        outcome=OutcomeSpec(kind="binary", scale=1.0),
        training_data=TrainingDataSpec(path="none, random weights", fingerprint="0" * 64, pairs=0, heldout_pairs=0),
        heldout_accuracy={},
        heldout_regression={},
    )
    return save_gvm(folder, model, model.state_dict(), tokenizer, manifest)


def _as_reward_model(gvm: Path, folder: Path) -> Path:
    """The same weights as a reward model. Large ones are not written twice: the files are linked where the file system can."""
    with whole_folder(folder) as draft:
        for file in gvm.iterdir():
            if file.suffix != ".safetensors":
                shutil.copy2(file, draft)
                continue
            try:
                os.link(file, draft / file.name)
            except OSError:
                shutil.copy2(file, draft)
        manifest = GVMManifest.model_validate_json((gvm / MANIFEST).read_text(encoding="utf-8"))
        manifest = manifest.model_copy(update={"objective": _RANKING})
        (draft / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return folder


# -------------------------------------------------------------------------------------------------------- prompts


def _make_prompts(config: Config, file: Path):
    """Distinct prompts of random letters, each longer than `data.max_prompt_tokens`, which the encoder then cuts to that length."""
    from dvpo_ray.config.schema import PromptData

    count = 2 * config.batch.prompts_per_step + 16
    generator = random.Random(config.seed)
    words = ["".join(generator.choices(_LETTERS, k=5)) for _ in range(1000)]
    rows = [{"prompt": " ".join(generator.choices(words, k=config.data.max_prompt_tokens + 1))} for _ in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return PromptData(path=str(file), heldout_fraction=_HELDOUT_SHARE)
