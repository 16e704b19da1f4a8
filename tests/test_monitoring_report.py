"""report.html, from whole, partial and damaged run folders."""

import html.parser
import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dvpo_ray.errors import InputError
from dvpo_ray.evaluation.intervals import paired_bootstrap_ci
from dvpo_ray.monitoring.charts import number
from dvpo_ray.monitoring.checks import findings
from dvpo_ray.monitoring.metrics import MetricsLog
from dvpo_ray.monitoring.report import write_report
from dvpo_ray.monitoring.report_charts import MOST_POINTS, Curves
from dvpo_ray.monitoring.run_data import RunData, load_run
from dvpo_ray.monitoring.summary import write_summary

HEADLINES = ["Gold score", "Distance from the reference", "Value", "Advantage", "Policy loss", "Clipped tokens", "Entropy", "Response length"]
HEADLINES += ["Cut-off responses", "Gradient norm", "Engine against learner", "Time of a step", "Throughput", "Memory", "Idle"]


def step_metrics(step: int) -> dict[str, float]:
    """Plausible metrics of a step that goes well."""
    return {
        "reward/gold_mean": 0.3 + step / 50,
        "kl/reference_mean": step / 2,
        "value/mean": step / 40,
        "value/std": 0.3,
        "value/terminal_mean": step / 30,
        "advantage/mean": 0.0,
        "advantage/std": 1.0,
        "advantage/min": -4.0,
        "advantage/max": 5.0,
        "policy/loss": -0.01,
        "policy/clip_fraction": 0.1,
        "policy/entropy": 2.0,
        "policy/grad_norm": 1.0,
        "mismatch/log_prob_abs_max": 1e-4,
        "response_length/mean": 30.0,
        "response_length/max": 48.0,
        "response_length/truncated_fraction": 0.25,
        "time/generate_seconds": 3.0,
        "time/update_seconds": 2.0,
        "time/step_seconds": 6.0,
        "throughput/samples_per_second": 16.0,
        "throughput/generated_tokens_per_second": 900.0,
        "memory/policy_learner_gib": 2.5,
        "idle/policy_learner_fraction": 0.5,
    }


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def evaluation(gold: list[float | None], response: str = "A day.") -> list[dict]:
    return [{"prompt": f"prompt {i}", "response": f"{response} {i}", "gold": g, "kl": 0.5} for i, g in enumerate(gold)]


def rollout(**changes) -> dict:
    row = {
        "row_id": 0,
        "prompt": "How was your day?",
        "response": "Good fun",
        "prompt_ids": [1, 2],
        "response_ids": [3, 4, 5],
        "tokens": ["Good", " fun", "<|im_end|>"],
        "values": [0.0, 0.5, 0.75, 0.7],
        "advantages": [1.0, 0.25, -0.5],
        "log_probs": [-1.0, -2.0, -0.5],
        "reference_log_probs": [-1.5, -2.5, -0.25],
        "gold": 0.6,
        "policy_version": 1,
        "truncated": False,
    }
    return {**row, **changes}


BEFORE, AFTER = [0.1, -0.2, 0.3, 0.0, 0.2, 0.1], [0.6, 0.1, 0.2, 0.5, 0.9, 0.4]


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished run of three steps."""
    with MetricsLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.write(step, step_metrics(step))
    write_rows(tmp_path / "evaluation" / "step_000000.jsonl", evaluation(BEFORE))
    write_rows(tmp_path / "evaluation" / "step_000003.jsonl", evaluation(AFTER, "A wonderful day."))
    write_rows(tmp_path / "rollouts" / "step_000001.jsonl", [rollout(response="An early one", tokens=["An", " early", " one"])])
    write_rows(
        tmp_path / "rollouts" / "step_000003.jsonl", [rollout(), rollout(values=[0.0, 0.1, 0.1, 0.1], response="Dull", tokens=["D", "ul", "l"])]
    )
    (tmp_path / "config.yaml").write_text("name: first\nseed: 7\n", encoding="utf-8")
    summary = {"name": "first", "state": "finished", "steps": 3, "model": "SmolLM2", "duration_seconds": 185.0, "peak_memory_gib": 6.25}
    summary |= {"kl": {"after_mean": 12.5}, "gvm": {"heldout_accuracy": {"mean": 0.731, "last": 0.792}}}
    write_summary(tmp_path, summary)
    return tmp_path


def page(folder: Path) -> str:
    """The report of a run, checked to be well-formed and to need nothing from outside."""
    text = write_report(folder).read_text(encoding="utf-8")
    assert_well_formed(text)
    for reference in (r"https?:", r"\ssrc=", r"\shref=", r"url\(", r"@import", r"<link", r"<img", r"<iframe"):
        assert not re.search(reference, text), reference
    assert not re.search(r"\bnan\b|\binf\b|>None<", text, re.IGNORECASE)
    return text


def assert_well_formed(text: str) -> None:
    void, open_tags = {"meta", "br"}, []

    class Balance(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in void:
                open_tags.append(tag)

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Balance(convert_charrefs=True).feed(text)
    assert open_tags == []
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)


def visible(text: str) -> str:
    """The text of a page without its tags, styles and scripts."""
    text = re.sub(r"<(style|script|title)>.*?</\1>", " ", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", text)))


# --------------------------------------------------------------------------------------------------- whole runs


def test_the_summary_box_has_the_main_numbers(run):
    text = visible(page(run))
    gain, low, high = paired_bootstrap_ci(BEFORE, AFTER)
    assert "0.0833 → 0.45" in text
    assert f"+{number(gain)} on 6 held-out prompts, 95 % interval +{number(low)} to +{number(high)}: a clear gain" in text
    for expected in ("first finished", "12.5 nats", "79.2%", "mean 73.1%", "3 min 05 s", "6.25 GiB", "6 s per step", "model SmolLM2"):
        assert expected in text, expected


def test_every_curve_is_drawn(run):
    drawn = re.findall(
        r"<h3>([^<]*)(?:<span class=\"soft\">[^<]*</span>)?</h3>(?:<span class=\"now\">[^<]*</span>)?</div>(?:<div class=\"legend\">.*?</div>)?<svg",
        page(run),
    )
    assert set(HEADLINES) <= set(drawn)


def test_a_loss_is_called_a_loss(run):
    write_rows(run / "evaluation" / "step_000003.jsonl", evaluation([score - 0.5 for score in BEFORE]))
    assert "a clear loss" in visible(page(run))


def test_no_change_is_called_no_clear_change(run):
    write_rows(run / "evaluation" / "step_000003.jsonl", evaluation(BEFORE[::-1]))
    assert "no clear change" in visible(page(run))


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
    tip = html.unescape(tokens[1][3])
    assert tip.splitlines() == ["token 2 ' fun'", "value 0.75 (+0.25)", "advantage 0.25", "log-prob −2, reference −2.5"]


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
    assert "first failed" in text
    assert "The run failed. weight sync did not finish" in text
    assert "There is no evaluation after training to compare with." in text
    assert "Before (step 0)" in text and "After" not in text


def test_a_run_without_a_judge(run):
    for step in (0, 3):
        write_rows(run / "evaluation" / f"step_{step:06d}.jsonl", evaluation([None] * 6))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_rows(run / "metrics.jsonl", [{key: value for key, value in row.items() if key != "reward/gold_mean"} for row in rows])
    text = visible(page(run))
    assert "No gold judge scored this run" in text
    assert "The first 6 of 6 held-out prompts." in text and "KL 0.5 nats" in text
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


def test_metrics_of_another_version_are_shown_too(run):
    write_rows(run / "metrics.jsonl", [{"step": 1, "time": 1.0, "policy/novelty": 2.5, "note": "text"}])
    text = page(run)
    assert "<code>policy/novelty</code>" in text and "<code>note</code>" not in text


def test_a_run_that_trains_a_value_model(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.write(step, {"gvm/loss": 0.5 / step, "gvm/accuracy": 0.6, "gvm/grad_norm": 1.0, "time/step_seconds": 2.0})
    accuracy = {"mean": 0.674, "last": 0.708, "longer_wins": 0.511, **{f"position_{p}": 0.6 for p in (25, 50, 75, 100)}}
    write_summary(tmp_path, {"state": "finished", "gvm": {"heldout_accuracy": accuracy}, "warnings": ["few pairs"]})
    text = visible(page(tmp_path))
    assert "Held-out pairs ordered correctly 70.8% by the last value 67.4% by the mean value; 51.1% by length alone" in text
    for title in ("Held-out accuracy by position", "GVM loss", "Training pairs ordered correctly", "Time of a step"):
        assert title in text
    assert "Worth a look few pairs" in text
    assert "gold" not in text and "KL" not in text


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
    assert "Of the 1 rollouts of step 1" in text  # the rollouts before are shown instead


@pytest.mark.parametrize(("content", "problem"), [("{", "not valid JSON"), ("[]", "expected a JSON object, found list"), ("\xff", "not valid JSON")])
def test_a_damaged_summary_is_named(run, content, problem):
    (run / "summary.json").write_bytes(content.encode("latin-1"))
    text = visible(page(run))
    assert f"summary.json: {problem}" in text
    assert "a clear gain" in text  # from the evaluations


def test_a_summary_of_odd_types_does_no_harm(run):
    write_summary(run, {"name": 5, "state": None, "gvm": 3, "kl": [1], "duration_seconds": "long", "notes": [1, None], "steps": "x"})
    page(run)


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


def test_prompts_of_messages_show_their_roles(run):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi <you>"}]
    for step, gold in ((0, 0.1), (3, 0.5)):
        write_rows(run / "evaluation" / f"step_{step:06d}.jsonl", [{"prompt": messages, "response": "Hello", "gold": gold, "kl": 1.0}])
    assert "system: Be kind.\nuser: Hi &lt;you&gt;" in page(run)


# ---------------------------------------------------------------------------------------------------- findings


def run_with(columns: dict[str, list[float]], **summary) -> RunData:
    length = len(next(iter(columns.values())))
    rows = [{"step": i + 1, **{name: values[i] for name, values in columns.items()}} for i in range(length)]
    return RunData(Path("run"), summary=summary, metrics=rows)


def test_a_healthy_run_has_no_findings(run):
    assert findings(load_run(run)) == []
    assert "No metric lies beyond its bounds." in page(run)


def test_a_metric_beyond_its_bounds_is_found_with_advice():
    (finding,) = findings(run_with({"policy/clip_fraction": [0.1] * 5 + [0.5] * 5}))
    assert finding.text.startswith("policy/clip_fraction is 0.5 on average over the last 5 steps.")
    assert "policy.learning_rate" in finding.advice


def test_a_metric_that_was_beyond_its_bounds_long_ago_is_not_found():
    assert findings(run_with({"policy/clip_fraction": [0.9] * 5 + [0.1] * 5})) == []


def test_value_up_while_gold_falls_is_an_alarm():
    wiggle = [0.01 * (-1) ** i for i in range(40)]
    rising = [i / 40 + w for i, w in enumerate(wiggle)]
    falling = [min(i, 20 - i) / 40 + w for i, w in enumerate(wiggle)]
    (finding,) = findings(run_with({"value/terminal_mean": rising, "reward/gold_mean": falling}))
    assert "exploits errors of the GVM" in finding.text
    assert findings(run_with({"value/terminal_mean": rising, "reward/gold_mean": rising})) == []
    assert findings(run_with({"value/terminal_mean": wiggle, "reward/gold_mean": falling})) == []


def test_a_weak_value_model_is_found():
    (finding,) = findings(run_with({"policy/loss": [0.1]}, gvm={"heldout_accuracy": {"mean": 0.55}}))
    assert "orders only 55% of held-out pairs" in finding.text
    assert findings(run_with({"policy/loss": [0.1]}, gvm={"heldout_accuracy": {"mean": 0.6}})) == []


def test_alarms_come_first_with_their_advice(run):
    alarm = {"step": 12, "name": "value_bias", "text": "Responses <far> away are overrated.", "advice": "Raise kl.coefficient."}
    write_summary(run, json.loads((run / "summary.json").read_text()) | {"state": "stopped", "alarms": [alarm]})
    text = visible(page(run))
    assert "Alarms: 1 Step 12, value_bias: Responses <far> away are overrated. Raise kl.coefficient." in text
    assert "stopped" in text


def test_health_is_drawn_where_it_was_measured(run):
    with MetricsLog(run, resume_step=3) as log:
        log.write(4, step_metrics(4) | {"health/gold_correlation": 0.5, "health/value_drift": 0.2})
    text = visible(page(run))
    assert "Estimate against gold" in text and "Calibration along the response" in text and "Disagreement" not in text
