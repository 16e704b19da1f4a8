"""report.html, from whole and partial run folders."""

import html.parser
import json
import math
import os
import re
import socket
from pathlib import Path

import psutil
import pytest
from report_pages import AFTER, BEFORE, HEADLINES, evaluation, finished_run, page, rollout, step_metrics, visible, write_rows

from dvpo_ray.config.algorithms import ALGORITHMS
from dvpo_ray.evaluation.gain import gain_of
from dvpo_ray.monitoring import report_texts
from dvpo_ray.monitoring.charts import number
from dvpo_ray.monitoring.metrics import MetricsLog
from dvpo_ray.monitoring.report_charts import MOST_POINTS, Curves
from dvpo_ray.monitoring.report_summary import origin
from dvpo_ray.monitoring.run_data import load_run
from dvpo_ray.monitoring.run_files import write_summary


@pytest.fixture
def run(tmp_path) -> Path:
    return finished_run(tmp_path)


# --------------------------------------------------------------------------------------------------- whole runs


def test_the_summary_box_has_the_main_numbers(run):
    text = visible(page(run))
    gold = gain_of(BEFORE, AFTER)
    gain, (low, high) = gold["gain"], gold["gain_ci95"]
    assert "0.0833 → 0.45" in text
    assert f"+{number(gain)} on 6 held-out prompts, 95 % interval +{number(low)} to +{number(high)}: a clear gain" in text
    for expected in (
        "first · policy finished",
        "With the gold score, not instead of it.",
        "12.5 nats",
        "79.2%",
        "73.1% by mean value, of held-out pairs; 79.2% by last value",
        "3 min 05 s",
        "6.25 GiB",
        "6 s per step",
        "model SmolLM2",
    ):
        assert expected in text, expected


@pytest.mark.parametrize("algorithm", [name for name, roles in ALGORITHMS.items() if roles.section == "reward_model"])
def test_a_baseline_shows_its_reward_model_and_no_gvm(run, algorithm):
    summary = json.loads((run / "summary.json").read_text())
    del summary["gvm"]
    trained = {"reward_model": {"heldout_accuracy": {"mean": 0.512, "last": 0.688}}}
    write_summary(run, summary | {"algorithm": algorithm} | trained)
    text = visible(page(run))
    assert "Reward model accuracy 68.8% by last value, of held-out pairs" in text and "GVM accuracy" not in text and "51.2%" not in text
    write_summary(run, summary)  # of a run that ended before it began
    (run / "config.yaml").write_text(f"algorithm: {algorithm}\n", encoding="utf-8")
    text = visible(page(run))
    assert "Reward model accuracy – not in the summary" in text and "GVM accuracy" not in text


def test_the_accuracy_of_the_scoring_model_comes_with_its_pairs_and_its_warnings(run):
    measured = {"heldout_accuracy": {"mean": 1.0, "last": 1.0, "longer_wins": 1.0}, "pairs": 6, "accuracy_ci95": {"mean": [0.61, 1.0]}}
    write_summary(run, {"state": "finished", "gvm": measured, "warnings": ["g: length alone"], "notes": ["g: length alone", "a note"]})
    text = visible(page(run))
    assert "100.0% by mean value, of 6 held-out pairs (61.0% to 100.0%); 100.0% by last value; 100.0% by length" in text
    assert "Worth a look g: length alone Notes on data and settings: 1 a note" in text


def test_alarms_are_grouped_by_rule_and_those_of_many_rules_are_folded(run):
    raised = [(1, "cut_off"), *((step, name) for step in range(10, 40, 10) for name in ("calibration", "value_bias", "gold_divergence"))]
    summary = json.loads((run / "summary.json").read_text())
    told = [{"step": step, "name": name, "text": f"{name} at {step}.", "advice": f"Mend {name}."} for step, name in raised]
    write_summary(run, summary | {"alarms": told})
    text = visible(page(run))
    assert (
        "Alarms: 10 Step 1, cut_off: cut_off at 1. Mend cut_off. 3 times from step 10 to step 30, calibration. The last: calibration at 30." in text
    )
    assert text.count("Mend calibration.") == 1 and "calibration at 20." not in text
    assert "<summary>Of other rules: 1</summary><ul><li>3 times from step 10 to step 30, gold_divergence" in page(run)
    write_summary(run, summary | {"alarms": told[:3]})
    assert "Of other rules" not in page(run)


@pytest.mark.parametrize("has_critic", [False, True])
def test_a_baseline_shows_what_it_optimises(run, has_critic):
    for path in (run / "evaluation").iterdir():
        path.unlink()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = {key for key in rows[0] if key.startswith("value/") and not has_critic} | {"reward/gold_mean"}
    rewards = [
        {key: number for key, number in row.items() if key not in values} | {"reward/model_mean": row["step"] - 3.5, "reward/model_std": 1.0}
        for row in rows
    ]
    write_rows(run / "metrics.jsonl", rewards)
    text = visible(page(run))
    assert "Reward −2.5 → −0.5" in text and "What the reward model gives the rollouts, before KL." in text
    assert ("What the critic predicts for the rollouts" in text) is has_critic and "What the value model predicts" not in text


def test_a_baseline_lists_the_settings_that_it_reads(run):
    config = "algorithm: grpo\nadvantage: {mode: release}\ngvm: {path: runs/gvm/final}\nreward_model: {path: runs/rm/final}\n"
    (run / "config.yaml").write_text(config, encoding="utf-8")
    write_summary(run, {"stage": "train", "state": "finished", "algorithm": "grpo", "advantage_mode": "grpo"})
    assert dict(origin(load_run(run))["settings"]) == {"algorithm": "grpo", "reward_model.path": "runs/rm/final"}
    assert "algorithm grpo" in visible(page(run)) and "advantage mode" not in visible(page(run))
    (run / "config.yaml").write_text(config.replace("grpo", "dvpo"), encoding="utf-8")
    write_summary(run, {"stage": "train", "state": "finished", "algorithm": "dvpo", "advantage_mode": "release"})
    assert dict(origin(load_run(run))["settings"]) == {"algorithm": "dvpo", "advantage.mode": "release", "gvm.path": "runs/gvm/final"}
    assert "advantage mode release" in visible(page(run))


def test_every_curve_is_drawn(run):
    figures = re.findall(r"<figure.*?</figure>", page(run), re.DOTALL)
    assert set(HEADLINES) <= {re.search("<h3>([^<]*)", figure)[1] for figure in figures if "<svg" in figure}


@pytest.mark.parametrize(("after", "verdict"), [([score - 0.5 for score in BEFORE], "a clear loss"), (BEFORE[::-1], "no clear change")])
def test_the_interval_of_the_gain_decides_its_verdict(run, after, verdict):
    write_rows(run / "evaluation" / "step_000003.jsonl", evaluation(after))
    assert verdict in visible(page(run))


def test_samples_run_from_the_largest_gain_to_the_largest_loss(run):
    before, after = [0.0] * 30, [i / 30 for i in range(-15, 15)]
    write_rows(run / "evaluation" / "step_000000.jsonl", evaluation(before))
    write_rows(run / "evaluation" / "step_000003.jsonl", evaluation(after, "A wonderful day."))
    text = visible(page(run))
    shown = [int(i) for i in re.findall(r"Prompt prompt (\d+)", text)]
    assert len(shown) == 8 and shown[0] == 29 and shown[-1] == 0 and shown == sorted(shown, reverse=True)
    assert "A day. 29" in text and "A wonderful day. 29" in text and "gold 0.47 (+0.47)" in text and "gold −0.50 (−0.50)" in text


def test_a_gain_that_rounds_to_nothing_is_neither_good_nor_bad(run):
    write_rows(run / "evaluation" / "step_000003.jsonl", evaluation([score - 0.001 for score in BEFORE]))
    text = page(run)
    assert "(±0)" in text and not re.search(r'chip (good|bad)">gold', text)


def test_the_response_whose_value_moves_most_is_coloured_twice(run):
    text = page(run)
    tokens = re.findall(r'<span class="tok (\w+)" style="--a:([\d.]+)" data-token="(\d)" title="([^"]*)">([^<]*)</span>', text)
    assert [token[4] for token in tokens] == ["Good", " fun", "&lt;|im_end|&gt;"] * 2
    assert [token[:2] for token in tokens[:3]] == [("pos", "0.667"), ("pos", "1.000"), ("pos", "0.933")]  # by value
    assert [token[:2] for token in tokens[3:]] == [("pos", "1.000"), ("pos", "0.250"), ("neg", "0.500")]  # by advantage
    assert "−0.75 worse" in text and "0.75 better" in text and "−1 less likely" in text and "1 more likely" in text
    tip = html.unescape(tokens[1][3])
    assert tip.splitlines() == ["token 2 ' fun'", "value 0.75 (+0.25)", "advantage 0.25", "log-prob −2, reference −2.5"]


def test_the_coloured_response_is_of_those_that_fit(run, monkeypatch):
    monkeypatch.setattr(report_texts, "MOST_TOKENS", 3)
    long = rollout(**{name: rollout()[name] * 2 for name in ("response_ids", "tokens", "advantages", "log_probs", "reference_log_probs")})
    write_rows(run / "rollouts" / "step_000003.jsonl", [rollout(), long | {"values": [0.0] * 6 + [9.0]}])
    assert "moves most among the 1 rollout of step 3 with at most 3 tokens." in visible(page(run))


def test_config_and_all_metrics_are_there(run):
    text = page(run)
    assert '<pre tabindex="0">name: first\nseed: 7\n</pre>' in text
    for name in step_metrics(1):
        assert f"<code>{name}</code>" in text


def test_evaluations_between_are_points_of_the_gold_curve(run):
    write_rows(run / "evaluation" / "step_000002.jsonl", evaluation(AFTER))
    assert page(run).count("held out 0.45, 95 % interval") == 2


def test_a_long_run_is_thinned_and_says_so(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(1, 1251):
            log.write(step, step_metrics(1) | {"policy/loss": float(step)})
    curves = Curves(load_run(tmp_path))
    assert len(curves.steps) <= MOST_POINTS and curves.steps[-1] == 1250
    assert curves.column("policy/loss")[0] == 3.5  # of steps 1 to 6
    text = page(tmp_path)
    assert "Each point is the mean of 6 steps." in text
    assert len(text) < 1_000_000


# ------------------------------------------------------------------------------------------------ partial runs


def remove(run: Path, name: str) -> None:
    path = run / name
    if path.is_dir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    else:
        path.unlink()


PARTS = ["metrics.jsonl", "summary.json", "evaluation", "rollouts", "config.yaml"]


@pytest.mark.parametrize("missing", PARTS)
def test_any_part_may_be_missing(run, missing):
    remove(run, missing)
    page(run)


@pytest.mark.parametrize("only", PARTS)
def test_any_part_alone_is_enough(run, only):
    for name in PARTS:
        if name != only:
            remove(run, name)
    page(run)


def test_a_run_that_failed_early_shows_how_far_it_came(run):
    remove(run, "evaluation/step_000003.jsonl")
    write_summary(run, {"name": "first", "state": "failed", "error": "weight sync did not finish", "steps": 3})
    text = visible(page(run))
    assert "first · policy failed" in text
    assert "The run failed after step 3. weight sync did not finish" in text
    assert "There is no evaluation after training to compare with." in text
    assert "Before (step 0)" in text and "After" not in text


HERE = {"pid": os.getpid(), "host": socket.gethostname(), "started": psutil.Process().create_time()}
GONE = HERE | {"started": 1.0}


@pytest.mark.parametrize(
    ("summary", "badge", "said"),
    [
        (
            {"state": "failed", "error": "learner-0 died: killed by signal 9", "error_actor": "learner-0", "steps": 3},
            'bad">failed',
            "The run failed after step 3 of 20, in learner-0. learner-0 died: killed by signal 9",
        ),
        ({"state": "failed", "error": "no GPU", "steps": 0}, 'bad">failed', "The run failed before its first step was done. no GPU"),
        ({"state": "interrupted", "steps": 3}, 'warn">interrupted', "The run was interrupted after step 3 of 20. Ctrl-C or a signal ended it."),
        ({"state": "stopped", "steps": 3}, 'warn">stopped', "An alarm stopped the run after step 3 of 20."),
        ({"state": "running", "process": HERE}, 'warn">running', "The run is going on after step 3 of 20."),
        ({"state": "running", "process": GONE | {"host": "elsewhere"}}, 'warn">running', "The run is going on after step 3 of 20."),
        ({"state": "running", "process": GONE}, 'bad">died', f"The run ended without a word after step 3 of 20. Its process {os.getpid()} is gone"),
        ({"name": "first"}, '">state unknown', "How the run ended is not known after step 3 of 20."),
    ],
)
def test_a_run_that_is_not_finished_says_how_it_stands_and_nothing_is_green(run, summary, badge, said):
    (run / "config.yaml").write_text("train: {steps: 20}\n")
    write_rows(run / "evaluation" / "step_000003.jsonl", evaluation(BEFORE))
    write_summary(run, {"stage": "train", **summary})
    text = page(run)
    assert f'class="badge {badge}</span>' in text
    assert said in visible(text)
    assert "No metric is out of bounds up to here." in text and not re.search(r'class="[^"]*\bgood"', text)


def test_what_continues_a_run_and_the_log_of_its_actor(run):
    (run / "logs").mkdir()
    (run / "logs" / "learner-0.log").touch()
    ended = {"stage": "train", "state": "failed", "error": "it died", "error_actor": "learner-0", "steps": 3}
    write_summary(run, ended)
    assert "The log of the actor: logs/learner-0.log There is no checkpoint to continue from." in visible(page(run))
    (run / "checkpoints" / "step_000002").mkdir(parents=True)
    goes_on = f"To continue: dvpo train {run}/config.yaml --out {run} --resume"
    assert f"The log of the actor: logs/learner-0.log {goes_on}" in visible(page(run))
    write_summary(run, {"stage": "train", "state": "running", "process": GONE})  # a killed run has left no line
    assert goes_on in visible(page(run))
    write_summary(run, {"stage": "train", "state": "running", "process": HERE})
    assert "To continue" not in visible(page(run))


def test_commands_of_a_report_have_the_run_as_the_paths_of_its_config_are(run, monkeypatch):
    (run / "config.yaml").write_text("data: {prompts: {path: p.jsonl}}\n")
    (run / "final").mkdir()
    write_summary(run, {"stage": "train", "state": "finished"})
    monkeypatch.chdir(run.parent)
    assert f"dvpo eval {run.name}/config.yaml --policy {run.name}/final To serve it vllm serve {run.name}/final" in visible(page(run))


def test_command_data_settings_and_uses_are_there(run):
    (run / "config.yaml").write_text("data: {prompts: {path: p.jsonl}}\npolicy: {learning_rate: 3.0e-05}\nevaluation: {judge: vader}\n")
    (run / "final").mkdir()
    write_summary(run, {"stage": "train", "state": "finished", "command": ["dvpo", "train", "c.yaml", "--out", "my run"]})
    text = visible(page(run))
    assert "Resumed by" not in text
    assert "Command dvpo train c.yaml --out 'my run' Data data.prompts.path p.jsonl Main settings policy.learning_rate 3e-05" in text
    assert f"To judge it on held-out prompts dvpo eval {run}/config.yaml --policy {run}/final To serve it vllm serve {run}/final" in text
    assert f"AutoModelForCausalLM.from_pretrained('{run}/final')" in text
    (run / "final").rmdir()
    assert "Use the result" not in page(run)
    write_summary(run, {"stage": "train", "command": ["dvpo", "train", "c.yaml"], "resumed_by": [["dvpo", "train", "r/config.yaml", "--resume"]]})
    assert "Command dvpo train c.yaml Resumed by: 1 dvpo train r/config.yaml --resume Data" in visible(page(run))


def test_notes_have_their_own_title(run):
    write_summary(run, {"state": "finished", "notes": ["kl.coefficient has no effect"]})
    assert "Notes on data and settings: 1 kl.coefficient has no effect" in visible(page(run))


@pytest.mark.parametrize(
    ("stage", "metrics", "titles"),
    [
        ("sft", {"sft/loss": 2.0, "sft/grad_norm": 1.0}, ["SFT loss", "SFT gradient norm"]),
        ("dpo", {"dpo/loss": 2.0, "dpo/accuracy": 0.6, "dpo/margin": 0.1}, ["DPO loss", "Pairs ordered correctly", "Rewards"]),
    ],
)
def test_a_run_of_a_trainer_shows_its_loss(tmp_path, stage, metrics, titles):
    with MetricsLog(tmp_path) as log:
        for step in (1, 2):
            log.write(step, metrics | {f"{stage}/loss": 2.0 / step})
    write_summary(tmp_path, {"stage": stage, "state": "finished", "steps": 2})
    text = visible(page(tmp_path))
    assert "Training loss, first and last step 2 → 1" in text and all(title in text for title in titles)
    assert "Gold score" not in text and "Rollouts" not in text


def test_a_run_without_a_judge(run):
    for step in (0, 3):
        write_rows(run / "evaluation" / f"step_{step:06d}.jsonl", evaluation([None] * 6))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_rows(run / "metrics.jsonl", [{key: value for key, value in row.items() if key != "reward/gold_mean"} for row in rows])
    text = visible(page(run))
    assert "No judge scored this run So nothing independent measures its gain." in text and "evaluation.judge" not in text
    assert "so it should rise." in text and "gold score, not instead" not in text
    assert "The first 6 of 6 held-out prompts. The KL of one response is its log-prob by" in text and "KL 0.5 nats" in text
    assert "Gold score against KL" not in text


def test_a_run_without_steps_says_so(run):
    (run / "metrics.jsonl").write_text("")
    assert "No training step has been logged" in visible(page(run))


def test_a_single_step_is_drawn(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, step_metrics(1))
    assert 'class="dot c1"' in page(tmp_path)


def test_metrics_that_are_null_leave_gaps(run):
    with MetricsLog(run, resume_step=3) as log:
        log.write(4, {"policy/loss": math.nan, "value/mean": 0.1})
    text = visible(page(run))
    assert "policy/loss was not finite at 1 of 4 steps, first at step 4." in text


def test_a_metric_that_is_null_at_every_step_is_a_finding(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in (1, 2):
            log.write(step, {"policy/grad_norm": math.nan, "policy/loss": 0.1})
    assert "policy/grad_norm was not finite at 2 of 2 steps, first at step 1." in visible(page(tmp_path))


def test_metrics_of_another_version_are_shown_too(run):
    write_rows(run / "metrics.jsonl", [{"step": 1, "time": 1.0, "policy/novelty": 2.5, "note": "text"}])
    text = page(run)
    assert "<code>policy/novelty</code>" in text and "<code>note</code>" not in text


@pytest.mark.parametrize(
    ("stage", "data"),
    [
        ("train", {"data.prompts.path": "p", "data.long_prompt": "drop", "data.on_bad_row": "skip"}),
        ("gvm", {"data.preferences.path": "q", "data.long_response": "truncate", "data.long_prompt": "drop", "data.on_bad_row": "skip"}),
    ],
)
def test_a_report_names_the_data_that_the_run_has_read(run, stage, data):
    write_summary(run, {"stage": stage})
    rows = "preferences: {path: q}, prompts: {path: p}, long_prompt: drop, long_response: truncate, on_bad_row: skip"
    (run / "config.yaml").write_text(f"data: {{{rows}}}\n", encoding="utf-8")
    assert dict(origin(load_run(run))["data"]) == data


def test_a_run_that_trains_a_value_model(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.write(step, {"gvm/loss": 0.5 / step, "gvm/accuracy": 0.6, "gvm/grad_norm": 1.0, "time/step_seconds": 2.0})
    accuracy = {"mean": 0.674, "last": 0.708, "longer_wins": 0.511, **{f"position_{p}": 0.6 for p in (25, 50, 75, 100)}}
    measured = {"heldout_accuracy": accuracy, "pairs": 48, "accuracy_ci95": {"mean": [0.541, 0.792], "last": [0.583, 0.833]}}
    write_summary(tmp_path, {"stage": "gvm", "state": "finished", "gvm": measured, "warnings": ["few pairs"]})
    text = visible(page(tmp_path))
    assert " · Global Value Model finished" in text
    assert (
        "Held-out pairs ordered correctly 67.4% by the mean value, on 48 pairs, 95 % interval 54.1% to 79.2% 70.8% by the last value; 51.1% by"
        in text
    )
    for title in ("Held-out accuracy by position", "GVM loss", "Training pairs ordered correctly", "Time of a step"):
        assert title in text
    assert "Worth a look few pairs" in text
    assert "gold" not in text and "KL" not in text
    write_summary(tmp_path, {"stage": "rm", "state": "finished", "gvm": measured})
    (tmp_path / "final").mkdir()
    text = visible(page(tmp_path))
    assert "70.8% by the last value, on 48 pairs, 95 % interval 58.3% to 83.3% 51.1% by length alone" in text
    assert "Reward model loss" in text and "final/ is a reward model." in text and "GVM loss" not in text


@pytest.mark.parametrize(
    ("stage", "accuracy", "found"),
    [
        ("gvm", {"mean": 0.55, "last": 0.8}, "The GVM orders only 55% of held-out pairs correctly by its mean value"),
        ("rm", {"mean": 0.8, "last": 0.55}, "The reward model orders only 55% of held-out pairs correctly by its last value"),
        ("rm", {"mean": 0.55, "last": 0.8}, None),  # the mean value of a reward model is not trained
    ],
)
def test_a_weak_model_is_found_by_the_value_that_it_was_trained_on(tmp_path, stage, accuracy, found):
    with MetricsLog(tmp_path) as log:
        log.write(1, {"gvm/loss": 0.5})
    write_summary(tmp_path, {"stage": stage, "state": "finished", "gvm": {"heldout_accuracy": accuracy}})
    text = visible(page(tmp_path))
    assert found in text if found else "orders only" not in text
