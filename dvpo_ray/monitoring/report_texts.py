"""The texts of a report: samples before and after, one response token by token, every metric, the config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dvpo_ray.monitoring.catalogue import find_metric
from dvpo_ray.monitoring.charts import Series, line_chart, number
from dvpo_ray.monitoring.markup import escape, tag
from dvpo_ray.monitoring.metric_list import Metric
from dvpo_ray.monitoring.run_data import RunData
from dvpo_ray.monitoring.tokens import align_tokens, colour_legend, coloured_tokens

SAMPLES = 8
MOST_TOKENS = 600


# ------------------------------------------------------------------------------------------------------ samples


def samples(run: RunData) -> str:
    """Held-out prompts with the responses before and after training, side by side."""
    steps = sorted(run.evaluations)
    if not steps:
        return ""
    before, after = run.evaluations[steps[0]], run.evaluations[steps[-1]]
    if len(steps) == 1:
        chosen: list[tuple[dict, dict | None]] = [(row, None) for row in before[:SAMPLES]]
        lead = f"Responses at step {steps[0]}, the only evaluation of this run."
    else:
        chosen, lead = _spread_of_gains(_paired(before, after))
    cards = [_sample(first, second, steps) for first, second in chosen]
    return tag("section", tag("h2", "Sample texts"), tag("p", escape(lead), class_="lead"), *cards)


def _paired(before: list[dict], after: list[dict]) -> list[tuple[dict, dict]]:
    """Rows of the same prompt; evaluations keep the order of the prompts, so equal prompts at equal places belong together."""
    return [(first, second) for first, second in zip(before, after, strict=False) if first["prompt"] == second["prompt"]]


def _spread_of_gains(pairs: list[tuple[dict, dict]]) -> tuple[list[tuple[dict, dict]], str]:
    """A few pairs at even distances between the largest gain and the largest loss, and the sentence that says so."""
    if any(row.get("gold") is None for pair in pairs for row in pair):
        return pairs[:SAMPLES], f"The first {len(pairs[:SAMPLES])} of {len(pairs)} held-out prompts."
    ranked = sorted(pairs, key=lambda pair: pair[0]["gold"] - pair[1]["gold"])
    count = min(SAMPLES, len(ranked))
    places = [round(i * (len(ranked) - 1) / max(count - 1, 1)) for i in range(count)]
    lead = f"{count} of {len(ranked)} held-out prompts, at even distances from the largest gain to the largest loss; none is picked by hand."
    return [ranked[place] for place in places], lead


def _sample(before: dict, after: dict | None, steps: list[int]) -> str:
    prompt = tag("div", tag("div", "Prompt", class_="role"), _text(before["prompt"]), class_="prompt")
    sides = [_side(f"Before (step {steps[0]})", before, None)]
    if after is not None:
        sides.append(_side(f"After (step {steps[-1]})", after, before))
    return tag("article", prompt, tag("div", *sides, class_="pair"), class_="card sample")


def _side(label: str, row: dict, before: dict | None) -> str:
    chips = []
    if row.get("gold") is not None:
        gain = round(row["gold"] - before["gold"], 2) + 0.0 if before and before.get("gold") is not None else None
        kind = "good" if (gain or 0) > 0 else "bad" if (gain or 0) < 0 else ""
        text = f"gold {row['gold']:.2f}" + ("" if gain is None else f" ({gain:+.2f})" if gain else " (±0)")
        chips.append(tag("span", text.replace("-", "−"), class_=f"chip {kind}".strip()))
    if before is not None and row.get("kl") is not None:
        chips.append(tag("span", f"KL {number(row['kl'])} nats", class_="chip"))
    return tag("div", tag("div", escape(label), *chips, class_="role"), _text(row["response"]), class_="side")


def _text(content: Any) -> str:
    """A text, or the messages of a chat, each after its role."""
    if isinstance(content, list):
        messages = [message if isinstance(message, dict) else {"content": message} for message in content]
        content = "\n".join(f"{message.get('role', '')}: {message.get('content', '')}".removeprefix(": ") for message in messages)
    return tag("p", escape(content) or '<i class="mark">(empty)</i>', class_="text", dir="auto", tabindex=0)


# ------------------------------------------------------------------------------------------------- token credit


def token_credit(run: RunData) -> str:
    """One response of the last rollouts, coloured by value and by advantage."""
    if not run.rollouts:
        return ""
    short = [row for row in run.rollouts if len(row["tokens"]) <= MOST_TOKENS]
    shown = "values" if "values" in run.rollouts[-1] else "advantages"  # a baseline without a critic has no values
    row = max(short or run.rollouts, key=lambda row: max(row[shown]) - min(row[shown]))
    values, advantages = row.get("values", [])[: MOST_TOKENS + 1], row["advantages"][:MOST_TOKENS]
    pieces = align_tokens(row["tokens"], row["response"])[:MOST_TOKENS]
    tips = [_token_tip(row, t, piece) for t, piece in enumerate(pieces)]
    lead = (
        f"Of the {len(run.rollouts)} rollouts of step {run.rollout_step}, the one whose {shown[:-1]} moves most. Point at a token to see its numbers "
        "and to find it in every view."
    )
    return tag(
        "section",
        tag("h2", "One response, token by token"),
        tag("p", escape(lead), class_="lead"),
        tag(
            "div",
            tag("div", tag("div", "Prompt", *_rollout_chips(row), class_="role"), _text(row["prompt"]), class_="card"),
            _value_curve(values, pieces) if values else "",
            _token_card("Value", "What the value model expects after each token.", pieces, values[1:], tips, ("worse", "better")) if values else "",
            _token_card("Advantage", "What the update does to each token.", pieces, advantages, tips, ("less likely", "more likely")),
            class_="two",
        ),
    )


def _rollout_chips(row: dict) -> list[str]:
    texts = [f"{len(row['tokens'])} tokens"]
    if "values" in row:
        texts[:0] = [f"value of the prompt {number(row['values'][0])}", f"value at the end {number(row['values'][-1])}"]
    if "reward" in row:
        texts.insert(0, f"reward {number(row['reward'])}")
    if row.get("gold") is not None:
        texts.insert(0, f"gold {number(row['gold'])}")
    if row.get("truncated"):
        texts.append("cut off at the length limit")
    if len(row["tokens"]) > MOST_TOKENS:
        texts.append(f"the first {MOST_TOKENS} shown")
    return [tag("span", escape(text), class_="chip") for text in texts]


def _token_tip(row: dict, t: int, piece: str) -> str:
    values = row.get("values")
    change = values[t + 1] - values[t] if values else 0.0
    return "\n".join(
        [
            f"token {t + 1} {piece!r}",
            *([f"value {number(values[t + 1])} ({'+' if change > 0 else ''}{number(change)})"] if values else []),
            f"advantage {number(row['advantages'][t])}",
            f"log-prob {number(row['log_probs'][t])}, reference {number(row['reference_log_probs'][t])}",
        ]
    )


def _token_card(title: str, caption: str, pieces: Sequence[str], numbers: Sequence[float], tips: Sequence[str], ends: tuple[str, str]) -> str:
    head = tag("div", tag("h3", title), tag("span", escape(caption), class_="now"), class_="head")
    return tag("div", head, coloured_tokens(pieces, numbers, tips), colour_legend(numbers, *ends), class_="card")


def _value_curve(values: Sequence[float], pieces: Sequence[str]) -> str:
    series = [Series("value", list(values))]
    chart = line_chart(range(len(values)), series, name="Value along the response", x_label="response token", from_zero=True, tokens=pieces)
    head = tag("div", tag("h3", "Value along the response"), class_="head")
    caption = tag("figcaption", "Position 0 is the value of the prompt; each step up or down is the credit of one token.")
    return tag("figure", head, chart, caption, class_="card")


# ------------------------------------------------------------------------------------------------------- tables


def all_metrics(run: RunData) -> str:
    """Every metric of the run with its range and its meaning, folded away."""
    if not run.metrics:
        return ""
    titles = [tag("th", text, scope="col", class_=kind) for text, kind in _COLUMNS]
    body = [_metric_row(run, name) for name in sorted(run.names())]
    table = tag("table", tag("thead", tag("tr", *titles)), tag("tbody", *body))
    return tag("details", tag("summary", f"All {len(body)} metrics"), tag("div", table, class_="scroll"), class_="card")


_COLUMNS = (
    ("metric", ""),
    ("unit", ""),
    ("first", "num"),
    ("last", "num"),
    ("lowest", "num"),
    ("highest", "num"),
    ("meaning", ""),
    ("trouble when", ""),
)


def _metric_row(run: RunData, name: str) -> str:
    known = [value for value in run.column(name) if value is not None]
    metric = find_metric(name) or Metric(name, "", "")  # another version may have written it
    unit, meaning, trouble = metric.unit, metric.meaning, metric.trouble
    numbers = [tag("td", number(value), class_="num") for value in (known[0], known[-1], min(known), max(known))]
    return tag("tr", tag("td", tag("code", escape(name))), tag("td", escape(unit)), *numbers, tag("td", escape(meaning)), tag("td", escape(trouble)))


def config(run: RunData) -> str:
    """config.yaml as it was resolved, folded away."""
    if not run.config:
        return ""
    return tag("details", tag("summary", "Config"), tag("pre", escape(run.config), tabindex=0), class_="card")
