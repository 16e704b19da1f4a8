"""What the runs of an experiment read is checked before the first of them starts, in a dry run as in a real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from study_fakes import STORIES, dvpo

from dvpo_ray.experiments import runner

PAIRS, PROMPTS = ("runs/stories/preferences.train.jsonl", "runs/stories/preferences.heldout.jsonl"), "runs/stories/prompts.jsonl"


@pytest.fixture(autouse=True)
def in_a_folder_with_everything(tmp_path, monkeypatch):
    """All that stories-cpu.yaml names is there, by the looks of it; no run ever starts."""
    monkeypatch.chdir(tmp_path)
    leave_model("stories260K", num_hidden_layers=5, max_position_embeddings=512)
    leave_artifact("runs/stories/gvm/final", "monte_carlo")
    leave_artifact("runs/stories/rm/final", "bradley_terry")
    Path(PROMPTS).touch()
    for file, rows in zip(PAIRS, (550, 1), strict=True):
        Path(file).write_text("".join(json.dumps({"prompt": f"{file} {i}", "chosen": "yes", "rejected": "no"}) + "\n" for i in range(rows)))


def leave_model(folder: str, **config) -> None:
    Path(folder).mkdir(parents=True)
    (Path(folder) / "config.json").write_text(json.dumps(config))


def leave_artifact(folder: str, objective: str) -> None:
    leave_model(folder)
    (Path(folder) / "gvm.json").write_text(json.dumps({"objective": {"name": objective}}))


@pytest.fixture
def started(monkeypatch) -> list:
    """The runs that were started."""
    started: list = []
    monkeypatch.setattr(runner, "STAGES", dict.fromkeys(runner.STAGES, lambda run, console: started.append(run)))
    return started


def notes(capsys, name: str, *argv: str) -> list[str]:
    """The notes of an experiment's dry run on the stories config with one seed."""
    assert dvpo(name, STORIES, *argv, "--seeds", 0, "--out", "out", "--dry-run") == 0
    assert not Path("out").exists()
    return [line.removeprefix("note: ") for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]


def refusal(capsys, name: str, *argv: str) -> str:
    """The one line of an experiment that starts nothing."""
    assert dvpo(name, STORIES, *argv, "--seeds", 0, "--out", "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("dvpo: ") and error.count("\n") == 1
    return error.removeprefix("dvpo: ").rstrip("\n")


JUDGED = ["evaluation.every_steps=2"]
DOMAINS = ["--domain", f"a={PAIRS[0]},{PAIRS[1]}", "--domain", "b=b.jsonl,b.dev.jsonl"]
MISSING = [
    ("gvm-quality", [f"data.preferences.path={PAIRS[0]}x.jsonl"], f"data.preferences.path {PAIRS[0]}x.jsonl: "),
    ("transfer", DOMAINS, "data.preferences.path b.jsonl: "),
    ("gvm-size", ["--layers", "1", "6"], "gvm.num_layers 6: ./stories260K has 5 decoder layers"),
    ("gvm-size", ["--init-from", "./small"], "gvm.init_from ./small: "),
    ("bound", ["--policy", "runs/stories"], "--policy runs/stories: "),
    ("bound", ["--policy", "runs/stories/gvm/final"], "--policy runs/stories/gvm/final: a value model"),
    ("convergence", [*JUDGED, "reward_model.path=runs/stories/rm"], "reward_model.path runs/stories/rm: "),
    ("advantage-modes", [*JUDGED, "gvm.path=runs/stories/rm/final"], "gvm.path runs/stories/rm/final: a reward model"),
    ("distribution-shift", ["gvm.path=runs/stories/gvm"], "gvm.path runs/stories/gvm: "),
    ("bound", ["--pairs", "50", "551", "500"], f"--pairs 551: {PAIRS[0]} has 550 training pairs; ask for fewer"),
    (
        "refresh",
        [*JUDGED, "train.steps=11", "gvm.refresh.prompts=10", "gvm.refresh.pairs_per_prompt=2", "--pairs", "511", "--every", "10", "5"],
        f"--pairs 511 + 40 that refreshes can collect = 551: {PAIRS[0]} has 550 training pairs; ask for fewer",
    ),
    ("advantage-modes", [*JUDGED, "policy.trainable_layers=6"], "policy.trainable_layers 6: ./stories260K has 5 decoder layers"),
    (
        "convergence",
        [*JUDGED, "rollout.max_response_tokens=496", "batch.micro_batch_tokens=999999"],
        "data.max_prompt_tokens 17 + rollout.max_response_tokens 496 = 513 tokens, but ./stories260K has a context of 512",
    ),
    ("refresh", [*JUDGED, "data.prompts.path=runs/prompts.jsonl"], "data.prompts.path runs/prompts.jsonl: "),
]
"""The lines of checks that other commands have too are given by their beginnings."""


@pytest.mark.parametrize(("name", "argv", "line"), MISSING, ids=[f"{name} {argv[-1]}" for name, argv, _ in MISSING])
def test_what_is_missing_is_a_note_of_the_dry_run_and_the_end_of_a_run_before_it_starts(name, argv, line, started, capsys):
    note = notes(capsys, name, *argv)[0]
    assert note.startswith(line)
    assert refusal(capsys, name, *argv) == note
    assert not started and not Path("out").exists()


@pytest.mark.parametrize("name", ["gvm-quality", "convergence", "distribution-shift", "bound", "gvm-size", "advantage-modes", "refresh"])
def test_where_everything_is_there_nothing_is_noted(name, capsys):
    assert notes(capsys, name, *JUDGED) == []


def test_what_the_experiment_makes_itself_is_not_missed(capsys):
    assert notes(capsys, "convergence", *JUDGED, "gvm.path=null", "reward_model.path=null") == []
    assert notes(capsys, "gvm-size", "--policies") == []


def test_names_of_the_hub_are_left_to_the_run(capsys):
    assert notes(capsys, "gvm-size", "--init-from", "meta-llama/Llama-3.2-1B-Instruct") == []
    assert notes(capsys, "gvm-quality", "data.preferences.path=ultrafeedback_binarized") == []
    # What starts with a folder of this machine is no name of the hub.
    assert notes(capsys, "gvm-quality", "data.preferences.path=runs/pairs") == [
        f"data.preferences.path runs/pairs: no such file or folder in {Path.cwd()}, where this command starts"
    ]


def test_pairs_on_the_hub_are_counted_by_the_run_alone(capsys, started, monkeypatch):
    argv = ["bound", "data.preferences.path=ultrafeedback_binarized", "--pairs", "999999999"]
    assert notes(capsys, *argv) == []
    read = []
    monkeypatch.setattr("dvpo_ray.data.splitting.read_rows", lambda path, split: read.append(path) or iter(()))
    refusal(capsys, *argv)
    assert read == ["ultrafeedback_binarized"] and not started


def test_every_stage_says_what_it_reads():
    assert set(runner.NEEDED) == set(runner.STAGES)


# ------------------------------------------------------------------------------------------------- options and folder


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["gvm-quality", "--bt-weight", "nan"], "argument --bt-weight: 'nan' is "),
        (["gvm-size", "--layers", "0"], "argument --layers: '0' is "),
        (["distribution-shift", "--positions", "101"], "argument --positions: '101' is "),
        (["advantage-modes", "--kl", "inf"], "argument --kl: 'inf' is "),
    ],
)
def test_options_that_mean_nothing(argv, line, capsys):
    assert dvpo(argv[0], STORIES, *argv[1:]) == 2
    assert capsys.readouterr().err.startswith(f"dvpo: {line}")


@pytest.mark.parametrize(
    ("file", "content", "line"),
    [
        ("notes.txt", "mine", "out: not empty, and without a run of an experiment; give another --out"),
        ("result.json", '{"experiment": "bound"}', "out: holds the experiment bound, not gvm-quality; give another --out"),
        ("result.json", "{", "out/result.json: not readable as JSON"),
        (
            "td0-seed0/summary.json",
            "[]",
            "out/td0-seed0/summary.json: not readable as JSON (expected an object); remove out/td0-seed0 to do it again",
        ),
    ],
)
@pytest.mark.parametrize("mode", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_folder_of_something_else_is_refused(file, content, line, mode, started, capsys):
    path = Path("out") / file
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert dvpo("gvm-quality", STORIES, "--variants", "td0", "--seeds", 0, "--out", "out", *mode) == 2
    assert capsys.readouterr().err.startswith(f"dvpo: {line}")
    assert path.read_text() == content and not started


def test_runs_of_other_seeds_are_no_other_experiment(capsys):
    Path("out/td0-seed7").mkdir(parents=True)
    assert dvpo("gvm-quality", STORIES, "--variants", "td0", "--seeds", 0, "--out", "out", "--dry-run") == 0


CURVES = ["evaluation.every_steps=5"]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["advantage-modes", *CURVES, "--modes", "td", "td"], "the run td-seed0 is asked for twice; name every variant once"),
        (["convergence", *CURVES, "--algorithms", "dvpo", "dvpo"], "the run dvpo-seed0 is asked for twice"),
        (["convergence", *CURVES, "--algorithms", "dvpo", "--grid", "policy.learning_rate=1e-4,1e-4"], "the run dvpo-1e-4-seed0 is asked for twice"),
        (
            ["convergence", *CURVES, "--set", "ppo:train.steps=3"],
            "ppo differs from dvpo in train.steps x batch.prompts_per_step x batch.samples_per_prompt",
        ),
        (["convergence", *CURVES, "--set", "grpo:evaluation.prompts=3"], "grpo differs from dvpo in evaluation"),
        (
            ["convergence", *CURVES, "--algorithms", "dvpo", "--grid", "rollout.max_response_tokens=8,9"],
            "dvpo-9 differs from dvpo-8 in rollout.max_response_tokens",
        ),
        (["transfer", "--domain", "a=x,y", "--domain", "b=x,z"], "--domain: x is given twice; transfer needs four different files"),
        (["transfer", "--domain", "a=x,x", "--domain", "b=z,y"], "--domain: x is given twice"),
        (["convergence", *CURVES, "--grid", "seed=1,2"], "--grid seed=1,2: the command itself chooses seed"),
        (["advantage-modes", *CURVES, "algorithm=ppo"], f"{STORIES}: algorithm is ppo, which has no advantage modes to compare"),
    ],
)
def test_comparisons_that_would_compare_nothing(argv, line, started, capsys):
    assert dvpo(argv[0], STORIES, *argv[1:], "--seeds", 0, "--out", "out") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dvpo: {line}") and error.count("\n") == 1
    assert not started


def test_a_position_counts_once(capsys):
    assert dvpo("distribution-shift", STORIES, "--positions", 50, 0, 50, "--seeds", 0, "--out", "out", "--dry-run") == 0
    assert "positions=[50.0, 0.0]" in capsys.readouterr().out
