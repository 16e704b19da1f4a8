"""report.html, from damaged run folders and hostile texts, and what it finds by itself."""

import html.parser
import json
import re
from pathlib import Path

import pytest
from report_pages import AFTER, assert_well_formed, evaluation, finished_run, page, rollout, step_metrics, visible, write_rows

from dvpo_ray.errors import InputError
from dvpo_ray.monitoring.metrics import MetricsLog
from dvpo_ray.monitoring.report import write_report
from dvpo_ray.monitoring.report_summary import findings
from dvpo_ray.monitoring.run_data import RunData, load_run
from dvpo_ray.monitoring.run_files import write_summary


@pytest.fixture
def run(tmp_path) -> Path:
    return finished_run(tmp_path)


# ------------------------------------------------------------------------------------------------- damaged runs


def test_damaged_lines_are_named_and_the_rest_is_used(run):
    for name in ("metrics.jsonl", "evaluation/step_000000.jsonl", "rollouts/step_000003.jsonl"):
        path = run / name
        path.write_text(path.read_text() + "{broken\n" + "[1]\n" + '{"step": "x"}\n{"torn": ')
    text = visible(page(run))
    assert re.search(r"metrics\.jsonl:4: not valid JSON \(.*?\); the line is left out", text)
    assert "metrics.jsonl:5: expected a JSON object, found list; the line is left out" in text
    assert "metrics.jsonl:6: `step` is missing or not a whole number; the line is left out" in text
    assert "step_000000.jsonl:9: `prompt` is missing or not a text; the line is left out" in text
    assert "step_000003.jsonl:3: not valid JSON" in text
    assert "0.0833 → 0.45" in text and "torn" not in text


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"tokens": "Good fun"}, "`tokens` is missing or not a list of texts"),
        ({"tokens": []}, "`tokens` is missing or not a list of texts"),
        ({"values": [0.0, 0.5, 0.75]}, "`values` is not a list of 4 numbers for 3 tokens"),
        ({"advantages": [1.0, None, 0.0]}, "`advantages` is not a list of 3 numbers for 3 tokens"),
        ({"log_probs": None}, "`log_probs` is not a list of 3 numbers for 3 tokens"),
        ({"response": 5}, "`response` is missing or not a text"),
        ({"gold": "good"}, "`gold` is not a number"),
    ],
)
def test_a_rollout_that_does_not_fit_is_named(run, changes, problem):
    write_rows(run / "rollouts" / "step_000003.jsonl", [rollout(**changes)])
    text = visible(page(run))
    assert f"step_000003.jsonl:1: {problem}; the line is left out" in text
    assert "among the 1 rollout of step 1" in text  # the rollouts before are shown instead


@pytest.mark.parametrize(("content", "problem"), [("{", "not valid JSON"), ("[]", "expected a JSON object, found list"), ("\xff", "not valid JSON")])
def test_a_damaged_summary_is_named(run, content, problem):
    (run / "summary.json").write_bytes(content.encode("latin-1"))
    text = visible(page(run))
    assert f"summary.json: {problem}" in text
    assert "a clear gain" in text  # from the evaluations


def test_evaluations_of_different_prompts_are_not_compared(run):
    rows = evaluation(AFTER)
    for damaged in (rows[:4], [{**row, "prompt": "another"} for row in rows]):
        write_rows(run / "evaluation" / "step_000003.jsonl", damaged)
        text = visible(page(run))
        assert "a clear gain" not in text and "The evaluations are of different prompts." in text


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_folder_that_is_no_run_is_one_line(tmp_path, name):
    with pytest.raises(InputError, match="run folder") as error:
        write_report(tmp_path / name)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------- escaping

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;</p></pre></details>\x00\ud800"


def test_hostile_text_is_shown_and_not_run(run):
    write_rows(run / "evaluation" / "step_000000.jsonl", [{"prompt": HOSTILE, "response": HOSTILE, "gold": 0.5, "kl": 0.0}])
    write_rows(run / "evaluation" / "step_000003.jsonl", [{"prompt": HOSTILE, "response": HOSTILE, "gold": 0.6, "kl": 0.0}])
    tokens = [HOSTILE[:20], HOSTILE[20:], "</span>"]
    write_rows(run / "rollouts" / "step_000003.jsonl", [rollout(prompt=HOSTILE, response=HOSTILE, tokens=tokens)])
    (run / "config.yaml").write_text(HOSTILE[:-1])
    write_summary(run, {"name": "</title>" + HOSTILE[:-1], "state": "<b>", "error": HOSTILE[:-1], "notes": [HOSTILE[:-1]], "model": HOSTILE[:-1]})
    with MetricsLog(run, resume_step=3):
        pass
    text = write_report(run).read_text(encoding="utf-8")
    assert_well_formed(text)
    assert text.count("<script>") == 1 and "<img" not in text and "\x00" not in text
    assert "<script>alert(1)</script>" in html.unescape(text)


def test_tokens_show_line_breaks_and_are_escaped(run):
    tokens = ["<b>", "\n", "\ufffd", "\ufffd"]
    numbers = {"values": [0.0] * 5, "advantages": [0.0] * 4, "log_probs": [0.0] * 4, "reference_log_probs": [0.0] * 4}
    write_rows(run / "rollouts" / "step_000003.jsonl", [rollout(response="<b>\né", tokens=tokens, **numbers)])
    spans = re.findall(r'--a:(\S+)" data-token="\d"[^>]*>(.*?)</span>', page(run), re.DOTALL)
    assert [text for _, text in spans] == ["&lt;b&gt;", '<i class="mark">↵</i>\n', "é", '<i class="mark">·</i>'] * 2
    assert {strength for strength, _ in spans} == {"0.000"}  # nothing moves


def test_prompts_of_messages_show_their_roles(run):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi <you>"}]
    for step, gold in ((0, 0.1), (3, 0.5)):
        write_rows(run / "evaluation" / f"step_{step:06d}.jsonl", [{"prompt": messages, "response": "Hello", "gold": gold, "kl": 1.0}])
    text = page(run)
    assert 'class="turn user"><div class="role">user</div>' in text
    assert "system Be kind. user Hi <you> Before (step 0)" in visible(text)


@pytest.mark.parametrize("prompt", [[{"role": "user"}], [{"role": "user", "content": None}], ["Hi"], 5, None])
def test_a_prompt_that_is_neither_text_nor_messages_is_named(run, prompt):
    write_rows(run / "rollouts" / "step_000003.jsonl", [rollout(prompt=prompt)])
    assert "step_000003.jsonl:1: `prompt` is missing or not a text; the line is left out" in visible(page(run))


# ---------------------------------------------------------------------------------------------------- findings


def run_with(columns: dict[str, list[float]], **summary) -> RunData:
    length = len(next(iter(columns.values())))
    rows = [{"step": i + 1, **{name: values[i] for name, values in columns.items()}} for i in range(length)]
    return RunData(Path("run"), summary=summary, metrics=rows)


def test_a_healthy_run_has_no_findings(run):
    assert list(findings(load_run(run))) == []
    assert 'class="notice good">No metric is out of bounds.' in page(run)


def test_a_metric_beyond_its_bounds_is_found_with_advice():
    ((text, advice),) = findings(run_with({"policy/clip_fraction": [0.1] * 5 + [0.5] * 5}))
    assert text.startswith("policy/clip_fraction is 0.5 on average over the last 5 steps.")
    assert "policy.learning_rate" in advice


def test_a_metric_that_was_beyond_its_bounds_long_ago_is_not_found():
    assert list(findings(run_with({"policy/clip_fraction": [0.9] * 5 + [0.1] * 5}))) == []


def test_a_response_that_was_cut_off_says_so(run):
    write_rows(run / "evaluation" / "step_000003.jsonl", [row | {"truncated": i == 2} for i, row in enumerate(evaluation(AFTER))])
    assert visible(page(run)).count("cut off at the length limit") == 1


def test_value_up_while_gold_falls_is_an_alarm():
    wiggle = [0.01 * (-1) ** i for i in range(40)]
    rising = [i / 40 + w for i, w in enumerate(wiggle)]
    falling = [min(i, 20 - i) / 40 + w for i, w in enumerate(wiggle)]
    ((text, advice),) = findings(run_with({"value/terminal_mean": rising, "reward/gold_mean": falling}))
    assert "exploits errors of the GVM" in text
    ppo = {"value/terminal_mean": wiggle, "reward/model_mean": rising, "reward/gold_mean": falling}
    ((text, advice),) = findings(run_with(ppo, algorithm="ppo"))
    assert "exploits errors of the reward model" in text and "train the reward model on more pairs" in advice
    assert list(findings(run_with({"value/terminal_mean": rising, "reward/gold_mean": rising}))) == []
    assert list(findings(run_with({"value/terminal_mean": wiggle, "reward/gold_mean": falling}))) == []


def test_a_weak_value_model_is_found():
    ((text, advice),) = findings(run_with({"policy/loss": [0.1]}, gvm={"heldout_accuracy": {"mean": 0.55}}))
    assert "orders only 55% of held-out pairs" in text
    assert list(findings(run_with({"policy/loss": [0.1]}, gvm={"heldout_accuracy": {"mean": 0.6}}))) == []


def test_alarms_come_first_with_their_advice(run):
    alarm = {"step": 12, "name": "value_bias", "text": "Responses <far> away are overrated.", "advice": "Raise kl.coefficient."}
    write_summary(run, json.loads((run / "summary.json").read_text()) | {"state": "stopped", "alarms": [alarm]})
    text = visible(page(run))
    assert "An alarm stopped the run after step 3." in text
    assert "Alarms: 1 Step 12, value_bias: Responses <far> away are overrated. Raise kl.coefficient." in text
    assert "stopped" in text


def test_health_is_drawn_where_it_was_measured(run):
    with MetricsLog(run, resume_step=3) as log:
        log.write(4, step_metrics(4) | {"health/gold_correlation": 0.5, "health/value_drift": 0.2})
    text = visible(page(run))
    assert "Estimate against gold" in text and "Calibration along the response" in text and "Disagreement" not in text
