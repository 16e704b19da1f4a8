"""Preferences from outside: pairs of responses go out, labels come back, through a file or an HTTP endpoint.

A pair, in `to_label.jsonl` and in a request `{"pairs": [...]}`:

    {"id": "0f3a...", "prompt": text or messages, "response_a": text, "response_b": text}

Its label, in `labels.jsonl` and in an answer `{"labels": [...]}`: which is better, or a score for each, or both:

    {"id": "0f3a...", "preferred": "a" | "b" | "tie"}
    {"id": "0f3a...", "score_a": number, "score_b": number}

`labels.jsonl` keeps the labels of both sources. A pair with a label there is not asked again, so an interrupted run loses no label.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from dvpo_ray.config.arithmetic import counted
from dvpo_ray.config.schema import RefreshConfig
from dvpo_ray.data.prompts import Prompt
from dvpo_ray.errors import InputError, ResourceError
from dvpo_ray.files import clear_when_full, whole_file
from dvpo_ray.monitoring.run_files import read_json_lines
from dvpo_ray.refresh.pairs import pair_row
from dvpo_ray.refresh.samples import Sample

POLL_SECONDS = 1.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class CandidatePair:
    """Two responses to one prompt, in no order of merit."""

    prompt: Prompt
    a: Sample
    b: Sample

    @cached_property
    def id(self) -> str:
        """A hash of the texts alone, so that a label fits wherever the same pair is sampled again."""
        return hashlib.sha256(json.dumps([self.prompt.content, self.a.text, self.b.text]).encode()).hexdigest()[:16]

    def as_row(self) -> dict:
        """The pair as a labeller gets it."""
        return {"id": self.id, "prompt": self.prompt.content, "response_a": self.a.text, "response_b": self.b.text}


@dataclass(frozen=True)
class Label:
    """What a labeller says of a pair: `a`, `b` or `tie`, and the scores if there are any."""

    preferred: str
    scores: tuple[float, float] | None = None


def candidate_pairs(answered: Sequence[tuple[Prompt, list[Sample]]], pairs_per_prompt: int) -> list[CandidatePair]:
    """Pairs of samples in the order they were sampled; no sample is in two of them."""
    return [
        CandidatePair(prompt, samples[2 * i], samples[2 * i + 1])
        for prompt, samples in answered
        for i in range(min(pairs_per_prompt, len(samples) // 2))
    ]


def labelled_rows(pairs: Sequence[CandidatePair], labels: dict[str, Label], needs_scores: bool) -> list[dict]:
    """Rows of a preference file; ties are left out.

    Raises:
        InputError: the value model learns scores, and a label has none.
    """
    rows = []
    for pair in pairs:
        label = labels[pair.id]
        if needs_scores and label.scores is None:
            raise InputError(f"label {pair.id}: no score_a and score_b, but the GVM was trained with gvm.outcome score; give both")
        a, b = (replace(sample, score=score) for sample, score in zip((pair.a, pair.b), label.scores or (None, None), strict=True))
        if label.preferred != "tie":
            rows.append(pair_row(pair.prompt, *((a, b) if label.preferred == "a" else (b, a))))
    return rows


def parse_label(row: object, where: str) -> tuple[str, Label]:
    """The id and the label in a row.

    Raises:
        InputError: names the place, and what would be right.
    """
    if not isinstance(row, dict) or not isinstance(row.get("id"), str):
        raise InputError(f"{where}: expected an object with the `id` of a pair")
    preferred, scores = row.get("preferred"), (row.get("score_a"), row.get("score_b"))
    if preferred not in (None, "a", "b", "tie"):
        raise InputError(f'{where}: `preferred` is {json.dumps(preferred)}; give "a", "b" or "tie"')
    if scores == (None, None):
        if preferred is None:
            raise InputError(f"{where}: neither `preferred` nor `score_a` and `score_b`; give one of them")
        return row["id"], Label(preferred)
    if not all(isinstance(score, (int, float)) and math.isfinite(score) for score in scores):
        raise InputError(f"{where}: `score_a` and `score_b` must both be finite numbers")
    better = "tie" if scores[0] == scores[1] else "a" if scores[0] > scores[1] else "b"
    if preferred not in (None, better):
        raise InputError(f'{where}: `preferred` is "{preferred}", but the scores say "{better}"')
    return row["id"], Label(better, (float(scores[0]), float(scores[1])))


# -------------------------------------------------------------------------------------------------------- sources


def labels_from_file(pairs: Sequence[CandidatePair], folder: Path, settings: RefreshConfig, say: Say) -> dict[str, Label]:
    """Write the pairs to `to_label.jsonl` and wait until `labels.jsonl` beside it has a label for each of them.

    Raises:
        InputError: a bad label. ResourceError: `timeout_seconds` have passed.
    """
    questions, answers = folder / "to_label.jsonl", folder / "labels.jsonl"
    with whole_file(questions) as file:
        file.writelines(json.dumps(pair.as_row(), ensure_ascii=False) + "\n" for pair in pairs)
    deadline = time.monotonic() + settings.timeout_seconds
    labels = _read_labels(answers)
    if any(pair.id not in labels for pair in pairs):
        say(f"waiting for labels: answer {questions} in {answers}")
    while missing := sum(pair.id not in labels for pair in pairs):
        if time.monotonic() >= deadline:
            raise ResourceError(
                f"{answers}: no label for {missing} of {counted(len(pairs), 'pair')} of {questions.name} after "
                f"{counted(settings.timeout_seconds, 'second')} (gvm.refresh.timeout_seconds); label them and go on with --resume"
            )
        time.sleep(POLL_SECONDS)
        labels = _read_labels(answers)
    return labels


def labels_from_endpoint(pairs: Sequence[CandidatePair], folder: Path, settings: RefreshConfig, say: Say) -> dict[str, Label]:
    """Post the pairs to `settings.url`, some at a time, and keep the answers in `labels.jsonl`.

    Raises:
        InputError: the endpoint refuses a request, or its answer lacks a label. ResourceError: it cannot be reached.
    """
    kept = folder / "labels.jsonl"
    labels = _read_labels(kept)
    asked = [pair for pair in pairs if pair.id not in labels]
    for start in range(0, len(asked), settings.pairs_per_request):
        part = asked[start : start + settings.pairs_per_request]
        rows = _answer(settings, [pair.as_row() for pair in part])
        labels |= dict(parse_label(row, f"{settings.url}: labels[{i}]") for i, row in enumerate(rows))
        missing = [pair.id for pair in part if pair.id not in labels]
        if missing:
            raise InputError(f"{settings.url}: the answer has no label for {len(missing)} of {counted(len(part), 'pair')}, the first is {missing[0]}")
        with clear_when_full(kept), kept.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return labels


def _read_labels(path: Path) -> dict[str, Label]:
    if not path.is_file():
        return {}
    rows, bad = read_json_lines(path)
    if bad:
        raise InputError(f"{bad[0]}; give one label per line")
    return dict(parse_label(row, str(path)) for row in rows)


def _answer(settings: RefreshConfig, pairs: list[dict]) -> list:
    answer = _post(settings, json.dumps({"pairs": pairs}).encode())
    try:
        labels = json.loads(answer)["labels"]
    except (ValueError, KeyError, TypeError):
        labels = None
    if not isinstance(labels, list):
        raise InputError(f'{settings.url}: the answer is not {{"labels": [...]}} as JSON')
    return labels


def _post(settings: RefreshConfig, body: bytes) -> bytes:
    """The answer to a POST. It is sent again after an error that may pass: no connection, a time limit, 429 or 5xx."""
    request = urllib.request.Request(settings.url, body, {"Content-Type": "application/json"}, method="POST")
    problem = ""
    for attempt in range(settings.retries + 1):
        if attempt:
            time.sleep(2.0 ** (attempt - 1))
        try:
            with urllib.request.urlopen(request, timeout=settings.request_timeout_seconds) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code} {error.reason}"
            if error.code != 429 and error.code < 500:
                raise InputError(f"{settings.url}: {problem}; gvm.refresh.url must take pairs by POST") from error
        except (OSError, http.client.HTTPException) as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
    raise ResourceError(f"{settings.url}: no answer in {settings.retries + 1} attempts (gvm.refresh.retries): {problem}")


SOURCES = {"file": labels_from_file, "endpoint": labels_from_endpoint}
