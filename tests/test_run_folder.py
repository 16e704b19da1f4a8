"""Run folders: what a resumed run may change, what a new one may take over, and that a refusal touches nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import without_loading

from dvpo_ray import cli
from dvpo_ray.config import Config, dump_config, load_config
from dvpo_ray.config.resuming import MAY_CHANGE, STAGES, forbidden_changes
from dvpo_ray.errors import InputError
from dvpo_ray.monitoring.run_files import amend_summary, living, read_summary, resume_command, this_process, write_summary
from dvpo_ray.training.run_folder import RunIsFinished, begin, check_new, check_resume, locked

SETTINGS = {
    "model": {"path": "sft"},
    "data": {"preferences": {"path": "pairs.jsonl"}, "prompts": {"path": "prompts.jsonl"}, "sft": "answers.jsonl"},
    "gvm": {"path": "g"},
    "reward_model": {"path": "r"},
}


def config_with(**changes) -> Config:
    """The settings with dotted keys changed, `__` for the dot."""
    tree = json.loads(Config.model_validate(SETTINGS).model_dump_json())
    for key, value in changes.items():
        *parents, name = key.split("__")
        part = tree
        for parent in parents:
            part[parent] = part[parent] or {}
            part = part[parent]
        part[name] = value
    return Config.model_validate(tree)


GONE = this_process() | {"started": 0.0}
"""A process that had this one's id and is no more."""


def make_run(folder: Path, stage: str = "train", state: str = "interrupted", steps: int = 4, checkpoint: str | None = "step_000004/learner") -> Path:
    """A run folder as a run of that stage leaves it."""
    begin(folder, stage, config_with(), resumed=False)
    summary = json.loads((folder / "summary.json").read_text()) | {"state": state, "steps": steps}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "logs").mkdir()
    (folder / "logs" / "learner-0.log").write_text("…")
    if steps:
        (folder / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, steps + 1)))
    if checkpoint is not None:
        (folder / "checkpoints" / checkpoint).mkdir(parents=True)
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(what, *args) -> str:
    """The one line of a refusal, which leaves every file as it was."""
    folder = next(arg for arg in args if isinstance(arg, Path))
    before = contents(folder)
    with pytest.raises(InputError) as caught:
        what(*args)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert contents(folder) == before
    return str(caught.value)


# ----------------------------------------------------------------------------------------------- what may change


@pytest.mark.parametrize(
    ("stage", "changes", "told"),
    [
        ("train", {"algorithm": "ppo"}, "algorithm was dvpo and is ppo now"),
        ("train", {"seed": 7}, "seed was 0 and is 7 now"),
        ("train", {"batch__prompts_per_step": 64}, "batch.prompts_per_step was 128 and is 64 now"),
        ("train", {"model__path": "other"}, "model.path was sft and is other now"),
        ("train", {"policy__num_actors": 2}, "policy.num_actors was 1 and is 2 now"),
        ("train", {"rollout__num_actors": 2}, "rollout.num_actors was 1 and is 2 now"),
        ("train", {"policy__lora": {"rank": 4}}, "policy.lora.rank was not set and is 4 now"),
        ("gvm", {"gvm__epochs": 2.0}, "gvm.epochs was 1.0 and is 2.0 now"),
        ("gvm", {"data__preferences__path": "more.jsonl"}, "data.preferences.path was pairs.jsonl and is more.jsonl now"),
        ("rm", {"reward_model__pairs_per_step": 8}, "reward_model.pairs_per_step was 32 and is 8 now"),
        ("sft", {"sft__learning_rate": 0.5}, "sft.learning_rate was 2e-05 and is 0.5 now"),
        ("dpo", {"dpo__beta": 0.5}, "dpo.beta was 0.1 and is 0.5 now"),
    ],
)
def test_another_run_is_refused_by_key_and_both_values(tmp_path, stage, changes, told):
    checkpoint = {"train": "step_000004/learner", "sft": "checkpoint-4", "dpo": "checkpoint-4"}.get(stage, "step_000004/trainer")
    folder = make_run(tmp_path / "run", stage, checkpoint=checkpoint)
    line = refused(check_resume, folder, stage, config_with(**changes))
    assert told in line and "may change" in line and "docs/training.md" in line
    check_resume(folder, stage, config_with())


def test_the_first_differences_are_told_and_the_others_counted(tmp_path):
    folder = make_run(tmp_path / "run")
    changes = config_with(seed=1, algorithm="ppo", kl__coefficient=0.0, batch__update_epochs=4, advantage__mode="td")
    line = refused(check_resume, folder, "train", changes)
    assert "seed was 0 and is 1 now, algorithm was dvpo and is ppo now" in line and "(and 2 more)" in line


def test_what_advantages_are_made_of_may_not_change():
    changed = config_with(advantage__value_whitening="batch", advantage__mode="td")
    keys = [key for key, _, _ in forbidden_changes("train", config_with(), changed)]
    assert keys == ["advantage.mode", "advantage.value_whitening"]
    assert forbidden_changes("gvm", config_with(), changed) == []


def test_what_the_docs_list_may_change():
    changes = {
        "train": {"train__steps": 400, "train__trackers": [], "name": "other", "out": "there", "checkpoint__every_steps": 1, "ray__num_cpus": 2}
        | {"evaluation__every_steps": 3, "health__on_alarm": "stop", "mismatch__max_token_mult_error": None, "weight_sync__timeout_seconds": 9.0}
        | {"policy__cpus_per_actor": 2.0, "scorer__num_actors": 2, "batch__micro_batch_tokens": 64, "sft__epochs": 3.0, "data__sft": None},
        "gvm": {
            "gvm__checkpoint_every_steps": 2,
            "gvm__micro_batch_tokens": 64,
            "policy__learning_rate": 0.5,
            "gvm__path": None,
            "data__prompts": None,
        },
        "rm": {"reward_model__checkpoint_every_steps": 2, "algorithm": "ppo", "reward_model__path": None},
        "sft": {"gvm__epochs": 3.0, "data__preferences": None, "checkpoint__keep": 4},
        "dpo": {"gvm__epochs": 3.0, "data__sft": None, "checkpoint__keep": 4},
    }
    for stage, allowed in changes.items():
        assert forbidden_changes(stage, config_with(), config_with(**allowed)) == []


def test_every_listed_key_is_one_and_stays_documented():
    from dvpo_ray.config.keys import known_keys

    listed = {*MAY_CHANGE, *(part for stage in STAGES.values() for part in (*stage.reads, *stage.leaves))}
    assert listed <= set(known_keys())
    documented = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    for key in MAY_CHANGE:
        assert any(f"`{name}`" in documented for name in (key, key.partition(".")[2])), key


# ------------------------------------------------------------------------------------------------- a resumed run


@pytest.mark.parametrize(("made_by", "checkpoint"), [("gvm", "step_000004/trainer"), ("rm", "step_000004/trainer"), ("dpo", "checkpoint-4")])
def test_a_folder_of_another_command_is_refused(tmp_path, made_by, checkpoint):
    folder = make_run(tmp_path / "run", made_by, checkpoint=checkpoint)
    line = refused(check_resume, folder, "train", config_with())
    assert f"`{STAGES[made_by].command}`, which `dvpo train` cannot resume" in line


def test_a_folder_without_settings_is_none_of_a_run(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "config.yaml").unlink()
    assert "no config.yaml, so this is not a run folder" in refused(check_resume, folder, "train", config_with())


def test_without_a_checkpoint_the_line_says_what_to_do(tmp_path):
    before_any_step = make_run(tmp_path / "a", state="failed", steps=0, checkpoint=None)
    assert refused(check_resume, before_any_step, "train", config_with()).endswith("start it again without --resume")
    after_some = make_run(tmp_path / "b", state="failed", steps=3, checkpoint=None)
    assert refused(check_resume, after_some, "train", config_with()).endswith("remove the folder to start anew")


@pytest.mark.parametrize(
    ("stage", "steps", "refusal"), [("train", 4, "--resume with a larger train.steps goes on"), ("gvm", 4, "in final/"), ("train", 5, None)]
)
def test_a_finished_run_is_left_alone_unless_it_gets_more_steps(tmp_path, stage, steps, refusal):
    checkpoint = "step_000004/learner" if stage == "train" else "step_000004/trainer"
    folder = make_run(tmp_path / "run", stage, state="finished", checkpoint=checkpoint)
    (folder / "final").mkdir()
    config = config_with(train__steps=steps)
    if refusal is None:
        check_resume(folder, stage, config)
    else:
        with pytest.raises(RunIsFinished, match="the run is finished and its result is in final/") as finished:
            check_resume(folder, stage, config)
        assert refusal in str(finished.value)


def test_fewer_steps_than_the_checkpoint_has_are_refused(tmp_path):
    folder = make_run(tmp_path / "run")
    check_resume(folder, "train", config_with(train__steps=4))
    line = refused(check_resume, folder, "train", config_with(train__steps=2))
    assert line == f"{folder}: train.steps is 2, but the run has a checkpoint of step 4; give 4 or more to resume"
    check_resume(make_run(tmp_path / "gvm", "gvm", checkpoint="step_000004/trainer"), "gvm", config_with(train__steps=2))  # not its steps


@pytest.mark.parametrize("steps", [4, 5])
def test_a_finished_run_without_a_checkpoint_does_not_promise_to_go_on(tmp_path, steps):
    folder = make_run(tmp_path / "run", state="finished", checkpoint=None)
    (folder / "final").mkdir()
    line = refused(check_resume, folder, "train", config_with(train__steps=steps))
    assert line.endswith(f"; it kept no checkpoint, so train further by a new run with model.path={folder}/final")


def test_a_resumed_run_keeps_its_numbers_until_there_are_new_ones(tmp_path):
    folder = make_run(tmp_path / "run")
    kept = read_summary(folder) | {"evaluations": {"0": {"gold": 0.5}}}
    write_summary(folder, kept | {"error": "the disk was full", "resume_command": "dvpo train"})
    begin(folder, "train", config_with(), resumed=True)
    assert read_summary(folder) == kept | {"state": "running", "resumed_by": read_summary(folder)["resumed_by"]}


def test_a_resumed_run_keeps_the_command_that_made_it(tmp_path, monkeypatch):
    for words in (["train", "c.yaml", "--out", "r"], *[["train", "r/config.yaml", "--out", "r", "--resume"]] * 2, ["train", "c.yaml", "--resume"]):
        monkeypatch.setattr(sys, "argv", ["/bin/dvpo", *words])
        begin(tmp_path, "train", config_with(), resumed="--resume" in words)
    summary = read_summary(tmp_path)
    assert summary["command"] == ["dvpo", "train", "c.yaml", "--out", "r"]
    assert summary["resumed_by"] == [["dvpo", "train", "r/config.yaml", "--out", "r", "--resume"], ["dvpo", "train", "c.yaml", "--resume"]]


# ----------------------------------------------------------------------------------------------------- a new run


@pytest.mark.parametrize("state", ["failed", "interrupted", "running"])
def test_a_run_that_never_took_a_step_makes_way(tmp_path, state):
    folder = make_run(tmp_path / "run", state=state, steps=0, checkpoint=".step_000002.draft/learner")
    write_summary(folder, read_summary(folder) | {"process": GONE})
    (folder / "checkpoints" / ".step_000002.draft" / "learner" / "half.pt").touch()
    (folder / "metrics.jsonl").touch()
    check_new(folder)
    begin(folder, "gvm", config_with(seed=5), resumed=False)
    assert set(contents(folder)) == {"config.yaml", "summary.json"}
    assert load_config(folder / "config.yaml").seed == 5
    assert json.loads((folder / "summary.json").read_text())["stage"] == "gvm"


@pytest.mark.parametrize(
    ("run", "line"),
    [
        ({"state": "finished"}, "give another --out (the run in it is finished; --resume with a larger train.steps goes on)"),
        ({"state": "finished", "checkpoint": None}, "it kept no checkpoint, so train further by a new run with model.path="),
        ({"state": "finished", "stage": "gvm"}, "give another --out (the run in it is finished)"),
        ({"state": "interrupted"}, "already there and not empty; give another --out, or --resume to continue the run in it"),
        ({"state": "failed", "steps": 3, "checkpoint": None}, "it has no checkpoint to continue from: its state is failed"),
        ({"state": "running", "steps": 0, "checkpoint": None}, f"process {os.getpid()} on {socket.gethostname()} still runs in it"),
        ({"state": "failed", "steps": 0}, "already there and not empty"),  # resumed, and it failed before it went on
    ],
)
def test_any_other_run_keeps_its_folder(tmp_path, run, line):
    folder = make_run(tmp_path / "run", **run)
    assert line in refused(check_new, folder)


@pytest.mark.parametrize("foreign", ["notes.txt", "logs/mine.txt", "evaluation/step_000010.jsonl", "sub/config.yaml"])
def test_files_that_no_run_made_are_never_removed(tmp_path, foreign):
    folder = make_run(tmp_path / "run", state="failed", steps=0, checkpoint=None)
    (folder / foreign).parent.mkdir(exist_ok=True)
    (folder / foreign).write_text("mine")
    assert foreign in refused(check_new, folder)
    begin(folder, "train", config_with(), resumed=False)  # of a caller that did not ask
    assert (folder / foreign).read_text() == "mine"


def test_an_empty_folder_and_none_are_new(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    check_new(tmp_path / "run")
    check_new(tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: a file with this name is already there"):
        check_new(tmp_path / "file")


# ------------------------------------------------------------------------------------------------ by the commands


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_command_refuses_before_it_loads_anything(stage, tmp_path, capsys, monkeypatch):
    """The model and the data of the config do not exist."""
    monkeypatch.setattr(cli, "quiet_libraries", lambda: None)
    monkeypatch.setattr("dvpo_ray.data.hub.refuse_unreachable", lambda *_: None)
    (tmp_path / "config.yaml").write_text(dump_config(config_with()))
    checkpoint = {"train": "step_000004/learner", "sft": "checkpoint-4", "dpo": "checkpoint-4"}.get(stage, "step_000004/trainer")
    folder = make_run(tmp_path / "run", stage, checkpoint=checkpoint)
    other = make_run(tmp_path / "other", "gvm" if stage == "train" else "train", checkpoint=None)
    command = STAGES[stage].command.split()[1:]
    before = contents(tmp_path)
    for out, changes, line in ((folder, ["seed=3"], "but seed was 0 and is 3 now"), (other, [], f"which `{STAGES[stage].command}` cannot resume")):
        assert cli.main([*command, str(tmp_path / "config.yaml"), *changes, "--out", str(out), "--resume"]) == 2
        printed, error = capsys.readouterr()
        assert without_loading(printed) == "" and error.startswith(f"dvpo: {out}: ") and line in error and error.count("\n") == 1
    assert contents(tmp_path) == before


# ------------------------------------------------------------------------------------------------- who runs in it


def test_a_folder_has_one_owner(tmp_path):
    folder = make_run(tmp_path / "run")
    lock = locked(folder)
    beside = f"import sys; from pathlib import Path; from dvpo_ray.training.run_folder import locked; locked(Path({str(folder)!r}))"
    refusal = subprocess.run([sys.executable, "-c", beside], capture_output=True, text=True, check=False)
    told = f"process {os.getpid()} on {socket.gethostname()} still runs in it; wait for its end or stop it, or give another --out"
    assert refusal.returncode == 1 and told in refusal.stderr
    lock.close()
    assert subprocess.run([sys.executable, "-c", beside], check=False).returncode == 0


def test_a_run_whose_process_is_gone_is_told_apart(tmp_path):
    assert living({"state": "running", "process": this_process()})
    assert living({"state": "running", "process": GONE | {"host": "elsewhere"}})  # nothing is known of another machine
    assert not living({"state": "running", "process": GONE})
    assert not living({"state": "failed", "process": this_process()})


def test_the_end_of_a_run_fits_where_its_beginning_stands(tmp_path):
    """On a full disk there is no room for a second file, nor for one that grows."""
    folder = make_run(tmp_path / "run")
    write_summary(folder, read_summary(folder))
    before = (folder / "summary.json").stat()
    amend_summary(folder, {"state": "failed", "error": "no space left on the disk"})
    after = (folder / "summary.json").stat()
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)
    assert read_summary(folder)["error"] == "no space left on the disk" and read_summary(folder)["stage"] == "train"


def test_the_command_that_continues_a_run_needs_a_checkpoint(tmp_path, monkeypatch):
    assert resume_command(make_run(tmp_path / "early", steps=0, checkpoint=None), "train") is None
    folder = make_run(tmp_path / "my run", "gvm", checkpoint="step_000004/trainer")
    monkeypatch.chdir(tmp_path)
    assert resume_command(folder, "gvm") == "dvpo gvm train 'my run/config.yaml' --out 'my run' --resume"
