"""Forward passes of a transformers model over micro-batches of rows of like length. Rows are padded nowhere else.

Rows are padded on the right and attention is causal, so no real token sees padding and no mask is needed. This keeps the
fast attention kernels, and a row's result does not depend on its padding or on the other rows of its micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.models.token_log_probs import Excluded, token_log_probs


def micro_batches(lengths: Sequence[int] | np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Split rows into micro-batches of at most `max_tokens` padded tokens each.

    Rows are sorted by length, longest first: a micro-batch then holds rows of like length with little padding, and the
    largest micro-batch comes first, so that a lack of memory shows at once. A row longer than `max_tokens` is alone.

    Returns:
        Row indices of each micro-batch, int64; every row exactly once.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    groups: list[list[int]] = []
    widest = 0
    for row in order:
        if groups and (len(groups[-1]) + 1) * widest <= max_tokens:
            groups[-1].append(int(row))
        else:
            groups.append([int(row)])
            widest = int(lengths[row])
    return [np.array(group, dtype=np.int64) for group in groups]


@dataclass(frozen=True)
class PaddedRows:
    """Some rows of a batch, padded on the right for one forward pass.

    Attributes:
        input_ids: int64 [B, L]; token 0 on padding, which is never read.
        token_index: int64 [B, L]; position of each token in the batch's flat arrays, -1 on padding.
    """

    input_ids: torch.Tensor
    token_index: torch.Tensor

    @property
    def is_token(self) -> torch.Tensor:
        """True on real tokens, bool [B, L]."""
        return self.token_index >= 0


def pad_rows(batch: RaggedBatch, rows: np.ndarray, device: torch.device | str = "cpu") -> PaddedRows:
    """Pad the given rows of a batch to the length of the longest."""
    lengths = batch.lengths[rows]
    column = np.arange(lengths.max())
    index = np.where(column < lengths[:, None], batch.offsets[rows][:, None] + column, -1)
    input_ids = np.where(index >= 0, batch.tokens[index], 0)
    return PaddedRows(torch.from_numpy(input_ids).to(device), torch.from_numpy(index).to(device))


@contextmanager
def project_only(model: torch.nn.Module, positions: torch.Tensor) -> Iterator[None]:
    """Within this context the model's output projection runs on the given positions only, bool [B, L].

    Logits then have shape [1, positions.sum(), vocabulary]. Only response tokens need the projection; it is a fifth of the
    work of a small model, and its output is the largest activation of any model.
    """

    def keep(_module, args):
        return (args[0][positions].unsqueeze(0), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class MinLength:
    """The engine samples no stop token before a response has so many tokens.

    Attributes:
        tokens: `rollout.min_response_tokens`.
        stop_token_ids: tokens that end a response.
    """

    tokens: int
    stop_token_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokens: int, stop_token_ids: Iterable[int]) -> MinLength | None:
        """None where there is no minimum."""
        return cls(tokens, tuple(sorted(stop_token_ids))) if tokens else None

    def excluded(self, batch: RaggedBatch, token_index: torch.Tensor) -> Excluded:
        """What could not be sampled at some response tokens, given by their positions in the batch's flat arrays, int64 [n]."""
        before = np.arange(batch.num_tokens) - np.repeat(batch.offsets[:-1] + batch.prompt_lengths, batch.lengths)
        early = torch.from_numpy(before < self.tokens).to(token_index.device)
        return Excluded(early[token_index], torch.tensor(self.stop_token_ids, device=token_index.device))


@dataclass(frozen=True)
class ResponseLogits:
    """Result of one forward pass for the response tokens of some rows.

    Attributes:
        log_probs: float32 [n], log-probability of each response token, differentiable.
        entropy: float32 [n], entropy in nats of the distribution of each token; None if not asked for.
        token_index: int64 [n], position of each response token in the batch's flat arrays.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor | None
    token_index: torch.Tensor


def response_log_probs(
    model: torch.nn.Module,
    batch: RaggedBatch,
    rows: np.ndarray,
    *,
    temperature: float = 1.0,
    min_length: MinLength | None = None,
    entropy: bool = True,
    entropy_gradient: bool = False,
    run: torch.nn.Module | None = None,
) -> ResponseLogits:
    """Log-probabilities and entropies of the response tokens of some rows, in one forward pass.

    Args:
        model: a causal language model of transformers; it has the output projection.
        rows: row indices of one micro-batch.
        temperature: logits are divided by it, as the rollout engine does before it samples.
        min_length: as the rollout engine keeps it.
        entropy: compute the entropies.
        entropy_gradient: the entropies are differentiable.
        run: is called instead of `model`: a DeepSpeed engine around it.
    """
    device = next(model.parameters()).device
    padded = pad_rows(batch, rows, device)
    is_response = torch.from_numpy(batch.response_mask).to(device)
    response = padded.is_token & is_response[padded.token_index.clamp(min=0)]
    predicts = torch.zeros_like(response)
    predicts[:, :-1] = response[:, 1:]  # the logits at position j predict the token at j + 1
    with project_only(model, predicts):
        logits = (run or model)(input_ids=padded.input_ids, use_cache=False).logits.squeeze(0)
    token_index = padded.token_index[response]
    excluded = min_length.excluded(batch, token_index) if min_length is not None else None
    log_probs, entropies = token_log_probs(logits, padded.input_ids[response], temperature=temperature, entropy=entropy, excluded=excluded)
    if entropies is not None and not entropy_gradient:
        entropies = entropies.detach()
    return ResponseLogits(log_probs, entropies, token_index)


@torch.no_grad()
def batch_log_probs(
    model: torch.nn.Module,
    batch: RaggedBatch,
    max_tokens: int,
    temperature: float = 1.0,
    *,
    min_length: MinLength | None = None,
    run: torch.nn.Module | None = None,
) -> np.ndarray:
    """Log-probability of every response token of a batch, float32 [N], 0 on prompts; without gradients."""
    flat = torch.zeros(batch.num_tokens)
    for rows in micro_batches(batch.lengths, max_tokens):
        out = response_log_probs(model, batch, rows, temperature=temperature, min_length=min_length, entropy=False, run=run)
        flat[out.token_index.cpu()] = out.log_probs.cpu()
    return flat.numpy()


def token_values(model: torch.nn.Module, batch: RaggedBatch, rows: np.ndarray, *, run=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of every token of some rows, in one forward pass of a value model; differentiable.

    Args:
        model: a token classifier with one label: its logit at a token is the value of the state after the token.

    Returns:
        values float32 [n], and token_index int64 [n], the position of each token in the batch's flat arrays.
    """
    padded = pad_rows(batch, rows, next(model.parameters()).device)
    logits = (run or model)(input_ids=padded.input_ids, use_cache=False).logits[..., 0].float()
    return logits[padded.is_token], padded.token_index[padded.is_token]


@torch.no_grad()
def batch_values(model: torch.nn.Module, batch: RaggedBatch, max_tokens: int) -> np.ndarray:
    """Value of the state after every token of a batch, prompt and response, float32 [N]; without gradients."""
    flat = torch.zeros(batch.num_tokens)
    for rows in micro_batches(batch.lengths, max_tokens):
        values, index = token_values(model, batch, rows)
        flat[index.cpu()] = values.cpu()
    return flat.numpy()
