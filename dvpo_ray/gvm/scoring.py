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
from dvpo_ray.data.rows import (
    Content,
    checked_flag,
    checked_name,
    checked_prompt,
    checked_response,
    content_text,
    first_present,
    parse_rows,
    required,
)
from dvpo_ray.data.splitting import prompt_key
from dvpo_ray.files import whole_file
from dvpo_ray.gvm.artifact import load_gvm_of_run
from dvpo_ray.gvm.context import Origin, with_peer_examples
from dvpo_ray.gvm.dataset import make_encoder
from dvpo_ray.models.forward import batch_values
from dvpo_ray.models.loading import load_tokenizer

_ITEMS_AT_ONCE = 256  # enough to sort by length, few enough to hold


@dataclass(frozen=True)
class Response:
    """A response to score, whether it was cut off, and the model that wrote it, where the row says."""

    content: Content
    truncated: bool
    source: str | None


@dataclass(frozen=True)
class Item:
    """A row to score: its prompt, and its responses by column name."""

    where: str
    prompt: Content
    responses: dict[str, Response]


@dataclass(frozen=True)
class Encoded:
    """A response that the length limits let through, as token ids."""

    item: int
    name: str
    prompt: list[int]
    response: list[int]


def score_file(config: Config, gvm_path: Path, input_path: Path, output_path: Path) -> int:
    """Score every response of a file.

    Args:
        gvm_path: the artifact; must have the tokenizer of `model.path`. One that was trained with a context draws the examples
            from the other rows of the file by the same source model.
        input_path: rows with `prompt` and `response`, or preference pairs; the layouts of `dvpo_ray.data`. `truncated` (or
            `chosen_truncated`, `rejected_truncated`) says that a response was cut off and has no end token, `source_model` (and
            `rejected_model`) who wrote it.
        output_path: JSONL, one object per row: `where`, `prompt`, and under the name of each response's column an object with
            `text`, `token_ids`, `tokens`, `values` (values[0..T], one more than tokens), `start`, `mean` and `last`. A response
            that the length limits drop is null.

    Returns:
        Rows written.

    Raises:
        InputError: a bad artifact, file or row, or too few examples. ResourceError: the disk is full.
    """
    tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
    model, manifest = load_gvm_of_run(config.model, gvm_path, tokenizer)
    encoder = make_encoder(config, config.gvm, tokenizer)
    items, _ = parse_rows(str(input_path), read_rows(str(input_path), "train"), _parse, config.data.on_bad_row)
    encoded = list(_encode(encoder, items))
    batch = RaggedBatch.from_rows([row.prompt for row in encoded], [row.response for row in encoded])
    if manifest.context.examples:
        batch = with_peer_examples(batch, _origins(items, encoded), manifest.context, config.seed, encoder.context_tokens)
    item_of_row = [row.item for row in encoded]
    with whole_file(output_path) as file:
        for start in range(0, len(items), _ITEMS_AT_ONCE):
            first, end = np.searchsorted(item_of_row, [start, start + _ITEMS_AT_ONCE])
            scored = _score(model, encoder, encoded[first:end], batch.select(np.arange(first, end)), config.scorer.micro_batch_tokens)
            for i, item in enumerate(items[start : start + _ITEMS_AT_ONCE], start):
                file.write(json.dumps(_output(item, i, scored), ensure_ascii=False) + "\n")
    return len(items)


def _parse(columns: Mapping, where: str) -> Item:
    source = checked_name(first_present(columns, "source_model", "model"), "source_model")
    if columns.get("response") is None and columns.get("chosen") is not None:
        prompt, *both = separate_prompt(columns)
        cut = [checked_flag(columns.get(name), name) for name in ("chosen_truncated", "rejected_truncated")]
        sources = [source, checked_name(columns.get("rejected_model"), "rejected_model") or source]
        return Item(where, prompt, dict(zip(("chosen", "rejected"), map(Response, both, cut, sources), strict=True)))
    content = checked_response(required(columns, "response"), "response")
    response = Response(content, checked_flag(columns.get("truncated"), "truncated"), source)
    return Item(where, checked_prompt(required(columns, "prompt")), {"response": response})


def _encode(encoder: Encoder, items: list[Item]) -> Iterator[Encoded]:
    for i, item in enumerate(items):
        for name, response in item.responses.items():
            ids = encoder.encode_answer(item.prompt, response.content, item.where, response.truncated)
            if ids is not None:
                yield Encoded(i, name, *ids)


def _origins(items: list[Item], encoded: list[Encoded]) -> list[Origin]:
    keys = [prompt_key(item.prompt) for item in items]
    return [Origin(items[row.item].where, row.item, keys[row.item], items[row.item].responses[row.name].source) for row in encoded]


def _score(model: PreTrainedModel, encoder: Encoder, encoded: list[Encoded], batch: RaggedBatch, max_tokens: int) -> dict[tuple[int, str], dict]:
    """What the output says of each response but its text, by item and column."""
    values = batch_values(model, batch, max_tokens)
    return {(row.item, row.name): _scored(encoder, row.response, values[batch.states(r)]) for r, row in enumerate(encoded)}


def _scored(encoder: Encoder, ids: list[int], values: np.ndarray) -> dict:
    return {
        "token_ids": ids,
        "tokens": [encoder.tokenizer.decode([token]) for token in ids],
        "values": [float(value) for value in values],
        "start": float(values[0]),
        "mean": float(values[1:].mean()),
        "last": float(values[-1]),
    }


def _output(item: Item, index: int, scored: Mapping[tuple[int, str], dict]) -> dict:
    """The output row of an item."""
    row: dict = {"where": item.where, "prompt": item.prompt}
    for name, response in item.responses.items():
        values = scored.get((index, name))
        row[name] = None if values is None else {"text": content_text(response.content)} | values
    return row
