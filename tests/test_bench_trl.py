"""`dvpo bench trl` and `dvpo bench trl-reward`: equal work on both sides, right arithmetic, and errors in one line.

TRL 1.12.0 itself is not needed: a stand-in for its environment's Python writes down what it is asked and answers.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_bench import write_config

from dvpo_ray import cli
from dvpo_ray.bench.overhead import StepProfile, StepTime
from dvpo_ray.bench.random_weights import make_value_model
from dvpo_ray.bench.trl import TRL_VERSION, check_trl, run_trl, same_work, trl_request, with_models
from dvpo_ray.bench.trl_results import Measured, lines, of_profile, trl_results
from dvpo_ray.bench.trl_reward import Accuracy, heldout_scores, new_reward_model, pair_rows, result_lines, train_with_trl
from dvpo_ray.config.schema import Config
from dvpo_ray.errors import ResourceError


def config(model="m", **sections) -> Config:
    return Config(model={"path": str(model), "dtype": "float32"}, **sections)


# ---------------------------------------------------------------------------------------------------------- work


def test_one_value_model_serves_as_reward_model_where_none_is_given():
    def paths(**sections) -> tuple[str, str]:
        models = with_models(config(**sections), "made")
        return models.gvm.path, models.reward_model.path

    assert paths() == ("made", "made")
    assert paths(gvm={"path": "g"}) == ("g", "g")
    assert paths(gvm={"path": "g"}, reward_model={"path": "r"}) == ("g", "r")
    assert paths(reward_model={"path": "r"}) == ("made", "r")


def test_trl_is_asked_for_the_configs_work():
    settings = config(
        batch={"prompts_per_step": 4, "samples_per_prompt": 2, "update_epochs": 4, "minibatches_per_epoch": 2},
        rollout={"max_response_tokens": 16, "temperature": 0.9},
        policy={"learning_rate": 3e-4, "clip_epsilon": 0.1},
        critic={"value_clip": None},
        kl={"coefficient": 0.05},
        advantage={"gae_lambda": 0.95},
    )
    assert same_work(settings).rollout.min_response_tokens == 16
    request = trl_request(settings, [[7], [8], [9]], repeats=2)
    assert request["rows"] == 8 and request["steps"] == 3 and len(request["prompts"]) == 24
    assert all(request["prompts"][i] == request["prompts"][i + 1] for i in range(0, 24, 2))
    assert request["ppo"] == {
        "response_length": 16,
        "temperature": 0.9,
        "num_ppo_epochs": 4,
        "num_mini_batches": 2,
        "learning_rate": 3e-4,
        "kl_coef": 0.05,
        "cliprange": 0.1,
        "cliprange_value": float("inf"),
        "lam": 0.95,
    }
    in_loss = settings.model_copy(update={"kl": settings.kl.model_copy(update={"placement": "loss"})})
    assert trl_request(in_loss, [[7]], repeats=1)["ppo"]["kl_coef"] == 0.0


def test_an_untrained_value_model_loads_as_an_artifact(tiny_model, tmp_path):
    from dvpo_ray.gvm.artifact import load_gvm
    from dvpo_ray.models.loading import load_tokenizer

    settings = config(tiny_model, gvm={"num_layers": 1})
    model, manifest = load_gvm(make_value_model(settings, tmp_path / "gvm"), tokenizer=load_tokenizer(str(tiny_model)), chat_template="auto")
    assert manifest.num_layers == 1 and model.score.weight.abs().sum() > 0


# -------------------------------------------------------------------------------------------------------- results


def results_of(rounds: int) -> dict:
    stages = {"generate": 1.0, "score": 0.2, "reference": 0.1, "advantage": 0.1, "update": 2.0, "sync": 0.5, "step": 3.9}
    settings = config(batch={"prompts_per_step": 8, "update_epochs": 4, "minibatches_per_epoch": 4}, rollout={"max_response_tokens": 16})
    of_rounds = [10.0, 12.0, 11.0], [22.0] * 3  # the machine is half as fast in the second round
    trl = [Measured([{"step": s, "generation": 2.0, "scoring": 1.0, "training": 7.0} for s in steps], 6.0) for steps in of_rounds]
    ours = {
        name: [of_profile(StepProfile([StepTime(slower * seconds, stages, 0.0)] * 3, 1.5)) for slower in (1, 2)]
        for name, seconds in (("ppo", 8.8), ("dvpo", 4.0))
    }
    return trl_results(settings, trl[:rounds], {name: runs[:rounds] for name, runs in ours.items()})


def test_ratios_and_gaps_are_of_medians():
    results = json.loads(json.dumps(results_of(1)))
    assert results["contestants"]["trl_ppo"]["samples_per_second"]["median"] == pytest.approx(8 / 11)
    ratios, gaps = ({name: one[key] for name, one in results["ratios"].items()} for key in ("ratio", "gap_seconds"))
    assert ratios == pytest.approx({"dvpo": 11 / 4, "ppo": 11 / 8.8})
    assert gaps["dvpo"] == pytest.approx({"step": 7.0, "generation": 1.0, "scoring": 0.6, "training": 5.0, "rest": 1.0 - 0.6})
    assert sum(value for name, value in gaps["ppo"].items() if name != "step") == pytest.approx(gaps["ppo"]["step"])


def test_lines_say_the_work_and_whether_the_targets_are_met():
    text = lines(results_of(1))
    assert text[0] == "8 rollouts of 16 tokens, 16 optimizer steps of 2 rows; medians, stages in seconds"
    assert text[-2] == "ppo: 1.25 x the samples per second of TRL's PPO, target >= 1.4, MISSED"
    assert text[-1] == "dvpo: 2.75 x the samples per second of TRL's PPO, target >= 2.5, met"
    assert text[4].split() == ["algorithm:", "dvpo", "2.00", "(2.00–2.00)", "4.000", "1.000", "0.400", "2.000", "0.600", "1.50"]


def test_rounds_are_compared_each_by_itself():
    results = results_of(2)
    assert results["ratios"]["dvpo"]["by_round"] == pytest.approx([2.75, 2.75])
    assert lines(results)[-1].startswith("dvpo: 2.75 x") and "TRL's PPO (by round: 2.75, 2.75), target" in lines(results)[-1]
    trl = results["contestants"]["trl_ppo"]
    assert [[step["step"] for step in steps] for steps in trl["steps_by_round"]] == [[10.0, 12.0, 11.0], [22.0] * 3]
    assert trl["seconds"]["step"] == 16.5 and trl["samples_per_second"]["median"] == pytest.approx(8 / 16.5)


# ------------------------------------------------------------------------------------------------------ TRL's side


def stand_in(path: Path, script: str) -> Path:
    """A Python of TRL's environment that only runs a shell script; $3 is the request and $4 the result."""
    path.write_text("#!/usr/bin/env bash\n" + script + "\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("setting", ["ppo:batch.update_epochs=3", "ppo:rollout.max_response_tokens=9", "ppo:batch.minibatches_per_epoch=8"])
def test_unequal_work_is_refused(tiny_model, tmp_path, monkeypatch, capsys, setting):
    monkeypatch.chdir(tmp_path)
    file = write_config(tmp_path, tiny_model, critic={"cpus_per_actor": 0})
    assert cli.main(["bench", "trl", str(file), "--trl-python", "python", "--set", setting]) == 2
    key = setting.removeprefix("ppo:").partition("=")[0]
    assert capsys.readouterr().err == f"dvpo: ppo differs from TRL in {key}, which must be equal in all that are compared\n"


@pytest.mark.parametrize(("script", "found"), [("echo 1.16.0", "TRL 1.16.0"), ("exit 1", "no TRL")])
def test_another_trl_is_refused(tmp_path, script, found):
    with pytest.raises(ResourceError, match=f"has {found}, the comparison needs 1.12.0; launch/bench_trl.sh makes an environment"):
        check_trl(stand_in(tmp_path / "python", script))
    with pytest.raises(ResourceError, match="missing: cannot be run as the Python of TRL 1.12.0"):
        check_trl(tmp_path / "missing")
    check_trl(stand_in(tmp_path / "right", f"echo {TRL_VERSION}"))


REQUEST = {"rows": 2, "threads": 3, "ppo": {"response_length": 4}}


def answer(*tokens: int) -> str:
    steps = [{"step": 4.0 + i, "generation": 1.0, "scoring": 1.0, "training": 1.5, "response_tokens": count} for i, count in enumerate(tokens)]
    return (
        f"echo 'step 1'; echo noise; echo 'step 2'; echo $OMP_NUM_THREADS $PYTHONPATH >&2; echo '{json.dumps({'steps': steps, 'versions': {}})}' >$4"
    )


def test_the_first_step_warms_up_and_threads_are_set(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/ours")
    done = []
    run = run_trl(REQUEST, stand_in(tmp_path / "python", answer(8, 8)), tmp_path, lambda: done.append(1))
    assert len(done) == 2
    assert run.steps == [{"step": 5.0, "generation": 1.0, "scoring": 1.0, "training": 1.5}]
    assert (tmp_path / "trl.log").read_text() == "3\n"
    assert json.loads((tmp_path / "trl_request.json").read_text()) == REQUEST


@pytest.mark.parametrize(
    ("script", "line"),
    [("exit 3", "TRL's PPO ended with status 3; .*trl.log says why"), (answer(8, 7), "TRL's PPO sampled 7 tokens in a step, the comparison needs 8")],
)
def test_a_failed_or_shorter_run_is_one_line(tmp_path, script, line):
    with pytest.raises(ResourceError, match=line):
        run_trl(REQUEST, stand_in(tmp_path / "python", script), tmp_path, lambda: None)


# --------------------------------------------------------------------------------------------------- reward model


def test_accuracies_are_compared_by_view():
    views = {"last": Accuracy(0.8, 0.7, 0.9), "mean": Accuracy(0.9, 0.8, 1.0), "position_50": Accuracy(0.7, 0.6, 0.8)}
    lines = result_lines(Accuracy(0.8, 0.7, 0.9), {"gvm": views, "reward_model": views})
    assert lines[0].endswith("0.800 [0.700, 0.900]")
    assert lines[1].endswith("1.000 x TRL's, target >= 1, met")
    assert lines[2].endswith("1.125 x TRL's")
    assert lines[3].endswith("0.875 x TRL's, target >= 0.9, MISSED")
    assert [line for line in lines[4:] if "target" in line] == []


@pytest.fixture
def separable(tiny_model, tmp_path):
    """A config and data whose pairs differ by one word."""

    from dvpo_ray.gvm.dataset import load_gvm_data

    def write(name: str, start: int, count: int) -> str:
        path = tmp_path / name
        rows = [{"prompt": f"Story {n}:", "chosen": " a happy day" + " so" * (n % 3), "rejected": " a sad day"} for n in range(start, start + count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    settings = config(
        tiny_model,
        data={"preferences": {"path": write("train.jsonl", 0, 32), "heldout_path": write("heldout.jsonl", 100, 9)}, "max_prompt_tokens": 32},
        reward_model={"learning_rate": 3e-3, "epochs": 4, "pairs_per_step": 4},
    )
    return settings, load_gvm_data(settings, settings.reward_model)


def test_trl_trains_on_the_value_models_ids(separable):
    _, data = separable
    rows, batch = pair_rows(data.train), data.train.batch
    assert len(rows) == data.train.num_pairs == 32
    assert rows[5]["chosen_ids"] == batch.tokens[batch.row(10)].tolist() and rows[5]["rejected_ids"] == batch.tokens[batch.row(11)].tolist()


@pytest.mark.slow
def test_trls_reward_model_learns_and_its_scores_are_its_own(separable, tmp_path, monkeypatch):
    from dvpo_ray.bench import trl_reward
    from dvpo_ray.monitoring.console import RunConsole

    settings, data = separable
    model, trainers = new_reward_model(settings), []
    monkeypatch.setattr(trl_reward, "heldout_scores", lambda trainer: trainers.append(trainer) or heldout_scores(trainer))
    with RunConsole() as console:
        accuracy = train_with_trl(model, data, settings, tmp_path, console)
    assert accuracy.share == 1.0 and 0.6 < accuracy.low < 1.0 == accuracy.high
    scores, batch = heldout_scores(trainers[0]), data.heldout.batch
    alone = [model(torch.tensor([batch.tokens[batch.row(r)].tolist()])).logits.item() for r in range(batch.num_rows)]
    np.testing.assert_allclose(scores, alone, rtol=1e-4, atol=1e-4)
