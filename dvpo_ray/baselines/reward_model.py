"""`dvpo rm train`: a Bradley-Terry reward model, as a value model whose last value alone is trained."""

from __future__ import annotations

from pathlib import Path

from dvpo_ray.config.schema import Config, GVMConfig, PreferenceTraining


def as_value_model(config: Config) -> Config:
    """The same config with its reward model's training in the place of the GVM's.

    The outcome of a pair is which response was chosen; the Bradley-Terry loss on the last values is the whole objective
    (Bradley & Terry 1952; Ouyang et al. 2022, arXiv 2203.02155, eq. 1).
    """
    training = config.reward_model.model_dump(include=set(PreferenceTraining.model_fields))
    return config.model_copy(update={"gvm": GVMConfig(**training, objective="bradley_terry", bradley_terry_value="last")})


def train_reward_model(config: Config, out: Path, resume: bool = False) -> Path:
    """Train a reward model on the config's preference pairs; see `train_gvm` for the arguments, the folder and the errors."""
    from dvpo_ray.gvm.training import train_gvm

    return train_gvm(as_value_model(config), out, resume)
