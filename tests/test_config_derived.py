"""What is derived from a config: batch arithmetic; and the configs and the page that are shipped."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dvpo_ray.config import Config, load_config
from dvpo_ray.config.arithmetic import counted, derive_batch
from dvpo_ray.config.docs import configuration_page
from dvpo_ray.config.keys import known_keys
from dvpo_ray.config.notes import training_notes
from dvpo_ray.errors import InputError
from dvpo_ray.planning.placement import plan_placement, plan_training_placement, total_resources

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted((ROOT / "cluster_configs").glob("*.yaml"))
MODEL = "model: {path: some/model}\n"

# ------------------------------------------------------------------------------------------------- arithmetic


def make(**sections) -> Config:
    return Config(model={"path": "some/model"}, **sections)


@pytest.mark.parametrize(("number", "told"), [(0, "0 pairs"), (0.5, "0.5 pairs"), (1, "1 pair"), (1.0, "1 pair"), (1234567, "1234567 pairs")])
def test_a_noun_agrees_with_its_number(number, told):
    assert counted(number, "pair") == told


def test_batch_arithmetic_golden_numbers():
    config = make(
        batch={"prompts_per_step": 24, "samples_per_prompt": 2, "update_epochs": 4, "minibatches_per_epoch": 3},
        policy={"num_actors": 4},
        rollout={"num_actors": 5, "max_response_tokens": 300},
        data={"max_prompt_tokens": 200},
        train={"steps": 10},
    )
    plan = derive_batch(config)
    assert plan.samples_per_step == 48
    assert plan.max_samples_per_engine == 10
    assert plan.samples_per_worker == 12
    assert plan.rows_per_minibatch == 16
    assert plan.max_tokens_per_row == 500
    assert plan.optimizer_steps_per_step == 12
    assert plan.optimizer_steps == 120
    assert plan.total_prompts == 240
    assert plan.total_samples == 480


@given(*[st.integers(1, 40)] * 3)
def test_uneven_minibatches_are_refused_with_numbers_that_work(prompts, samples, minibatches):
    def config(prompts: int) -> Config:
        return make(batch={"prompts_per_step": prompts, "samples_per_prompt": samples, "minibatches_per_epoch": minibatches})

    if prompts * samples % minibatches == 0:
        assert derive_batch(config(prompts)).rows_per_minibatch * minibatches == prompts * samples
        return
    with pytest.raises(InputError, match="can't be shared evenly by batch.minibatches_per_epoch") as caught:
        derive_batch(config(prompts))
    proposed = str(caught.value).removesuffix(" can").rpartition("batch.prompts_per_step ")[2].split(" or ")
    for number in proposed:
        derive_batch(config(int(number)))


def test_workers_may_get_different_numbers_of_rows_but_not_none():
    assert derive_batch(make(batch={"prompts_per_step": 10}, policy={"num_actors": 3})).samples_per_worker == 4
    with pytest.raises(InputError, match="a minibatch has 2 samples, fewer than policy.num_actors 3"):
        derive_batch(make(batch={"prompts_per_step": 4, "minibatches_per_epoch": 2}, policy={"num_actors": 3}))


# ------------------------------------------------------------------------------------- shipped configs and docs


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_fit_the_machine_they_are_named_after(path):
    counted = re.search(r"(\d+)gpu", path.stem)
    gpus = int(counted[1]) if counted else int("gpu" in path.stem)
    config = load_config(path)
    derive_batch(config)
    assert training_notes(config) == []
    assert total_resources(plan_placement(config))[1] == gpus
    assert total_resources(plan_training_placement(config.gvm))[1] == gpus
    assert config.data.preferences and config.data.prompts
    if config.ray.num_cpus:
        assert total_resources(plan_placement(config))[0] <= config.ray.num_cpus


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_have_room_for_a_critic(path):
    counted = re.search(r"(\d+)gpu", path.stem)
    config = load_config(path, ["algorithm=ppo"])
    gpus = int(counted[1]) if counted else int("gpu" in path.stem)
    cpus, planned = total_resources(plan_placement(config))
    assert derive_batch(config) and planned == gpus and cpus <= (config.ray.num_cpus or 64)
    assert all(seat.slots for seat in plan_placement(config) if gpus and seat.role != "experience")


def test_the_papers_setting():
    config = load_config(ROOT / "cluster_configs" / "single-node-8gpu.yaml")
    assert (config.gvm.learning_rate, config.gvm.pairs_per_step, config.gvm.epochs) == (1.41e-5, 32, 1)
    assert config.data.max_prompt_tokens + config.data.max_response_tokens == 2048
    assert (config.policy.learning_rate, config.policy.schedule, config.policy.clip_epsilon) == (2e-6, "linear", 0.2)
    assert (config.kl.placement, config.kl.coefficient) == ("reward", 0.05)
    assert config.policy.deepspeed.zero_stage == 3
    assert derive_batch(config).total_prompts == 10_000


def test_shipped_configs_mean_the_same_to_other_yaml_readers():
    for path in SHIPPED:
        assert Config.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))) == load_config(path)


def test_configuration_page_is_up_to_date():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == configuration_page(), "run: python -m dvpo_ray.config.docs > docs/configuration.md"


def test_every_setting_is_explained():
    unexplained = [key.path for key in known_keys().values() if key.section is None and not key.field.description]
    assert unexplained == []


def test_importing_the_config_loads_neither_torch_nor_ray():
    code = "import sys, dvpo_ray.config, dvpo_ray.config.arithmetic, dvpo_ray.planning.placement; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "ray", "transformers", "vllm", "deepspeed"} & set(loaded)
