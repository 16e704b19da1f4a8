"""`dvpo gvm score`: the value after every token of given responses."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.config import Config
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

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Response:
    """A response to score; whether it was cut off; and the model that wrote it, if the row names one."""

    content: Content
    truncated: bool
    source: str | None


@dataclass(frozen=True)
class Item:
    """A row to score: its prompt and its responses, by the name of their column."""

    where: str
    prompt: Content
    responses: dict[str, Response]


def score_file(config: Config, gvm_path: Path, input_path: Path, output_path: Path) -> int:
    """Score every response of a file.

    Args:
        gvm_path: the artifact; it must have the tokenizer of `model.path`. If it was trained with examples, these are drawn from
            the other rows of the file with the same source model.
        input_path: rows with `prompt` and `response`, or preference pairs, in the layouts of `dvpo_ray.data`. `truncated` (or
            `chosen_truncated`, `rejected_truncated`) marks a response that was cut off and has no end token; `source_model` (and
            `rejected_model`) names the model that wrote it.
        output_path: JSONL, one object per row: `where`, `prompt`, and under the name of each response's column an object with
            `text`, `token_ids`, `tokens`, `values` (values[0..T], one more than tokens), `start`, `mean` and `last`; null for a
            response that the length limits drop.

    Returns:
        Number of rows written.

    Raises:
        InputError: a bad artifact, file or row, or too few examples. ResourceError: the disk is full.
    """
    tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
    model, manifest = load_gvm_of_run(config.model, gvm_path, tokenizer)
    encoder = make_encoder(config, config.gvm, tokenizer)
    items, notes = parse_rows(str(input_path), read_rows(str(input_path), "train"), _parse, config.data.on_bad_row)
    encoded = {
        (i, name): ids
        for i, item in enumerate(items)
        for name, response in item.responses.items()
        if (ids := encoder.encode_answer(item.prompt, response.content, item.where, response.truncated)) is not None
    }
    for note in [*notes, *encoder.notes("responses")]:
        logger.warning("%s", note)
    batch = RaggedBatch.from_rows([prompt for prompt, _ in encoded.values()], [response for _, response in encoded.values()])
    if manifest.context.examples:
        keys = [prompt_key(item.prompt) for item in items]
        origins = [Origin(items[i].where, i, keys[i], items[i].responses[name].source) for i, name in encoded]
        batch = with_peer_examples(batch, origins, manifest.context, config.seed, encoder.context_tokens)
    values = batch_values(model, batch, config.scorer.micro_batch_tokens)
    row_of = {key: row for row, key in enumerate(encoded)}
    with whole_file(output_path) as file:
        for i, item in enumerate(items):
            output: dict = {"where": item.where, "prompt": item.prompt}
            for name, response in item.responses.items():
                row = row_of.get((i, name))
                output[name] = None if row is None else _scored(tokenizer, response, encoded[i, name][1], values[batch.states(row)])
            file.write(json.dumps(output, ensure_ascii=False) + "\n")
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


def _scored(tokenizer: PreTrainedTokenizerBase, response: Response, ids: list[int], values: np.ndarray) -> dict:
    return {
        "text": content_text(response.content),
        "token_ids": ids,
        "tokens": [tokenizer.decode([token]) for token in ids],
        "values": [float(value) for value in values],
        "start": float(values[0]),
        "mean": float(values[1:].mean()),
        "last": float(values[-1]),
    }
