"""A training whose numbers are none any more is stopped by name."""

from __future__ import annotations

import math

import pytest
import torch

from dvpo_ray.config.schema import Config
from dvpo_ray.errors import ResourceError
from dvpo_ray.training.run import check_finite

SOUND = {"gvm/loss": 0.5, "gvm/grad_norm": 2.0}


@pytest.mark.parametrize("name", list(SOUND))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_loss_and_gradient_norm_are_finite(name, value):
    check_finite(3, SOUND, "gvm", "gvm", dtype="bfloat16")
    with pytest.raises(ResourceError) as caught:
        check_finite(3, SOUND | {name: value}, "gvm", "reward_model", dtype="bfloat16")
    assert str(caught.value) == f"training has diverged: {name} is {value} at step 3; lower reward_model.learning_rate and start anew"


def test_a_gradient_that_overflows_in_float16_is_how_the_loss_scale_is_found():
    check_finite(1, SOUND | {"gvm/grad_norm": math.inf}, "gvm", "gvm", dtype="float16")
    with pytest.raises(ResourceError, match="gvm/loss is nan"):
        check_finite(1, SOUND | {"gvm/loss": math.nan}, "gvm", "gvm", dtype="float16")


def test_a_policy_without_probabilities_cannot_be_sampled(tiny_model):
    from dvpo_ray.actors.transformers_backend import TransformersBackend

    settings = {"model": {"path": str(tiny_model), "dtype": "float32"}, "rollout": {"backend": "transformers", "max_response_tokens": 4}}
    backend = TransformersBackend(Config.model_validate(settings), frozenset({2}))
    torch.nn.init.constant_(backend.model.model.norm.weight, math.nan)
    with pytest.raises(ResourceError, match="diverged: the policy's token probabilities are not finite; lower policy.learning_rate"):
        list(backend.generate([[1, 5, 6]], seed=0))
