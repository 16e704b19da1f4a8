"""`dvpo gvm score`: the value after every token of given responses."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.config import Config
from dvpo_ray.data.encoding import Encoder
from dvpo_ray.data.preferences import separate_prompt
from dvpo_ray.data.reading import read_rows
from dvpo_ray.data.rows import Content, checked_flag, checked_prompt, checked_response, content_text, parse_rows, required
from dvpo_ray.files import whole_file
from dvpo_ray.gvm.artifact import load_gvm
from dvpo_ray.gvm.dataset import make_encoder
from dvpo_ray.models.forward import batch_values
from dvpo_ray.models.loading import default_device, load_tokenizer, torch_dtype

_ITEMS_AT_ONCE = 256  # enough to sort by length, few enough to hold


@dataclass(frozen=True)
class Item:
    """A row to score: its prompt, and its responses with whether each was cut off, by column name."""

    where: str
    prompt: Content
    responses: dict[str, tuple[Content, bool]]


def score_file(config: Config, gvm_path: Path, input_path: Path, output_path: Path) -> int:
    """Score every response of a file.

    Args:
        gvm_path: the artifact; must have the tokenizer of `model.path`.
        input_path: rows with `prompt` and `response`, or preference pairs; the layouts of `dvpo_ray.data`. `truncated` (or
            `chosen_truncated`, `rejected_truncated`) says that a response was cut off and has no end token.
        output_path: JSONL, one object per row: `where`, `prompt`, and under the name of each response's column an object with
            `text`, `token_ids`, `tokens`, `values` (values[0..T], one more than tokens), `start`, `mean` and `last`. A response
            that the length limits drop is null.

    Returns:
        Rows written.

    Raises:
        InputError: a bad artifact, file or row. ResourceError: the disk is full.
    """
    tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
    model, _ = load_gvm(
        gvm_path,
        torch_dtype(config.model.dtype),
        config.model.attention,
        tokenizer,
        default_device(),
        config.model.trust_remote_code,
        config.model.chat_template,
    )
    encoder = make_encoder(config, tokenizer)
    items, _ = parse_rows(str(input_path), read_rows(str(input_path), "train"), _parse, config.data.on_bad_row)
    with whole_file(output_path) as file:
        for start in range(0, len(items), _ITEMS_AT_ONCE):
            for row in _score(model, encoder, items[start : start + _ITEMS_AT_ONCE], config.scorer.micro_batch_tokens):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return len(items)


def _parse(columns: Mapping, where: str) -> Item:
    if columns.get("response") is None and columns.get("chosen") is not None:
        prompt, *both = separate_prompt(columns)
        cut = [checked_flag(columns.get(name), name) for name in ("chosen_truncated", "rejected_truncated")]
        return Item(where, prompt, dict(zip(("chosen", "rejected"), zip(both, cut, strict=True), strict=True)))
    response = checked_response(required(columns, "response"), "response")
    return Item(where, checked_prompt(required(columns, "prompt")), {"response": (response, checked_flag(columns.get("truncated"), "truncated"))})


def _score(model: PreTrainedModel, encoder: Encoder, items: list[Item], max_tokens: int) -> Iterator[dict]:
    """The output row of each item."""
    encoded = {
        (i, name): encoder.encode_answer(item.prompt, response, item.where, truncated)
        for i, item in enumerate(items)
        for name, (response, truncated) in item.responses.items()
    }
    kept = [key for key, ids in encoded.items() if ids is not None]
    batch = RaggedBatch.from_rows([encoded[key][0] for key in kept], [encoded[key][1] for key in kept])
    values = batch_values(model, batch, max_tokens)
    states = {key: values[batch.states(r)] for r, key in enumerate(kept)}
    for i, item in enumerate(items):
        row: dict = {"where": item.where, "prompt": item.prompt}
        for name, (response, _) in item.responses.items():
            ids = encoded[i, name]
            row[name] = None if ids is None else _scored(encoder, content_text(response), ids[1], states[i, name])
        yield row


def _scored(encoder: Encoder, text: str, ids: list[int], values: np.ndarray) -> dict:
    return {
        "text": text,
        "token_ids": ids,
        "tokens": [encoder.tokenizer.decode([token]) for token in ids],
        "values": [float(value) for value in values],
        "start": float(values[0]),
        "mean": float(values[1:].mean()),
        "last": float(values[-1]),
    }
