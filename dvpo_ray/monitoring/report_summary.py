"""The top of a report: what ran, how it ended, what it gained, and what deserves attention."""

from __future__ import annotations

from datetime import UTC, datetime
from statistics import fmean

from dvpo_ray.evaluation.gain import gain_of
from dvpo_ray.monitoring.charts import WIDTH, make_frame, number
from dvpo_ray.monitoring.checks import findings
from dvpo_ray.monitoring.console import duration
from dvpo_ray.monitoring.markup import escape, tag
from dvpo_ray.monitoring.run_data import RunData

_BADGES = {"finished": "good", "failed": "bad", "stopped": "warn", "interrupted": "warn", "running": "warn"}


def gold_gain(run: RunData) -> dict | None:
    """The gain by the run's held-out evaluations; None without a judge, or without two evaluations of the same prompts."""
    steps = sorted(run.evaluations)
    if len(steps) < 2 or steps[0] != 0:
        return None
    first, last = run.evaluations[steps[0]], run.evaluations[steps[-1]]
    before, after = [row.get("gold") for row in first], [row.get("gold") for row in last]
    if [row["prompt"] for row in first] != [row["prompt"] for row in last] or None in before or None in after:
        return None
    return gain_of(before, after)


def header(run: RunData) -> str:
    """The run's name, how it ended, and its main settings."""
    state = str(run.summary.get("state") or "state unknown")
    facts = {name.replace("_", " "): run.summary.get(name) for name in ("model", "algorithm", "advantage_mode", "seed")}
    if run.metrics and isinstance(run.metrics[-1].get("time"), (int, float)):
        facts["last step"] = datetime.fromtimestamp(run.metrics[-1]["time"], UTC).strftime("%Y-%m-%d %H:%M UTC")
    shown = [tag("span", f"{escape(name)} ", tag("b", escape(value))) for name, value in facts.items() if value is not None]
    badge = tag("span", escape(state), class_=f"badge {_BADGES.get(state, '')}".strip())
    return tag("header", tag("h1", escape(run.name)), badge, tag("div", *shown, class_="facts"), class_="top")


def summary(run: RunData) -> str:
    """The main result beside the main numbers."""
    return tag("section", _headline(run), tag("div", *_tiles(run), class_="tiles"), class_="summary", aria_label="Summary")


def _headline(run: RunData) -> str:
    if run.is_value_model:
        return _accuracy_headline(run)
    gain = gold_gain(run)
    if gain is None:
        return tag("div", tag("h3", "Gold score of held-out prompts"), _why_no_gain(run), class_="card headline")
    mean, (low, high) = gain["gain"], gain["gain_ci95"]
    verdict, kind = ("a clear gain", "good") if low > 0 else ("a clear loss", "bad") if high < 0 else ("no clear change", "")
    big = f'{number(gain["before"]["mean"])}<span class="arrow" aria-label="to">→</span>{number(gain["after"]["mean"])}'
    words = f"{_signed(mean)} on {gain['prompts']} held-out prompts, 95 % interval {_signed(low)} to {_signed(high)}: "
    return tag(
        "div",
        tag("h3", "Gold score of held-out prompts, before and after"),
        tag("div", big, class_="big"),
        tag("p", escape(words), tag("span", verdict, class_=f"chip {kind}".strip())),
        _range_plot(gain),
        class_="card headline",
    )


def _accuracy_headline(run: RunData) -> str:
    views = {"last": "by the last value", "mean": "by the mean value", "longer_wins": "by length alone: the longer wins"}
    known = [(words, value) for view, words in views.items() if (value := run.summary_number(f"gvm.heldout_accuracy.{view}")) is not None]
    if not known:
        return tag("div", tag("h3", "Held-out pairs ordered correctly"), tag("p", "Not evaluated.", class_="soft"), class_="card headline")
    (words, value), *others = known
    rest = tag("p", escape("; ".join(f"{other:.1%} {text}" for text, other in others)), class_="soft")
    big = tag("div", f"{value:.1%}", class_="big") + tag("p", words)
    return tag("div", tag("h3", "Held-out pairs ordered correctly"), big, rest, class_="card headline")


def _why_no_gain(run: RunData) -> str:
    scored = {step: [row["gold"] for row in rows if row.get("gold") is not None] for step, rows in sorted(run.evaluations.items())}
    scored = {step: gold for step, gold in scored.items() if gold}
    if not scored:
        return tag("p", "No gold judge scored this run, so there is no independent measure of its gain. Set evaluation.judge.", class_="soft")
    (first, gold), *others = scored.items()
    why = "The evaluations are of different prompts." if others else "There is no evaluation after training to compare with."
    return tag("div", number(fmean(gold)), class_="big") + tag("p", f"at step {first}, on {len(gold)} prompts. {why}", class_="soft")


def _range_plot(gain: dict) -> str:
    """Both means with their intervals on one scale."""
    height = 96
    frame = make_frame(
        [x for side in (gain["before"], gain["after"]) for x in (side["mean"], *side["ci95"])], [0.0, 1.0], "gold score", steps=False, height=height
    )
    parts = [f'<line class="grid zero" x1="{frame.x(0):.1f}" x2="{frame.x(0):.1f}" y1="4" y2="{height - 34}"/>'] if _holds(frame.x_range, 0) else []
    for y, label, color in ((16, "before", "c8"), (42, "after", "c1")):
        mean, (low, high) = gain[label]["mean"], gain[label]["ci95"]
        parts.append(f'<text class="strong" x="0" y="{y + 4}">{label}</text>')
        parts.append(f'<line class="whisker {color}" x1="{frame.x(low):.1f}" x2="{frame.x(high):.1f}" y1="{y}" y2="{y}"/>')
        tip = escape(f"{label} {number(mean)}\n95 % interval {number(low)} to {number(high)}")
        parts.append(f'<circle class="dot {color}" cx="{frame.x(mean):.1f}" cy="{y}" r="6"><title>{tip}</title></circle>')
    axis = f'<line class="grid" x1="50" x2="{WIDTH - 14}" y1="{height - 34}" y2="{height - 34}"/>'
    words = f"Gold score before {number(gain['before']['mean'])} and after {number(gain['after']['mean'])}, with 95 % intervals."
    return frame.svg(axis + "".join(parts) + frame.x_axis(), words)


def _holds(interval: tuple[float, float], value: float) -> bool:
    return interval[0] <= value <= interval[1]


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + number(value)


# -------------------------------------------------------------------------------------------------------- tiles


def _tiles(run: RunData) -> list[str]:
    kl = run.summary_number("kl.after_mean")
    seconds, memory = run.summary_number("duration_seconds"), run.summary_number("peak_memory_gib")
    policy = [
        _tile("KL from the reference", "–" if kl is None else f"{number(kl)} nats", "mean per held-out response, after training"),
        _accuracy_tile(run),
        _responses_tile(run),
    ]
    return [
        *([] if run.is_value_model else policy),
        _tile("Steps", number(run.summary_number("steps") or (run.steps[-1] if run.steps else 0)), _pace(run)),
        _tile("Duration", "–" if seconds is None else duration(seconds), "start to end, evaluations included"),
        _tile("Peak memory", "–" if memory is None else f"{number(memory)} GiB", "all processes of the run on this node"),
    ]


def _accuracy_tile(run: RunData) -> str:
    views = {name: run.summary_number(f"gvm.heldout_accuracy.{name}") for name in ("last", "mean")}
    known = [f"{name} {value:.1%}" for name, value in views.items() if value is not None]
    best = next((value for value in views.values() if value is not None), None)
    note = "of held-out pairs: " + ", ".join(known) + " value" if known else "not in the summary"
    return _tile("GVM accuracy", "–" if best is None else f"{best:.1%}", note)


def _pace(run: RunData) -> str:
    known = [value for value in run.column("time/step_seconds") if value is not None]
    return f"{number(sum(known) / len(known))} s per step" if known else ""


def _responses_tile(run: RunData) -> str:
    """Rollouts sampled, as far as the metrics tell."""
    pairs = zip(run.column("throughput/samples_per_second"), run.column("time/step_seconds"), strict=True)
    total = sum(round(rate * seconds) for rate, seconds in pairs if rate is not None and seconds is not None)
    return _tile("Rollouts", number(total) if total else "–", "responses sampled for training")


def _tile(label: str, value: str, note: str) -> str:
    parts = [tag("div", escape(label), class_="label"), tag("div", escape(value), class_="value"), tag("div", escape(note), class_="note")]
    return tag("div", *parts, class_="card tile")


# ---------------------------------------------------------------------------------------------------- attention


def attention(run: RunData) -> str:
    """Why the run failed, its alarms, what is beyond its bounds, and which lines could not be read."""
    boxes = []
    if error := run.summary.get("error"):
        boxes.append(tag("div", tag("b", "The run failed. "), escape(error), class_="notice bad"))
    alarms = [alarm for alarm in run.summary_list("alarms") if isinstance(alarm, dict)]
    if alarms:
        boxes.append(tag("div", tag("b", f"Alarms: {len(alarms)}"), tag("ul", *map(_alarm, alarms)), class_="notice bad"))
    items = [tag("li", escape(warning)) for warning in _texts(run, "warnings")]
    items += [tag("li", escape(finding.text), " ", tag("span", escape(finding.advice), class_="soft")) for finding in findings(run)]
    if items:
        boxes.append(tag("div", tag("b", "Worth a look"), tag("ul", *items), class_="notice"))
    elif run.metrics:
        boxes.append(tag("div", "No metric lies beyond its bounds.", class_="notice good"))
    if rows := _texts(run, "notes"):
        items = tag("ul", *(tag("li", escape(row)) for row in rows))
        boxes.append(tag("details", tag("summary", f"Data rows skipped or dropped: {len(rows)}"), items))
    if run.notes:
        boxes.append(tag("div", tag("b", "Not readable"), tag("ul", *(tag("li", escape(note)) for note in run.notes)), class_="notice"))
    return tag("section", *boxes, aria_label="Findings") if boxes else ""


def _alarm(alarm: dict) -> str:
    text = f"Step {alarm.get('step')}, {alarm.get('name')}: {alarm.get('text')}"
    return tag("li", escape(text), " ", tag("span", escape(alarm.get("advice")), class_="soft"))


def _texts(run: RunData, key: str) -> list[str]:
    """The lines of a list in the summary."""
    return [str(line) for line in run.summary_list(key) if line]
