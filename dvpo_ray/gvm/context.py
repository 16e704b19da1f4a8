"""Trajectory conditioning τ: examples of a policy's answers in front of the prompt, so that the values are those of that policy.

An example is a whole row: a prompt and a response to it with its end token, if it has one. A row with examples is a row with
a longer prompt, and its T + 1 supervised states are the same tokens as before. So nothing else has to know of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedModel

from dvpo_ray.batch import PROMPT_VERSION, RaggedBatch
from dvpo_ray.errors import InputError
from dvpo_ray.gvm.artifact import ContextSpec
from dvpo_ray.models.forward import batch_values


class TooFewExamples(ValueError):
    """A row that too few other prompts have an example for.

    Attributes:
        row: its index.
        available: prompts in the pool that are not its own.
    """

    def __init__(self, row: int, available: int) -> None:
        super().__init__(f"row {row}: the pool has {available} other prompts")
        self.row = row
        self.available = available


def choose_examples(
    row_ids: Sequence[int] | np.ndarray, prompts: Sequence[Hashable], pool_prompts: Sequence[Hashable], num_examples: int, seed: int
) -> np.ndarray:
    """Draw examples for every row: all other prompts of the pool are equally likely, and so are the examples of a prompt.

    A draw depends on the row's id and prompt, the pool and the seed, and on no other row.

    Args:
        row_ids: int [R], rows with the same id and prompt get the same examples.
        prompts: [R], equal for equal prompts.
        pool_prompts: [E], the prompt of each example.

    Returns:
        int64 [R, num_examples], indices into the pool; never two examples of one prompt, never one of the row's own prompt.

    Raises:
        TooFewExamples: the pool has too few other prompts for a row.
    """
    examples_of: dict[Hashable, list[int]] = {}
    for example, prompt in enumerate(pool_prompts):
        examples_of.setdefault(prompt, []).append(example)
    distinct = list(examples_of)
    choices = np.empty((len(row_ids), num_examples), dtype=np.int64)
    for row, (row_id, own) in enumerate(zip(row_ids, prompts, strict=True)):
        available = len(distinct) - (own in examples_of)
        if available < num_examples:
            raise TooFewExamples(row, available)
        rng = np.random.default_rng([seed, int(row_id)])
        # One prompt more than needed, in case the row's own is among them.
        drawn = rng.choice(len(distinct), size=min(num_examples + 1, len(distinct)), replace=False)
        others = [distinct[i] for i in drawn if distinct[i] != own][:num_examples]
        choices[row] = [rng.choice(examples_of[prompt]) for prompt in others]
    return choices


def with_context(batch: RaggedBatch, examples: RaggedBatch, choices: np.ndarray) -> RaggedBatch:
    """The rows of a batch with their examples in front, as part of their prompts.

    Args:
        choices: int64 [R, k], rows of `examples`, in the order they stand in.

    Returns:
        R rows without fields by token; see `without_context` for the way back.
    """
    rows, k = choices.shape
    bare = [replace(part, by_token={}, by_row={"truncated": part.truncated}) for part in (examples, batch)]
    parts = RaggedBatch.concatenate(bare)
    own = examples.num_rows + np.arange(rows)
    laid_out = parts.select(np.column_stack([choices, own]).reshape(-1))
    context_lengths = laid_out.lengths.reshape(rows, k + 1)[:, :k].sum(axis=1)
    extended = RaggedBatch(
        tokens=laid_out.tokens,
        offsets=laid_out.offsets[:: k + 1],
        prompt_lengths=context_lengths + batch.prompt_lengths,
        steps=batch.steps,
        row_ids=batch.row_ids,
        policy_versions=laid_out.policy_versions,
        by_row=batch.by_row,
    )
    return replace(extended, policy_versions=np.where(extended.response_mask, extended.policy_versions, PROMPT_VERSION))


def without_context(field: np.ndarray, extended: RaggedBatch, batch: RaggedBatch) -> np.ndarray:
    """A per-token field of the extended rows, [N'], at the tokens of the original rows, [N]."""
    shift = extended.offsets[1:] - batch.offsets[1:]  # both end with the row's last token
    return field[np.repeat(shift, batch.lengths) + np.arange(batch.num_tokens)]


# ---------------------------------------------------------------------------------------------- rows of a data set


@dataclass(frozen=True)
class Origin:
    """Where a row of a data set comes from.

    Attributes:
        where: label of its source row.
        number: index of its source row; the responses of one pair share it, and so their examples.
        prompt: equal for equal prompts.
        source: the model that wrote the response; None where the data does not say. All such rows count as one model's.
    """

    where: str
    number: int
    prompt: str
    source: str | None


def with_peer_examples(batch: RaggedBatch, origins: Sequence[Origin], spec: ContextSpec, seed: int, context_tokens: int) -> RaggedBatch:
    """The rows of a data set, each with examples from the other rows of the same source model.

    Args:
        batch: R rows; those of at most `spec.max_tokens` tokens can be examples.
        origins: [R].
        context_tokens: what a row and its examples may have together.

    Raises:
        InputError: a model has too few examples, or a row and its examples do not fit the context.
    """
    choices = np.empty((batch.num_rows, spec.examples), dtype=np.int64)
    fits = batch.lengths <= spec.max_tokens
    for rows in _rows_by_source(origins):
        pool = rows[fits[rows]]
        numbers, prompts = [origins[r].number for r in rows], [origins[r].prompt for r in rows]
        try:
            chosen = choose_examples(numbers, prompts, [origins[r].prompt for r in pool], spec.examples, seed)
        except TooFewExamples as error:
            raise InputError(_too_few(origins[rows[error.row]], spec, error.available)) from error
        choices[rows] = pool[chosen]
    extended = with_context(batch, batch, choices)
    _check_fit(extended, batch, origins, context_tokens)
    return extended


def _rows_by_source(origins: Sequence[Origin]) -> list[np.ndarray]:
    rows: dict[str | None, list[int]] = {}
    for row, origin in enumerate(origins):
        rows.setdefault(origin.source, []).append(row)
    return [np.array(group, dtype=np.int64) for group in rows.values()]


def _too_few(origin: Origin, spec: ContextSpec, available: int) -> str:
    by = "without a source_model" if origin.source is None else f"of source_model {origin.source}"
    return (
        f"{origin.where}: its context takes {spec.examples} examples {by}, but only {available} other prompts have one of at most "
        f"{spec.max_tokens} tokens; give more such rows, or train the GVM with lower gvm.context.examples or higher gvm.context.max_tokens"
    )


def _check_fit(extended: RaggedBatch, batch: RaggedBatch, origins: Sequence[Origin], context_tokens: int) -> None:
    longest = int(extended.lengths.argmax()) if extended.num_rows else None
    if longest is None or extended.lengths[longest] <= context_tokens:
        return
    own, total = batch.lengths[longest], extended.lengths[longest]
    raise InputError(
        f"{origins[longest].where}: {own} tokens of prompt and response and {total - own} of examples exceed the model's context of "
        f"{context_tokens}; lower data.max_prompt_tokens or data.max_response_tokens, "
        "or train the GVM with lower gvm.context.examples or gvm.context.max_tokens"
    )


# ------------------------------------------------------------------------------------------- rollouts of a policy


def with_rollout_examples(batch: RaggedBatch, examples: RaggedBatch, spec: ContextSpec, seed: int) -> RaggedBatch:
    """Rollouts of a policy, each with examples from other rollouts of the same policy; which ones, its `row_ids` entry and prompt decide.

    Args:
        examples: rollouts in any order; those of at most `spec.max_tokens` tokens are used.

    Raises:
        InputError: too few of them are short enough, or answer other prompts than the row's.
    """
    pool = examples.select(np.flatnonzero(examples.lengths <= spec.max_tokens)).sorted_by_id()
    try:
        choices = choose_examples(batch.row_ids, _prompt_keys(batch), _prompt_keys(pool), spec.examples, seed)
    except TooFewExamples as error:
        raise InputError(
            f"the value model's context takes {spec.examples} examples, but of {examples.num_rows} rollouts of the current policy only "
            f"{error.available} answer other prompts within {spec.max_tokens} tokens; raise gvm.context.pool, lower rollout.max_response_tokens, "
            "or train the GVM with higher gvm.context.max_tokens"
        ) from error
    return with_context(batch, pool, choices)


def rollout_values(
    model: PreTrainedModel, batch: RaggedBatch, max_tokens: int, spec: ContextSpec, examples: RaggedBatch | None, seed: int
) -> np.ndarray:
    """Value of the state after every token of a policy's rollouts, float32 [N], from a value model with or without a context.

    Args:
        batch: rollouts of the current policy.
        max_tokens: padded tokens of one forward pass.
        spec: the context that the model was trained with.
        examples: other rollouts of the current policy; not read by a model without a context.

    Raises:
        InputError: there are no examples, or too few, for a model that needs them.
    """
    if not spec.examples:
        return batch_values(model, batch, max_tokens)
    if examples is None:
        raise InputError(
            f"this value model was trained with gvm.context.examples {spec.examples}, so it needs examples of the policy's rollouts, and none are "
            "given here; use one that was trained with gvm.context.examples 0"
        )
    extended = with_rollout_examples(batch, examples, spec, seed)
    return without_context(batch_values(model, extended, max_tokens), extended, batch)


def _prompt_keys(batch: RaggedBatch) -> list[bytes]:
    ends = batch.offsets[:-1] + batch.prompt_lengths
    return [batch.tokens[start:end].tobytes() for start, end in zip(batch.offsets[:-1], ends, strict=True)]
