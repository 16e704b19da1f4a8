"""The experiments on value models: which runs they are made of, and their tables. No run is real here."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file
from study_fakes import STORIES, dvpo, leave_policy, leave_value_model, result_of

from dvpo_ray.experiments.gvm_quality import VARIANTS

VIEWS = ("mean", "last", "p10", "p50", "p90", "position_25", "position_50", "position_75", "position_100", "longer_wins")


def views(accuracy: float) -> dict[str, float]:
    return dict.fromkeys(VIEWS, accuracy)


# --------------------------------------------------------------------------------------------------------- quality


def test_quality_compares_every_objective_outcome_and_context(faked, tmp_path):
    started = faked(lambda run: leave_value_model(run, views(0.7 + 0.01 * run.seed)))
    assert dvpo("gvm-quality", STORIES, "gvm.outcome=score", "gvm.context.examples=4", "--seeds", 0, 1, "--out", tmp_path) == 0
    assert [run.variant for run in started] == [*VARIANTS, *VARIANTS]
    settings = {run.variant: run.config.gvm for run in started}
    assert {name: gvm.objective for name, gvm in settings.items() if "+" not in name} == {
        name: name for name in ("td0", "td_lambda", "monte_carlo", "bradley_terry")
    }
    # Beside what its name says a variant is like every other, whatever the config says.
    assert [name for name, gvm in settings.items() if gvm.outcome == "score"] == ["td_lambda+score", "monte_carlo+score"]
    assert [name for name, gvm in settings.items() if gvm.bradley_terry_weight > 0] == ["td0+bt", "td_lambda+bt", "monte_carlo+bt"]
    assert {name: gvm.context.examples for name, gvm in settings.items() if gvm.context.examples} == {"monte_carlo+tau": 2}
    table = {row["variant"]: row for row in result_of(tmp_path)["table"]}
    assert table["td0"]["position_50"]["mean"] == pytest.approx(0.705)
    assert table["td0"]["explained variance"]["mean"] == 0.2 and "explained variance" not in table["bradley_terry"]
    assert set(VIEWS) < set(table["td0"])
    assert (tmp_path / "table.md").read_text().startswith("| variant | mean | last |")


def test_an_explained_variance_that_is_not_defined_is_a_dash(faked, tmp_path):
    faked(lambda run: leave_value_model(run, views(0.7), None))
    assert dvpo("gvm-quality", STORIES, "--variants", "td0", "--seeds", 0, "--out", tmp_path) == 0
    assert (tmp_path / "table.md").read_text().splitlines()[2].endswith("| – |")


# ------------------------------------------------------------------------------------------------------------ size


def leave_sized(run):
    if run.stage == "policy":
        leave_policy(run, [0.5, 0.8], [0.0, 6.0])
        return
    leave_value_model(run, views(0.6 + 0.05 * (run.config.gvm.num_layers or 5)))
    (run.folder / "metrics.jsonl").write_text('{"step": 1, "time/step_seconds": 1.5}\n{"step": 2, "time/step_seconds": 0.5}\n')
    (run.folder / "final").mkdir(exist_ok=True)
    save_file({"a": np.zeros((1000, run.config.gvm.num_layers or 5)), "b": np.zeros(500)}, run.folder / "final" / "model.safetensors")


def test_sizes_are_truncations_and_other_checkpoints(faked, tmp_path):
    started = faked(leave_sized)
    argv = ("gvm-size", STORIES, "gvm.num_layers=3", "--layers", 1, 2, "--init-from", "models/small", "--policies", "--seeds", 7, "--out", tmp_path)
    assert dvpo(*argv) == 0
    models = [run for run in started if run.stage == "gvm"]
    assert [(run.variant, run.config.gvm.num_layers, run.config.gvm.init_from) for run in models] == [
        ("layers-1", 1, None),
        ("layers-2", 2, None),
        ("whole", None, None),
        ("small", None, "models/small"),
    ]
    policies = {run.variant: run.config.gvm.path for run in started if run.stage == "policy"}
    assert policies["policy-layers-2"] == str(tmp_path / "layers-2-seed7" / "final")
    row = result_of(tmp_path)["table"][1]
    assert row["parameters, millions"]["mean"] == pytest.approx(2500 / 1e6)
    assert row["training seconds"]["mean"] == 2.0
    assert (row["last"]["mean"], row["final gold"]["mean"]) == (pytest.approx(0.7), pytest.approx(0.8))


def test_sizes_without_policies_need_no_prompts(faked, tmp_path, capsys):
    started = faked(leave_sized)
    assert dvpo("gvm-size", STORIES, "data.prompts=null", "--layers", 1, "--seeds", 0, "--out", tmp_path) == 0
    assert [run.variant for run in started] == ["layers-1", "whole"]
    assert "final gold" not in (tmp_path / "table.md").read_text()
    assert dvpo("gvm-size", STORIES, "data.prompts=null", "--policies") == 2
    assert "data.prompts.path is not set, and gvm-size needs it" in capsys.readouterr().err
    assert dvpo("gvm-size", STORIES, "--init-from", "a/small", "b/small") == 2
    assert "--init-from b/small: there are two variants small" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- transfer

DOMAINS = ("--domain", "a=a.train.jsonl,a.dev.jsonl", "--domain", "b=b.train.jsonl,b.dev.jsonl")
HOME, ABROAD = 0.8, 0.6


def leave_transfer(run):
    at_home = run.variant.split("-")[1:] in (["a", "on", "a"], ["b", "on", "b"]) or run.stage == "gvm"
    if run.stage == "policy":
        leave_policy(run, [0.5, 0.9 if at_home else 0.7], [0.0, 6.0])
    else:
        leave_value_model(run, views(HOME if at_home else ABROAD))


def test_transfer_judges_and_uses_each_value_model_in_both_domains(faked, tmp_path):
    started = faked(leave_transfer)
    assert dvpo("transfer", STORIES, *DOMAINS, "--seeds", 0, "--out", tmp_path) == 0
    runs = {run.variant: run.config for run in started}
    assert list(runs)[:4] == ["gvm-a", "gvm-b", "eval-a-on-b", "eval-b-on-a"] and len(runs) == 8
    assert runs["gvm-a"].data.preferences.path == "a.train.jsonl" and runs["gvm-a"].data.preferences.heldout_path == "a.dev.jsonl"
    judged = runs["eval-a-on-b"]
    assert (judged.gvm.path, judged.data.preferences.heldout_path) == (str(tmp_path / "gvm-a-seed0" / "final"), "b.dev.jsonl")
    used = runs["policy-a-on-b"]
    assert (used.gvm.path, used.data.prompts.path) == (str(tmp_path / "gvm-a-seed0" / "final"), "b.train.jsonl")
    table = {row["value model of → judged on"]: row for row in result_of(tmp_path)["table"]}
    assert {label: (row["last"]["mean"], round(row["gold gain"]["mean"], 6)) for label, row in table.items()} == {
        "a → a": (HOME, 0.4),
        "a → b": (ABROAD, 0.2),
        "b → a": (ABROAD, 0.2),
        "b → b": (HOME, 0.4),
    }


def test_transfer_of_accuracy_alone(faked, tmp_path):
    started = faked(leave_transfer)
    assert dvpo("transfer", STORIES, "evaluation.judge=none", *DOMAINS, "--accuracy-only", "--seeds", 0, "--out", tmp_path) == 0
    assert {run.stage for run in started} == {"gvm", "gvm-eval"}
    assert "gold gain" not in result_of(tmp_path)["table"][0]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--domain", "a=x"], "argument --domain: a=x: expected NAME=TRAIN,HELDOUT"),
        (["--domain", "a=x,y"], "transfer is between two domains of different names, got a"),
        (["--domain", "a=x,y", "--domain", "a=z,w"], "transfer is between two domains of different names, got a, a"),
        (["evaluation.judge=none", *DOMAINS], "evaluation.judge is none, and transfer compares gold; set one"),
    ],
)
def test_what_transfer_refuses(argv, line, capsys):
    assert dvpo("transfer", STORIES, *argv) == 2
    assert line in capsys.readouterr().err
