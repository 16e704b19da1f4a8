"""What a command says when it is done."""

from __future__ import annotations

import pytest
from report_pages import finished_run

from dvpo_ray.evaluation.gain import gain_of
from dvpo_ray.monitoring.ending import accuracy_words, ending, own_prompts, uses
from dvpo_ray.monitoring.report import write_report
from dvpo_ray.monitoring.run_files import write_summary

GOLD = gain_of([0.1, -0.2, 0.3, 0.0], [0.6, 0.3, 0.8, 0.5])


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Writes a run folder `run` with a summary and settings; returns what its command says at its end."""

    def run(summary: dict, config: str = "name: first\n") -> list[str]:
        monkeypatch.chdir(tmp_path)
        folder = finished_run(tmp_path / "run").relative_to(tmp_path)
        (folder / "config.yaml").write_text(config, encoding="utf-8")
        (folder / "final").mkdir()
        (folder / "checkpoints" / "step_000002").mkdir(parents=True)
        write_summary(folder, summary)
        write_report(folder)
        return ending(folder)

    return run


JUDGED = "evaluation: {judge: vader}\ndata: {prompts: {path: p.jsonl}}\n"


def test_a_policy_ends_with_its_gain_and_the_next_command(run):
    assert run({"stage": "train", "state": "finished", "steps": 3, "gold": GOLD, "kl": {"after_mean": 2.5}}, JUDGED) == [
        "gold score on 4 held-out prompts: +0.050 before, +0.550 after",
        "gain: +0.500, 95 % interval +0.500 to +0.500",
        "The policy got better on prompts it was never trained on: the interval of the gain is clear of 0.",
        "KL from the reference: 2.50 nats per response to a held-out prompt (a step shows that of its rollouts)",
        "report: run/report.html",
        "model: run/final",
        "next, to judge it on held-out prompts:",
        "dvpo eval run/config.yaml --policy run/final",
    ]


@pytest.mark.parametrize(
    ("alarms", "kl", "advice"),
    [
        (["cut_off"], 1.0, "More steps or a larger policy.learning_rate move the policy further."),
        (["gold_correlation", "cut_off"], 1.0, "More steps would not mend what the alarm gold_correlation found: do what it advises first"),
        ([], 10.8, "The policy is far from the reference already"),
    ],
)
def test_more_steps_are_advised_only_near_the_reference_and_without_an_alarm(run, alarms, kl, advice):
    told = [{"step": 2, "name": name, "text": "", "advice": ""} for name in alarms]
    unclear = gain_of([0.1, 0.2, 0.3, 0.4], [0.2, 0.1, 0.4, 0.3])
    line = run({"stage": "train", "state": "finished", "gold": unclear, "kl": {"after_mean": kl}, "alarms": told}, JUDGED)[2]
    assert line.startswith(f"No clear change: the interval of the gain contains 0. {advice}")
    assert ("More steps or" in line) is advice.startswith("More steps or")


def test_without_a_judge_nothing_is_claimed(run):
    lines = run({"stage": "train", "state": "finished", "steps": 3})
    assert lines[0].startswith("no judge scored held-out prompts") and lines[0].endswith("the report shows responses before and after side by side")
    assert lines[-2:] == [
        "next, to read its responses to held-out prompts beside those of the model before:",
        "dvpo eval run/config.yaml --policy run/final data.prompts.path=PROMPTS.jsonl",
    ]


def test_a_run_that_an_alarm_stopped_says_so_first(run):
    alarm = {"step": 2, "name": "value_bias", "text": "responses far away are overrated", "advice": "Raise kl.coefficient."}
    lines = run({"stage": "train", "state": "stopped", "steps": 2, "alarms": [alarm]})
    assert lines[:3] == [
        "stopped by an alarm after step 2, value_bias: responses far away are overrated",
        "to go on:",
        "dvpo train run/config.yaml --out run --resume",
    ]


@pytest.mark.parametrize(
    ("stage", "purpose", "command"),
    [
        ("gvm", "optimise a policy with it", "dvpo train run/config.yaml gvm.path=run/final data.prompts.path=PROMPTS.jsonl --out run-policy"),
        (
            "rm",
            "optimise a policy with it",
            "dvpo train run/config.yaml algorithm=ppo reward_model.path=run/final data.prompts.path=PROMPTS.jsonl --out run-policy",
        ),
        ("sft", "train a value model for it", "dvpo gvm train run/config.yaml model.path=run/final data.preferences.path=PAIRS.jsonl --out run-gvm"),
        (
            "dpo",
            "read its responses to held-out prompts beside those of the model before",
            "dvpo eval run/config.yaml --policy run/final data.prompts.path=PROMPTS.jsonl",
        ),
    ],
)
def test_each_stage_names_what_comes_after_it(run, stage, purpose, command):
    assert run({"stage": stage, "state": "finished"})[-2:] == [f"next, to {purpose}:", command]


@pytest.mark.parametrize(
    ("pairs", "prompts", "own"),
    [
        ("mine.jsonl", "gone.jsonl", " data.prompts.path=mine.jsonl data.prompts.heldout_path=null evaluation.judge=none"),
        ("mine.jsonl", "dvpo_ray/quickstart/data/p.jsonl", " data.prompts.path=mine.jsonl data.prompts.heldout_path=null evaluation.judge=none"),
        ("mine.jsonl", "there.jsonl", ""),
        ("mine.jsonl", "org/prompts", ""),
        ("dvpo_ray/quickstart/data/pairs.jsonl", "dvpo_ray/quickstart/data/p.jsonl", ""),
        (None, "gone.jsonl", ""),
        (None, None, " data.prompts.path=PROMPTS.jsonl"),
    ],
)
def test_a_policy_gets_the_prompts_of_one_s_pairs_where_the_config_has_none_for_them(pairs, prompts, own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.jsonl").touch()
    config = {"data": {"preferences": pairs and {"path": pairs}, "prompts": prompts and {"path": prompts}}, "evaluation": {"judge": "vader"}}
    assert own_prompts(config) == own


def test_a_stage_of_a_trainer_ends_with_its_last_step(run):
    lines = run({"stage": "dpo", "state": "finished", "last_step": {"dpo/loss": 0.5, "dpo/accuracy": 0.75}})
    assert lines[:2] == ["loss at the last step: 0.500", "pairs of the last step that the policy itself orders correctly: 75%; 50% is chance"]


def test_a_folder_with_spaces_can_be_pasted(tmp_path):
    commands = uses(tmp_path / "my run", "train", {})
    assert commands["serve it"] == f"vllm serve '{tmp_path}/my run/final'"


def test_a_folder_without_a_summary_says_nothing(tmp_path):
    assert ending(tmp_path) == []


@pytest.mark.parametrize(
    ("ends", "longer", "found"),
    [
        ((0.6, 0.8), 0.55, 'better than chance (0.5) and "the longer wins" (0.550)'),
        ((0.6, 0.8), 0.6, 'not clearly better than "the longer wins" (0.600)'),
        ((0.45, 0.8), 0.3, "not clearly better than chance (0.5)"),
        ((0.5, 0.8), 1.0, 'not clearly better than chance (0.5) and "the longer wins" (1.000)'),
    ],
)
def test_what_an_accuracy_means_follows_from_its_interval(ends, longer, found):
    report = {"pairs": 9, "heldout_accuracy": {"mean": 0.7, "last": 0.6, "longer_wins": longer}, "accuracy_ci95": {"mean": ends, "last": (0, 1)}}
    assert accuracy_words(report)[1].startswith(f"by mean value it is {found}: 95 % interval")
