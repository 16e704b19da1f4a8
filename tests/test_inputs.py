"""What a run would stumble over once its actors are up is refused before: by key or file, in one line, and nothing is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from gvm_artifacts import make_gvm
from tiny_models import tiny_config, tiny_language_model
from transformers import AutoTokenizer

from dvpo_ray.config.schema import Config, ModelConfig, PolicyConfig, PromptData
from dvpo_ray.data.prompts import load_prompts
from dvpo_ray.data.rows import first_of
from dvpo_ray.errors import InputError, ResourceError
from dvpo_ray.gvm.artifact import ObjectiveSpec
from dvpo_ray.models.trainable import check_partial_training
from dvpo_ray.training.policy import train
from dvpo_ray.training.policy_inputs import load_inputs
from dvpo_ray.training.value_model import train_value_model

REWARD_MODEL = ObjectiveSpec(name="bradley_terry", td_lambda=0.95, bradley_terry_weight=0.0, bradley_terry_value="last")


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch):
    """What is not refused ends here, before Ray."""

    def start(*args, **kwargs):
        raise AssertionError("not refused")

    for place in ("training.run.begin", "training.evaluate.connect"):
        monkeypatch.setattr(f"dvpo_ray.{place}", start)


@pytest.fixture(scope="module")
def gvm(tiny_model, tmp_path_factory) -> Path:
    return make_gvm(tmp_path_factory.mktemp("gvm") / "final", tiny_model)


@pytest.fixture
def settings(tiny_model, gvm, tmp_path) -> dict:
    """Of a run on a tiny model, ready but for what a test changes."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Tell me story {i}"}) + "\n" for i in range(20)))
    pairs = [{"prompt": f"Tell me story {i}", "chosen": " a good day", "rejected": " a bad day"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return {
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "data": {
            "prompts": {"path": str(tmp_path / "prompts.jsonl")},
            "preferences": {"path": str(tmp_path / "pairs.jsonl")},
            "sft": str(tmp_path / "pairs.jsonl"),
            "max_prompt_tokens": 24,
            "max_response_tokens": 24,
        },
        "gvm": {"path": str(gvm)},
        "rollout": {"backend": "transformers", "max_response_tokens": 12},
        "evaluation": {"judge": "vader"},
    }


def train_gvm(config: Config, out: Path) -> Path:
    return train_value_model(config, config.gvm, out)


def changed(settings: dict, out: Path, **sections) -> Config:
    merged = settings | {name: settings.get(name, {}) | changes for name, changes in sections.items()}
    return Config.model_validate(merged | {"out": str(out)})


def refused(run, folder: Path) -> str:
    """The one line of a refusal that leaves no run folder."""
    with pytest.raises((InputError, ResourceError)) as caught:
        run()
    assert "\n" not in str(caught.value) and not folder.exists()
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------- dvpo train


@pytest.mark.parametrize(
    ("policy", "line"),
    [
        ({"trainable_layers": 3}, "policy.trainable_layers is 3, but the model has 2 decoder layers"),
        ({"lora": {"layers": [0, 2]}}, "policy.lora.layers names layer 2, but the model has the decoder layers 0 to 1"),
        ({"lora": {"layers": [5], "target_modules": ["q_proj"]}}, "policy.lora.layers names layer 5"),
        (
            {"lora": {"target_modules": ["q_proj", "qkv"]}},
            "policy.lora.target_modules: 'qkv' fits no module of the model; its linear layers are down_",
        ),
        ({"lora": {"target_modules": ".*qkv"}}, "policy.lora.target_modules: '.*qkv' fits no module of the model"),
        ({"lora": {"target_modules": "(q"}}, "policy.lora.target_modules: '(q' is not a regular expression"),
        ({"lora": {"target_modules": ["mlp"]}}, "policy.lora.target_modules: 'mlp' fits model.layers.0.mlp, which is not a linear layer"),
        ({"lora": {"layers": [0], "target_modules": ".*q_proj"}}, "policy.lora: "),
        ({"lora": {"target_modules": ["q_proj", "lm_head"]}}, "policy.lora.target_modules: lm_head has the weights of the input embedding"),
        ({"gpus_per_actor": 1}, "policy.gpus_per_actor is 1, but this machine has no GPU that torch can use; set policy.gpus_per_actor=0"),
    ],
)
def test_what_the_policy_does_not_have(settings, tmp_path, monkeypatch, policy, line):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    out = tmp_path / "run"
    assert refused(lambda: train(changed(settings, out, policy=policy)), out).startswith(line)


def test_adapters_of_experts_do_not_travel_alone(settings, tmp_path):
    tiny_language_model(tiny_config("qwen3_moe")).save_pretrained(tmp_path / "experts")
    check_partial_training(Config.model_validate(settings).model, PolicyConfig(lora={"rank": 2}), "adapters")
    experts = ModelConfig(path=str(tmp_path / "experts"))
    check_partial_training(experts, PolicyConfig(lora={"rank": 2, "target_modules": ["q_proj"]}), "adapters")
    with pytest.raises(InputError, match=r"^weight_sync\.transport is adapters, but \S*experts\S* is not a linear layer"):
        check_partial_training(experts, PolicyConfig(lora={"rank": 2}), "adapters")


@pytest.mark.parametrize("policy", [{"trainable_layers": 2}, {"lora": {"rank": 2}}, {"lora": {"target_modules": ".*[qv]_proj"}}])
def test_what_the_policy_has(settings, tmp_path, policy):
    assert load_inputs(changed(settings, tmp_path / "run", policy=policy)).prompts
    assert load_inputs(changed(settings, tmp_path / "run", policy={"lora": {"target_modules": ["q_proj"], "layers": [1]}})).prompts


def test_every_prompt_that_is_left_out_is_counted_by_reason(settings, tmp_path):
    rows = [{"prompt": f"{letter} day " * 40} for letter in "abcdefgh"] + [{"prompt": f"Tell me story {i}"} for i in range(40)]
    rows += [rows[10], rows[17], {"prompt": "tell me story 0"}, {"text": "no prompt"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = {"path": str(path), "heldout_fraction": 0.3}
    sets = load_prompts(PromptData(**prompts), "skip")
    train, heldout = ([prompt.where for prompt in part] for part in (sets.train, sets.heldout))
    long = {f"{path}:{number}" for number in range(1, 9)}
    assert len(train) + len(heldout) == 49 and long & set(train[:25]) and len(set(heldout) - long) > 3

    data = {"prompts": {**prompts, "limit": 25}, "on_bad_row": "skip", "long_prompt": "drop"}
    inputs = load_inputs(changed(settings, tmp_path / "run", data=data, evaluation={"prompts": 3}))
    dropped = [where for where in [*train[:25], *heldout] if where in long]
    assert {prompt.where for prompt in inputs.texts} == set(train[:25]) - long and len(inputs.heldout) == 3
    *counted, evaluated = [note for note in inputs.notes if str(path) in note and not note.startswith("evaluation.judge")]
    assert counted == [
        f"{path}: left out 1 of 52 rows: bad (data.on_bad_row skip); the first is {path}:52: no `prompt`; the row has text",
        f"{path}: left out 2 of 51 prompts: exact repeats of an earlier one; the first is {path}:49",
        f"{path}: left out {len(train) - 25} of {len(train)} training prompts: data.prompts.limit is 25; the first is {first_of(train[25:])}",
        f"left out {len(dropped)} of {25 + len(heldout)} prompts: the prompt is over data.max_prompt_tokens 24; the longest has 121 tokens; "
        f"data.max_prompt_tokens=121 keeps all whole; the first is {first_of(dropped)}",
    ]
    others = len(set(heldout) - long) - 3
    assert evaluated.startswith(f"left out {others} of {others + 3} held-out prompts: evaluations use 3 of them (evaluation.prompts); the first is ")


def test_pairs_of_a_refresh_that_are_left_out_are_counted(settings, tmp_path):
    data = {"preferences": {**settings["data"]["preferences"], "limit": 5}}
    config = changed(settings, tmp_path / "run", data=data, gvm={"refresh": {"source": "judge"}, "refresh_every_steps": 1})
    assert any("training pairs: data.preferences.limit is 5" in note for note in load_inputs(config).notes)


def test_gpus_of_another_cluster_are_its_own_affair(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert load_inputs(changed(settings, tmp_path, policy={"gpus_per_actor": 1}, ray={"address": "ray://somewhere:1"})).prompts
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:1")
    assert load_inputs(changed(settings, tmp_path, scorer={"gpus_per_actor": 1})).prompts


def damage(folder: Path, file: str, how: str) -> None:
    path = folder / file
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("how", ["missing", "truncated", "altered"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_damaged_value_model(settings, gvm, tmp_path, file, how):
    spoiled = shutil.copytree(gvm, tmp_path / "spoiled")
    damage(spoiled, file, how)
    out = tmp_path / "run"
    whole = changed(settings, out)
    for config in (
        changed(settings, out, gvm={"path": str(spoiled)}),
        changed(settings, out, scorer={"ensemble": [str(spoiled)]}),
        changed(settings, out, reward_model={"path": str(spoiled)}).model_copy(update={"algorithm": "grpo"}),
    ):
        line = refused(lambda config=config: train(config), out)
        assert str(spoiled) in line and file in line and ("copy the artifact" in line or "train the GVM again" in line)
    start = whole.model_copy(update={"gvm": whole.gvm.model_copy(update={"init_from": str(spoiled)})})
    assert file in refused(lambda: train_gvm(start, out), out)


def test_an_ensemble_of_others_only(settings, gvm, tiny_model, tmp_path):
    def line(*paths) -> str:
        return refused(lambda: train(changed(settings, tmp_path / "run", scorer={"ensemble": list(map(str, paths))})), tmp_path / "run")

    reward_model = make_gvm(tmp_path / "rm", tiny_model, bias=0.5, objective=REWARD_MODEL)
    assert f"{reward_model}: a reward model" in line(reward_model) and "scorer.ensemble needs a model made by `dvpo gvm train`" in line(reward_model)
    copied = shutil.copytree(gvm, tmp_path / "copy")
    assert f"scorer.ensemble: {copied} is the same model as {gvm}" in line(copied)
    other = make_gvm(tmp_path / "other", tiny_model, bias=0.75)
    copied = shutil.copytree(other, tmp_path / "other copy")
    assert f"{copied} is the same model as {other}" in line(other, copied)
    assert load_inputs(changed(settings, tmp_path / "run", scorer={"ensemble": [str(other)]})).prompts


# ------------------------------------------------------------------------------------------------ dvpo gvm train


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"num_layers": 3}, "gvm.num_layers is 3, but "),
        ({"lora": {"layers": [2]}}, "gvm.lora.layers names layer 2"),
        ({"lora": {"layers": [1]}, "num_layers": 1}, "gvm.lora.layers names layer 1, but the model has the decoder layers 0 to 0"),
        ({"lora": {"target_modules": ["c_attn"]}}, "gvm.lora.target_modules: 'c_attn' fits no module"),
        ({"keep_head": True}, "gvm.keep_head continues from the head of the GVM in gvm.init_from, but it is not set; give a GVM, or keep_head=false"),
        ({"gpus_per_actor": 1}, "gvm.gpus_per_actor is 1, but this machine has no GPU"),
    ],
)
def test_what_the_trunk_does_not_have(settings, tmp_path, monkeypatch, options, line):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    out = tmp_path / "run"
    assert refused(lambda: train_gvm(changed(settings, out, gvm=options), out), out).startswith(line)


def test_no_head_to_keep(settings, tiny_model, tmp_path):
    out = tmp_path / "run"
    line = refused(lambda: train_gvm(changed(settings, out, gvm={"keep_head": True, "init_from": str(tiny_model)}), out), out)
    assert f"but {tiny_model} is not one (it has no gvm.json)" in line


def test_a_reward_model_is_told_by_its_own_keys(settings, tmp_path):
    out = tmp_path / "run"
    config = changed(settings, out, reward_model={"num_layers": 3})
    assert refused(lambda: train_value_model(config, config.reward_model, out), out).startswith("reward_model.num_layers is 3, but ")


# --------------------------------------------------------------------------------------- tokenizer and embedding fit


def test_more_tokens_than_rows_are_refused_by_every_command(settings, gvm, tiny_model, tmp_path):
    from dvpo_ray.gvm.evaluation import evaluate_gvm
    from dvpo_ray.gvm.scoring import score_file
    from dvpo_ray.training.dpo import train_dpo
    from dvpo_ray.training.evaluate import evaluate_policy
    from dvpo_ray.training.sft import train_sft

    grown = shutil.copytree(tiny_model, tmp_path / "grown")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = len(tokenizer)
    tokenizer.add_tokens(["<|tool|>", "<|answer|>"], special_tokens=True)
    tokenizer.save_pretrained(grown)
    out, pairs = tmp_path / "run", tmp_path / "pairs.jsonl"
    config = changed(settings, out, model={"path": str(grown)})
    stages = [
        train,
        lambda c: train_gvm(c, out),
        lambda c: train_value_model(c, c.reward_model, out),
        lambda c: train_sft(c, out, False),
        lambda c: train_dpo(c, out, False),
        lambda c: evaluate_policy(c, c.model.path, out),
        lambda c: evaluate_gvm(c, gvm, out),
        lambda c: score_file(c, gvm, pairs, out / "values.jsonl"),
    ]
    for stage in stages:
        line = refused(lambda stage=stage: stage(config), out)
        assert line.startswith(f"{grown}: the tokenizer has {rows + 2} tokens, but the model's embedding has {rows} rows (vocab_size in config.json)")
        assert "the first token without a row is '<|tool|>'" in line


@pytest.mark.parametrize("section", ["gvm", "scorer"])
def test_a_value_model_has_a_row_for_every_token_too(settings, tiny_model, tmp_path, section):
    small = make_gvm(tmp_path / "small", tiny_model, bias=0.5)
    for file, changes in (("config.json", {"vocab_size": 300}), ("gvm.json", {"config_sha256": None})):
        (small / file).write_text(json.dumps(json.loads((small / file).read_text()) | changes))
    config = changed(settings, tmp_path / "run", **{section: {"path": str(small)} if section == "gvm" else {"ensemble": [str(small)]}})
    assert refused(lambda: load_inputs(config), tmp_path / "run").startswith(f"{small}: the tokenizer has ")


# ------------------------------------------------------------------------------------------- a GVM is no policy


def test_a_value_model_is_no_policy(settings, gvm, tmp_path):
    from dvpo_ray.training.dpo import train_dpo
    from dvpo_ray.training.evaluate import evaluate_policy
    from dvpo_ray.training.sft import train_sft

    out = tmp_path / "run"
    config = changed(settings, out, model={"path": str(gvm)})
    stages = (train, lambda c: train_gvm(c, out), lambda c: train_sft(c, out, False), lambda c: train_dpo(c, out, False))
    for stage in (*stages, lambda c: evaluate_policy(c, c.model.path, out)):
        line = refused(lambda stage=stage: stage(config), out)
        assert line == f"model.path: {gvm} is a value or reward model (it holds gvm.json), not a policy; give a causal language model"
    assert refused(lambda: evaluate_policy(changed(settings, out), str(gvm), out), out).startswith(f"--policy: {gvm} is a value or reward model")
