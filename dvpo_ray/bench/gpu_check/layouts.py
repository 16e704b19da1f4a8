"""Packed rows against padded rows, and the control: rows that see each other must be found out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.bench.gpu_check.figures import Report
from dvpo_ray.bench.gpu_check.shapes import models_of
from dvpo_ray.config.schema import ModelConfig
from dvpo_ray.models.attention import VARLEN
from dvpo_ray.models.forward import response_log_probs
from dvpo_ray.models.layouts import Passes, Rows, lay_out
from dvpo_ray.models.loading import default_device, load_policy

ROWS = ((7, 12), (1, 3), (20, 30), (5, 1), (11, 25), (3, 17))
"""Prompt and response tokens of each row, of several lengths."""
NOISE = 4.0
"""Times the rounding error of a dtype that two layouts may differ by; the control must differ by more."""
LEAST = 1e-6
"""The rounding error of float32, against which nothing more exact is at hand."""


def packed(report: Report) -> None:
    """Log-probs and gradients of packed rows differ from those of padded rows no more than these from float32; the control's differ by more."""
    _, config = models_of(report, "tiny")
    random = np.random.default_rng(0)
    batch = RaggedBatch.from_rows(*([random.integers(3, 259, row[part]).tolist() for row in ROWS] for part in (0, 1)))
    exact = _result(config.model.model_copy(update={"dtype": "float32"}), batch, "sdpa")
    padded = _result(config.model, batch, "sdpa")
    for name, change in LAYOUTS.items():
        result, wrong = _result(config.model, batch, VARLEN, change), change is not as_it_is
        for what, mine, others, right in zip(("log-probs", "gradient"), result, padded, exact, strict=True):
            rounding, apart = max(_apart(others, right), LEAST), _apart(mine, others)
            report.check(f"{name}: {what}", (apart > NOISE * rounding) == wrong, f"{apart:.2g} from padded, rounding {rounding:.2g}")


def as_it_is(rows: Rows) -> Rows:
    """The rows as the package lays them out."""
    return rows


def as_one_row(rows: Rows) -> Rows:
    """The same tokens as one row: every token sees all rows before its own."""
    count = rows.input_ids.numel()
    bounds = torch.tensor([0, count], device=rows.input_ids.device, dtype=torch.int32)
    positions = torch.arange(count, device=rows.input_ids.device)[None]
    inputs = {"position_ids": positions, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": count, "max_length_k": count}
    return replace(rows, inputs=inputs)


LAYOUTS: dict[str, Callable[[Rows], Rows]] = {"packed": as_it_is, "packed, rows see each other": as_one_row}


def _result(settings: ModelConfig, batch: RaggedBatch, attention: str, change: Callable[[Rows], Rows] = as_it_is) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs of the response tokens, and the gradient of their weighted sum, flat."""
    model: nn.Module = load_policy(settings.model_copy(update={"attention": attention}), default_device(), packs=True)
    (rows,) = lay_out(model, batch, Passes([np.arange(batch.num_rows)]), batch.response_mask, ahead=True)
    log_probs = response_log_probs(model, change(rows)).log_probs
    weights = torch.linspace(-1.0, 1.0, batch.num_tokens, device=log_probs.device)[rows.tokens]
    (log_probs * weights).sum().backward()
    flat = np.zeros(batch.num_tokens)
    flat[rows.tokens.cpu()] = log_probs.detach().double().cpu()
    gradient = torch.cat([parameter.grad.flatten().float().cpu() for parameter in model.parameters() if parameter.grad is not None])
    return flat, gradient.double().numpy()


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    """Distance over length."""
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))
