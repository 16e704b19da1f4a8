"""What must be equal in runs whose numbers are put side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dvpo_ray.config.arithmetic import derive_batch
from dvpo_ray.config.schema import Config
from dvpo_ray.errors import InputError

Equal = Mapping[str, Callable[[Config], Any]]
"""What of a config must be equal, by the settings it comes from."""

_ROWS: Equal = {
    "model": lambda config: config.model,
    "data": lambda config: config.data,
    "rollout.max_response_tokens": lambda config: config.rollout.max_response_tokens,
}
SAME_UPDATE: Equal = {
    "batch.prompts_per_step x batch.samples_per_prompt": lambda config: derive_batch(config).samples_per_step,
    **_ROWS,
    "batch.update_epochs": lambda config: config.batch.update_epochs,
    "batch.minibatches_per_epoch": lambda config: config.batch.minibatches_per_epoch,
}
"""For the cost of a step: as many samples of the same lengths by the same model, and as many optimizer steps."""
SAME_RUN: Equal = {
    "train.steps x batch.prompts_per_step x batch.samples_per_prompt": lambda config: derive_batch(config).total_samples,
    **_ROWS,
    "evaluation": lambda config: config.evaluation,
}
"""For gold and KL along a run: as many samples of the same model, judged alike."""


def check_equal(configs: Mapping[str, Config], equal: Equal) -> None:
    """Refuse configs that differ from the first one in what must be equal.

    Args:
        configs: by the name of the algorithm or variant.

    Raises:
        InputError: names the two and the setting; impossible arithmetic.
    """
    (first, expected), *others = configs.items()
    for name, config in others:
        for what, read in equal.items():
            if read(config) != read(expected):
                raise InputError(f"{name} differs from {first} in {what}, which must be equal in all that are compared")
