"""Policy gradients under different values of the same responses, and how far apart they are."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.models.forward import micro_batches, response_log_probs


def policy_gradients(model: PreTrainedModel, batch: RaggedBatch, credits: np.ndarray, max_tokens: int, temperature: float) -> np.ndarray:
    """The policy gradient sum over response tokens of credit * grad log pi(y_t | s_t), divided by their number, for K credits of each token.

    Args:
        model: parameters that require gradients count.
        credits: float [K, N], per-token; read at response tokens.
        max_tokens: padded tokens of one forward and backward pass.

    Returns:
        float32 [K, P] over the P trained parameters; a pass over the batch for each of the K.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tokens = int(batch.response_lengths.sum())
    gradients = np.empty((len(credits), sum(parameter.numel() for parameter in trained)), dtype=np.float32)
    for k, credit in enumerate(credits):
        model.zero_grad()
        for rows in micro_batches(batch.lengths, max_tokens):
            out = response_log_probs(model, batch, rows, temperature=temperature, entropy=False)
            weights = torch.from_numpy(credit[out.token_index.cpu().numpy()].astype(np.float32)).to(out.log_probs.device)
            ((weights * out.log_probs).sum() / tokens).backward()
        gradients[k] = torch.cat([parameter.grad.float().reshape(-1).cpu() for parameter in trained]).numpy()
    model.zero_grad()
    return gradients


def gradient_difference(gradient: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """`cosine` of two gradients, and `difference`, the norm of their difference as a multiple of the target's norm; both [P]."""
    gradient, target = gradient.astype(np.float64), target.astype(np.float64)
    norm = np.linalg.norm(target)
    return {
        "cosine": float(gradient @ target / (np.linalg.norm(gradient) * norm)),
        "difference": float(np.linalg.norm(gradient - target) / norm),
    }
