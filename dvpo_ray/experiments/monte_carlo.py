"""A policy's responses to held-out prompts, finished again from their middle and judged; what frozen models say of them; policy gradients."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.config import Config
from dvpo_ray.data.encoding import Encoder
from dvpo_ray.evaluation.judges import make_judge
from dvpo_ray.experiments.states import States, finish, states_at
from dvpo_ray.gvm.artifact import load_gvm_of_run
from dvpo_ray.gvm.context import rollout_values
from dvpo_ray.models.attention import is_packed
from dvpo_ray.models.forward import batch_log_probs, response_log_probs
from dvpo_ray.models.layouts import Passes, lay_out, micro_batches
from dvpo_ray.models.loading import context_tokens, default_device, load_policy, load_tokenizer
from dvpo_ray.policy.statistics import sequence_kl
from dvpo_ray.training.evaluate import heldout_prompts, policy_sampler

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MonteCarlo:
    """R responses of a policy, S states of them, and m whole responses from each state.

    Attributes:
        batch: the responses, with the policy's `log_probs`.
        finished: S * m rows, state after state: the prompt and a whole response.
        gold: float64 [S, m], the judge's scores of `finished`.
    """

    batch: RaggedBatch
    states: States
    finished: RaggedBatch
    gold: np.ndarray


def sample_monte_carlo(config: Config, policy: str, shares: Sequence[float], count: int, out: Path) -> MonteCarlo:
    """Sample a response to each held-out prompt, and `count` ways to finish it from each share of it on.

    Args:
        config: `evaluation.prompts` prompts of `data.prompts`, judged by `evaluation.judge`; sampled with `rollout`.
        policy: checkpoint folder or hub name.
        out: folder of the engines' logs.

    Raises:
        InputError: no prompts, or no such checkpoint. ResourceError: no room for the engines.
    """
    tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
    context = context_tokens(config.model.path, config.model.trust_remote_code)
    encoder = Encoder(tokenizer, config.data, config.model.chat_template, context)
    prompts, prompt_ids, notes = heldout_prompts(config, encoder)
    for note in notes:
        logger.warning("%s", note)
    limit = config.rollout.max_response_tokens
    longest = min(context, config.data.max_prompt_tokens + 2 * limit)  # room for a whole response after any beginning of one
    sampling = config.model_copy(update={"model": config.model.model_copy(update={"path": policy})})
    with policy_sampler(sampling, frozenset(encoder.stop_token_ids), longest, out.resolve()) as sample:
        batch = sample(prompt_ids)
        states = states_at(batch, shares)
        responses = finish(batch, states, count, limit, sample)
    texts = [[encoder.decode(response) for response in of_state] for of_state in responses]
    judge = make_judge(config.evaluation.judge)
    gold = [judge.score([prompts[row].text] * count, of_state) for row, of_state in zip(states.row, texts, strict=True)]
    rows = [(prompt_ids[row], response) for row, of_state in zip(states.row, responses, strict=True) for response in of_state]
    return MonteCarlo(batch, states, RaggedBatch.from_rows(*zip(*rows, strict=True)), np.array(gold, dtype=np.float64))


@torch.inference_mode()
def values_of(config: Config, path: str, batch: RaggedBatch) -> np.ndarray:
    """Values of a GVM (or reward model) after every token of a policy's responses, float32 [N].

    A GVM that takes examples of the policy gets other rows of the batch.
    """
    tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
    model, manifest = load_gvm_of_run(config.model, path, tokenizer)
    return rollout_values(model, batch, config.scorer.micro_batch_tokens, manifest.context, batch, config.seed)


@torch.inference_mode()
def kl_from_reference(config: Config, batch: RaggedBatch) -> np.ndarray:
    """Sequence KL of each response from the model of `model.path`, in nats, float64 [R]; a one-sample estimate."""
    reference = load_policy(config.model, default_device(), packs=True)
    log_probs = batch_log_probs(reference, batch, config.reference.micro_batch_tokens, config.rollout.temperature)
    return sequence_kl(batch.with_token_fields(reference_log_probs=log_probs))


# -------------------------------------------------------------------------------------------------------- gradients


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
    passes = Passes(micro_batches(batch.lengths, max_tokens, packed=is_packed(model)))
    for k, credit in enumerate(credits):
        model.zero_grad()
        weighted = batch.with_token_fields(credit=credit.astype(np.float32))
        for rows in lay_out(model, weighted, passes, batch.response_mask, ahead=True, fields=("credit",)):
            out = response_log_probs(model, rows, temperature=temperature, entropy=False)
            ((rows.fields["credit"] * out.log_probs).sum() / tokens).backward()
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
