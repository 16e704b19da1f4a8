"""The top of a report: what ran, how it ended, what it gained, and what deserves attention."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from datetime import UTC, datetime
from statistics import fmean

from dvpo_ray.config.algorithms import ALGORITHMS
from dvpo_ray.config.arithmetic import counted
from dvpo_ray.config.paths import from_home
from dvpo_ray.evaluation.gain import gain_of
from dvpo_ray.health.alarms import trend
from dvpo_ray.monitoring.catalogue import find_metric
from dvpo_ray.monitoring.charts import number, range_chart
from dvpo_ray.monitoring.console import duration
from dvpo_ray.monitoring.run_data import DIED, RunData, setting
from dvpo_ray.monitoring.run_files import resume_command

LAST_STEPS = 5
LEAST_STEPS = 12
LEAST_TREND = 2.0
LOW_GVM_ACCURACY = 0.6

_PAIRS = ("data.preferences.path", "data.preferences.heldout_path", "data.long_response")
_DATA = {"train": ("data.prompts.path", "data.prompts.heldout_path"), "gvm": _PAIRS, "rm": _PAIRS, "dpo": _PAIRS, "sft": ("data.sft",)}
_ANY_DATA = ("data.long_prompt", "data.on_bad_row")
_COMMON = ("model.path", "model.dtype", "model.chat_template", "data.max_prompt_tokens", "seed")
_VALUE_MODEL = ("init_from", "num_layers", "objective", "epochs", "pairs_per_step", "learning_rate")
_TRAINER = ("epochs", "batch_size", "gradient_accumulation_steps", "learning_rate")
_SETTINGS = {
    "train": (
        *("algorithm", "advantage.mode", "gvm.path", "reward_model.path", "train.steps", "batch.prompts_per_step", "batch.samples_per_prompt"),
        *("policy.learning_rate", "kl.placement", "kl.coefficient", "rollout.max_response_tokens", "rollout.temperature", "evaluation.judge"),
    ),
    "gvm": tuple(f"gvm.{key}" for key in _VALUE_MODEL),
    "rm": tuple(f"reward_model.{key}" for key in _VALUE_MODEL),
    "sft": tuple(f"sft.{key}" for key in (*_TRAINER, "max_tokens")),
    "dpo": tuple(f"dpo.{key}" for key in (*_TRAINER, "beta")),
}
"""What a reader asks for first; the whole config is below."""
_OF_DVPO, _OF_BASELINES = ("advantage.mode", "gvm.path"), ("reward_model.path",)
"""Settings that the other algorithms do not read."""


def facts(run: RunData) -> dict[str, object]:
    """The main settings, and when the last step ended."""
    known = {name.replace("_", " "): run.summary.get(name) for name in ("model", "algorithm", "advantage_mode", "seed")}
    if known["advantage mode"] == known["algorithm"]:  # a baseline has no mode of its advantage
        del known["advantage mode"]
    if known["model"] is not None:
        known["model"] = from_home(known["model"])
    if run.metrics and "time" in run.metrics[-1]:
        known["last step"] = datetime.fromtimestamp(run.metrics[-1]["time"], UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {name: value for name, value in known.items() if value is not None}


def outcome(run: RunData) -> dict | None:
    """How a run that is not finished stands: `kind`, `title`, `text`, the `log` of the actor and the `command` that continues it."""
    if run.state == "finished":
        return None
    process, actor, error = run.summary.get("process") or {}, run.summary.get("error_actor"), run.summary.get("error")
    kind, title, text = {
        "failed": ("bad", "The run failed", ""),
        "interrupted": ("warn", "The run was interrupted", "Ctrl-C or a signal ended it."),
        "stopped": ("warn", "An alarm stopped the run", ""),
        "running": ("", "The run is going on", "This page shows it so far; `dvpo report` writes it anew."),
        DIED: (
            "bad",
            "The run ended without a word",
            f"Its process {process.get('pid', '')} is gone: killed, out of memory, or the machine went down. The files in logs/ may tell.",
        ),
    }.get(run.state, ("warn", "How the run ended is not known", "summary.json does not say it."))
    steps = setting(run.settings, "train.steps") if run.stage == "train" else None
    goes_on = resume_command(run.folder.resolve(), run.stage) if run.state != "running" else None
    where = f"after step {run.last_step}{f' of {steps}' if steps else ''}" if run.last_step else "before its first step was done"
    return {
        "kind": kind,
        "title": f"{title} {where}{f', in {actor}' if actor else ''}.",
        "text": " ".join(filter(None, [error, text])),
        "log": f"logs/{actor}.log" if actor and (run.folder / "logs" / f"{actor}.log").is_file() else "",
        "command": goes_on,
        "anew": run.state not in ("", "running") and goes_on is None,
    }


def origin(run: RunData) -> dict:
    """How a run was made: its `command`, those that `resumed` it, its `data` and its main `settings`, as pairs of key and value."""
    command, resumed = run.summary.get("command"), run.summary.get("resumed_by") or ()
    data, own = (*_DATA[run.stage], *_ANY_DATA), _SETTINGS.get(run.stage, ())
    known = {key: setting(run.settings, key) for key in (*data, *_COMMON, *own)}
    unread = _OF_BASELINES if _section(run) == "gvm" else _OF_DVPO
    own = tuple(key for key in own if key not in unread)
    return {
        "command": shlex.join(map(str, command)) if isinstance(command, list) else "",
        "resumed": [shlex.join(map(str, words)) for words in resumed],
        "data": [(key, known[key]) for key in data if known[key] is not None],
        "settings": [(key, known[key]) for key in (*_COMMON, *own) if known[key] is not None],
    }


def headline(run: RunData) -> dict:
    """The main result: `title`, `big` numbers, `text`, a `verdict` with its colour, a `note` and a `plot`; some are missing."""
    if run.stage in ("sft", "dpo"):
        known = [value for value in run.column(f"{run.stage}/loss") if value is not None]
        numbers = {"big": [number(known[0]), number(known[-1])]} if known else {"note": "No step has been logged."}
        return {"title": "Training loss, first and last step", **numbers}
    if run.is_value_model:
        return {"title": "Held-out pairs ordered correctly", **_accuracy(run)}
    evaluations = {step: [row.get("gold") for row in rows] for step, rows in sorted(run.evaluations.items())}
    steps = list(evaluations)
    title = "Gold score of held-out prompts"
    prompts = [[row["prompt"] for row in run.evaluations[step]] for step in (steps[:1] + steps[-1:])]
    before, after = (evaluations[steps[0]], evaluations[steps[-1]]) if steps else ([], [])
    if len(steps) > 1 and steps[0] == 0 and prompts[0] == prompts[1] and None not in (*before, *after):
        when = "before and after" if run.state == "finished" else f"at steps 0 and {steps[-1]}"
        return {"title": f"{title}, {when}", **_gain(gain_of(before, after))}
    scored = {step: known for step, scores in evaluations.items() if (known := [score for score in scores if score is not None])}
    if not scored:
        return {
            "title": "No judge scored this run",
            "note": "So nothing independent measures its gain. Read the sample texts below, or lay more of them side by side with dvpo eval. "
            "docs/training.md, Without a judge, says more.",
        }
    step, scores = next(iter(scored.items()))
    why = "The evaluations are of different prompts." if len(scored) > 1 else "There is no evaluation after training to compare with."
    return {"title": title, "big": [number(fmean(scores))], "note": f"at step {step}, on {counted(len(scores), 'prompt')}. {why}"}


def _gain(gold: dict) -> dict:
    low, high = gold["gain_ci95"]
    gain, *ends = (("+" if value > 0 else "") + number(value) for value in (gold["gain"], low, high))
    verdict = ("a clear gain", "good") if low > 0 else ("a clear loss", "bad") if high < 0 else ("no clear change", "")
    rows = {side: (gold[side]["mean"], *gold[side]["ci95"]) for side in ("before", "after")}
    return {
        "big": [number(mean) for mean, _, _ in rows.values()],
        "text": f"{gain} on {counted(gold['prompts'], 'held-out prompt')}, 95 % interval {ends[0]} to {ends[1]}:",
        "verdict": verdict,
        "plot": range_chart(rows, name="Gold score", x_label="gold score"),
    }


def _accuracy(run: RunData) -> dict:
    by_mean = {} if run.stage == "rm" else {"mean": "by the mean value"}  # which counts, but is not trained in a reward model
    views = {**by_mean, "last": "by the last value", "longer_wins": "by length alone: the longer wins"}
    known = [(value, words) for view, words in views.items() if (value := run.summary_number(f"gvm.heldout_accuracy.{view}")) is not None]
    if not known:
        return {"note": "Not evaluated."}
    (value, words), *others = known
    pairs, ends = run.summary_number("gvm.pairs"), setting(run.summary, f"gvm.accuracy_ci95.{'mean' if by_mean else 'last'}")
    measured = f", on {counted(pairs, 'pair')}, 95 % interval {ends[0]:.1%} to {ends[1]:.1%}" if pairs is not None and ends else ""
    return {"big": [f"{value:.1%}"], "text": f"{words}{measured}", "note": "; ".join(f"{other:.1%} {text}" for other, text in others)}


def tiles(run: RunData) -> list[tuple[str, str, str]]:
    """The main numbers: label, value and note of each."""
    kl, seconds, memory = map(run.summary_number, ("kl.after_mean", "duration_seconds", "peak_memory_gib"))
    times = run.column("time/step_seconds")
    known = [value for value in times if value is not None]
    rates = zip(run.column("throughput/samples_per_second"), times, strict=True)
    rollouts = sum(round(rate * seconds) for rate, seconds in rates if rate is not None and seconds is not None)
    policy = [
        ("KL from the reference", f"{number(kl)} nats" if kl is not None else "–", "mean per held-out response, after training"),
        _scoring_accuracy(run),
        ("Rollouts", number(rollouts) if rollouts else "–", "responses sampled for training"),
    ]
    return [
        *(policy if run.stage == "train" else []),
        ("Steps", number(run.last_step), f"{number(fmean(known))} s per step" if known else ""),
        ("Duration", duration(seconds) if seconds is not None else "–", "start to end, evaluations included"),
        ("Peak memory", f"{number(memory)} GiB" if memory is not None else "–", "all processes of the run on this node"),
    ]


def _section(run: RunData) -> str:
    """The section of the config that names the model that scores the rollouts."""
    algorithm = run.summary.get("algorithm") or setting(run.settings, "algorithm")  # a run that ended before it began has no summary of it
    return ALGORITHMS.get(str(algorithm), ALGORITHMS["dvpo"]).section


def _scoring_accuracy(run: RunData) -> tuple[str, str, str]:
    """The tile of the model that scores the rollouts: the GVM, or the reward model of a baseline, of which only the last value is trained."""
    section = _section(run)
    name, views = {"gvm": ("GVM accuracy", ("mean", "last")), "reward_model": ("Reward model accuracy", ("last",))}[section]
    accuracy = {view: value for view in views if (value := run.summary_number(f"{section}.heldout_accuracy.{view}")) is not None}
    if not accuracy:
        return name, "–", "not in the summary"
    (view, counts), *others = accuracy.items()
    pairs, ends = run.summary_number(f"{section}.pairs"), setting(run.summary, f"{section}.accuracy_ci95.{view}")
    measured = f"{counted(pairs, 'held-out pair')} ({ends[0]:.1%} to {ends[1]:.1%})" if pairs and ends else "held-out pairs"
    longer = run.summary_number(f"{section}.heldout_accuracy.longer_wins")
    rest = [f"{value:.1%} by {other} value" for other, value in others] + ([f"{longer:.1%} by length"] if longer is not None else [])
    return name, f"{counts:.1%}", "; ".join([f"by {view} value, of {measured}", *rest])


def alarms(run: RunData) -> list[tuple[str, str]]:
    """The alarms of a run, one entry for each rule in the order of their first alarms: when and, of the last one, what was observed; the advice."""
    by_rule: dict[str, list[dict]] = {}
    for alarm in run.summary.get("alarms") or ():
        by_rule.setdefault(alarm["name"], []).append(alarm)
    return [(_raised(name, raised), raised[-1]["advice"]) for name, raised in by_rule.items()]


def _raised(name: str, raised: list[dict]) -> str:
    first, last = raised[0], raised[-1]
    if len(raised) == 1:
        return f"Step {last['step']}, {name}: {last['text']}"
    return f"{len(raised)} times from step {first['step']} to step {last['step']}, {name}. The last: {last['text']}"


def findings(run: RunData) -> Iterator[tuple[str, str]]:
    """Everything in a run that deserves attention, the worst first: what it is, and what to do about it."""
    # What the policy is optimised for rises while the gold score falls.
    baseline = _section(run) == "reward_model"
    estimate, what, judge = ("reward/model_mean", "reward", "reward model") if baseline else ("value/terminal_mean", "value", "GVM")
    known, gold = (run.column(name)[len(run.metrics) // 2 :] for name in (estimate, "reward/gold_mean"))
    if len(run.metrics) >= LEAST_STEPS and None not in (*known, *gold) and trend(known) > LEAST_TREND and trend(gold) < -LEAST_TREND:
        text = f"The {what} rises while the gold score falls over the second half of the run: the policy exploits errors of the {judge}."
        yield text, find_metric("reward/gold_mean").advice.replace("GVM", judge)

    called, view, more = (
        ("reward model", "last", "or for more epochs") if run.stage == "rm" else ("GVM", "mean", "for more epochs, or with gvm.bradley_terry_weight")
    )
    accuracy = run.summary_number(f"gvm.heldout_accuracy.{view}")
    if accuracy is not None and accuracy < LOW_GVM_ACCURACY:
        text = f"The {called} orders only {accuracy:.0%} of held-out pairs correctly by its {view} value, less than {LOW_GVM_ACCURACY:.0%}."
        yield text, f"Train it on more pairs, {more}."

    for name in run.names():
        metric, last = find_metric(name), [value for value in run.column(name)[-LAST_STEPS:] if value is not None]
        if metric and last and metric.is_trouble(fmean(last)):
            yield f"{name} is {number(fmean(last))} on average over the last {counted(len(last), 'step')}. {metric.trouble}", metric.advice

    for name in dict.fromkeys(name for row in run.metrics for name in row):
        steps = [row["step"] for row in run.metrics if name in row and row[name] is None]
        if steps:
            text = f"{name} was not finite at {len(steps)} of {counted(len(run.metrics), 'step')}, first at step {steps[0]}."
            yield text, "Look at policy/grad_norm and mismatch/ at the steps before. Lower policy.learning_rate."
