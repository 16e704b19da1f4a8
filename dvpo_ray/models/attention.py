"""Attention over packed rows: rows stand one after the other in one sequence, and no token sees another row.

`varlen` is an attention of transformers like `sdpa`. It takes the bounds of the rows from the arguments of the forward pass
(`dvpo_ray.models.layouts`), and it builds no mask. On a GPU it is torch's variable-length attention (FlashAttention 2; on Hopper
with the package `flash_attn_interface` installed, FlashAttention 3). On a CPU it takes one row after the other: slow, but the same numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, masking_utils

from dvpo_ray.errors import InputError

VARLEN = "varlen"
"""The name of this attention, in transformers and in `model.attention`."""

_ROW_LAYERS = {"full_attention", "sliding_attention"}
"""Types of layers that mix tokens by attention alone."""


def attention_for(choice: str, config: PretrainedConfig, dtype: torch.dtype, *, on_gpu: bool) -> str:
    """The attention that `model.attention` means for a model: `auto` packs rows where GPU and model can.

    Raises:
        InputError: `varlen` is asked for, and the model has layers that it can't compute, or the GPU can't compute it.
    """
    if choice not in ("auto", VARLEN):
        return choice
    problem = why_not_packed(config) or (_why_no_kernel(config, dtype) if on_gpu else None)
    if choice == "auto":
        return VARLEN if on_gpu and problem is None else "sdpa"
    if problem is not None:
        raise InputError(f"model.attention: varlen can't compute {config.model_type}: {problem}; use auto or sdpa")
    return choice


def _why_no_kernel(config: PretrainedConfig, dtype: torch.dtype) -> str | None:
    """What FlashAttention, which computes on GPUs, can't take; None if it can. A process without a GPU takes that of others for a new one."""
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if dtype not in (torch.bfloat16, torch.float16):
        return "on a GPU it needs model.dtype bfloat16 or float16"
    if head % 8 or head > 256:
        return f"its heads have {head} elements, and on a GPU they must be a multiple of 8 up to 256"
    if torch.cuda.is_available() and (capability := torch.cuda.get_device_capability()) < (8, 0):
        return f"it needs a GPU of compute capability 8.0 or higher, and this one has {capability[0]}.{capability[1]}"
    return None


def why_not_packed(config: PretrainedConfig) -> str | None:
    """What in a model mixes the rows of a packed sequence, or needs another attention; None if nothing does."""
    text = config.get_text_config()
    if others := set(getattr(text, "layer_types", None) or ()) - _ROW_LAYERS:
        return f"it has layers of type {sorted(others)[0]}"
    if getattr(text, "attn_logit_softcapping", None):
        return "it caps the attention's logits"
    if not getattr(AutoModelForCausalLM._model_mapping.get(type(config), None), "_supports_attention_backend", False):
        return "transformers has no choice of attention for it"
    return None


def is_packed(model: nn.Module) -> bool:
    """Whether the forward passes of a model take packed rows."""
    return model.config._attn_implementation == VARLEN


@contextmanager
def without_a_search_for_packed_rows() -> Iterator[None]:
    """Within this context transformers does not look for packed rows in the positions of padded ones.

    It would do so in every forward pass without a mask, and on a GPU the answer waits for all work before it.
    """
    search = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = search


@torch.compiler.disable  # compiled layers call it as it is, on both devices
def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_,
) -> tuple[Tensor, None]:
    """Causal attention within each packed row.

    Args:
        query: [1, heads, N, head size]; key and value may have fewer heads.
        sliding_window: tokens that a token sees, itself included; all before it if None.
        cu_seq_lens_q: int32 [R + 1], where each row begins, and N.
        max_length_q: tokens of the longest row.

    Returns:
        [1, N, heads, head size], and no attention weights.
    """
    if cu_seq_lens_q is None or attention_mask is not None or softcap is not None or s_aux is not None:
        raise RuntimeError(f"{type(module).__name__} can't run packed rows: use model.attention sdpa")
    window = (sliding_window - 1 if sliding_window else -1, 0)
    compute = _on_gpu if query.is_cuda else _row_by_row
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return compute(query, key, value, cu_seq_lens_q, max_length_q, scaling, window).unsqueeze(0), None


def _on_gpu(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scaling: float | None, window: tuple[int, int]) -> Tensor:
    kernel, options = _torch_kernel()
    return kernel(query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=window, **options)


@cache
def _torch_kernel():
    """torch's kernel, and the options with which key and value may have fewer heads: older versions need none."""
    from torch.nn import attention
    from torch.nn.attention.varlen import varlen_attn

    is_hopper = torch.cuda.get_device_capability()[0] == 9  # torch takes FlashAttention 3 nowhere else
    if is_hopper and find_spec("flash_attn_interface") is not None and hasattr(attention, "activate_flash_attention_impl"):
        attention.activate_flash_attention_impl("FA3")
    return varlen_attn, {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def _row_by_row(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scaling: float | None, window: tuple[int, int]) -> Tensor:
    parts = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        row = (tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value))
        place = torch.arange(end - start, device=query.device)
        distance = place[:, None] - place
        seen = (distance >= 0) & (distance <= window[0]) if window[0] >= 0 else None
        grouped = query.shape[1] != key.shape[1]
        parts.append(F.scaled_dot_product_attention(*row, attn_mask=seen, is_causal=seen is None, scale=scaling, enable_gqa=grouped))
    return torch.cat([part[0].transpose(0, 1) for part in parts])


AttentionInterface.register(VARLEN, varlen_attention)
