"""Log-probs from hidden states, a block of tokens at a time, so that the logits of a micro-batch never exist as a whole.

With a vocabulary of 128,000 the logits of 8,192 tokens and their gradient are 4 GiB in 16 bits. Here each block goes through the output
projection, and the backward pass computes its logits again (as in torch's activation checkpointing). That is a third more work in the
projection alone. So logits that are small enough are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dvpo_ray.models.layouts import Rows, output_of
from dvpo_ray.models.token_log_probs import TokenLogProbs

KEPT_BYTES = 2**30
"""Logits of so many bytes are kept whole."""

BLOCK_LOGITS = 2**27
"""Logits of one block: about a thousand tokens of a vocabulary of 128,000, enough for a matrix product at full speed."""

_KNOWN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def keeps_logits(model: nn.Module, tokens: int) -> bool:
    """Whether the logits of so many tokens are kept whole: they are small, or the model's projection must run inside its forward pass."""
    projection = model.get_output_embeddings()
    is_plain = type(projection) is nn.Linear and not hasattr(projection.weight, "ds_id")  # no adapter on it, and no shard of ZeRO-3
    size = tokens * projection.out_features * projection.weight.element_size() if is_plain else 0
    return not is_plain or projection.weight.device.type == "cpu" or size <= KEPT_BYTES


def log_probs_in_blocks(
    model: nn.Module, rows: Rows, log_probs_of: Callable[[Tensor, Rows], TokenLogProbs], run: nn.Module | None
) -> TokenLogProbs | None:
    """Log-probs of the wanted tokens of some rows, or None if the model does more to its logits than `logits_of` knows.

    Args:
        log_probs_of: log-probs of a block of tokens from their logits [n, vocabulary].
        run: is called instead of `model`.
    """
    if not _is_known(model, rows, run):
        return None
    hidden = _hidden_states(model, rows, run)

    def of_block(block: Tensor, start: int) -> TokenLogProbs:
        return log_probs_of(logits_of(model, block), rows.part(start, start + len(block)))

    size = max(1, BLOCK_LOGITS // model.get_output_embeddings().out_features)
    blocks = enumerate(hidden.split(size))
    parts = [checkpoint(of_block, block, i * size, use_reentrant=False, preserve_rng_state=False) for i, block in blocks]
    log_probs, entropies = zip(*parts, strict=True)
    return TokenLogProbs(torch.cat(log_probs), None if entropies[0] is None else torch.cat(entropies))


def logits_of(model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits of hidden states [n, width] as the model computes them: the projection, then the scale or the cap that its config has."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden)
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * scale
    if (scaling := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / scaling
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
        logits = torch.tanh(logits / cap) * cap
    return logits


@torch.compiler.set_stance("force_eager")  # as in `check_rows_apart`
@torch.no_grad()
def _is_known(model: nn.Module, rows: Rows, run: nn.Module | None) -> bool:
    """Whether `logits_of` gives the model's own logits; compared once for each model, at some tokens of its first rows."""
    if model not in _KNOWN:
        few = rows.part(0, 16)
        with project_only(model, few.reads):
            own = output_of(run or model, few).logits.squeeze(0)
        ours = logits_of(model, _hidden_states(model, few, run))
        _KNOWN[model] = own.shape == ours.shape and torch.allclose(own.float(), ours.float(), rtol=0.02, atol=0.02 * float(own.abs().max()))
    return _KNOWN[model]


def _hidden_states(model: nn.Module, rows: Rows, run: nn.Module | None) -> Tensor:
    """What the output projection would read at the wanted places, [n, width]. The projection itself runs on nothing."""
    seen = []

    def take(_module, args):
        seen.append(args[0].flatten(0, 1)[rows.reads])
        return (args[0][:, :0], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(take)
    try:
        output_of(run or model, rows)
    finally:
        handle.remove()
    return seen[0]


@contextmanager
def project_only(model: nn.Module, places: Tensor) -> Iterator[None]:
    """Within this context the model's output projection runs on the given places only, int64 [n], of the flattened sequence.

    Logits then have shape [1, n, vocabulary]. Only response tokens need the projection; it is a fifth of the work of a small
    model, and its output is the largest activation of any model.
    """

    def keep(_module, args):
        return (args[0].flatten(0, 1)[places].unsqueeze(0), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()
