"""Every baseline on the same real loop: Ray, a rollout engine, DeepSpeed, a reward model, and for PPO a critic."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from gvm_artifacts import make_gvm
from loop_runs import rollouts, run, values_by_hand, without_times

from dvpo_ray.errors import InputError
from dvpo_ray.gvm.artifact import ObjectiveSpec

pytestmark = pytest.mark.slow

REWARD_MODEL = ObjectiveSpec(name="bradley_terry", td_lambda=0.95, bradley_terry_weight=0.0, bradley_terry_value="last")


@pytest.fixture(scope="module")
def baseline_settings(loop_settings, tiny_model, tmp_path_factory) -> dict:
    path = str(make_gvm(tmp_path_factory.mktemp("rm") / "rm", tiny_model, bias=2.0, objective=REWARD_MODEL))
    return loop_settings | {"reward_model": {"path": path}, "critic": {"learning_rate": 3e-3}, "train": {"steps": 2, "trackers": []}}


ROLES = {"rollout", "reward_model", "reference", "learner", "experience"}


def check_roles_and_rewards(folder: Path, metrics: list[dict], settings: dict, roles: set[str]) -> None:
    """What every run of a baseline leaves: the logs of its roles, rewards of the reward model, a policy that moved."""
    assert {f.stem.rpartition("-")[0] for f in (folder / "logs").iterdir()} == roles
    rows = rollouts(folder, 1)
    for row in rows[:3]:
        assert row["reward"] == pytest.approx(values_by_hand(settings["reward_model"]["path"], row)[-1], abs=1e-5)
    assert metrics[0]["reward/model_mean"] == pytest.approx(np.mean([row["reward"] for row in rows]), abs=1e-5)
    assert metrics[1]["kl/reference_mean"] != pytest.approx(0.0, abs=1e-4)
    assert ("values" in rows[0]) == ("critic/loss" in metrics[0]) == ("critic" in roles)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["state"] == "finished" and summary["algorithm"] == settings["algorithm"] and "gvm" not in summary


def test_ppo_learns_its_values_and_a_finished_run_goes_on(baseline_settings, tmp_path):
    """Two critic ranks under ZeRO-3 beside one learner; the critic's state is part of a checkpoint. With more steps than it had, the run
    repeats those since its last whole checkpoint exactly and takes the new ones."""
    critic = {"num_actors": 2, "deepspeed": {"zero_stage": 3}, "init": "policy", "learning_rate": 1e-2, "value_clip": None, "schedule": "constant"}
    policy = baseline_settings["policy"] | {"schedule": "constant"}  # else its rates would depend on the number of steps
    settings = baseline_settings | {"algorithm": "ppo", "policy": policy, "critic": critic, "train": {"steps": 4, "trackers": []}}
    whole = run(settings, tmp_path / "whole")
    check_roles_and_rewards(tmp_path / "whole", whole, settings, ROLES | {"critic"})
    assert whole[-1]["critic/loss"] < 0.5 * whole[0]["critic/loss"]
    assert whole[0]["value/std"] == 0.0 and whole[1]["value/std"] > 0.0  # a zero head says nothing, and then it does
    shutil.copytree(tmp_path / "whole", tmp_path / "longer")
    shutil.rmtree(tmp_path / "longer" / "checkpoints" / "step_000004")
    longer = run(settings, tmp_path / "longer", resume=True, train={"steps": 5})
    assert without_times(longer)[:4] == without_times(whole) and [row["step"] for row in longer] == [1, 2, 3, 4, 5]


def test_a_reward_model_is_no_value_model(baseline_settings, tmp_path):
    with pytest.raises(InputError, match="a reward model; only its last value is trained"):
        run(baseline_settings | {"gvm": baseline_settings["reward_model"]}, tmp_path / "refused")
