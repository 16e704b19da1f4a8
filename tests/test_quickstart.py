"""The quickstart's shipped data, its settings, what it prints, and the whole of it."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from dvpo_ray.cli import main
from dvpo_ray.config.arithmetic import derive_batch
from dvpo_ray.data.preferences import load_preferences
from dvpo_ray.data.prompts import load_prompts
from dvpo_ray.evaluation.gain import verdict
from dvpo_ray.evaluation.judges import make_judge
from dvpo_ray.planning.placement import plan_placement, total_resources
from dvpo_ray.quickstart.prompts import HELDOUT_PROMPTS, all_prompts, write_prompts
from dvpo_ray.quickstart.run import DATA, gold_table, quickstart_config, samples_table


def test_prompts_are_distinct_and_written_as_shipped(tmp_path):
    assert len(set(all_prompts())) == len(all_prompts())
    for file in write_prompts(tmp_path):
        assert file.read_text() == (DATA / file.name).read_text()


def test_shipped_pairs_are_split_by_prompt_and_labelled_by_the_gold_judge():
    config = quickstart_config()
    pairs, prompts = load_preferences(config.data.preferences, "error"), load_prompts(config.data.prompts, "error")
    trained = {pair.prompt for pair in pairs.train} | {prompt.content for prompt in prompts.train}
    heldout = {pair.prompt for pair in pairs.heldout} | {prompt.content for prompt in prompts.heldout}
    assert not trained & heldout
    assert len(prompts.heldout) == HELDOUT_PROMPTS >= config.evaluation.prompts >= 128
    judge = make_judge("vader")
    for pair in [*pairs.train[::50], *pairs.heldout[::50]]:
        scores = judge.score([pair.prompt] * 2, [pair.chosen, pair.rejected])
        assert scores == pytest.approx([pair.chosen_score, pair.rejected_score], abs=1e-4)
        assert scores[0] > scores[1]


def test_settings_fit_two_cores():
    config = quickstart_config()
    cpus, gpus = total_resources(plan_placement(config))
    assert cpus <= 2 and gpus == 0
    assert derive_batch(config).total_samples <= 2048


def test_overrides_win(tmp_path):
    config = quickstart_config(["train.steps=3", "data.prompts.path=other.jsonl"], checkpoint=tmp_path)
    assert config.train.steps == 3 and config.data.prompts.path == "other.jsonl" and config.model.path == str(tmp_path)


def test_a_bad_override_is_refused_before_anything_is_fetched(capsys, monkeypatch):
    monkeypatch.setattr("dvpo_ray.quickstart.run.smollm2_checkpoint", lambda **_: pytest.fail("fetched the model"))
    assert main(["quickstart", "policy.lerning_rate=1"]) == 2
    assert "learning_rate" in capsys.readouterr().err


def test_an_occupied_run_folder_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["quickstart", "--out", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err


def test_dry_run_prints_a_plan_and_starts_nothing(capsys, monkeypatch):
    monkeypatch.setattr("dvpo_ray.quickstart.run.smollm2_checkpoint", lambda **_: pytest.fail("fetched the model"))
    assert main(["quickstart", "--dry-run", "--steps", "7"]) == 0
    printed = capsys.readouterr().out
    assert "steps: 7" in printed and "samples per step" in printed


# ------------------------------------------------------------------------------------------------------- what it says


GOLD = {
    "prompts": 2,
    "before": {"mean": 0.1, "ci95": [0.0, 0.2]},
    "after": {"mean": 0.5, "ci95": [0.4, 0.6]},
    "gain": 0.4,
    "gain_ci95": [0.25, 0.55],
}


def printed(renderable) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(renderable)
    return console.file.getvalue()


def test_the_gold_table_has_both_means_and_the_interval():
    text = printed(gold_table(GOLD))
    for part in ("+0.100", "+0.500", "+0.400", "[+0.250, +0.550]"):
        assert part in text


@pytest.mark.parametrize(
    ("ends", "says"), [([0.1, 0.3], "better"), ([-0.3, -0.1], "worse"), ([-0.1, 0.3], "No clear change"), ([0.0, 0.3], "No clear")]
)
def test_the_verdict_follows_the_interval(ends, says):
    assert says in verdict({"gain_ci95": ends})


def test_samples_stand_side_by_side_by_prompt(tmp_path):
    (tmp_path / "evaluation").mkdir()
    for step, response, gold in ((0, " sad", -0.5), (9, " glad", 0.5)):
        rows = [{"prompt": f"prompt {i}", "response": response, "gold": gold, "kl": 0.0} for i in range(5)]
        (tmp_path / "evaluation" / f"step_{step:06d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [line for line in printed(samples_table(tmp_path, 9)).splitlines() if "prompt 0" in line]
    assert len(lines) == 1 and lines[0].index("sad (-0.50)") < lines[0].index("glad (+0.50)")


# ------------------------------------------------------------------------------------------------------------- all of it


@pytest.mark.slow
def test_the_whole_quickstart_on_a_tiny_model(tiny_model, tmp_path, capsys):
    """Every stage and every file of the run folder, on a model too small to get better."""
    out = tmp_path / "run"
    overrides = [
        f"model.path={tiny_model}",
        "rollout.backend=transformers",
        "gvm.num_layers=1",
        "policy.trainable_layers=1",
        "policy.deepspeed.zero_stage=1",
        "data.max_prompt_tokens=64",
        "data.max_response_tokens=160",
        "data.preferences.limit=64",
        "batch.prompts_per_step=8",
        "evaluation.prompts=8",
    ]
    assert main(["quickstart", *overrides, "--steps", "2", "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["state"] == "finished" and summary["steps"] == 2
    printed = capsys.readouterr().out
    assert printed.startswith("loading the libraries: starts\n")
    assert re.search(r"^.*learner-0.*: ready after \d", printed, re.MULTILINE) and "start of the actors · done in" in printed
    assert f"report: {out}/report.html\nmodel: {out}/final\nnext, to judge it on held-out prompts:\ndvpo eval {out}/config.yaml" in printed
    assert {"before", "after", "gain", "gain_ci95"} <= set(summary["gold"]) and summary["gold"]["prompts"] == 8
    assert set(summary["gvm"]["heldout_accuracy"]) >= {"mean", "last"}
    assert summary["duration_seconds"] > json.loads((out / "gvm" / "summary.json").read_text())["duration_seconds"]
    assert summary["peak_memory_gib"] > 0
    for file in ("config.yaml", "metrics.jsonl", "report.html", "rollouts/step_000001.jsonl", "final/config.json", "gvm/final/gvm.json"):
        assert (out / file).is_file(), file
    first, second = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    assert abs(first["kl/reference_mean"]) < 1e-4 < abs(second["kl/reference_mean"])  # the engine did get the trained layer
    assert max(row["mismatch/log_prob_abs_max"] for row in (first, second)) < 1e-3
    assert "gold score" in printed
