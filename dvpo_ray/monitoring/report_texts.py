"""The texts of a report: samples before and after, one response token by token, and every metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

from dvpo_ray.config.arithmetic import counted
from dvpo_ray.monitoring.catalogue import Metric, find_metric
from dvpo_ray.monitoring.charts import Series, line_chart, number
from dvpo_ray.monitoring.run_data import RunData

SAMPLES = 8
CUT_OFF = "cut off at the length limit"
MOST_TOKENS = 600
_BROKEN = "\ufffd"  # a token that holds only part of a character decodes to this
_LONGEST_CHARACTERS = 8  # of the text that a run of such tokens stands for


# ------------------------------------------------------------------------------------------------------ samples


def samples(run: RunData) -> dict | None:
    """Held-out prompts with the responses before and after training: a `lead`, and `cards` of a `prompt`, a text or messages, and its `sides`."""
    steps = sorted(run.evaluations)
    if not steps:
        return None
    first, last = run.evaluations[steps[0]], run.evaluations[steps[-1]]
    # Evaluations keep the order of the prompts, so equal prompts at equal places belong together.
    pairs = [(before, after) for before, after in zip(first, last, strict=False) if before["prompt"] == after["prompt"]]
    if len(steps) == 1:
        chosen, lead = pairs[:SAMPLES], f"Responses at step {steps[0]}, the only evaluation of this run."
    elif any(row.get("gold") is None for pair in pairs for row in pair):
        chosen = pairs[:SAMPLES]
        lead = f"The first {len(chosen)} of {counted(len(pairs), 'held-out prompt')}."
    else:
        ranked = sorted(pairs, key=lambda pair: pair[0]["gold"] - pair[1]["gold"])
        count = min(SAMPLES, len(ranked))
        chosen = [ranked[round(i * (len(ranked) - 1) / max(count - 1, 1))] for i in range(count)]
        prompts = counted(len(ranked), "held-out prompt")
        lead = f"{count} of {prompts}, evenly spaced from the largest gain to the largest loss; none is picked by hand."
    if len(steps) > 1 and any(after.get("kl") is not None for _, after in chosen):
        lead += " The KL of one response is its log-prob by the policy minus that by the reference."
        lead += " It can be negative, and so can the mean of few responses."
    cards = []
    for before, after in chosen:
        sides = [_side(f"Before (step {steps[0]})", before, None)]
        sides += [_side(f"After (step {steps[-1]})", after, before)] if len(steps) > 1 else []
        cards.append({"prompt": before["prompt"], "sides": sides})
    return {"lead": lead, "cards": cards}


def _side(label: str, row: dict, before: dict | None) -> dict:
    chips = []
    if row.get("gold") is not None:
        gain = round(row["gold"] - before["gold"], 2) + 0.0 if before and before.get("gold") is not None else None
        kind = "good" if (gain or 0) > 0 else "bad" if (gain or 0) < 0 else ""
        text = f"gold {round(row['gold'], 2) + 0.0:.2f}" + ("" if gain is None else f" ({gain:+.2f})" if gain else " (±0)")
        chips.append((text.replace("-", "−"), kind))
    if before is not None and row.get("kl") is not None:
        chips.append((f"KL {number(row['kl'])} nats", ""))
    if row.get("truncated"):
        chips.append((CUT_OFF, "warn"))
    return {"label": label, "chips": chips, "text": row["response"]}


# ------------------------------------------------------------------------------------------------- token credit


def token_credit(run: RunData) -> dict | None:
    """One response of the last rollouts: its `prompt`, the `curve` of its values, and `views` coloured by value and advantage."""
    if not run.rollouts:
        return None
    short = [row for row in run.rollouts if len(row["tokens"]) <= MOST_TOKENS]
    shown = "values" if "values" in run.rollouts[-1] else "advantages"  # a baseline without a critic has no values
    row = max(short or run.rollouts, key=lambda row: max(row[shown]) - min(row[shown]))
    values, advantages = row.get("values", [])[: MOST_TOKENS + 1], row["advantages"][:MOST_TOKENS]
    pieces = align_tokens(row["tokens"], row["response"])[:MOST_TOKENS]
    tips = [_token_tip(row, t, piece) for t, piece in enumerate(pieces)]
    views = [_view("Advantage", "What the update does to each token.", pieces, advantages, tips, ("less likely", "more likely"))]
    curve = None
    if values:
        views.insert(0, _view("Value", "What the value model expects after each token.", pieces, values[1:], tips, ("worse", "better")))
        title, series = "Value along the response", [Series("value", values)]
        svg = line_chart(range(len(values)), series, name=title, x_label="response token", from_zero=True, tokens=pieces)
        caption = "Position 0 is the value of the prompt; each step up or down is the credit of one token."
        curve = {"title": title, "svg": svg, "caption": caption}
    lead = (
        f"The {shown[:-1]} of this response moves most among the {counted(len(short or run.rollouts), 'rollout')} of step {run.rollout_step}"
        f"{f' with at most {MOST_TOKENS} tokens' if 0 < len(short) < len(run.rollouts) else ''}. "
        "Point at a token to see its numbers and to find it in every view."
    )
    return {"lead": lead, "prompt": row["prompt"], "chips": _rollout_chips(row), "curve": curve, "views": views}


def _rollout_chips(row: dict) -> list[str]:
    texts = [f"{name} {number(row[name])}" for name in ("gold", "reward") if row.get(name) is not None]
    if "values" in row:
        texts += [f"value of the prompt {number(row['values'][0])}", f"value at the end {number(row['values'][-1])}"]
    texts.append(counted(len(row["tokens"]), "token"))
    if row.get("truncated"):
        texts.append(CUT_OFF)
    if len(row["tokens"]) > MOST_TOKENS:
        texts.append(f"the first {MOST_TOKENS} shown")
    return texts


def _token_tip(row: dict, t: int, piece: str) -> str:
    lines = [f"token {t + 1} {piece!r}"]
    if values := row.get("values"):
        change = values[t + 1] - values[t]
        lines.append(f"value {number(values[t + 1])} ({'+' if change > 0 else ''}{number(change)})")
    lines.append(f"advantage {number(row['advantages'][t])}")
    lines.append(f"log-prob {number(row['log_probs'][t])}, reference {number(row['reference_log_probs'][t])}")
    return "\n".join(lines)


def _view(title: str, caption: str, pieces: Sequence[str], numbers: Sequence[float], tips: Sequence[str], ends: tuple[str, str]) -> dict:
    """Tokens coloured from one hue over none, at 0, to another; the largest absolute number has full colour."""
    scale = max(map(abs, numbers)) or 1.0
    tokens = [
        {"text": _visible(piece), "kind": "pos" if value >= 0 else "neg", "strength": f"{abs(value) / scale:.3f}", "tip": tip}
        for piece, value, tip in zip(pieces, numbers, tips, strict=True)
    ]
    return {"title": title, "caption": caption, "tokens": tokens, "low": f"{number(-scale)} {ends[0]}", "high": f"{number(scale)} {ends[1]}"}


def _visible(piece: str) -> Markup:
    """A token's text with its line breaks marked, so that a token of nothing else can be seen and pointed at."""
    return escape(piece).replace("\n", Markup('<i class="mark">↵</i>\n')) or Markup('<i class="mark">·</i>')


def align_tokens(tokens: Sequence[str], response: str) -> list[str]:
    """The part of a response that each token stands for.

    Decoding token by token loses spaces (SentencePiece) and characters that span several tokens (bytes of an emoji). The
    response text has them. Tokens that the text does not show, such as an end-of-turn token, stand for themselves.

    Args:
        tokens: each token decoded by itself.
        response: all tokens decoded together, without special tokens.

    Returns:
        One text per token. In a run of tokens that share a character, the first has it and the others are empty.
    """
    pieces: list[str] = []
    position = 0
    broken: list[int] = []  # indices of the run of broken tokens that ends here

    def mend(text: str) -> None:
        for i in broken if text else ():
            pieces[i] = text if i == broken[0] else ""
        broken.clear()

    for token in tokens:
        spaces = len(response) - position - len(response[position:].lstrip(" "))
        reach = position + (_LONGEST_CHARACTERS if broken else spaces)
        found = {text: response.find(text, position, reach + len(text)) for text in (token, token.lstrip(" ")) if text}
        text = min((text for text in found if found[text] >= 0), key=found.get, default=None)
        if text is None:
            if _BROKEN in token:
                broken.append(len(pieces))
            pieces.append(token)
            continue
        if response[position : found[text]].strip(" "):  # what broken tokens stand for; spaces alone belong to this token
            mend(response[position : found[text]])
            position = found[text]
        broken.clear()
        pieces.append(response[position : found[text] + len(text)])
        position = found[text] + len(text)
    mend(response[position:])
    return pieces


# ------------------------------------------------------------------------------------------------------ metrics


def all_metrics(run: RunData) -> list[dict[str, Any]]:
    """Every metric of the run with its range and what it means."""
    rows = []
    for name in sorted(run.names()):
        known = [value for value in run.column(name) if value is not None]
        numbers = [number(value) for value in (known[0], known[-1], min(known), max(known))]
        rows.append({"name": name, "numbers": numbers, "metric": find_metric(name) or Metric(name, "", "")})  # another version's metric
    return rows
