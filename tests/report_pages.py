"""A run folder as a report finds it, and the page that it makes."""

import html.parser
import json
import re
from pathlib import Path
from xml.etree import ElementTree

from dvpo_ray.monitoring.metrics import MetricsLog
from dvpo_ray.monitoring.report import write_report
from dvpo_ray.monitoring.run_files import write_summary

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


def finished_run(tmp_path: Path) -> Path:
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
