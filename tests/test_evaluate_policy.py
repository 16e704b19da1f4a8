"""`dvpo eval`: what it samples, what it writes, and what it refuses."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager

import pytest
from conftest import make_tiny_model
from gvm_artifacts import make_gvm

from dvpo_ray.config import Config
from dvpo_ray.errors import InputError


def config(prompt_file, **evaluation) -> Config:
    return Config(
        model={"path": "overridden/by-policy", "dtype": "float32"},
        data={"prompts": {"path": str(prompt_file), "heldout_fraction": 0.5}, "max_prompt_tokens": 24},
        rollout={"backend": "transformers", "num_actors": 2, "max_response_tokens": 8, "cpus_per_actor": 0.5},
        evaluation={"judge": "vader", **evaluation},
        ray={"num_cpus": 2, "object_store_gib": 0.1},
    )


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"story {n}"}) + "\n" for n in range(30)), encoding="utf-8")
    return path


def test_a_value_model_of_another_tokenizer_is_refused_before_anything_is_sampled(tiny_model, tiny_chat_model, prompts, tmp_path):
    from dvpo_ray.training.evaluate import evaluate_policy

    settings = config(prompts, judge="none")
    settings.gvm.path = str(make_gvm(tmp_path / "gvm", tiny_model))
    with pytest.raises(InputError, match="tokenizer"):
        evaluate_policy(settings, str(tiny_chat_model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_prompts_that_are_all_too_long(tiny_chat_model, prompts, tmp_path):
    from dvpo_ray.training.evaluate import evaluate_policy

    settings = config(prompts)
    settings.data.max_prompt_tokens, settings.data.long_prompt = 2, "drop"
    with pytest.raises(InputError, match="no held-out prompt is left; left out .* the prompt is over data.max_prompt_tokens 2; the longest"):
        evaluate_policy(settings, str(tiny_chat_model), tmp_path / "out")


def test_the_prompts_that_are_not_evaluated_are_counted(tiny_chat_model, prompts):
    from dvpo_ray.data.encoding import Encoder
    from dvpo_ray.models.loading import load_tokenizer
    from dvpo_ray.training.evaluate import heldout_prompts

    settings = config(prompts, prompts=4)
    chosen, ids, notes = heldout_prompts(settings, Encoder(load_tokenizer(str(tiny_chat_model)), settings.data, "auto", 256))
    [note] = notes
    assert len(chosen) == len(ids) == 4
    found = re.fullmatch(r"left out (\d+) of (\d+) held-out prompts: evaluations use 4 of them \(evaluation.prompts\); the first is (.*)", note)
    assert int(found[2]) - int(found[1]) == 4 and found[3] not in {prompt.where for prompt in chosen}


def test_notes_on_the_prompts_come_before_anything_is_sampled(tiny_chat_model, prompts, tmp_path, monkeypatch, capsys):
    from dvpo_ray.training import evaluate

    def no_engines(*_):
        raise InputError("no engines here")

    monkeypatch.setattr(evaluate, "policy_sampler", no_engines)
    with pytest.raises(InputError, match="no engines here"):
        evaluate.evaluate_policy(config(prompts, prompts=4), str(tiny_chat_model), tmp_path / "out")
    assert "held-out prompts: evaluations use 4 of them (evaluation.prompts)" in capsys.readouterr().out


def test_two_policies_that_keep_other_prompts_are_not_compared(tiny_model, tiny_chat_model, prompts, tmp_path, capsys):
    """Of more prompts than an evaluation takes, each would draw its own."""
    from dvpo_ray.training.evaluate import evaluate_policy

    prompts.write_text("".join(json.dumps({"prompt": "story " * (n % 6 + 1) + str(n)}) + "\n" for n in range(60)), encoding="utf-8")
    settings = config(prompts, judge="none", prompts=4)
    settings.model.path, settings.data.max_prompt_tokens, settings.data.long_prompt = str(tiny_model), 20, "drop"
    told = f"{tiny_chat_model} and {tiny_model} do not keep the same held-out prompts, so their responses cannot be compared"
    with pytest.raises(InputError, match=re.escape(told)):
        evaluate_policy(settings, str(tiny_chat_model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_row_says_of_both_responses_whether_they_are_cut_off(tiny_model, prompts, tmp_path, monkeypatch):
    from dvpo_ray.batch import RaggedBatch
    from dvpo_ray.training import evaluate

    other = make_tiny_model(tmp_path / "other", seed=1)

    @contextmanager
    def engines(config, *_):
        """Those of the policy cut off every response."""
        yield lambda ids: RaggedBatch.from_rows(ids, [[3, 4]] * len(ids), truncated=[config.model.path == str(other)] * len(ids))

    monkeypatch.setattr(evaluate, "policy_sampler", engines)
    settings = config(prompts, judge="none", prompts=3)
    settings.model.path = str(tiny_model)
    evaluate.evaluate_policy(settings, str(other), tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["truncated"], row["truncated_before"]) for row in rows] == [(True, False)] * 3


@pytest.mark.slow
def test_every_heldout_prompt_is_judged_once(ray_session, tiny_chat_model, prompts, tmp_path):
    from dvpo_ray.data.prompts import load_prompts
    from dvpo_ray.training.evaluate import evaluate_policy

    settings = config(prompts, prompts=9)
    summary = evaluate_policy(settings, str(tiny_chat_model), tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()]
    heldout = {prompt.content for prompt in load_prompts(settings.data.prompts, "error").heldout}
    assert len({row["prompt"] for row in rows}) == len(rows) == summary["prompts"] == 9
    assert {row["prompt"] for row in rows} <= heldout
    assert summary["gold"]["mean"] == pytest.approx(sum(row["gold"] for row in rows) / 9, abs=1e-6)
    assert summary["gold"]["ci95"][0] <= summary["gold"]["mean"] <= summary["gold"]["ci95"][1]
    cut_off = summary["response_length"]["truncated_fraction"]
    assert cut_off == sum(row["truncated"] for row in rows) / 9
    assert any("are cut off at rollout.max_response_tokens" in note for note in summary["notes"]) == (cut_off > 0.5)


@pytest.mark.slow
def test_without_a_judge_the_responses_of_both_models_are_laid_side_by_side(ray_session, tiny_model, prompts, tmp_path):
    from dvpo_ray.training.evaluate import evaluate_policy

    other = make_tiny_model(tmp_path / "other", seed=1)
    settings = config(prompts, judge="none", prompts=9)
    settings.model.path, settings.gvm.path = str(tiny_model), str(make_gvm(tmp_path / "gvm", tiny_model))
    summary = evaluate_policy(settings, str(other), tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == summary["prompts"] == 9 and summary["beside"] == str(tiny_model) and "gold" not in summary
    assert [row["before"] for row in rows] != [row["response"] for row in rows]
    assert list(rows[0]) == ["prompt", "before", "response", "truncated", "truncated_before", "value", "value_before"]
    assert summary["estimate"]["after"]["mean"] == pytest.approx(sum(row["value"] for row in rows) / 9, abs=1e-6)
    again = evaluate_policy(settings, str(tiny_model), tmp_path / "before")
    assert again["estimate"] == summary["estimate"]["before"] and "beside" not in again
    kept = [json.loads(line) for line in (tmp_path / "before" / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["response"] for row in kept] == [row["before"] for row in rows]
    assert [row["truncated"] for row in kept] == [row["truncated_before"] for row in rows]
