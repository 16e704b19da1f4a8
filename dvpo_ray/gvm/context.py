"""Trajectory conditioning τ: examples of a policy's answers before the prompt, so that the values are those of this policy.

An example is a whole row: a prompt, a response to it, and the end token unless the response was cut off. A row with examples
is a row with a longer prompt; its T + 1 supervised states are the same tokens. So other code needs no change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedModel

from dvpo_ray.batch import PROMPT_VERSION, RaggedBatch
from dvpo_ray.config.arithmetic import counted
from dvpo_ray.errors import InputError
from dvpo_ray.gvm.artifact import ContextSpec
from dvpo_ray.models.forward import batch_values


class TooFewExamples(ValueError):
    """The pool has too few prompts other than the row's own. `args`: the index of the row, and the number of other prompts."""


def choose_examples(
    row_ids: Sequence[int] | np.ndarray, prompts: Sequence[Hashable], pool_prompts: Sequence[Hashable], num_examples: int, seed: int
) -> np.ndarray:
    """Draw examples for every row: all other prompts in the pool are equally likely, and so are all examples of a prompt.

    The draw for a row depends on its id and prompt, the pool and the seed; it does not depend on other rows.

    Args:
        row_ids: int [R], rows with the same id and prompt get the same examples.
        prompts: [R], a key for the prompt of each row.
        pool_prompts: [E], the key of the prompt of each example.

    Returns:
        int64 [R, num_examples], indices into the pool. The examples of a row have different prompts, and none has the row's own.

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
        # Draw one prompt more than needed, in case the row's own is among them.
        drawn = rng.choice(len(distinct), size=min(num_examples + 1, len(distinct)), replace=False)
        others = [distinct[i] for i in drawn if distinct[i] != own][:num_examples]
        choices[row] = [rng.choice(examples_of[prompt]) for prompt in others]
    return choices


def with_context(batch: RaggedBatch, examples: RaggedBatch, choices: np.ndarray) -> RaggedBatch:
    """The rows of a batch with their examples in front of their prompts, as part of the prompts.

    Args:
        choices: int64 [R, k], rows of `examples`, in the order of the result.

    Returns:
        R rows without fields by token; `without_context` maps fields back.
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
    """A per-token field of the extended rows, [N'], restricted to the tokens of the original rows, [N]."""
    shift = extended.offsets[1:] - batch.offsets[1:]  # both rows end with the same token
    return field[np.repeat(shift, batch.lengths) + np.arange(batch.num_tokens)]


# ---------------------------------------------------------------------------------------------- rows of a data set


@dataclass(frozen=True)
class Origin:
    """The origin of a row of a data set.

    Attributes:
        where: file and line of the source row.
        number: index of the source row; both responses of a pair have the same number.
        prompt: a key for the prompt.
        source: the model that wrote the response; None if unknown. All rows without a source count as those of one model.
    """

    where: str
    number: int
    prompt: str
    source: str | None


def with_peer_examples(batch: RaggedBatch, origins: Sequence[Origin], spec: ContextSpec, seed: int, context_tokens: int) -> RaggedBatch:
    """The rows of a data set, each with examples from other rows of the same source model.

    Args:
        batch: R rows; rows of at most `spec.max_tokens` tokens can be examples.
        origins: [R].
        context_tokens: greatest length of a row with its examples.

    Raises:
        InputError: a model has too few examples, or a row with its examples is too long.
    """
    choices = np.empty((batch.num_rows, spec.examples), dtype=np.int64)
    fits = batch.lengths <= spec.max_tokens
    rows_of: defaultdict[str | None, list[int]] = defaultdict(list)
    for row, origin in enumerate(origins):
        rows_of[origin.source].append(row)
    for source, rows in rows_of.items():
        pool = np.array([r for r in rows if fits[r]], dtype=np.int64)
        numbers, prompts = [origins[r].number for r in rows], [origins[r].prompt for r in rows]
        try:
            choices[rows] = pool[choose_examples(numbers, prompts, [origins[r].prompt for r in pool], spec.examples, seed)]
        except TooFewExamples as error:
            row, available = error.args
            by = "without a source_model" if source is None else f"of source_model {source}"
            raise InputError(
                f"{origins[rows[row]].where}: the row needs {counted(spec.examples, 'example')} {by}, but only {available} other prompts have "
                f"one of at most {spec.max_tokens} tokens; add such rows, or train the GVM with lower gvm.context.examples or higher "
                "gvm.context.max_tokens"
            ) from error
    extended = with_context(batch, batch, choices)
    _check_fit(extended, batch, origins, context_tokens)
    return extended


def _check_fit(extended: RaggedBatch, batch: RaggedBatch, origins: Sequence[Origin], context_tokens: int) -> None:
    if extended.lengths.max(initial=0) <= context_tokens:
        return
    longest = int(extended.lengths.argmax())
    own, total = batch.lengths[longest], extended.lengths[longest]
    raise InputError(
        f"{origins[longest].where}: {own} tokens of prompt and response and {total - own} of examples exceed the model's context of "
        f"{context_tokens}; lower data.max_prompt_tokens or data.max_response_tokens, "
        "or train the GVM with lower gvm.context.examples or gvm.context.max_tokens"
    )


# ------------------------------------------------------------------------------------------- rollouts of a policy


def with_rollout_examples(batch: RaggedBatch, examples: RaggedBatch, spec: ContextSpec, seed: int) -> RaggedBatch:
    """Rollouts of a policy, each with examples from other rollouts of the same policy; its row id and prompt decide which.

    Args:
        examples: rollouts in any order; those of at most `spec.max_tokens` tokens are used.

    Raises:
        InputError: too few of the examples are short enough and answer other prompts than the row's.
    """
    pool = examples.select(np.flatnonzero(examples.lengths <= spec.max_tokens)).sorted_by_id()
    try:
        choices = choose_examples(batch.row_ids, _prompt_keys(batch), _prompt_keys(pool), spec.examples, seed)
    except TooFewExamples as error:
        _, available = error.args
        raise InputError(
            f"the value model needs {counted(spec.examples, 'example')} before a row, but only {available} of {examples.num_rows} rollouts of the "
            f"current policy have another prompt and at most {spec.max_tokens} tokens; raise gvm.context.pool, lower "
            "rollout.max_response_tokens, or train the GVM with higher gvm.context.max_tokens"
        ) from error
    return with_context(batch, pool, choices)


def rollout_values(
    model: PreTrainedModel, batch: RaggedBatch, max_tokens: int, spec: ContextSpec, examples: RaggedBatch | None, seed: int
) -> np.ndarray:
    """Value of the state after every token of a policy's rollouts, float32 [N].

    Args:
        batch: rollouts of the current policy.
        max_tokens: padded tokens of one forward pass.
        spec: the examples that the model was trained with.
        examples: other rollouts of the current policy; not used if the model was trained without examples.

    Raises:
        InputError: the model needs examples, and there are none or too few.
    """
    if not spec.examples:
        return batch_values(model, batch, max_tokens)
    if examples is None:
        raise InputError(
            f"this value model was trained with gvm.context.examples {spec.examples} and needs examples of the policy's rollouts, but there are "
            "none here; use a model that was trained with gvm.context.examples 0"
        )
    extended = with_rollout_examples(batch, examples, spec, seed)
    return without_context(batch_values(model, extended, max_tokens), extended, batch)


def _prompt_keys(batch: RaggedBatch) -> list[bytes]:
    ends = batch.offsets[:-1] + batch.prompt_lengths
    return [batch.tokens[start:end].tobytes() for start, end in zip(batch.offsets[:-1], ends, strict=True)]
