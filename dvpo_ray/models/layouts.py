"""Rows of a batch as the input of one forward pass: padded, or packed one after the other. Rows are padded nowhere else.

Padded rows stand under each other, padded on the right. Attention is causal, so no real token sees padding and no mask is needed. This
keeps the fast attention kernels, and a row's result does not depend on its padding or on the other rows of its micro-batch. Packed rows
have no padding; they need an attention that keeps them apart (`dvpo_ray.models.attention`). Both give the same numbers.

All indices are made on the host, and one copy for each dtype brings them to the device. So a forward pass waits for nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.models.attention import is_packed, without_a_search_for_packed_rows


def micro_batches(lengths: Sequence[int] | np.ndarray, max_tokens: int, *, packed: bool = False, multiple_of: int = 1) -> list[np.ndarray]:
    """Split rows into micro-batches of at most `max_tokens` tokens each, padding included. A longer row is alone.

    Padded, rows are sorted by length, longest first: a micro-batch then holds rows of like length with little padding, and the
    largest micro-batch comes first, so that a lack of memory shows at once. Packed, the micro-batches have nearly equal numbers of
    tokens.

    Args:
        multiple_of: the number of micro-batches is a multiple of it, as far as there are rows.

    Returns:
        Row indices of each micro-batch, int64; every row exactly once, and no micro-batch without a row.
    """
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    whole = _equal_groups(lengths, order, max_tokens, multiple_of) if packed else _halved(_like_lengths(lengths, order, max_tokens), multiple_of)
    return [np.array(group, dtype=np.int64) for group in whole]


def _like_lengths(lengths: np.ndarray, order: np.ndarray, max_tokens: int) -> list[list[int]]:
    groups: list[list[int]] = []
    widest = 0
    for row in order:
        if groups and (len(groups[-1]) + 1) * widest <= max_tokens:
            groups[-1].append(int(row))
        else:
            groups.append([int(row)])
            widest = int(lengths[row])
    return groups


def _halved(groups: list[list[int]], multiple_of: int) -> list[list[int]]:
    """The groups with most rows, halved until their number is a multiple."""
    while len(groups) % multiple_of and max(map(len, groups)) > 1:
        largest = max(range(len(groups)), key=lambda i: len(groups[i]))
        half = -(-len(groups[largest]) // 2)
        groups[largest : largest + 1] = [groups[largest][:half], groups[largest][half:]]
    return groups


def _equal_groups(lengths: np.ndarray, order: np.ndarray, max_tokens: int, multiple_of: int) -> list[list[int]]:
    """The longest row that is left goes to the group with the fewest tokens, with as few groups as that allows."""
    count = -(-int(lengths.sum()) // max_tokens)
    while True:
        count = min(len(lengths), -(-count // multiple_of) * multiple_of)
        groups: list[list[int]] = [[] for _ in range(count)]
        sizes = [(0, group) for group in range(count)]
        for row in order:
            size, group = sizes[0]
            groups[group].append(int(row))
            heapq.heapreplace(sizes, (size + int(lengths[row]), group))
        if all(size <= max_tokens or len(groups[group]) == 1 for size, group in sizes):
            return sorted(groups, key=lambda group: -int(lengths[group].sum()))
        count += 1


@dataclass(frozen=True)
class Passes:
    """The forward passes of one of several ranks that run together.

    Attributes:
        rows: row indices of each pass, int64.
        idle: the last so many passes are there only to keep step with the other ranks; their rows count elsewhere.
    """

    rows: list[np.ndarray]
    idle: int = 0

    @property
    def working(self) -> list[np.ndarray]:
        """The passes that are not idle."""
        return self.rows[: len(self.rows) - self.idle]


def deal(lengths: np.ndarray, ranks: int, max_tokens: int, *, packed: bool = False) -> list[Passes]:
    """Micro-batches of all rows, dealt out to ranks: each gets the same number of passes and nearly as many tokens.

    Each row counts on one rank. Ranks may get different numbers of rows.

    Args:
        lengths: tokens of each row, int64 [R], at least one row.
        max_tokens, packed: as in `micro_batches`.
    """
    groups = micro_batches(lengths, max_tokens, packed=packed, multiple_of=ranks)
    dealt: list[list[np.ndarray]] = [[] for _ in range(ranks)]
    for start in range(0, len(groups), ranks):
        turn = groups[start : start + ranks]
        for rank, group in zip(range(ranks) if start // ranks % 2 == 0 else reversed(range(ranks)), turn, strict=False):
            dealt[rank].append(group)
    longest, filler = max(map(len, dealt)), np.array([np.argmin(lengths)])
    return [Passes(mine + [filler] * (longest - len(mine)), longest - len(mine)) for mine in dealt]


@dataclass(frozen=True)
class Rows:
    """Some rows of a batch on a device, laid out for one forward pass, and n of their tokens whose results are wanted.

    Attributes:
        input_ids: int64 [B, L] padded, token 0 on padding, which is never read; or [1, L] packed.
        inputs: further arguments of the model.
        reads: int64 [n]; for each wanted token the place in the flattened output that is read.
        tokens: int64 [n]; the positions of the wanted tokens in the batch's flat arrays.
        ids: int64 [n]; the wanted tokens.
        depths: int64 [n]; how many response tokens of the row come before each; negative on prompts.
        fields: float32 [n] by name: fields of the batch at the wanted tokens.
    """

    input_ids: Tensor
    inputs: dict[str, Any]
    reads: Tensor
    tokens: Tensor
    ids: Tensor
    depths: Tensor
    fields: dict[str, Tensor] = field(default_factory=dict)

    def part(self, start: int, end: int) -> Rows:
        """The same rows with some of the wanted tokens only."""
        few = {name: getattr(self, name)[start:end] for name in ("reads", "tokens", "ids", "depths")}
        return replace(self, **few, fields={name: values[start:end] for name, values in self.fields.items()})


def output_of(model: nn.Module, rows: Rows, **options: bool) -> ModelOutput:
    """What a model of transformers, or a DeepSpeed engine around it, gives for some rows in one forward pass.

    Args:
        options: further arguments of the model.
    """
    with without_a_search_for_packed_rows():
        return model(input_ids=rows.input_ids, use_cache=False, **options, **rows.inputs)


def lay_out(
    model: nn.Module,
    batch: RaggedBatch,
    passes: Passes,
    wanted: np.ndarray,
    *,
    ahead: bool,
    fields: Sequence[str] = (),
) -> list[Rows]:
    """The rows of several forward passes on the device of a model, in the layout of its attention.

    Args:
        wanted: bool [N], the tokens of the batch whose results are read; none in idle passes.
        ahead: results are read one token earlier: of the state that the token was chosen in.
        fields: by token; taken along at the wanted tokens.
    """
    device, packed = next(model.parameters()).device, is_packed(model)
    nothing, working = np.zeros_like(wanted), len(passes.working)
    on_host = [
        _arrays(batch, rows, wanted if i < working else nothing, packed=packed, ahead=ahead, fields=fields) for i, rows in enumerate(passes.rows)
    ]
    sent = iter(to_device([array for arrays in on_host for array in arrays.values()], device))
    laid_out = []
    for arrays, rows in zip(on_host, passes.rows, strict=True):
        tensors = {name: next(sent) for name in arrays}
        longest = int(batch.lengths[rows].max())
        if packed:
            bounds = tensors.pop("bounds")
            inputs = {
                "position_ids": tensors.pop("position_ids"),
                "cu_seq_lens_q": bounds,
                "cu_seq_lens_k": bounds,
                "max_length_q": longest,
                "max_length_k": longest,
            }
        else:
            inputs = {}
        own = {name: tensors.pop(name) for name in ("input_ids", "reads", "tokens", "ids", "depths")}
        laid_out.append(Rows(inputs=inputs, fields=tensors, **own))
    return laid_out


def _arrays(batch: RaggedBatch, rows: np.ndarray, wanted: np.ndarray, *, packed: bool, ahead: bool, fields: Sequence[str]) -> dict[str, np.ndarray]:
    lengths = batch.lengths[rows]
    ends = np.cumsum(lengths)
    within = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    index = np.repeat(batch.offsets[rows], lengths) + within
    if packed:
        place, input_ids = np.arange(len(index)), batch.tokens[index][None]
        layout = {"position_ids": within[None], "bounds": np.concatenate([[0], ends]).astype(np.int32)}
    else:
        place, layout = np.repeat(np.arange(len(rows)) * lengths.max(), lengths) + within, {}
        input_ids = np.zeros((len(rows), lengths.max()), dtype=np.int64)
        input_ids.reshape(-1)[place] = batch.tokens[index]
    chosen = wanted[index]
    tokens = index[chosen]
    return {
        "input_ids": input_ids,
        **layout,
        "reads": place[chosen] - int(ahead),
        "tokens": tokens,
        "ids": batch.tokens[tokens],
        "depths": (within - np.repeat(batch.prompt_lengths[rows], lengths))[chosen],
        **{name: batch.by_token[name][tokens] for name in fields},
    }


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays as tensors on a device. To a GPU they travel together, in one copy for each dtype, which nothing waits for."""
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    sent: dict[int, Tensor] = {}
    for dtype in {tensor.dtype for tensor in tensors}:
        members = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
        whole = torch.cat([tensors[i].reshape(-1) for i in members]).pin_memory().to(device, non_blocking=True)
        parts = whole.split([tensors[i].numel() for i in members])
        sent |= {i: part.view(tensors[i].shape) for i, part in zip(members, parts, strict=True)}
    return [sent[i] for i in range(len(tensors))]
