"""Settings without effect and paths that are missing: notes of the dry run, warnings of the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gvm_artifacts import make_gvm

from dvpo_ray import cli
from dvpo_ray.config import Config, dump_config, load_config
from dvpo_ray.config.inputs import is_local
from dvpo_ray.config.notes import few_steps, training_notes
from dvpo_ray.config.schema import GVMConfig, RewardModelConfig
from dvpo_ray.data.hub import NEITHER_HERE_NOR_CACHED

LOCAL_CPU = str(Path(__file__).resolve().parents[1] / "cluster_configs" / "local-cpu.yaml")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "quiet_libraries", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def dry_run(capsys, *argv: str, on_hub: bool = False) -> list[str]:
    """The notes, without or with the one on names that are not looked for."""
    assert cli.main([*argv, "--dry-run"]) == 0
    found = [line.removeprefix("# note: ") for line in capsys.readouterr().out.splitlines() if line.startswith("# note: ")]
    return [note for note in found if on_hub or not note.startswith("taken for names on the hub")]


@pytest.mark.parametrize(
    ("pairs", "settings", "told"),
    [
        (54, {}, "2 optimizer steps are too few to learn much: take 30 or more, for example by gvm.pairs_per_step=8 gvm.epochs=5, or raise"),
        (54, {"epochs": 0.5}, "1 optimizer step is too few"),
        (3, {"pairs_per_step": 2}, "for example by gvm.pairs_per_step=2 gvm.epochs=15, or"),
        (54, {"pairs_per_step": 8, "epochs": 5}, None),
        (1103, {}, None),
        (54, {"keep_head": True, "init_from": "g"}, None),
    ],
)
def test_too_few_steps_to_learn_are_told_with_settings_that_take_enough(pairs, settings, told):
    lines = few_steps(pairs, GVMConfig(**settings))
    assert told in lines[0] if told else lines == []
    reward = few_steps(pairs, RewardModelConfig(**{key: value for key, value in settings.items() if key in ("epochs", "pairs_per_step")}))
    assert "keep_head" in settings or bool(reward) == bool(told) and "gvm.epochs" not in "".join(reward)


def test_the_dry_run_of_a_value_model_says_that_its_steps_are_few(capsys, tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"{i}", "chosen": "a", "rejected": "b"}) + "\n" for i in range(40)))
    mine = ["data.preferences.path=p.jsonl", "data.preferences.heldout_path=null"]
    assert "2 optimizer steps are too few to learn much" in dry_run(capsys, "gvm", "train", LOCAL_CPU, *mine)[-1]
    assert "reward_model.epochs=" in dry_run(capsys, "rm", "train", LOCAL_CPU, *mine)[-1]
    assert dry_run(capsys, "gvm", "train", LOCAL_CPU, *mine, "gvm.epochs=20") == []


REFRESHED = ["gvm.refresh.source=judge"]


@pytest.mark.parametrize(
    ("overrides", "note"),
    [
        (["batch.micro_batch_tokens=79"], "batch.micro_batch_tokens 79 is below the longest row of 80 tokens"),
        (["placement=separate"], "placement separate has no effect, since no actor has a GPU"),
        (["rollout.num_actors=99", "ray.address=auto"], "rollout.num_actors 99 is above the 64 samples of a step; some engines stay idle"),
        (["kl.placement=loss", "kl.estimator=k1"], "kl.estimator k1 has no effect as a loss"),
        (["kl.placement=off", "kl.coefficient=0.05"], "kl.coefficient 0.05 has no effect, since kl.placement is off"),
        (["kl.placement=off", "kl.adaptive_target_nats=6"], "kl.adaptive_target_nats 6 has no effect, since kl.placement is off"),
        (
            ["train.steps=5", "health.window_steps=6", "health.on_alarm=stop"],
            "health.on_alarm is stop, but health.window_steps 6 is above train.steps 5; no alarm that does so can be raised",
        ),
        (
            ["health.on_alarm=stop", "evaluation.judge=none"],
            "health.on_alarm is stop, but no alarm that does so can be raised, since evaluation.judge is none",
        ),
        (["train.steps=12", "gvm.refresh_every_steps=12", *REFRESHED], "gvm.refresh_every_steps 12 is not below train.steps 12"),
    ],
)
def test_settings_without_effect(overrides, note, capsys):
    (found,) = training_notes(load_config(LOCAL_CPU, overrides))
    assert found.startswith(note)
    assert found in dry_run(capsys, "train", LOCAL_CPU, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["batch.micro_batch_tokens=80"],
        ["placement=separate", "policy.gpus_per_actor=1"],
        ["kl.coefficient=0.05"],
        ["kl.placement=off", "kl.coefficient=0"],
        ["kl.placement=loss"],
        ["train.steps=5", "health.window_steps=6"],
        ["train.steps=5", "health.window_steps=5", "health.on_alarm=stop"],
        ["health.on_alarm=stop"],
        ["health.on_alarm=stop", "evaluation.judge=none", "health.max_calibration_error=0.1"],
        ["train.steps=12", "gvm.refresh_every_steps=11", *REFRESHED],
    ],
)
def test_settings_with_effect(overrides):
    assert training_notes(load_config(LOCAL_CPU, overrides)) == []


@pytest.mark.parametrize(
    ("prompts", "pairs", "judge", "told"),
    [
        ("mine.jsonl", "mine.jsonl", "vader", True),
        ("mine.jsonl", None, "vader", True),
        ("runs/prompts.jsonl", "runs/preferences.train.jsonl", "vader", False),  # the judge labelled these
        ("mine.jsonl", "runs/preferences.train.jsonl", "vader", True),
        ("mine.jsonl", "mine.jsonl", "none", False),
        ("org/prompts", "mine.jsonl", "vader", False),
        ("dvpo_ray/quickstart/data/prompts.train.jsonl", None, "vader", False),
    ],
)
def test_a_judge_of_sentiment_beside_prompts_of_ones_own_is_told(prompts, pairs, judge, told, capsys):
    settings = [f"data.prompts.path={prompts}", f"evaluation.judge={judge}", f"data.preferences={'null' if pairs is None else f'{{path: {pairs}}}'}"]
    found = [note for note in training_notes(load_config(LOCAL_CPU, settings)) if note.startswith("evaluation.judge is vader, which scores")]
    assert len(found) == told
    if told:
        assert "mine.jsonl are prompts of your own" in found[0] and "set evaluation.judge=none (docs/training.md, Without a judge)" in found[0]
        assert found[0] in dry_run(capsys, "train", LOCAL_CPU, *settings)


def test_heldout_prompts_of_the_value_model_s_training_pairs_are_told(tmp_path):
    def found(*settings):
        config = load_config(LOCAL_CPU, ["data.prompts={path: p.jsonl, heldout_path: null}", "evaluation.judge=none", *settings])
        return [note for note in training_notes(config) if "heldout_fraction" in note]

    same, more = "data.preferences={path: p.jsonl, heldout_path: null}", "data.prompts.heldout_fraction=0.4"
    told = (
        "data.prompts.heldout_fraction is 0.4, and the value model's pairs of the same file have data.preferences.heldout_fraction 0.1: about 75% of "
        "the held-out prompts are those of its training pairs; set data.prompts.heldout_fraction=0.1 for prompts that it has not seen"
    )
    assert found(same, more) == [told]
    assert found(same) == found(more) == found(same, "data.prompts.heldout_fraction=0.05") == []
    assert found(same, more, "data.preferences.heldout_path=h.jsonl") == []
    (tmp_path / "run").mkdir()  # the pairs of the value model count
    (tmp_path / "run" / "config.yaml").write_text(dump_config(load_config(LOCAL_CPU, [same])), encoding="utf-8")
    assert found(more, "gvm.path=run/final") == [told]
    (tmp_path / "run" / "config.yaml").write_text(dump_config(load_config(LOCAL_CPU)), encoding="utf-8")
    assert found(same, more, "gvm.path=run/final") == []
    (tmp_path / "run" / "config.yaml").write_text("no_key: 1", encoding="utf-8")
    assert found(same, more, "gvm.path=run/final") == [told]


def test_a_default_coefficient_gets_no_note():
    assert training_notes(Config(model={"path": "m"}, kl={"placement": "off"})) == []


def test_a_run_warns_of_them(tiny_model, tmp_path):
    from dvpo_ray.training.policy_inputs import load_inputs

    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": f"a good day {i}"}) + "\n" for i in range(30)))
    settings = {
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "data": {"prompts": {"path": "prompts.jsonl", "heldout_fraction": 0.3}, "max_prompt_tokens": 24},
        "gvm": {"path": str(make_gvm(tmp_path / "gvm", tiny_model))},
        "rollout": {"max_response_tokens": 12},
        "train": {"steps": 5},
        "health": {"on_alarm": "stop"},
    }
    assert load_inputs(Config(**settings)).notes == [
        "health.on_alarm is stop, but health.window_steps 10 is above train.steps 5; no alarm that does so can be raised"
    ]


@pytest.mark.parametrize(("algorithm", "section"), [("dvpo", "gvm"), ("ppo", "reward_model")])
def test_what_training_said_against_the_scoring_model_is_said_again(tiny_model, tmp_path, capsys, algorithm, section):
    """In the dry run, in the header and the notes of the run, and in its summary."""
    from dvpo_ray.training.policy_inputs import load_inputs
    from dvpo_ray.training.policy_state import PolicyState
    from dvpo_ray.training.run import Run

    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": f"a good day {i}"}) + "\n" for i in range(30)))
    accuracy = {"mean": 0.5, "last": 1.0, "longer_wins": 1.0}
    model = make_gvm(tmp_path / "scoring", tiny_model, heldout_accuracy=accuracy, heldout_warnings=["it may have learnt length alone"])
    settings = {
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "algorithm": algorithm,
        "data": {"prompts": {"path": "prompts.jsonl", "heldout_fraction": 0.3}, "max_prompt_tokens": 24},
        section: {"path": str(model)},
        "rollout": {"max_response_tokens": 12},
    }
    config, warning = Config(**settings), f"{model}: it may have learnt length alone"
    inputs = load_inputs(config)
    state = PolicyState(Run("train", config, tmp_path / "run"), inputs)
    assert inputs.notes[0] == warning and state.summary()["warnings"] == [warning]
    assert state.summary()[section] == {
        "path": str(model),
        "heldout_accuracy": accuracy,
        "pairs": 4,
        "accuracy_ci95": {"mean": pytest.approx([0.15, 0.85], abs=1e-3), "last": pytest.approx([0.5101, 1.0], abs=1e-3)},
    }
    called, shown = {
        "gvm": ("value model", "mean 0.500, last 1.000, on 4 pairs, 95 % interval 0.15 to 0.85"),
        "reward_model": ("reward model", "last 1.000, on 4 pairs, 95 % interval 0.51 to 1.00"),
    }[section]
    assert state.header()[called] == f"{model} (held-out accuracy {shown})"
    assert cli.main(["train", LOCAL_CPU, f"algorithm={algorithm}", f"{section}.path={model}", "--dry-run"]) == 0
    assert warning in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        (
            ["train", LOCAL_CPU, "gvm.path=g", "data.prompts.path=p.jsonl", "data.prompts.heldout_path=./h"],
            ["gvm.path g: no such folder", "data.prompts.path p.jsonl: no such file or folder", "data.prompts.heldout_path ./h: no such file"],
        ),
        (
            ["train", LOCAL_CPU, "algorithm=ppo", "reward_model.path=runs/rm", "gvm.path=g", "data.prompts.path=hub/prompts"],
            ["reward_model.path runs/rm: no such folder in {here}, where this command starts; give a reward model made by `dvpo rm train`"],
        ),
        (
            ["gvm", "train", LOCAL_CPU, "data.preferences.path=p.jsonl", "gvm.init_from=/nowhere"],
            ["gvm.init_from /nowhere: no such checkpoint folder", "data.preferences.path p.jsonl: no such file or folder"],
        ),
        (
            ["rm", "train", LOCAL_CPU, "data.preferences.path=p.jsonl", "reward_model.init_from=/nowhere", "gvm.init_from=/elsewhere"],
            ["reward_model.init_from /nowhere: no such checkpoint folder", "data.preferences.path p.jsonl: no such file or folder"],
        ),
        (["dpo", LOCAL_CPU, "data.preferences.path=p.jsonl"], ["data.preferences.path p.jsonl: no such file or folder"]),
        (["sft", LOCAL_CPU, "data.sft=s.jsonl", "model.path=./m"], ["model.path ./m: no such checkpoint folder", "data.sft s.jsonl: no such file"]),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else None,
)
def test_a_dry_run_names_the_paths_that_are_missing(command, missing, capsys):
    settings = {"model.path": "hub/model", "data.prompts.heldout_path": "null", "data.preferences.heldout_path": "null"}
    more = ["evaluation.judge=none"] + [f"{key}={value}" for key, value in settings.items() if not any(text.startswith(key) for text in command)]
    found = dry_run(capsys, *command, *more)
    starts = [start.format(here=Path.cwd()) for start in missing]
    assert len(found) == len(starts) and all(note.startswith(start) for note, start in zip(found, starts, strict=True)), found


@pytest.mark.parametrize(
    ("path", "note"),
    [
        (
            "z.csv",
            "data.preferences.path z.csv: CSV is not read; convert it, for example by pandas.read_csv('z.csv').to_json('z.jsonl', orient='records', "
            "lines=True)",
        ),
        ("pair.jsonl", "data.preferences.path pair.jsonl: no such file or folder; did you mean pairs.jsonl?"),
        ("./pairs", "data.preferences.path ./pairs: no such file or folder; did you mean ./pairs.jsonl?"),
        ("pairs.json", "data.preferences.path pairs.json: no such file or folder; did you mean pairs.jsonl?"),
        ("runs/a", "data.preferences.path runs/a: a run folder, which has no rows of a data set; give a file or a folder of rows"),
        ("other.jsonl", "data.preferences.path other.jsonl: no such file or folder in {here}, where this command starts"),
        ("/other.jsonl", "data.preferences.path /other.jsonl: no such file or folder"),
        ("pairs", "data.preferences.path pairs is taken for a name on the hub; did you mean pairs.jsonl?"),
    ],
)
def test_data_that_cannot_be_read_is_a_note_with_the_file_that_may_be_meant(path, note, capsys, tiny_model):
    Path("runs/a").mkdir(parents=True)
    for name in ("z.csv", "pairs.jsonl", "pairs.txt", "runs/a/config.yaml", "runs/a/summary.json", "runs/a/metrics.jsonl"):
        Path(name).touch()
    settings = [LOCAL_CPU, f"model.path={tiny_model}", "gvm.num_layers=2", f"data.preferences.path={path}", "data.preferences.heldout_path=null"]
    note = note.format(here=Path.cwd())
    assert dry_run(capsys, "gvm", "train", *settings) == [note]
    refusal = note.replace(" is taken for a name on the hub", f": {NEITHER_HERE_NOR_CACHED}")
    assert cli.main(["gvm", "train", *settings]) == 2
    printed = capsys.readouterr()
    assert printed.err == f"dvpo: {refusal}\n" and "loading" not in printed.out


def test_what_is_there_is_no_note(capsys, tiny_model, tmp_path):
    Path("p.jsonl").write_text('{"prompt": "Hi"}\n{"prompt": "Ho"}\n', encoding="utf-8")
    gvm = make_gvm(tmp_path / "run" / "final", tiny_model)
    settings = [f"model.path={tiny_model}", "data.prompts.path=p.jsonl", "data.prompts.heldout_path=null", "evaluation.judge=none"]
    assert dry_run(capsys, "train", LOCAL_CPU, *settings, f"gvm.path={gvm}") == []
    (note,) = dry_run(capsys, "train", LOCAL_CPU, *settings, f"gvm.path={gvm.parent}")
    assert note == f"gvm.path {gvm.parent}: no gvm.json, so this is not a GVM artifact; did you mean {gvm}?"


@pytest.mark.parametrize(
    ("command", "note"),
    [
        (["train", "policy.trainable_layers=3"], "policy.trainable_layers 3: {model} has 2 decoder layers; give 2 or fewer"),
        (
            ["train", "rollout.max_response_tokens=9999", "batch.micro_batch_tokens=99999"],
            "data.max_prompt_tokens 32 + rollout.max_response_tokens 9999 = 10031 tokens, but {model} has a context of 256; lower one or both",
        ),
        (["gvm", "train", "gvm.num_layers=3"], "gvm.num_layers 3: {model} has 2 decoder layers; give 2 or fewer"),
        (["gvm", "train", "gvm.num_layers=3", "model.path=hub/name", "gvm.init_from={model}"], "gvm.num_layers 3: {model} has 2 decoder layers"),
        (["rm", "train", "reward_model.num_layers=4"], "reward_model.num_layers 4: {model} has 2 decoder layers; give 2 or fewer"),
    ],
)
def test_what_the_model_does_not_have_is_a_note(command, note, capsys, tiny_model):
    split = 1 if command[0] == "train" else 2
    settings = [text.format(model=tiny_model) for text in command[split:]]
    quiet = [
        "data.prompts.path=hub/prompts",
        "data.prompts.heldout_path=null",
        "data.preferences.path=hub/pairs",
        "data.preferences.heldout_path=null",
    ]
    fitting = [
        "gvm.path=hub/gvm",
        "gvm.num_layers=2",
        "reward_model.num_layers=2",
        "scorer.micro_batch_tokens=99999",
        "reference.micro_batch_tokens=99999",
    ]
    found = dry_run(capsys, *command[:split], LOCAL_CPU, f"model.path={tiny_model}", *quiet, *fitting, *settings)
    found = [line for line in found if not line.startswith("gvm.path")]
    assert len(found) == 1 and found[0].startswith(note.format(model=tiny_model))


def test_names_that_only_the_hub_knows_are_told(capsys, tiny_model):
    settings = [LOCAL_CPU, "data.preferences=null", "data.prompts.heldout_path=null", "evaluation.judge=none", "gvm.path=hub/gvm"]
    line = "taken for names on the hub, which a dry run does not ask: model.path hub/model, data.prompts.path ultrafeedback"
    assert line in dry_run(capsys, "train", *settings, "model.path=hub/model", "data.prompts.path=ultrafeedback", on_hub=True)
    Path("p.jsonl").write_text('{"prompt": "Hi"}\n{"prompt": "Ho"}\n', encoding="utf-8")
    for prompts in ("p", "p.jsonl"):
        found = dry_run(capsys, "train", *settings, f"model.path={tiny_model}", f"data.prompts.path={prompts}", on_hub=True)
        assert not any(note.startswith("taken for names") for note in found)


@pytest.mark.parametrize("algorithm", ["dvpo", "reinforce"])
def test_a_value_model_of_another_vocabulary_is_a_note(algorithm, capsys, tiny_model, tmp_path):
    key = "gvm.path" if algorithm == "dvpo" else "reward_model.path"
    gvm = make_gvm(tmp_path / "gvm", tiny_model)
    argv = ["train", LOCAL_CPU, f"model.path={tiny_model}", f"algorithm={algorithm}", f"{key}={gvm}"]
    told = f"{key} {gvm}: trained with another tokenizer than that of {tiny_model}; use models with the same tokenizer"
    assert told not in dry_run(capsys, *argv)
    tokenizer = json.loads((gvm / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"] = {}
    (gvm / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert told in dry_run(capsys, *argv)
    (gvm / "tokenizer.json").unlink()
    assert told not in dry_run(capsys, *argv)


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("./a", True),
        ("../a/b", True),
        ("/a", True),
        ("~/a", True),
        ("a/b/c", True),
        ("a b", True),
        ("a.jsonl", True),
        ("owner/name.parquet", True),
        ("there/name", True),
        ("there", True),
        ("owner/name", False),
        ("name", False),
        ("name-1.5B", False),
    ],
)
def test_which_paths_can_be_nothing_but_local(path, local):
    Path("there").mkdir()
    assert is_local(path) is local


# ---------------------------------------------------------------------------------------------- a cluster too small


@pytest.mark.parametrize("command", [["train", "gvm.path=g"], ["train", "--dry-run"], ["gvm", "train", "gvm.cpus_per_actor=4"], ["eval"]])
def test_a_local_cluster_that_is_too_small_is_refused_before_anything_is_loaded(command, capsys):
    split = 2 if command[0] == "gvm" else 1
    argv = [*command[:split], LOCAL_CPU, *command[split:], "rollout.cpus_per_actor=3"]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("dvpo: ray.num_cpus is 2, but the actors need ") and error.count("\n") == 1
    assert cli.main([*argv, "ray.num_cpus=1", "ray.address=h:1", "--dry-run"]) == (2 if command == ["eval"] else 0)


@pytest.mark.parametrize(("address", "status"), [("h:1", 0), ("auto", 0), ("local", 2), ("", 2)])
def test_the_size_of_a_local_cluster_says_nothing_of_another(monkeypatch, address, status):
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert cli.main(["train", LOCAL_CPU, "ray.num_cpus=1", "--dry-run"]) == status


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        (["train", "gvm.path=hub/gvm"], ["rollout", "scorer", "reference", "policy"]),
        (["gvm", "train"], ["gvm"]),
        (["rm", "train"], ["reward_model"]),
        (["dpo"], []),
    ],
)
def test_gpus_that_this_machine_does_not_have_are_a_note(command, keys, capsys, monkeypatch):
    def found(*settings):
        argv = [word for word in command if "=" not in word]
        return [line for line in dry_run(capsys, *argv, single_gpu, *command[len(argv) :], *settings) if "has no GPU" in line]

    single_gpu = LOCAL_CPU.replace("local-cpu", "single-gpu")
    monkeypatch.setattr("dvpo_ray.planning.placement.glob", lambda _: [])
    none = " ".join(f"{key}.gpus_per_actor=0" for key in keys)
    assert [line.partition("; set ")[2].partition(" (")[0] for line in found()] == ([none] if keys else [])
    assert found(*none.split()) == found("ray.address=h:1") == []
    monkeypatch.setattr("dvpo_ray.planning.placement.glob", lambda pattern: ["/dev/nvidia0"] if "nvidia" in pattern else [])
    assert found() == []


def test_what_a_cluster_needs_is_counted_by_role(capsys):
    assert cli.main(["train", LOCAL_CPU, "ray.num_gpus=1", "policy.gpus_per_actor=2", "--dry-run"]) == 2
    assert capsys.readouterr().err == (
        "dvpo: ray.num_gpus is 1, but the actors need 2 GPUs (learner 1 x 2); set it to 2 or more, or lower their num_actors or gpus_per_actor\n"
    )
