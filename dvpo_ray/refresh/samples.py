"""The current policy's answers to some prompts, and the file of them that a refresh of the value model reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.data.encoding import Encoder
from dvpo_ray.data.prompts import Prompt
from dvpo_ray.data.rows import count_note
from dvpo_ray.evaluation.judges import Judge
from dvpo_ray.files import whole_file
from dvpo_ray.monitoring.run_files import read_json_lines


@dataclass(frozen=True)
class Sample:
    """One response of the model.

    Attributes:
        text: the response; encoded after its prompt it gives the sampled token ids again.
        truncated: the length limit ended it.
        score: by the gold judge; None when nobody has scored it.
    """

    text: str
    truncated: bool
    score: float | None = None


def exact_text(encoder: Encoder, prompt: Prompt, token_ids: list[int], truncated: bool) -> str | None:
    """Text of a sampled response; None when it is blank, or when its text after its prompt would not give the sampled tokens again."""
    if not encoder.decode(token_ids).strip():
        return None
    for text in encoder.texts(token_ids):
        answer = encoder.encode_answer(prompt.content, text, prompt.where, truncated)
        if answer is not None and answer[1] == token_ids:
            return text
    return None


def usable_samples(
    batch: RaggedBatch, prompts: Sequence[Prompt], samples_per_prompt: int, encoder: Encoder, judge: Judge | None
) -> tuple[list[list[Sample]], list[str]]:
    """The different responses to each prompt whose text gives their tokens again, scored if there is a judge, and notes on the others.

    Args:
        batch: rows in the order of their ids; row i answers prompt i // samples_per_prompt.

    Returns:
        The samples of each prompt, and one line for each reason why samples are left out.
    """
    blank, inexact, repeated = [], [], []
    answers: list[dict[str, bool]] = [{} for _ in prompts]
    for r in range(batch.num_rows):
        p = int(batch.row_ids[r]) // samples_per_prompt
        truncated = bool(batch.truncated[r])
        ids = batch.tokens[batch.response(r)].tolist()
        text = exact_text(encoder, prompts[p], ids, truncated)
        if text is None:
            (inexact if encoder.decode(ids).strip() else blank).append(prompts[p].where)
        elif text in answers[p]:
            repeated.append(prompts[p].where)
        else:
            answers[p][text] = truncated
    notes = [
        line
        for labels, why in (
            (blank, "the response is blank"),
            (inexact, "the text of the response does not give its tokens again"),
            (repeated, "the same response to the same prompt"),
        )
        for line in count_note("left out", labels, batch.num_rows, "samples", why)
    ]
    return [judged(prompt, list(texts.items()), judge) for prompt, texts in zip(prompts, answers, strict=True)], notes


def judged(prompt: Prompt, answers: Sequence[tuple[str, bool]], judge: Judge | None) -> list[Sample]:
    """Text and `truncated` of each answer as a sample, scored if there is a judge."""
    scores = judge.score([prompt.text] * len(answers), [text for text, _ in answers]).tolist() if judge and answers else [None] * len(answers)
    return [Sample(text, truncated, score) for (text, truncated), score in zip(answers, scores, strict=True)]


def write_samples(path: Path, prompts: Sequence[Prompt], samples: Sequence[list[Sample]]) -> None:
    """One row per prompt: `prompt`, its `where`, and `responses` with `text`, `truncated` and `score`."""
    with whole_file(path) as file:
        for prompt, answers in zip(prompts, samples, strict=True):
            responses = [{"text": sample.text, "truncated": sample.truncated, "score": sample.score} for sample in answers]
            file.write(json.dumps({"prompt": prompt.content, "where": prompt.where, "responses": responses}, ensure_ascii=False) + "\n")


def read_samples(path: Path) -> list[tuple[Prompt, list[Sample]]]:
    """What `write_samples` wrote."""
    rows, _ = read_json_lines(path)
    return [(Prompt(row["prompt"], row["where"]), [Sample(**response) for response in row["responses"]]) for row in rows]
