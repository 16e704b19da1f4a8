"""Packed rows against padded rows, and the control: rows that see each other must be found out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.bench.bare import ModelInputs, lay_out, response_log_probs
from dvpo_ray.bench.gpu_check.figures import Report
from dvpo_ray.bench.gpu_check.shapes import models_of
from dvpo_ray.models.loading import default_device, load_policy

ROWS = ((7, 12), (1, 3), (20, 30), (5, 1), (11, 25), (3, 17))
"""Prompt and response tokens of each row, of several lengths."""
NOISE = 4.0
"""Times the rounding error of a dtype that two layouts may differ by; the control must differ by more."""

Layout = Callable[[torch.nn.Module, RaggedBatch], tuple[np.ndarray, np.ndarray]]
"""Log-probs of the response tokens, and the gradient of their weighted sum, flat."""


def packed(report: Report) -> None:
    """Log-probs and gradients of packed and of padded rows in the model's dtype differ no more than padded rows from float32."""
    _, config = models_of(report, "tiny")
    batch = _batch()
    exact = _padded(load_policy(config.model.model_copy(update={"dtype": "float32"}), default_device()), batch)
    model = load_policy(config.model, default_device())
    results = {name: layout(model, batch) for name, layout in LAYOUTS.items()}
    for index, what in enumerate(("log-probs", "gradient")):
        rounding = max(_apart(results["padded"][index], exact[index]), 1e-6)
        for name in ("packed", "packed, rows see each other"):
            apart, wrong = _apart(results[name][index], results["padded"][index]), name != "packed"
            # Without attention across rows only rounding differs; with it, something that is no rounding must show.
            report.check(f"{name}: {what}", (apart > NOISE * rounding) == wrong, f"{apart:.2g} from padded, rounding {rounding:.2g}")


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    """Distance over length."""
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def _batch() -> RaggedBatch:
    random = np.random.default_rng(0)
    return RaggedBatch.from_rows(*([random.integers(3, 259, row[part]).tolist() for row in ROWS] for part in (0, 1)))


def _result(model: torch.nn.Module, batch: RaggedBatch, inputs: ModelInputs) -> tuple[np.ndarray, np.ndarray]:
    model.zero_grad()
    log_probs = response_log_probs(model, inputs, temperature=1.0)
    weights = torch.linspace(-1.0, 1.0, batch.num_tokens, device=log_probs.device)[inputs.token_index]
    (log_probs * weights).sum().backward()
    flat = np.zeros(batch.num_tokens)
    flat[inputs.token_index.cpu()] = log_probs.detach().double().cpu()
    gradient = torch.cat([parameter.grad.flatten().float().cpu() for parameter in model.parameters() if parameter.grad is not None])
    return flat, gradient.double().numpy()


def _inputs(model: torch.nn.Module, batch: RaggedBatch, layout: str) -> ModelInputs:
    (inputs,) = lay_out(batch, np.arange(batch.num_rows), layout, 10**6, next(model.parameters()).device)
    return inputs


def _padded(model: torch.nn.Module, batch: RaggedBatch) -> tuple[np.ndarray, np.ndarray]:
    return _result(model, batch, _inputs(model, batch, "padded"))


def _packed(model: torch.nn.Module, batch: RaggedBatch) -> tuple[np.ndarray, np.ndarray]:
    return _result(model, batch, _inputs(model, batch, "packed"))


def _mixed(model: torch.nn.Module, batch: RaggedBatch) -> tuple[np.ndarray, np.ndarray]:
    """Positions that go on over all rows: the model takes them for one row."""
    inputs = _inputs(model, batch, "packed")
    positions = torch.arange(batch.num_tokens, device=inputs.input_ids.device)[None]
    return _result(model, batch, ModelInputs(inputs.input_ids, positions, inputs.predicts, inputs.targets, inputs.token_index))


LAYOUTS: dict[str, Layout] = {"padded": _padded, "packed": _packed, "packed, rows see each other": _mixed}
