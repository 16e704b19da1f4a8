"""Loading of checkpoints, with errors that a user can act on."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from dvpo_ray.config.inputs import is_local, no_checkpoint
from dvpo_ray.config.schema import ModelConfig
from dvpo_ray.data.hub import NEITHER_HERE_NOR_CACHED, prepare_hub, unwritable_cache
from dvpo_ray.errors import InputError, ResourceError
from dvpo_ray.models.attention import VARLEN, attention_for
from dvpo_ray.models.cpu_linear import use_fast_linears

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
Loaded = TypeVar("Loaded")


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a dtype name in the config."""
    return getattr(torch, name)


def load_checkpoint(what: str, path: str, load: Callable[[str], Loaded]) -> Loaded:
    """Call `load(path)` without output from transformers; a missing or broken checkpoint ends in one line.

    Args:
        what: what is loaded, for the error.

    Raises:
        InputError: names the path and the reason.
    """
    problem = _local_problem(what, path)
    if problem is not None:
        raise InputError(problem)
    on_hub = not Path(path).is_dir()
    is_online = on_hub and prepare_hub()
    verbosity, progress_bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        return load(path)
    except (OSError, ValueError) as error:
        if on_hub and not is_online:
            raise InputError(f"{path}: {NEITHER_HERE_NOR_CACHED}; give a checkpoint folder with config.json") from error
        unwritable = unwritable_cache() if on_hub and isinstance(error, OSError) else None
        raise InputError(f"{path}: cannot load the {what}: {unwritable or first_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if progress_bar:
            transformers_logging.enable_progress_bar()


def _local_problem(what: str, path: str) -> str | None:
    """The reason why a local folder cannot be loaded, if that is clear without loading it."""
    if not is_local(path):
        return None
    if what != "tokenizer":
        return no_checkpoint(path)
    if any((Path(path) / file).is_file() for file in TOKENIZER_FILES):
        return None
    return no_checkpoint(path) or f"{path}: no tokenizer there (tokenizer.json or tokenizer_config.json); save it beside the model"


def first_line(error: Exception) -> str:
    """The first line of an error's message, or more of the message if that line ends in a colon."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(" ".join(lines).split())[:300] if lines[0].rstrip().endswith(":") else lines[0]


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises:
        InputError: the folder or hub name has none, or one with more tokens than the model's embedding has rows.
    """
    tokenizer = load_checkpoint("tokenizer", path, lambda p: AutoTokenizer.from_pretrained(p, trust_remote_code=trust_remote_code))
    if not is_local(path) or no_checkpoint(path) is None:  # a folder may hold a tokenizer alone
        check_vocabulary(tokenizer, path, trust_remote_code)
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, path: str, trust_remote_code: bool = False) -> None:
    """Refuse a tokenizer with more tokens than the input embedding of a checkpoint has rows. Fewer are fine: the rest is padding.

    The placeholder of an image needs no row: Gemma 3 1B, which reads text only, has one without.

    Args:
        path: checkpoint folder or hub name of a policy or a value model.

    Raises:
        InputError: names both numbers.
    """
    placeholder = tokenizer.special_tokens_map.get("image_token")
    ids = {text: id_ for text, id_ in tokenizer.get_vocab().items() if text != placeholder}
    rows = getattr(load_model_config(path, trust_remote_code).get_text_config(), "vocab_size", None)
    tokens = max(ids.values(), default=-1) + 1
    if rows is None or tokens <= rows:
        return
    first = min((id_, text) for text, id_ in ids.items() if id_ >= rows)[1]
    raise InputError(
        f"{path}: the tokenizer has {tokens} tokens, but the model's embedding has {rows} rows (vocab_size in config.json); the first token "
        f"without a row is {first!r}; add rows with resize_token_embeddings({tokens}) and save the model, or remove the added tokens"
    )


@contextmanager
def each_weight(place: Callable[[nn.Parameter], None]) -> Iterator[None]:
    """Within this context `place` gets each weight of a checkpoint as soon as transformers has read it, to move it or to cut it.

    One weight is read at a time. Weights that the checkpoint lacks are left out, and so are buffers.
    """

    def hook(_module: nn.Module, _name: str, parameter: nn.Parameter) -> None:
        is_read = getattr(parameter, "_is_hf_initialized", False) and not parameter.is_meta
        if is_read and id(parameter) not in placed:  # a tied weight is set twice
            placed[id(parameter)] = parameter
            place(parameter)

    placed: dict[int, nn.Parameter] = {}
    registered = register_module_parameter_registration_hook(hook)
    in_threads = os.environ.get(_NOT_IN_THREADS)
    os.environ[_NOT_IN_THREADS] = "1"
    try:
        yield
    finally:
        registered.remove()
        if in_threads is None:
            del os.environ[_NOT_IN_THREADS]
        else:
            os.environ[_NOT_IN_THREADS] = in_threads


_NOT_IN_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"
"""With this variable transformers reads the next weight when the one before is in its place."""


def straight_to(device: torch.device | str):
    """Context in which each weight of a checkpoint goes to a GPU as soon as it is read, instead of all together afterwards."""
    device = torch.device(device)

    def move(weight: nn.Parameter) -> None:
        weight.data = weight.data.to(device)

    return nullcontext() if device.type == "cpu" else each_weight(move)


def moved(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """A model that was read `straight_to` a device, with the rest of it there too: buffers, and weights that the checkpoint lacks."""
    return model if torch.device(device).type == "cpu" else model.to(device)


def load_policy(model: ModelConfig, device: torch.device | str = "cpu", *, keeps_randomness: bool = False, packs: bool = False) -> PreTrainedModel:
    """The SFT checkpoint as a causal language model in evaluation mode, which computes the same numbers in training mode.

    What its generation_config.json suggests is left out; `save_policy` copies the file.

    Args:
        keeps_randomness: leave the dropout of the checkpoint's config on in training mode.
        packs: its rows are laid out by `dvpo_ray.models.layouts`, so they may be packed. Other libraries pad them, with masks.

    Raises:
        InputError: the checkpoint is missing or is not a causal language model, or `model.attention` does not fit it.
    """
    config = load_model_config(model.path, model.trust_remote_code)
    dtype = torch_dtype(model.dtype)
    choice = model.attention if packs or model.attention not in ("auto", VARLEN) else "sdpa"
    attention = attention_for(choice, config, dtype, on_gpu=torch.cuda.is_available())
    if not keeps_randomness:
        turn_off_randomness(config)
    with straight_to(device):
        loaded = load_checkpoint(
            "model",
            model.path,
            lambda p: AutoModelForCausalLM.from_pretrained(
                p, config=config, dtype=dtype, attn_implementation=attention, trust_remote_code=model.trust_remote_code
            ),
        )
    ends = loaded.generation_config
    loaded.generation_config = GenerationConfig(bos_token_id=ends.bos_token_id, eos_token_id=ends.eos_token_id, pad_token_id=ends.pad_token_id)
    return use_fast_linears(moved(loaded.eval(), device))


def turn_off_randomness(config: PretrainedConfig) -> None:
    """Set every dropout, layer drop and router jitter in a model config to 0, in place.

    Sampling and training must use the same distribution, and values must not differ between two passes. Many architectures pass
    the number to a function, so no module shows it; their configs have it under some name with `drop` or `jitter` in it.
    """
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            turn_off_randomness(value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and ("drop" in name or "jitter" in name or name.endswith("pdrop")):
            setattr(config, name, 0.0)
    config.classifier_dropout = 0.0  # transformers takes 0.1 if it is absent


def save_policy(
    model: PreTrainedModel, weights: dict[str, torch.Tensor] | None, tokenizer: PreTrainedTokenizerBase, source: ModelConfig, folder: Path
) -> None:
    """Write a Hugging Face checkpoint: the weights with the config, the generation config and the tokenizer of the source.

    Args:
        model: names the architecture.
        weights: under their checkpoint names, as `full_weights` yields them; None saves those of the model.
        source: the checkpoint that the model started from.
    """
    model.save_pretrained(folder, state_dict=weights, save_original_format=weights is None)
    config = load_model_config(source.path, source.trust_remote_code)  # with its own dropout, which is off in `model`
    config.architectures, config.dtype = model.config.architectures or [type(model).__name__], model.config.dtype
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    suggestions = cached_file(source.path, "generation_config.json", _raise_exceptions_for_missing_entries=False)
    if suggestions is not None:  # as it is: transformers refuses to write some files that it reads
        shutil.copyfile(suggestions, folder / "generation_config.json")


def rehearse_saving(save: Callable[[Path], object], run_folder: Path, source: str) -> None:
    """Save a model without its weights: what cannot be saved shows before the first step, not after the last.

    Args:
        save: writes the model with an empty state dict to a folder, which is removed afterwards.
        source: the checkpoint that the model started from, for the error.

    Raises:
        ResourceError: the model cannot be saved.
    """
    with tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=run_folder) as folder:
        try:
            save(Path(folder))
        except (OSError, ValueError, TypeError) as error:
            raise ResourceError(f"the model of {source} cannot be saved: {first_line(error)}") from error


def context_tokens(path: str, trust_remote_code: bool = False) -> int:
    """The context of a checkpoint: the greatest length of prompt and response together, in tokens.

    Raises:
        InputError: the folder or hub name has no config, or its config does not name the length.
    """
    context = getattr(load_model_config(path, trust_remote_code).get_text_config(), "max_position_embeddings", None)
    if context is None:
        raise InputError(f"{path}: its config.json has no max_position_embeddings, so the longest prompt and response is unknown")
    return context


def load_model_config(path: str, trust_remote_code: bool = False, **settings) -> PretrainedConfig:
    """The model config of a checkpoint.

    Args:
        settings: override those of the checkpoint.

    Raises:
        InputError: the folder or hub name has none.
    """
    return load_checkpoint("model config", path, lambda p: AutoConfig.from_pretrained(p, trust_remote_code=trust_remote_code, **settings))


def packs_rows(model: ModelConfig, path: str, *, on_gpu: bool) -> bool:
    """Whether the process that trains or scores with a checkpoint packs its rows.

    Args:
        path: folder or hub name of the checkpoint.
        on_gpu: that process has a GPU.
    """
    config = load_model_config(path, model.trust_remote_code)
    return attention_for(model.attention, config, torch_dtype(model.dtype), on_gpu=on_gpu) == VARLEN


def default_device() -> torch.device:
    """The GPU that Ray gave this process, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
