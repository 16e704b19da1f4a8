"""Ragged rollout batches: flat token arrays with row offsets, and no padding anywhere.

A row is one prompt and its response. Per-token fields are aligned to the row's tokens; what a field means at position j:

    tokens[j]          the token itself
    log_probs[j]       log p(tokens[j] | tokens[<j]); 0 on prompt positions
    values[j]          the GVM's value of the state after tokens[..j], so that the T+1 values of METHOD's `values[0..T]`
                       are the row's positions P-1 .. P+T-1 (P prompt tokens, T response tokens)
    advantages[j]      credit of choosing tokens[j]; 0 on prompt positions

Arrays are numpy, so that Ray shares them between the processes of a node without a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np


@dataclass(frozen=True)
class RaggedBatch:
    """R rows of N tokens in all. Construction checks every shape; a batch that exists is well formed.

    Attributes:
        tokens: int64 [N], prompt and response of row 0, then of row 1, ...
        offsets: int64 [R + 1], row r is `tokens[offsets[r]:offsets[r + 1]]`.
        prompt_lengths: int64 [R], at least 1 each: the first response token needs a state before it.
        row_ids: int64 [R], the row's index within its step; results never depend on the order of rows.
        truncated: bool [R], the response was cut off at the length limit and has no terminal state.
        policy_version: int64 [R], version of the weights that sampled the row.
        fields: per-token float32 [N] arrays by name (`log_probs`, `reference_log_probs`, `values`, `advantages`, ...).

    Raises:
        ValueError: a shape, an offset or a prompt length does not fit.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    prompt_lengths: np.ndarray
    row_ids: np.ndarray
    truncated: np.ndarray
    policy_version: np.ndarray
    fields: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = len(self.offsets) - 1
        if rows < 0 or self.offsets[0] != 0 or self.offsets[-1] != len(self.tokens):
            raise ValueError(f"offsets must run from 0 to {len(self.tokens)} tokens, got {self.offsets!r}")
        lengths = np.diff(self.offsets)
        for name in ("prompt_lengths", "row_ids", "truncated", "policy_version"):
            if getattr(self, name).shape != (rows,):
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, expected ({rows},)")
        if rows and (self.prompt_lengths.min() < 1 or (self.prompt_lengths > lengths).any()):
            raise ValueError("every row needs at least one prompt token and no more prompt tokens than tokens")
        for name, values in self.fields.items():
            if values.shape != self.tokens.shape:
                raise ValueError(f"field {name} has shape {values.shape}, expected {self.tokens.shape}")

    # ------------------------------------------------------------------------------------------------ shape

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, prompt and response, int64 [R]."""
        return np.diff(self.offsets)

    @property
    def response_lengths(self) -> np.ndarray:
        """Response tokens of each row, int64 [R]."""
        return self.lengths - self.prompt_lengths

    @property
    def response_mask(self) -> np.ndarray:
        """True on response tokens, bool [N]."""
        position = np.arange(self.num_tokens) - np.repeat(self.offsets[:-1], self.lengths)
        return position >= np.repeat(self.prompt_lengths, self.lengths)

    @property
    def row_of_token(self) -> np.ndarray:
        """The row (0..R-1) that each token belongs to, int64 [N]."""
        return np.repeat(np.arange(self.num_rows), self.lengths)

    def row(self, r: int) -> slice:
        """The slice of row r in every per-token array."""
        return slice(int(self.offsets[r]), int(self.offsets[r + 1]))

    def response(self, r: int) -> slice:
        """The slice of row r's response tokens."""
        return slice(int(self.offsets[r] + self.prompt_lengths[r]), int(self.offsets[r + 1]))

    def states(self, r: int) -> slice:
        """The slice of row r's T + 1 states: last prompt token to last response token."""
        return slice(int(self.offsets[r] + self.prompt_lengths[r] - 1), int(self.offsets[r + 1]))

    # ------------------------------------------------------------------------------------------ construction

    @classmethod
    def from_rows(
        cls,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        *,
        row_ids: Sequence[int] | None = None,
        truncated: Sequence[bool] | None = None,
        policy_version: int = 0,
        response_fields: dict[str, Sequence[Sequence[float]]] | None = None,
    ) -> RaggedBatch:
        """Build a batch from token lists; `response_fields` hold one value per response token and are 0 on prompts."""
        rows = [list(p) + list(r) for p, r in zip(prompts, responses, strict=True)]
        fields = {
            name: _concatenate([[0.0] * len(p) + list(v) for p, v in zip(prompts, values, strict=True)], np.float32)
            for name, values in (response_fields or {}).items()
        }
        count = len(rows)
        return cls(
            tokens=_concatenate(rows, np.int64),
            offsets=np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64),
            prompt_lengths=np.array([len(p) for p in prompts], dtype=np.int64),
            row_ids=np.arange(count) if row_ids is None else np.asarray(row_ids, dtype=np.int64),
            truncated=np.zeros(count, bool) if truncated is None else np.asarray(truncated, dtype=bool),
            policy_version=np.full(count, policy_version, dtype=np.int64),
            fields=fields,
        )

    @classmethod
    def concatenate(cls, batches: Iterable[RaggedBatch]) -> RaggedBatch:
        """All rows of several batches with the same fields, in the order given."""
        batches = list(batches)
        names = set(batches[0].fields)
        if any(set(b.fields) != names for b in batches):
            raise ValueError(f"batches have different fields: {[sorted(b.fields) for b in batches]}")
        lengths = np.concatenate([b.lengths for b in batches])
        return cls(
            tokens=np.concatenate([b.tokens for b in batches]),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            prompt_lengths=np.concatenate([b.prompt_lengths for b in batches]),
            row_ids=np.concatenate([b.row_ids for b in batches]),
            truncated=np.concatenate([b.truncated for b in batches]),
            policy_version=np.concatenate([b.policy_version for b in batches]),
            fields={name: np.concatenate([b.fields[name] for b in batches]) for name in sorted(names)},
        )

    def select(self, rows: Sequence[int] | np.ndarray) -> RaggedBatch:
        """The given rows, in the given order."""
        rows = np.asarray(rows, dtype=np.int64)
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        index = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return RaggedBatch(
            tokens=self.tokens[index],
            offsets=offsets,
            prompt_lengths=self.prompt_lengths[rows],
            row_ids=self.row_ids[rows],
            truncated=self.truncated[rows],
            policy_version=self.policy_version[rows],
            fields={name: values[index] for name, values in self.fields.items()},
        )

    def sorted_by_row_id(self) -> RaggedBatch:
        """The same rows in the order of their ids, whatever order they finished in."""
        return self.select(np.argsort(self.row_ids, kind="stable"))

    def with_fields(self, **fields: np.ndarray) -> RaggedBatch:
        """The same rows with per-token fields added or replaced."""
        return replace(self, fields={**self.fields, **fields})


def balanced_shards(lengths: np.ndarray, num_shards: int) -> list[np.ndarray]:
    """Split rows into shards of equal row counts and like token counts: longest first, dealt back and forth.

    Raises:
        ValueError: the rows can't be shared out evenly.
    """
    if len(lengths) % num_shards:
        raise ValueError(f"{len(lengths)} rows can't be shared evenly by {num_shards} shards")
    order = np.argsort(-np.asarray(lengths), kind="stable").reshape(-1, num_shards)
    order[1::2] = order[1::2, ::-1]
    return [np.sort(order[:, shard]) for shard in range(num_shards)]


def _concatenate(rows: list[list], dtype) -> np.ndarray:
    return np.concatenate([np.asarray(row, dtype=dtype) for row in rows]) if rows else np.zeros(0, dtype)
