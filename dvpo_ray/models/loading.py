"""Loading checkpoints, with errors a user can act on."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from dvpo_ray.config.schema import ModelConfig
from dvpo_ray.errors import InputError
from dvpo_ray.models.cpu_linear import use_fast_linears

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a config's dtype name."""
    return _DTYPES[name]


def _load(what: str, path: str, load):
    """Call `load()` and turn every way a checkpoint can be missing or broken into one line."""
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise InputError(f"{path}: no such checkpoint folder; give a folder with config.json or a hub name")
    verbosity, progress_bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        return load(str(Path(path).expanduser()) if path.startswith("~") else path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path}: cannot load the {what}: {reason}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if progress_bar:
            transformers_logging.enable_progress_bar()


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises:
        InputError: the folder or hub name has none.
    """
    return _load("tokenizer", path, lambda p: AutoTokenizer.from_pretrained(p, trust_remote_code=trust_remote_code))


def load_policy(model: ModelConfig, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The SFT checkpoint as a causal language model in evaluation mode (dropout off).

    Raises:
        InputError: the checkpoint is missing or is no causal language model.
    """
    loaded = _load(
        "model",
        model.path,
        lambda p: AutoModelForCausalLM.from_pretrained(
            p, dtype=torch_dtype(model.dtype), attn_implementation=model.attention, trust_remote_code=model.trust_remote_code
        ),
    )
    return use_fast_linears(loaded.eval().to(device))


def context_tokens(path: str, trust_remote_code: bool = False) -> int:
    """The longest prompt and response together, in tokens, that a checkpoint's positions allow."""
    return load_model_config(path, trust_remote_code).get_text_config().max_position_embeddings


def load_model_config(path: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model config of a checkpoint.

    Raises:
        InputError: the folder or hub name has none.
    """
    return _load("model config", path, lambda p: AutoConfig.from_pretrained(p, trust_remote_code=trust_remote_code))


def default_device() -> torch.device:
    """The GPU that Ray gave this process, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
