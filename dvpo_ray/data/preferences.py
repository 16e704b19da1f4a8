"""Preference pairs: the column layouts that TRL documents, UltraFeedback, and their held-out split."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from itertools import takewhile
from typing import Literal

from dvpo_ray.config.arithmetic import counted
from dvpo_ray.config.schema import PreferenceData
from dvpo_ray.data.rows import (
    BadRow,
    Content,
    Messages,
    NothingSaid,
    checked_content,
    checked_flag,
    checked_name,
    checked_prompt,
    checked_response,
    checked_score,
    content_text,
    count_note,
    first_present,
    required,
)
from dvpo_ray.data.splitting import Sets, load_sets, prompt_key
from dvpo_ray.errors import InputError

HH_ASSISTANT = "\n\nAssistant:"
"""Where a dialogue of Anthropic's hh-rlhf hands over to the assistant; both of its responses follow the last one they share."""


@dataclass(frozen=True)
class PreferencePair:
    """One prompt and two responses to it; the first one was preferred.

    Attributes:
        prompt: text, or messages that end with the turn to be answered.
        chosen: the preferred response: text, or a list with one assistant message.
        rejected: the other response, likewise.
        chosen_score: outcome of the chosen response (a reward model's, a judge's); both responses have one or neither has.
        rejected_score: outcome of the rejected response, at most `chosen_score`.
        source_model: the model that wrote the responses, or only the chosen one if `rejected_model` names another.
        rejected_model: the model that wrote the rejected response, if that is not `source_model`.
        chosen_truncated: the chosen response was cut off and has no terminal state.
        rejected_truncated: likewise.
        where: the row's label, `file.jsonl:LINE` or `name[row]`.
    """

    prompt: Content
    chosen: Content
    rejected: Content
    chosen_score: float | None = None
    rejected_score: float | None = None
    source_model: str | None = None
    rejected_model: str | None = None
    chosen_truncated: bool = False
    rejected_truncated: bool = False
    where: str = ""

    @cached_property
    def key(self) -> str:
        """Equal for pairs with the same prompt; see `prompt_key`."""
        return prompt_key(self.prompt)

    @property
    def response_models(self) -> tuple[str | None, str | None]:
        """The models that wrote the chosen and the rejected response; None where the data does not say."""
        return self.source_model, self.rejected_model or self.source_model

    @property
    def score_gap(self) -> float | None:
        """Chosen score minus rejected score; None without scores."""
        return None if self.chosen_score is None else self.chosen_score - self.rejected_score


def no_scores(where: str) -> str:
    """The error about a row without the scores that `gvm.outcome` asks for."""
    return f"{where}: gvm.outcome is score, but the row has no chosen_score and rejected_score; add them or set gvm.outcome=binary"


def load_preferences(data: PreferenceData, on_bad_row: Literal["error", "skip"]) -> Sets[PreferencePair]:
    """Read, check and split the preference pairs that the config names. Pairs whose scores tie or are too close are left out.

    Raises:
        InputError: a missing, unreadable or empty source; a bad row, unless bad rows are skipped; no pairs left; a
            `min_score_gap` for data without scores.
    """

    def far_apart(path: str, pairs: list[PreferencePair]) -> tuple[list[PreferencePair], list[str]]:
        if data.min_score_gap > 0 and pairs and all(pair.score_gap is None for pair in pairs):
            raise InputError(f"data.preferences.min_score_gap: {path} has no scores; remove the setting or add chosen_score and rejected_score")
        close = [pair.where for pair in pairs if pair.score_gap is not None and pair.score_gap < data.min_score_gap]
        if len(close) == len(pairs):
            raise InputError(f"{path}: in every pair the scores tie or are closer than data.preferences.min_score_gap {data.min_score_gap}")
        why = f"the scores are closer than data.preferences.min_score_gap {data.min_score_gap:g}"
        apart = [pair for pair in pairs if pair.score_gap is None or pair.score_gap >= data.min_score_gap]
        return apart, count_note(f"{path}: left out", close, len(pairs), "pairs", why) + _repeats_note(path, apart)

    return load_sets("data.preferences", "pairs", data, on_bad_row, parse_pair, far_apart)


def _repeats_note(path: str, pairs: Sequence[PreferencePair]) -> list[str]:
    """One line if pairs are there more than once. They stay: a data set may weight its pairs like this."""
    seen: set[str] = set()
    repeats = []
    for pair in pairs:
        content = json.dumps([pair.prompt, pair.chosen, pair.rejected])
        if content in seen:
            repeats.append(pair.where)
        seen.add(content)
    return count_note(f"{path}: kept", repeats, len(pairs), "pairs", "exact repeats of an earlier one, which count again")


# ------------------------------------------------------------------------------------------------------- layouts


def parse_pair(columns: Mapping, where: str) -> PreferencePair:
    """The pair in a row of any layout.

    Raises:
        BadRow: the row is not a preference pair. NothingSaid: an UltraFeedback row that prefers no completion.
    """
    if columns.get("completions") is not None:
        return _ultrafeedback_pair(columns, where)
    prompt, chosen, rejected = separate_prompt(columns)
    if content_text(chosen).strip() == content_text(rejected).strip():
        raise BadRow("`chosen` and `rejected` are equal; a pair needs two different responses")
    chosen_score, rejected_score = _scores(columns)
    return PreferencePair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        chosen_score=chosen_score,
        rejected_score=rejected_score,
        source_model=checked_name(first_present(columns, "source_model", "model"), "source_model"),
        rejected_model=checked_name(columns.get("rejected_model"), "rejected_model"),
        chosen_truncated=checked_flag(columns.get("chosen_truncated"), "chosen_truncated"),
        rejected_truncated=checked_flag(columns.get("rejected_truncated"), "rejected_truncated"),
        where=where,
    )


def _scores(columns: Mapping) -> tuple[float | None, float | None]:
    chosen = checked_score(first_present(columns, "chosen_score", "score_chosen"), "chosen_score")
    rejected = checked_score(first_present(columns, "rejected_score", "score_rejected"), "rejected_score")
    if (chosen is None) != (rejected is None):
        raise BadRow(f"no `{'chosen_score' if chosen is None else 'rejected_score'}`; give both scores or neither")
    if chosen is not None and chosen < rejected:
        raise BadRow(f"`chosen_score` {chosen:g} is below `rejected_score` {rejected:g}; swap the responses or leave the scores out")
    return chosen, rejected


def separate_prompt(columns: Mapping) -> tuple[Content, Content, Content]:
    """Prompt, chosen and rejected of a row.

    If `chosen` and `rejected` hold whole dialogues, the prompt is the messages they share at the start, even beside a `prompt` text.
    Without a `prompt` column, it is the text they share at the start, up to a word's boundary.

    Raises:
        BadRow: a part is missing, empty or of the wrong type, or there is no shared start.
    """
    chosen = checked_content(required(columns, "chosen"), "chosen")
    rejected = checked_content(required(columns, "rejected"), "rejected")
    prompt = columns.get("prompt")
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise BadRow("`chosen` and `rejected` must both be text or both be lists of messages")
    if isinstance(chosen, list):
        prompt, chosen, rejected = _separate_messages(prompt, chosen, rejected)
    elif prompt is None:
        prompt, chosen, rejected = _separate_text(chosen, rejected)
    return checked_prompt(prompt), checked_response(chosen, "chosen"), checked_response(rejected, "rejected")


def _separate_messages(prompt: object, chosen: Messages, rejected: Messages) -> tuple[object, Messages, Messages]:
    if prompt is not None and len(chosen) == len(rejected) == 1:
        return prompt, chosen, rejected
    if isinstance(prompt, list):
        shared = len(prompt)
        if checked_content(prompt, "prompt") != chosen[:shared] or chosen[:shared] != rejected[:shared]:
            return prompt, chosen, rejected
    else:
        shared = _shared_length(chosen[:-1], rejected[:-1])
    if shared == 0:
        raise BadRow("`chosen` and `rejected` share no leading messages that could be the prompt; give a `prompt`")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _separate_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    if chosen.strip() == rejected.strip():
        raise BadRow("`chosen` and `rejected` are equal; a pair needs two different responses")
    shared = chosen[: _shared_length(chosen, rejected)]
    dialogue, marker, _ = shared.rpartition(HH_ASSISTANT)
    end = len(dialogue + marker) if marker else _last_boundary(shared)
    if not shared[:end].strip():
        raise BadRow("`chosen` and `rejected` share no leading words that could be the prompt; give a `prompt`")
    return chosen[:end], chosen[end:], rejected[end:]


def _shared_length(first: Sequence, second: Sequence) -> int:
    """How many leading elements two sequences share."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _last_boundary(text: str) -> int:
    """Where the last, perhaps partial, word of a text begins; a space before it belongs to the word, as in tokenizers."""
    end = len(text) - len(re.split(r"\s", text)[-1])
    return end - 1 if text[:end].endswith(" ") else end


def _ultrafeedback_pair(columns: Mapping, where: str) -> PreferencePair:
    """The best-scored completion against one of the lower-scored others, drawn by a hash of the instruction.

    The published binarized form draws among all others and so keeps ties; a tie states no preference and is left out here.
    Completions without a score or without text do not count.
    """
    prompt = checked_prompt(required(columns, "instruction"), "instruction")
    candidates = _scored_completions(columns["completions"])
    best_score, best = max(candidates, key=lambda candidate: candidate[0])
    others = [candidate for candidate in candidates if candidate[0] < best_score]
    if not others:
        raise NothingSaid("all scored completions have the same score")
    draw = int.from_bytes(hashlib.sha256(f"rejected:{content_text(prompt)}".encode()).digest()[:8])
    other_score, other = others[draw % len(others)]
    return PreferencePair(
        prompt=prompt,
        chosen=best["response"],
        rejected=other["response"],
        chosen_score=best_score,
        rejected_score=other_score,
        source_model=checked_name(best.get("model"), "model"),
        rejected_model=checked_name(other.get("model"), "model"),
        where=where,
    )


def _scored_completions(completions: object) -> list[tuple[float, Mapping]]:
    if not isinstance(completions, list) or not all(isinstance(completion, Mapping) for completion in completions):
        raise BadRow("`completions` must be a list of objects with `response` and `overall_score`")
    scored = [
        (checked_score(completion["overall_score"], "overall_score"), completion)
        for completion in completions
        if completion.get("overall_score") is not None and isinstance(completion.get("response"), str) and completion["response"].strip()
    ]
    if len(scored) < 2:
        raise BadRow(f"`completions` has {counted(len(scored), 'scored response')}; a pair needs two")
    return scored


# --------------------------------------------------------------------------------------------------- fingerprint


def dataset_fingerprint(pairs: Iterable[PreferencePair]) -> str:
    """SHA-256, in hex, of the content of the pairs: the same for any order, and for any file they came from."""
    digests = sorted(hashlib.sha256(_canonical(pair)).digest() for pair in pairs)
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _canonical(pair: PreferencePair) -> bytes:
    """All fields but the label `where`, in their order."""
    return json.dumps(astuple(pair)[:-1], sort_keys=True).encode()
