"""Two ways to lay ragged rows out for a plain transformers model, as one would by hand.

The bare loops choose the faster of the two on the machine at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dvpo_ray.batch import RaggedBatch

LAYOUTS = ("packed", "padded")


@dataclass(frozen=True)
class ModelInputs:
    """Some rows of a batch as the inputs of one forward pass.

    Attributes:
        input_ids: int64 [B, L].
        position_ids: int64 [B, L], from 0 again at every packed row; None where each row of the tensor is one row.
        predicts: bool [B, L], the next token is a response token of the same row.
        targets: int64 [n], those response tokens.
        token_index: int64 [n], their positions in the batch's flat arrays.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    predicts: torch.Tensor
    targets: torch.Tensor
    token_index: torch.Tensor


def lay_out(batch: RaggedBatch, rows: np.ndarray, layout: str, max_tokens: int, device: torch.device | str) -> list[ModelInputs]:
    """Micro-batches of the given rows, of at most `max_tokens` tokens each, padding included.

    Args:
        layout: `packed` puts rows one after the other into one sequence (transformers keeps them apart by their positions);
            `padded` puts rows of like length under each other, padded on the right.
    """
    groups, arrange = (_pack_groups, _packed) if layout == "packed" else (_pad_groups, _padded)
    return [_model_inputs(batch, *arrange(batch, group), device) for group in groups(batch.lengths, rows, max_tokens)]


def _pack_groups(lengths: np.ndarray, rows: np.ndarray, max_tokens: int) -> list[list[int]]:
    groups: list[list[int]] = [[]]
    used = 0
    for row in rows.tolist():
        if groups[-1] and used + lengths[row] > max_tokens:
            groups.append([])
            used = 0
        groups[-1].append(row)
        used += lengths[row]
    return groups


def _pad_groups(lengths: np.ndarray, rows: np.ndarray, max_tokens: int) -> list[list[int]]:
    groups: list[list[int]] = [[]]
    for row in sorted(rows.tolist(), key=lambda row: -lengths[row]):
        if groups[-1] and (len(groups[-1]) + 1) * lengths[groups[-1][0]] > max_tokens:
            groups.append([])
        groups[-1].append(row)
    return groups


def _packed(batch: RaggedBatch, rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
    index = np.concatenate([np.arange(batch.offsets[row], batch.offsets[row + 1]) for row in rows])
    positions = np.concatenate([np.arange(batch.lengths[row]) for row in rows])
    return index[None], positions[None]


def _padded(batch: RaggedBatch, rows: list[int]) -> tuple[np.ndarray, None]:
    index = np.full((len(rows), int(batch.lengths[rows].max())), -1)
    for place, row in enumerate(rows):
        index[place, : batch.lengths[row]] = np.arange(batch.offsets[row], batch.offsets[row + 1])
    return index, None


def _model_inputs(batch: RaggedBatch, index: np.ndarray, positions: np.ndarray | None, device: torch.device | str) -> ModelInputs:
    """Inputs whose token at [b, l] is the batch's token `index[b, l]`; -1 is padding."""
    is_response = (index >= 0) & batch.response_mask[index]
    predicts = np.zeros_like(is_response)
    predicts[:, :-1] = is_response[:, 1:]

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return ModelInputs(
        input_ids=tensor(np.where(index >= 0, batch.tokens[index], 0)),
        position_ids=None if positions is None else tensor(positions),
        predicts=tensor(predicts),
        targets=tensor(batch.tokens[index[is_response]]),
        token_index=tensor(index[is_response]),
    )
