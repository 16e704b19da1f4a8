"""Stopping a training that has diverged, before it spends hours on numbers that are none."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dvpo_ray.errors import ResourceError


def check_finite(step: int, metrics: Mapping[str, float], stage: str, section: str, *, dtype: str) -> None:
    """Stop where the loss or the gradient norm of a step is no finite number.

    Args:
        metrics: has `<stage>/loss` and `<stage>/grad_norm`.
        section: of the config, whose `learning_rate` it is.
        dtype: of the computation. In float16 a gradient that overflows now and then is how the loss scale is found; such a step is skipped.

    Raises:
        ResourceError: says which number, at which step, and what to lower.
    """
    watched = [f"{stage}/loss", *([f"{stage}/grad_norm"] if dtype != "float16" else [])]
    for name in watched:
        if not math.isfinite(metrics[name]):
            raise diverged(f"{name} is {metrics[name]} at step {step}", section)


def diverged(finding: str, section: str) -> ResourceError:
    """The error of a training that has diverged.

    Args:
        finding: which number is not finite, and when.
        section: of the config, whose `learning_rate` it is.
    """
    return ResourceError(f"training has diverged: {finding}; lower {section}.learning_rate and start anew")
