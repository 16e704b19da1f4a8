"""The preference files of one refresh: new pairs to train on and to hold out, and old ones mixed in."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from dvpo_ray.config.arithmetic import counted
from dvpo_ray.config.schema import DataConfig, PromptData
from dvpo_ray.data.preferences import PreferencePair, load_preferences, parse_pair
from dvpo_ray.data.prompts import Prompt
from dvpo_ray.data.reading import read_rows
from dvpo_ray.data.rows import count_note, parse_rows
from dvpo_ray.data.splitting import split_by_prompt
from dvpo_ray.errors import InputError
from dvpo_ray.files import whole_file
from dvpo_ray.refresh.samples import Sample

NEW, HELDOUT, TRAINING = "pairs.train.jsonl", "pairs.heldout.jsonl", "training.jsonl"


def pair_up(samples: Sequence[Sample], pairs: int, min_score_gap: float) -> list[tuple[Sample, Sample]]:
    """Pair the best sample with the worst, the second best with the second worst, and so on.

    Args:
        samples: responses to one prompt.
        pairs: most pairs to make; no sample is in two of them.
        min_score_gap: pairs whose scores are closer than this, or equal, are left out.

    Returns:
        (chosen, rejected) pairs.
    """
    ranked = sorted(samples, key=lambda sample: sample.score, reverse=True)
    opposite = list(zip(ranked, reversed(ranked), strict=True))[: min(pairs, len(ranked) // 2)]
    return [(best, worst) for best, worst in opposite if best.score > worst.score and best.score - worst.score >= min_score_gap]


def pair_row(prompt: Prompt, chosen: Sample, rejected: Sample) -> dict:
    """A pair as a row of a preference file. Responses to messages are messages."""

    def content(text: str) -> str | list[dict[str, str]]:
        return text if isinstance(prompt.content, str) else [{"role": "assistant", "content": text}]

    row = {"prompt": prompt.content, "chosen": content(chosen.text), "rejected": content(rejected.text)}
    if chosen.score is not None and rejected.score is not None:
        row |= {"chosen_score": round(chosen.score, 4), "rejected_score": round(rejected.score, 4)}
    return row | {"chosen_truncated": chosen.truncated, "rejected_truncated": rejected.truncated}


def preference_rows(judged: Sequence[tuple[Prompt, list[Sample]]], pairs: int, min_score_gap: float) -> tuple[list[dict], list[str]]:
    """Rows of a preference file, prompt by prompt, and one line for each reason why prompts or pairs are left out."""
    rows, close = [], []
    for prompt, samples in judged:
        apart = pair_up(samples, pairs, min_score_gap)
        rows += [pair_row(prompt, chosen, rejected) for chosen, rejected in apart]
        close += [prompt.where] * (min(pairs, len(samples) // 2) - len(apart))
    why = f"the scores tie or are closer than {min_score_gap:g}"
    return rows, [*single_note(judged), *count_note("left out", close, len(close) + len(rows), "pairs of samples", why)]


def single_note(answered: Sequence[tuple[Prompt, list[Sample]]]) -> list[str]:
    """One line if prompts have fewer than two usable samples, so that no pair can be made, else nothing."""
    single = [prompt.where for prompt, samples in answered if len(samples) < 2]
    return count_note("left out", single, len(answered), "prompts", "fewer than two different usable samples")


def heldout_fraction(prompts: PromptData, share: float) -> float:
    """The fraction of all prompts that a refresh takes as held out, so that it holds out a share of the training prompts.

    The prompts of a refresh are training prompts of the policy. Where `data.prompts` holds out the first `heldout_fraction` of all
    prompts by their hash, none of these is among them, and the next ones are taken.

    Args:
        share: `gvm.refresh.heldout_fraction`.
    """
    before = prompts.heldout_fraction if prompts.holds_out_a_share else 0.0
    return before + share * (1.0 - before)


def write_pairs(
    folder: Path,
    rows: Sequence[dict],
    source: str,
    fraction: float,
    old: Sequence[PreferencePair],
    earlier: Sequence[PreferencePair],
    share: float,
    seed: int,
) -> list[str]:
    """Write the three files of a refresh: new pairs to train on, new pairs to hold out, and the former mixed with old pairs.

    Args:
        rows: of a preference file, all by the current policy.
        source: their `source_model`, a name of the policy.
        fraction: of `heldout_fraction`.
        old, earlier: pairs to draw from: those of the data, and those that earlier refreshes trained on. Those whose prompt is held out are
            left out.
        share: old pairs for each new one.

    Returns:
        One line for each reason why old pairs are left out, and one if the held-out prompt was trained on before.

    Raises:
        InputError: too few pairs or prompts to train on some and hold out others.
    """
    pairs = [parse_pair(row | {"source_model": source}, str(folder)) for row in rows]
    trained = {pair.key for pair in earlier}
    try:
        train, heldout = split_by_prompt(pairs, fraction, trained)
    except InputError as error:
        raise InputError(
            f"{folder}: too few to train on some and hold out others: {counted(len(pairs), 'new pair')} on "
            f"{counted(len({pair.key for pair in pairs}), 'prompt')}; raise gvm.refresh.prompts or gvm.refresh.samples_per_prompt, or lower "
            "gvm.refresh.min_score_gap"
        ) from error
    heldout_prompts = {pair.key for pair in heldout}
    old = [*old, *earlier]
    usable = [pair for pair in old if pair.key not in heldout_prompts]
    chosen = random.Random(seed).sample(range(len(usable)), min(len(usable), round(share * len(train))))
    mixed = [usable[i] for i in chosen]
    for name, content in ((NEW, train), (HELDOUT, heldout), (TRAINING, [*train, *mixed])):
        with whole_file(folder / name) as file:
            file.writelines(json.dumps(as_row(pair), ensure_ascii=False) + "\n" for pair in content)
    on_other_side = [pair.where for pair in old if pair.key in heldout_prompts]
    not_drawn = [usable[i].where for i in sorted(set(range(len(usable))) - set(chosen))]
    known = "the held-out prompt was trained on in an earlier refresh, so refresh/heldout_accuracy_before is too good; raise gvm.refresh.prompts"
    why = f"{share:g} old pairs are mixed in for each new one (gvm.refresh.old_pairs_per_new)"
    return [
        *([known] if heldout_prompts & trained else []),
        *count_note("left out", on_other_side, len(old), "old pairs", "their prompt is held out in this refresh"),
        *count_note("left out", not_drawn, len(old), "old pairs", why),
    ]


def pairs_of_data(data: DataConfig) -> tuple[list[PreferencePair], list[str]]:
    """The training pairs of `data.preferences`, where it is set, and the notes on what is left out of it."""
    if data.preferences is None:
        return [], []
    sets = load_preferences(data.preferences, data.on_bad_row)
    return sets.train, sets.notes


def pairs_of_refreshes(folders: Iterable[Path]) -> list[PreferencePair]:
    """The pairs that refreshes collected in their folders and trained on."""
    paths = [str(folder / NEW) for folder in folders]
    return [pair for path in paths for pair in parse_rows(path, read_rows(path, "train"), parse_pair, "error")[0]]


def as_row(pair: PreferencePair) -> dict:
    """A pair as a row that the readers of `dvpo_ray.data` read back to an equal one."""
    return {name: value for name, value in asdict(pair).items() if name != "where" and value is not None}
