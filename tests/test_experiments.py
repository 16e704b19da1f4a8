"""Experiments: which runs they start and keep, and the statistics they end in. No run is real here."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
from study_fakes import ROOT, STORIES, dvpo, leave_policy

from dvpo_ray.experiments.advantage_modes import summarise
from dvpo_ray.experiments.readings import Curve
from dvpo_ray.experiments.registry import STUDIES
from dvpo_ray.experiments.results import first_reaching, markdown, over_seeds, t_quantile, with_deviation, with_interval


def curve(variant, seed, kl, gold):
    n = len(kl)
    return Curve(variant, seed, np.arange(n), 2.0 * np.arange(n), np.array(kl, float), np.array(gold, float))


# ------------------------------------------------------------------------------------------------------ statistics


def test_gold_is_read_where_a_run_first_reaches_a_kl():
    run = curve("gae", 0, [0, 4, 10, 6, 12], [0.5, 0.7, 0.9, 0.1, 1.0])
    assert run.gold_at_kl(0) == 0.5
    assert run.gold_at_kl(2) == pytest.approx(0.6)
    assert run.gold_at_kl(7) == pytest.approx(0.8)  # the first crossing, not the later one
    assert math.isnan(run.gold_at_kl(13))
    assert first_reaching(run.gold, run.seconds, 0.8) == pytest.approx(3.0)


def test_interval_over_seeds_is_students():
    cell = over_seeds([0.7, 0.8, 0.9])
    assert (cell["mean"], cell["std"]) == (pytest.approx(0.8), pytest.approx(0.1))
    half = 4.302653 * 0.1 / math.sqrt(3)  # t(0.975, 2 degrees of freedom)
    assert cell["ci95"] == [pytest.approx(0.8 - half, abs=1e-4), pytest.approx(0.8 + half, abs=1e-4)]
    assert over_seeds([0.7])["ci95"] is None and over_seeds([0.7])["std"] == 0.0
    assert math.isnan(over_seeds([0.7, math.nan])["mean"])


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.706), (4, 2.776), (10, 2.228), (20, 2.086), (30, 2.042), (500, 1.965)])
def test_t_quantiles(degrees, quantile):
    assert t_quantile(degrees) == pytest.approx(quantile, abs=0.006)


def test_cells_of_a_table():
    rows = [{"mode": "a", "gold": over_seeds([0.5, 0.7]), "KL": over_seeds([123.0])}, {"mode": "b", "gold": over_seeds([math.nan])}]
    assert markdown(rows, with_interval).splitlines()[2:] == ["| `a` | 0.600 [-0.671, 1.871] | 123.0 |", "| `b` | – | – |"]
    assert markdown(rows, columns=["KL"]).splitlines()[0] == "| mode | KL |"


def test_table_of_the_advantage_modes():
    curves = [curve("gae", 0, [0, 8], [0.5, 0.9]), curve("gae", 1, [0, 8], [0.5, 0.7]), curve("td", 0, [0, 2], [0.5, 0.6])]
    rows = list(summarise(curves, [8]))
    assert [row["mode"] for row in rows] == ["gae", "td"]
    assert (rows[0]["gold at 8 nats"]["mean"], rows[0]["gold at 8 nats"]["std"]) == (pytest.approx(0.8), pytest.approx(0.2 / math.sqrt(2)))
    text = markdown(rows, with_deviation)
    assert "| `gae` | 0.800 ± 0.141 |" in text and "| `td` | – |" in text


# ------------------------------------------------------------------------------------------------ runs and results

MODES = ["advantage-modes", STORIES, "evaluation.every_steps=1", "--modes", "td", "gae"]


def leave(run):
    level = {"td": 0.6, "gae": 0.7}[run.config.advantage.mode] + 0.01 * run.config.seed
    leave_policy(run, [0.5, level, level + 0.1], [0.0, 5.0, 10.0])


def test_an_experiment_ends_in_a_table_a_plot_and_a_json(faked, tmp_path, capsys):
    started = faked(leave)
    assert dvpo(*MODES, "--seeds", 0, 1, "--out", tmp_path) == 0
    assert [run.folder.name for run in started] == ["td-seed0", "gae-seed0", "td-seed1", "gae-seed1"]
    assert all(run.config.out == str(run.folder) for run in started)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["experiment"], result["seeds"], result["samples_per_step"]) == ("advantage-modes", [0, 1], 64)
    assert result["table"][1]["final gold"]["values"] == [pytest.approx(0.8), pytest.approx(0.81)]
    assert result["curves"][0]["seconds"] == [0.0, 2.0, 4.0]
    table = (tmp_path / "table.md").read_text()
    assert "| `gae` |" in table and table in capsys.readouterr().out
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_finished_runs_are_kept_and_seeds_can_be_added(faked, tmp_path):
    faked(leave)
    assert dvpo(*MODES, "--seeds", 0, "--out", tmp_path) == 0
    summary = tmp_path / "td-seed0" / "summary.json"
    summary.write_text(summary.read_text().replace("finished", "interrupted"))
    started = faked(leave)
    assert dvpo(*MODES, "--seeds", 0, 1, "--out", tmp_path) == 0
    assert [run.folder.name for run in started] == ["td-seed0", "td-seed1", "gae-seed1"]


def test_a_folder_of_another_setting_is_refused_before_anything_starts(faked, tmp_path, capsys):
    faked(leave)
    assert dvpo(*MODES, "--seeds", 0, "--out", tmp_path) == 0
    started = faked(leave)
    capsys.readouterr()
    assert dvpo(*MODES[:3], "policy.learning_rate=1e-4", "--seeds", 0, "--out", tmp_path) == 2
    folder = tmp_path / "gae-seed0"
    refused = capsys.readouterr().err
    assert "holds a run with policy.learning_rate 0.0003, not 0.0001; give another --out, or remove that folder" in refused
    assert not started and folder.is_dir()


def test_dry_run_lists_the_runs_and_starts_nothing(faked, tmp_path, capsys):
    started = faked(leave)
    assert dvpo(*MODES, "--seeds", 0, "--out", tmp_path / "new", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 runs, 2 to do"
    assert lines[1].split() == ["to", "do", "policy", "td-seed0", 'advantage.mode="td"']
    assert not started and not (tmp_path / "new").exists()


def test_release_is_compared_with_both_whitenings_of_its_values(capsys):
    argv = [*MODES[:3], "advantage.value_whitening=row", "--seeds", 0, "--dry-run"]
    assert dvpo(*argv) == 0 and dvpo(*argv, "--modes", "release") == 0
    lines = [line.split()[3:] for line in capsys.readouterr().out.splitlines() if line.startswith("to do")]
    assert lines == [
        *([f"{mode}-seed0", f'advantage.mode="{mode}"'] for mode in ("static_q", "td", "gae")),
        *([f"release-{w}-seed0", 'advantage.mode="release"', f'advantage.value_whitening="{w}"'] for w in ("row", "batch")),
        ["release-seed0", 'advantage.mode="release"'],
    ]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ([], "evaluation.every_steps is 0, and advantage-modes compares gold along the run; set it"),
        (["evaluation.every_steps=4", "gvm.path=null"], "gvm.path is not set, and advantage-modes needs it"),
        (["evaluation.every_steps=4", "data.prompts=null"], "data.prompts.path is not set, and advantage-modes needs it"),
        (["evaluation.every_steps=4", "batch.prompts_per_step=6"], "can't be shared evenly"),
    ],
)
def test_what_a_config_lacks_is_said_before_anything_starts(settings, line, capsys):
    assert dvpo("advantage-modes", STORIES, *settings) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


DOCUMENTED = re.findall(r"^    dvpo experiment ([a-z].*)$", (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("command", DOCUMENTED)
def test_every_documented_command_passes_its_dry_run(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cluster_configs").symlink_to(ROOT / "cluster_configs")
    assert dvpo(*shlex.split(command), "--dry-run") == 0
    # The data and the models are on no machine of ours: notes say so.
    first, *runs = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("note: ")]
    assert first == f"{len(runs)} runs, {len(runs)} to do" and runs


@pytest.mark.parametrize("config", ["stories-cpu.yaml", "experiments-8gpu.yaml"])
def test_every_experiment_is_documented_for_the_small_and_for_a_real_model(config):
    assert {command.split()[0] for command in DOCUMENTED if config in command} == set(STUDIES)


def test_dry_run_loads_neither_torch_nor_ray(tmp_path):
    code = f"import sys; from dvpo_ray.cli import main; main({['experiment', *MODES, '--dry-run']!r}); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path).stdout.splitlines()[-1].split()
    assert not {"torch", "ray", "transformers", "vllm", "deepspeed", "datasets"} & set(loaded)


@pytest.mark.parametrize(("checkpoint", "resumed"), [("step_000005", True), (".step_000005.draft", False)])
def test_a_stopped_run_goes_on_from_its_checkpoint_or_begins_anew(monkeypatch, tmp_path, checkpoint, resumed):
    """Steps before the first checkpoint are lost, not in the way."""
    from dvpo_ray.experiments.runner import STAGES
    from dvpo_ray.training import value_model as training

    options = Namespace(config=STORIES, overrides=[], seeds=[0], layers=[1], init_from=[], policies=False)
    run = STUDIES["gvm-size"](options, tmp_path).runs()[0]
    (run.folder / "checkpoints" / checkpoint).mkdir(parents=True)
    (run.folder / "config.yaml").write_text("{}")
    (run.folder / "metrics.jsonl").write_text('{"step": 1}\n')
    calls = []

    def train_value_model(config, settings, out, resume, console):
        calls.append((resume, (out / "metrics.jsonl").exists()))

    monkeypatch.setattr(training, "train_value_model", train_value_model)
    STAGES["gvm"](run, None)
    assert calls == [(resumed, resumed)]
