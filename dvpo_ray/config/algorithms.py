"""The table of algorithms: the roles of each one. Loop, placement and inputs read it instead of comparing names of algorithms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Algorithm:
    """The roles of an algorithm, besides rollout engines, reference model and policy learner.

    Attributes:
        scorer: role of the frozen model that scores finished rollouts: `scorer`, the Global Value Model, or `reward_model`.
        has_critic: a value model is trained online beside the policy.
        has_greedy_baseline: every prompt also gets a greedy response, whose reward is the baseline of its samples.
        min_samples_per_prompt: fewest samples of one prompt that the advantage can compare.
    """

    scorer: str
    has_critic: bool = False
    has_greedy_baseline: bool = False
    min_samples_per_prompt: int = 1

    @property
    def section(self) -> Literal["gvm", "reward_model"]:
        """Section of the config whose `path` is the frozen model that scores finished rollouts."""
        return "gvm" if self.scorer == "scorer" else "reward_model"


ALGORITHMS: dict[str, Algorithm] = {
    "dvpo": Algorithm("scorer"),
    "ppo": Algorithm("reward_model", has_critic=True),
    "grpo": Algorithm("reward_model", min_samples_per_prompt=2),
    "rloo": Algorithm("reward_model", min_samples_per_prompt=2),
    "remax": Algorithm("reward_model", has_greedy_baseline=True),
    "reinforce": Algorithm("reward_model"),
}

ROLE_SECTIONS: dict[str, str] = {
    "rollout": "rollout",
    "scorer": "scorer",
    "reward_model": "scorer",
    "reference": "reference",
    "learner": "policy",
    "critic": "critic",
}
"""The section of the config that sets up each role. The role `experience` has no settings of its own."""
