"""Ragged rollout batches: flat token arrays with row offsets, without padding.

A row is one prompt and its response. Fields by token are aligned to the tokens of the row. At position j:

    tokens[j]          the token
    log_probs[j]       log p(tokens[j] | tokens[<j]); 0 on the prompt
    values[j]          the GVM's value of the state after tokens[..j]; the T+1 values `values[0..T]` of docs/method.md are at
                       positions P-1 .. P+T-1 of the row (P prompt tokens, T response tokens)
    advantages[j]      the credit for choosing tokens[j]; 0 on the prompt

Fields by row hold one number per row:

    truncated          bool, the response was cut off at the length limit and has no terminal state
    rewards            float64, the reward of the response from a reward model
    gold               float64, the score of the response from the gold judge

All arrays are numpy arrays, which the processes of a node share through Ray without a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

PROMPT_VERSION = -1
"""The policy version of prompt tokens, which are not sampled from a policy."""


@dataclass(frozen=True)
class Fields:
    """The results of a role that scores rollouts, for a batch of N tokens in R rows.

    Attributes:
        by_token: float32 [N] arrays by name.
        by_row: [R] arrays by name.
    """

    by_token: Mapping[str, np.ndarray] = field(default_factory=dict)
    by_row: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class RaggedBatch:
    """R rows with N tokens in total. The constructor checks every shape.

    `(steps[r], row_ids[r])` identifies a row and never changes; results do not depend on the order of rows.

    Attributes:
        tokens: int64 [N], prompt and response of row 0, then of row 1, ...
        offsets: int64 [R + 1], row r is `tokens[offsets[r]:offsets[r + 1]]`.
        prompt_lengths: int64 [R], at least 1 each, because the first response token needs a state before it.
        steps: int64 [R], the training step for which the row was started.
        row_ids: int64 [R], index of the row within that step.
        policy_versions: int64 [N], version of the weights that sampled each token; `PROMPT_VERSION` on prompts.
        by_token: float32 [N] arrays by name (`log_probs`, `reference_log_probs`, `values`, `advantages`, ...).
        by_row: [R] arrays by name (always `truncated`; `rewards`, `gold`, ...).

    Raises:
        ValueError: a shape, an offset or a prompt length is wrong.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    prompt_lengths: np.ndarray
    steps: np.ndarray
    row_ids: np.ndarray
    policy_versions: np.ndarray
    by_token: dict[str, np.ndarray] = field(default_factory=dict)
    by_row: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = len(self.offsets) - 1
        if rows < 0 or self.offsets[0] != 0 or self.offsets[-1] != len(self.tokens):
            raise ValueError(f"offsets must run from 0 to {len(self.tokens)} tokens, got {self.offsets!r}")
        by_row = {"prompt_lengths": self.prompt_lengths, "steps": self.steps, "row_ids": self.row_ids, **self.by_row}
        if "truncated" not in by_row:
            raise ValueError("the row field truncated is missing")
        for name, values in by_row.items():
            if values.shape != (rows,):
                raise ValueError(f"{name} has shape {values.shape}, expected ({rows},): one number per row")
        for name, values in {"policy_versions": self.policy_versions, **self.by_token}.items():
            if values.shape != self.tokens.shape:
                raise ValueError(f"{name} has shape {values.shape}, expected {self.tokens.shape}: one number per token")
        if rows and (self.prompt_lengths.min() < 1 or (self.prompt_lengths > np.diff(self.offsets)).any()):
            raise ValueError("every row needs at least one prompt token and at most as many prompt tokens as tokens")

    # ------------------------------------------------------------------------------------------------ shape

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each row, prompt and response, int64 [R]."""
        return np.diff(self.offsets)

    @property
    def truncated(self) -> np.ndarray:
        """True for responses that were cut off at the length limit, bool [R]."""
        return self.by_row["truncated"]

    @property
    def response_lengths(self) -> np.ndarray:
        """Number of response tokens of each row, int64 [R]."""
        return self.lengths - self.prompt_lengths

    @property
    def response_mask(self) -> np.ndarray:
        """True on response tokens, bool [N]."""
        position = np.arange(self.num_tokens) - np.repeat(self.offsets[:-1], self.lengths)
        return position >= np.repeat(self.prompt_lengths, self.lengths)

    @property
    def row_of_token(self) -> np.ndarray:
        """The row (0..R-1) of each token, int64 [N]."""
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

    @property
    def state_lengths(self) -> np.ndarray:
        """T + 1 of every row, int64 [R]."""
        return self.response_lengths + 1

    @property
    def state_index(self) -> np.ndarray:
        """Positions of all T + 1 states of every row, int64 [S], row after row."""
        first, lengths = self.offsets[:-1] + self.prompt_lengths - 1, self.state_lengths
        return np.repeat(first - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())

    # ------------------------------------------------------------------------------------------ construction

    @classmethod
    def from_rows(
        cls,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        *,
        step: int = 0,
        row_ids: Sequence[int] | None = None,
        truncated: Sequence[bool] | None = None,
        policy_version: int = 0,
        by_response_token: dict[str, Sequence[Sequence[float]]] | None = None,
        by_row: Mapping[str, Sequence | np.ndarray] | None = None,
    ) -> RaggedBatch:
        """Build a batch from token lists.

        Args:
            row_ids: 0, 1, ... by default.
            policy_version: of all response tokens.
            by_response_token: fields by token, one value per response token; they are 0 on prompts.
            by_row: fields by row.
        """
        rows = [list(p) + list(r) for p, r in zip(prompts, responses, strict=True)]
        count = len(rows)

        def spread(on_prompt: float, per_response: Iterable[Sequence[float]], dtype) -> np.ndarray:
            return _concatenate([[on_prompt] * len(p) + list(v) for p, v in zip(prompts, per_response, strict=True)], dtype)

        return cls(
            tokens=_concatenate(rows, np.int64),
            offsets=np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64),
            prompt_lengths=np.array([len(p) for p in prompts], dtype=np.int64),
            steps=np.full(count, step, dtype=np.int64),
            row_ids=np.arange(count) if row_ids is None else np.asarray(row_ids, dtype=np.int64),
            policy_versions=spread(PROMPT_VERSION, [[policy_version] * len(r) for r in responses], np.int64),
            by_token={name: spread(0.0, values, np.float32) for name, values in (by_response_token or {}).items()},
            by_row={
                "truncated": np.zeros(count, bool) if truncated is None else np.asarray(truncated, dtype=bool),
                **{name: np.asarray(values) for name, values in (by_row or {}).items()},
            },
        )

    @classmethod
    def concatenate(cls, batches: Iterable[RaggedBatch]) -> RaggedBatch:
        """All rows of several batches with the same fields, in the given order."""
        batches = list(batches)
        by_token, by_row = sorted(batches[0].by_token), sorted(batches[0].by_row)
        if any(sorted(b.by_token) != by_token or sorted(b.by_row) != by_row for b in batches):
            raise ValueError(f"batches have different fields: {[sorted([*b.by_token, *b.by_row]) for b in batches]}")
        lengths = np.concatenate([b.lengths for b in batches])
        return cls(
            tokens=np.concatenate([b.tokens for b in batches]),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            prompt_lengths=np.concatenate([b.prompt_lengths for b in batches]),
            steps=np.concatenate([b.steps for b in batches]),
            row_ids=np.concatenate([b.row_ids for b in batches]),
            policy_versions=np.concatenate([b.policy_versions for b in batches]),
            by_token={name: np.concatenate([b.by_token[name] for b in batches]) for name in by_token},
            by_row={name: np.concatenate([b.by_row[name] for b in batches]) for name in by_row},
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
            steps=self.steps[rows],
            row_ids=self.row_ids[rows],
            policy_versions=self.policy_versions[index],
            by_token={name: values[index] for name, values in self.by_token.items()},
            by_row={name: values[rows] for name, values in self.by_row.items()},
        )

    def sorted_by_id(self) -> RaggedBatch:
        """The same rows, sorted by step and row id."""
        return self.select(np.lexsort((self.row_ids, self.steps)))

    def with_token_fields(self, **fields: np.ndarray) -> RaggedBatch:
        """The same rows with fields by token added or replaced, [N] each."""
        return replace(self, by_token={**self.by_token, **fields})

    def with_row_fields(self, **fields: np.ndarray) -> RaggedBatch:
        """The same rows with fields by row added or replaced, [R] each."""
        return replace(self, by_row={**self.by_row, **fields})

    def with_fields(self, *scores: Fields) -> RaggedBatch:
        """The same rows with the results of several roles added."""
        by_token = {name: values for score in scores for name, values in score.by_token.items()}
        return self.with_token_fields(**by_token).with_row_fields(**{name: values for score in scores for name, values in score.by_row.items()})

    def only(self, *names: str) -> RaggedBatch:
        """The same rows with only these fields by token."""
        return replace(self, by_token={name: self.by_token[name] for name in names})


def _concatenate(rows: list[list], dtype) -> np.ndarray:
    return np.concatenate([np.asarray(row, dtype=dtype) for row in rows]) if rows else np.zeros(0, dtype)
