"""Forward passes of a transformers model over rows of a batch: log-probs of a policy, values of a value model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.errors import ResourceError
from dvpo_ray.models.attention import is_packed
from dvpo_ray.models.head import keeps_logits, log_probs_in_blocks, project_only
from dvpo_ray.models.layouts import Passes, Rows, lay_out, micro_batches, output_of
from dvpo_ray.models.token_log_probs import Excluded, TokenLogProbs, token_log_probs

MIXED = 0.02
"""Rows of a packed sequence are apart if another first row changes the hidden states of the second by less than this share.
Rounding changes those of a mixture of experts in 16 bits by a fifth of it at most; attention across rows changes all by more."""


@torch.compiler.set_stance("force_eager")  # compiled layers would be compiled for passes that nobody takes again
@torch.no_grad()
def check_rows_apart(model: nn.Module, run: nn.Module | None = None) -> None:
    """Refuse a model that mixes packed rows: two short rows, and then another first row beside the same second one.

    Args:
        run: as in `response_log_probs`.

    Raises:
        ResourceError: the hidden states of the second row changed.
    """
    if not is_packed(model):
        return
    hidden = []
    for first in ([1, 2, 3, 4, 5, 6], [9, 8, 7, 6, 5, 4]):
        batch = RaggedBatch.from_rows([first, [10, 11]], [[], [12, 13, 14, 15]])
        (rows,) = lay_out(model, batch, Passes([np.array([0, 1])]), batch.row_of_token == 1, ahead=False)
        output = output_of(run or model, rows, output_hidden_states=True)
        hidden.append(output.hidden_states[-1].flatten(0, 1)[rows.reads].float())
    changed = float((hidden[0] - hidden[1]).norm() / hidden[0].norm())
    if changed > MIXED:
        raise ResourceError(
            f"{model.config.model_type} mixes the rows of a packed sequence: another row before it changes a row's hidden states by {changed:.0%}; "
            "set model.attention=sdpa"
        )


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

    def excluded(self, depths: Tensor) -> Excluded:
        """What could not be sampled after so many response tokens, int64 [n]."""
        return Excluded(depths < self.tokens, self.stop_token_ids)


def response_log_probs(
    model: nn.Module,
    rows: Rows,
    *,
    temperature: float = 1.0,
    min_length: MinLength | None = None,
    entropy: bool = True,
    entropy_gradient: bool = False,
    run: nn.Module | None = None,
) -> TokenLogProbs:
    """Log-probabilities and entropies of the wanted tokens of some rows, in one forward pass.

    Args:
        model: a causal language model of transformers; it has the output projection.
        rows: laid out with `ahead=True`.
        temperature: logits are divided by it, as the rollout engine does before it samples.
        min_length: as the rollout engine keeps it.
        entropy: compute the entropies.
        entropy_gradient: the entropies are differentiable.
        run: is called instead of `model`: a DeepSpeed engine around it.
    """

    def log_probs_of(logits: Tensor, part: Rows) -> TokenLogProbs:
        excluded = min_length.excluded(part.depths) if min_length is not None else None
        return token_log_probs(logits, part.ids, temperature=temperature, entropy=entropy, excluded=excluded)

    result = None if keeps_logits(model, len(rows.ids)) else log_probs_in_blocks(model, rows, log_probs_of, run)
    if result is None:
        with project_only(model, rows.reads):
            result = log_probs_of(output_of(run or model, rows).logits.squeeze(0), rows)
    return result if entropy_gradient or not entropy else TokenLogProbs(result.log_probs, result.entropy.detach())


@torch.no_grad()
def log_probs_of(model: nn.Module, batch: RaggedBatch, passes: Passes, **options) -> Tensor:
    """Log-probability of every response token of some rows, float32 [N] on the model's device, 0 elsewhere; without gradients.

    Args:
        options: of `response_log_probs`.
    """
    flat = torch.zeros(batch.num_tokens, device=next(model.parameters()).device)
    for rows in lay_out(model, batch, passes, batch.response_mask, ahead=True):
        flat[rows.tokens] = response_log_probs(model, rows, entropy=False, **options).log_probs
    return flat


def batch_log_probs(model: nn.Module, batch: RaggedBatch, max_tokens: int, temperature: float = 1.0, **options) -> np.ndarray:
    """Log-probability of every response token of a batch, float32 [N], 0 on prompts; without gradients.

    Args:
        max_tokens: of one forward pass, padding included.
        options: of `response_log_probs`.
    """
    return log_probs_of(model, batch, _all_rows(model, batch, max_tokens), temperature=temperature, **options).cpu().numpy()


def _all_rows(model: nn.Module, batch: RaggedBatch, max_tokens: int) -> Passes:
    return Passes(micro_batches(batch.lengths, max_tokens, packed=is_packed(model)))


def token_values(model: nn.Module, rows: Rows, *, run: nn.Module | None = None) -> Tensor:
    """Values of the wanted tokens of some rows, float32 [n], in one forward pass of a value model; differentiable.

    Args:
        model: a token classifier with one label: its logit at a token is the value of the state after the token.
        run: as in `response_log_probs`.
    """
    return output_of(run or model, rows).logits.flatten().float()[rows.reads]


@torch.no_grad()
def values_of(model: nn.Module, batch: RaggedBatch, passes: Passes, *, run: nn.Module | None = None) -> Tensor:
    """Value of the state after every token of some rows, float32 [N] on the model's device, 0 elsewhere; without gradients."""
    flat = torch.zeros(batch.num_tokens, device=next(model.parameters()).device)
    for rows in lay_out(model, batch, passes, np.ones(batch.num_tokens, bool), ahead=False):
        flat[rows.tokens] = token_values(model, rows, run=run)
    return flat


def batch_values(model: nn.Module, batch: RaggedBatch, max_tokens: int) -> np.ndarray:
    """Value of the state after every token of a batch, prompt and response, float32 [N]; without gradients."""
    return values_of(model, batch, _all_rows(model, batch, max_tokens)).cpu().numpy()
