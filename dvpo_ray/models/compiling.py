"""torch.compile for decoder layers."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import torch
from torch import nn

from dvpo_ray.errors import ResourceError
from dvpo_ray.models.trainable import decoder_layers

STEPS_THAT_PAY = 200
"""Optimizer steps, or steps of a run, from which on compiled layers are assumed to save more than the minute that they cost."""


def compiles(setting: bool | None, steps: int) -> bool:
    """Whether to compile the layers of a model: what the config says, or without it on a GPU in a run that is long enough.

    Args:
        steps: optimizer steps that the model takes, or for a frozen model the steps of the run.
    """
    if setting is not None:
        return setting
    # Triton compiles C that calls Python.
    has_compiler = any(map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang"))))
    has_headers = Path(sysconfig.get_config_var("INCLUDEPY"), "Python.h").is_file()
    return torch.cuda.is_available() and steps >= STEPS_THAT_PAY and has_compiler and has_headers


def compile_layers(model: nn.Module, key: str = "deepspeed.compile") -> None:
    """Compile the decoder layers of a model in place, for any number and length of rows. The first passes then take half a minute.

    This is PyTorch's regional compilation: all layers share one compiled function, so the time does not grow with the number
    of layers. Parameters, their names and hooks stay as they are.

    Args:
        key: the config key that asks for it, for the error.

    Raises:
        ResourceError: the node has neither a GPU nor a C++ compiler.
    """
    require_compiler(key)
    for layer in decoder_layers(model):
        layer.compile(dynamic=True)


def require_compiler(key: str) -> None:
    """Raise `ResourceError` if the node has neither a GPU nor a C++ compiler; `key` as in `compile_layers`."""
    if torch.cuda.is_available():
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ResourceError(f"{key} needs a C++ compiler on this node: install g++ (Debian, Ubuntu: apt install g++) or set CXX to one") from error
