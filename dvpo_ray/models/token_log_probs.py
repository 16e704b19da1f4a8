"""Log-probabilities and entropies from logits, a few rows at a time, so that no other tensor of the logits' size is kept.

With a vocabulary of 128,000 the logits are the largest activation of a language model. A float32 copy, its `log_softmax` and their
gradients would be four more tensors of that size. Here the forward pass keeps only the logits as the model made them, and the
backward pass makes only their gradient, in the same precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS_AT_ONCE = {"cpu": 2**18, "cuda": 2**24}
"""Number of logits that are in float32 at a time, by type of device: 1 MiB, which fits into caches, and 64 MiB."""


IMPOSSIBLE = -1e4
"""The scaled logit of a token that cannot be sampled: its probability is 0, and every dtype holds the number."""


@dataclass(frozen=True)
class Excluded:
    """Tokens that cannot be sampled at some positions.

    Attributes:
        rows: bool [n], the positions.
        tokens: the tokens.
    """

    rows: Tensor
    tokens: Sequence[int]

    def apply(self, scaled: Tensor, rows: slice) -> None:
        """Exclude the tokens from scaled logits of some of the positions, in place."""
        for token in self.tokens:
            scaled[:, token].masked_fill_(self.rows[rows], IMPOSSIBLE)


class TokenLogProbs(NamedTuple):
    """Log-probabilities of targets.

    Attributes:
        log_probs: float [n], of each target.
        entropy: float [n], entropy in nats of the distribution of each target; None if not asked for.
    """

    log_probs: Tensor
    entropy: Tensor | None


def token_log_probs(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, entropy: bool = False, excluded: Excluded | None = None
) -> TokenLogProbs:
    """log softmax(logits / temperature) at the targets, and the entropy of that distribution; both differentiable once.

    Args:
        logits: [n, vocabulary] in any precision; the computation is in float32 or higher.
        targets: int64 [n].
        temperature: logits are divided by it.
        excluded: tokens whose probability is 0 at some positions.
        entropy: compute the entropies too.
    """
    log_probs, entropies = _TokenLogProbs.apply(logits, targets, temperature, entropy, excluded)
    return TokenLogProbs(log_probs, entropies if entropy else None)


class _TokenLogProbs(torch.autograd.Function):
    """With x = logits / T and p = softmax(x): d log p_t / dx_j = [j = t] - p_j, and dH / dx_j = -p_j (log p_j + H)."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, temperature: float, entropy: bool, excluded: Excluded | None) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        log_probs = torch.empty(len(targets), dtype=dtype, device=logits.device)
        entropies = torch.empty_like(log_probs) if entropy else log_probs.new_empty(0)
        for rows in _row_blocks(logits):
            log_p = F.log_softmax(_scaled(logits, rows, temperature, dtype, excluded), dim=-1)
            log_probs[rows] = log_p.gather(1, targets[rows, None])[:, 0]
            if entropy:
                entropies[rows] = -log_p.exp().mul_(log_p).sum(-1)
            del log_p  # otherwise it would coexist with the next one
        ctx.save_for_backward(logits, targets, entropies)
        ctx.temperature, ctx.excluded = temperature, excluded
        ctx.set_materialize_grads(False)
        return log_probs, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, to_log_probs: Tensor | None, to_entropies: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        if to_log_probs is None and to_entropies is None:
            return None, None, None, None, None
        logits, targets, entropies = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows in _row_blocks(logits):
            scaled = _scaled(logits, rows, ctx.temperature, entropies.dtype, ctx.excluded)
            if to_entropies is None:
                part = torch.softmax(scaled, dim=-1).mul_(-to_log_probs[rows, None])
            else:
                log_p = F.log_softmax(scaled, dim=-1)
                part = log_p.exp()
                weight = log_p.add_(entropies[rows, None]).mul_(-to_entropies[rows, None])
                part *= weight if to_log_probs is None else weight.sub_(to_log_probs[rows, None])
                del log_p, weight
            if to_log_probs is not None:
                part.scatter_add_(1, targets[rows, None], to_log_probs[rows, None])
            gradient[rows] = part.div_(ctx.temperature) if ctx.temperature != 1.0 else part
            del scaled, part
        return gradient, None, None, None, None


def _row_blocks(logits: Tensor) -> Iterator[slice]:
    at_once = max(1, LOGITS_AT_ONCE.get(logits.device.type, LOGITS_AT_ONCE["cuda"]) // logits.shape[-1])
    return (slice(start, start + at_once) for start in range(0, len(logits), at_once))


def _scaled(logits: Tensor, rows: slice, temperature: float, dtype: torch.dtype, excluded: Excluded | None) -> Tensor:
    """Some rows of the logits over the temperature, in `dtype`, without the excluded tokens; never written into afterwards."""
    block = logits[rows]
    converted = block.to(dtype)
    if excluded is not None and converted is block:
        converted = block.clone()
    if temperature != 1.0:
        converted = converted / temperature if converted is block else converted.div_(temperature)
    if excluded is not None:
        excluded.apply(converted, rows)
    return converted
