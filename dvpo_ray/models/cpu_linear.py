"""Linear layers through oneDNN, for x86 processors that are not made by Intel.

torch multiplies float32 matrices with MKL, which uses no more than AVX2 on processors of other makers. oneDNN, which is also part
of torch, uses all that the processor has: with AVX-512 it is twice as fast. It is as exact; only the order of summation differs.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def use_fast_linears(model: nn.Module) -> nn.Module:
    """Let a float32 model on such a CPU compute its linear layers with oneDNN, in place; other models are left as they are.

    The layers stay instances of `nn.Linear`, so adapters, sharding and checkpoints work as before.
    """
    if onednn_is_faster():
        for layer in model.modules():
            if type(layer) is nn.Linear and layer.weight.dtype == torch.float32:
                layer.__class__ = OneDNNLinear
    return model


@cache
def onednn_is_faster() -> bool:
    """Whether this is an x86 processor that is not made by Intel, and torch has oneDNN's linear layer."""
    has_layer = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if platform.machine() not in ("x86_64", "AMD64") or not has_layer:
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False  # not Linux: the maker is unknown


class OneDNNLinear(nn.Linear):
    """`nn.Linear` that computes its three products with oneDNN if its weight is on the CPU."""

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.device.type != "cpu" or input.dtype != torch.float32 or input.numel() == 0:
            return F.linear(input, self.weight, self.bias)  # not `super()`: other linear layers call this method as theirs
        return _Product.apply(input, self.weight, self.bias)


class _Product(torch.autograd.Function):
    """x W^T + b and its gradients, as in `torch.nn.functional.linear`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _multiply(gradient, weight.t()) if needs_x else None,
            _multiply(rows.t(), x.reshape(-1, x.shape[-1]).t()) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.dvpo_ray.onednn_linear(x, weight, bias) if torch.compiler.is_compiling() else _onednn_linear(x, weight, bias)


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], None)


# For torch.compile the product is one opaque operation, because its own lowering of oneDNN's product takes constant weights only.
_OPERATIONS = torch.library.Library("dvpo_ray", "DEF")
_OPERATIONS.define("onednn_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_OPERATIONS.impl("onednn_linear", _onednn_linear, "CPU")


@torch.library.register_fake("dvpo_ray::onednn_linear", lib=_OPERATIONS)
def _shape_of_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
