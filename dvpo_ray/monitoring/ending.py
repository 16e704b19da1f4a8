"""What a command says when it is done: the result in words, where it is, and what to do with it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dvpo_ray.config.arithmetic import counted
from dvpo_ray.config.inputs import no_data
from dvpo_ray.config.notes import is_shipped
from dvpo_ray.evaluation.gain import verdict
from dvpo_ray.health.alarms import RULES
from dvpo_ray.monitoring.console import Shell
from dvpo_ray.monitoring.run_data import parse_config, setting
from dvpo_ray.monitoring.run_files import read_summary, resume_command

CHANCE = 0.5
RESULTS = {"train": "model", "sft": "model", "dpo": "model", "gvm": "value model", "rm": "reward model"}
"""What `final/` of a run is, by its stage."""
_LOADERS = {"model": "AutoModelForCausalLM", "tokenizer": "AutoTokenizer"}


def ending(folder: Path) -> list[str]:
    """The end of a run, from its folder, one line each, shell lines for themselves; empty where the folder has no summary.

    Args:
        folder: as the user wrote it.
    """
    summary = read_summary(folder)
    return [*_stop(folder, summary), *_result(summary), *whereabouts(folder, _stage(summary))]


def whereabouts(folder: Path, stage: str) -> list[str]:
    """Where the report and the result of a run are, as far as they are there, and the command that uses the result."""
    lines = [f"report: {folder / 'report.html'}"] if (folder / "report.html").is_file() else []
    if (folder / "final").is_dir():
        lines.append(f"{RESULTS.get(stage, 'model')}: {folder / 'final'}")
        for purpose, command in list(uses(folder, stage, _settings(folder)).items())[:1]:
            lines += [f"next, to {purpose}:", Shell(command)]
    return lines


def _settings(folder: Path) -> dict[str, Any]:
    config = folder / "config.yaml"
    return parse_config(config.read_text(encoding="utf-8")) if config.is_file() else {}


def _stage(summary: Mapping[str, Any]) -> str:
    return str(summary.get("stage"))


def _stop(folder: Path, summary: Mapping[str, Any]) -> list[str]:
    """That a run did not come to its end, and how it goes on."""
    if summary.get("state") != "stopped":
        return []
    alarms = [f", {alarm['name']}: {alarm['text']}" for alarm in summary.get("alarms", [])[-1:]]
    goes_on = resume_command(folder.resolve(), _stage(summary))
    return [f"stopped by an alarm after step {summary.get('steps')}{''.join(alarms)}", *(["to go on:", Shell(goes_on)] if goes_on else [])]


def _result(summary: Mapping[str, Any]) -> list[str]:
    if _stage(summary) in ("sft", "dpo"):
        return _last_step(_stage(summary), summary.get("last_step") or {})
    if _stage(summary) != "train":
        return []  # the training of a value model has said how good it is
    kl = summary.get("kl", {}).get("after_mean")
    moved = [f"KL from the reference: {kl:z.2f} nats per response to a held-out prompt (a step shows that of its rollouts)"] if kl is not None else []
    if "gold" in summary:
        return [*gold_words(summary), *moved]
    unknown = "no judge scored held-out prompts before and after (evaluation.judge is none), so nothing independent says what the run gained"
    return [*moved, f"{unknown}; the report shows responses before and after side by side"]


def _last_step(stage: str, metrics: Mapping[str, float | None]) -> list[str]:
    loss, accuracy = metrics.get(f"{stage}/loss"), metrics.get(f"{stage}/accuracy")
    lines = [f"loss at the last step: {loss:.3f}"] if loss is not None else []
    if accuracy is not None:
        lines.append(f"pairs of the last step that the policy itself orders correctly: {accuracy:.0%}; {CHANCE:.0%} is chance")
    return lines


# ------------------------------------------------------------------------------------------------------ results in words


def verdict_of(summary: Mapping[str, Any]) -> str:
    """What the gain of a run says, beside its alarms and its KL."""
    alarms = [alarm["name"] for alarm in summary.get("alarms", []) if alarm["name"] in RULES and not RULES[alarm["name"]].once]
    return verdict(summary["gold"], summary.get("kl", {}).get("after_mean"), alarms)


def gold_words(summary: Mapping[str, Any]) -> list[str]:
    """The `gold` entry of summary.json: before, after, the gain, and what its interval says."""
    gold = summary["gold"]
    before, after = (gold[side]["mean"] for side in ("before", "after"))
    return [
        f"gold score on {counted(gold['prompts'], 'held-out prompt')}: {before:+.3f} before, {after:+.3f} after",
        f"gain: {gold['gain']:+.3f}, {_interval(gold['gain_ci95'], sign='+')}",
        verdict_of(summary),
    ]


def policy_words(result: Mapping[str, Any]) -> list[str]:
    """The result of `dvpo eval`, as `evaluate_policy` returns it."""
    if "gold" in result:
        return [f"gold score of {result['policy']} by {result['judge']}: {_mean(result['gold'])}, {counted(result['prompts'], 'prompt')}"]
    responses = f"responses of {result['policy']} to {counted(result['prompts'], 'held-out prompt')}"
    told = [f"{responses}, beside those of {result['beside']}" if "beside" in result else responses]
    estimate = result.get("estimate", {})
    if "gain" in estimate:
        before, after = (_mean(estimate[side]) for side in ("before", "after"))
        told.append(f"value model's estimate of a response: {before} for {result['beside']}; {after} for {result['policy']}")
        low, high = estimate["gain_ci95"]
        found = "the policy got better" if low > 0 else "the policy got worse" if high < 0 else "there is no clear change"
        told.append(f"gain: {estimate['gain']:+.3f}, {_interval((low, high), sign='+')}; by the estimate {found}")
    elif estimate:
        told.append(f"value model's estimate of a response: {_mean(estimate)}")
    return [*told, "No judge scored them (evaluation.judge is none). The estimate is what a policy is optimised for, so read the responses too."]


def _mean(score: Mapping[str, Any]) -> str:
    return f"{score['mean']:+.3f}, {_interval(score['ci95'], sign='+')}"


def accuracy_words(report: Mapping[str, Any], views: Sequence[str] = ("mean", "last")) -> list[str]:
    """Held-out accuracy of a value model, and what it means.

    Args:
        report: has `pairs`, `heldout_accuracy` and `accuracy_ci95`, see `heldout_report`.
        views: the values that pairs are ordered by; the first one counts.
    """
    accuracy = report["heldout_accuracy"]
    (low, high), longer = report["accuracy_ci95"][views[0]], accuracy["longer_wins"]
    shown = ", ".join(f"{accuracy[view]:.3f} by {view} value" for view in views)
    bars = {f"chance ({CHANCE})": CHANCE, f'"the longer wins" ({longer:.3f})': longer}
    unclear = [name for name, bar in bars.items() if low <= bar]
    found = f"not clearly better than {' and '.join(unclear)}" if unclear else f"better than {' and '.join(bars)}"
    lines = [f"held-out accuracy: {shown}, {counted(report['pairs'], 'pair')}", f"by {views[0]} value it is {found}: {_interval((low, high))}"]
    if len(views) == 1:
        return lines
    return [*lines, "for dvpo train the mean value counts"]


def _interval(ends: Sequence[float], sign: str = "") -> str:
    return f"95 % interval {ends[0]:{sign}.3f} to {ends[1]:{sign}.3f}"


# ------------------------------------------------------------------------------------------------------------- uses


def own_prompts(config: Mapping[str, Any]) -> str:
    """The overrides that give a policy its prompts, where the config has none, or beside pairs ones that are the quickstart's or not there."""
    pairs, prompts = setting(config, "data.preferences.path"), setting(config, "data.prompts.path")
    if not prompts:
        return " data.prompts.path=PROMPTS.jsonl"
    if pairs and not is_shipped(pairs) and (is_shipped(prompts) or no_data(prompts) is not None):
        return f" data.prompts.path={shlex.quote(pairs)} data.prompts.heldout_path=null evaluation.judge=none"
    return ""


def uses(folder: Path, stage: str, config: Mapping[str, Any]) -> dict[str, str]:
    """What `final/` of a run is for: commands by their purpose, the most natural one first."""
    final, own = shlex.quote(str(folder / "final")), shlex.quote(str(folder / "config.yaml"))
    prompts = own_prompts(config)
    pairs = "" if setting(config, "data.preferences.path") else " data.preferences.path=PAIRS.jsonl"
    has_judge = setting(config, "evaluation.judge") not in (None, "none") and "evaluation.judge=none" not in prompts
    purpose = "judge it on held-out prompts" if has_judge else "read its responses to held-out prompts beside those of the model before"
    judged = {purpose: f"dvpo eval {own} --policy {final}{prompts}"}
    load = "\n".join(f"{name} = {loader}.from_pretrained({str(folder / 'final')!r})" for name, loader in _LOADERS.items())
    served = {"serve it": f"vllm serve {final}", "load it in Python": f"from transformers import {', '.join(_LOADERS.values())}\n{load}"}
    policy, gvm = (f" --out {shlex.quote(str(folder.with_name(f'{folder.name}-{name}')))}" for name in ("policy", "gvm"))
    by_stage = {
        "gvm": {
            "optimise a policy with it": f"dvpo train {own} gvm.path={final}{prompts}{policy}",
            "measure it again": f"dvpo gvm eval {own} --gvm {final} --out DIR",
            "see its values of texts": f"dvpo gvm score {own} --gvm {final} --input ROWS.jsonl --output VALUES.jsonl",
        },
        "rm": {"optimise a policy with it": f"dvpo train {own} algorithm=ppo reward_model.path={final}{prompts}{policy}"},
        "sft": {"train a value model for it": f"dvpo gvm train {own} model.path={final}{pairs}{gvm}", **judged, **served},
        "dpo": {**judged, **served},
        "train": {**judged, **served},
    }
    return by_stage.get(stage, {})
