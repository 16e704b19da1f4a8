"""The padded forward pass gives every row the same result as the row alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.models.forward import batch_log_probs, response_log_probs
from dvpo_ray.models.layouts import Passes, lay_out, micro_batches


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 200))
def test_micro_batches_hold_every_row_once_within_the_budget(lengths, budget):
    groups = micro_batches(lengths, budget)
    assert sorted(int(r) for g in groups for r in g) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[r] for r in group) <= budget


@pytest.mark.parametrize("max_tokens", [1, 12, 1000])
def test_log_probs_equal_a_row_at_a_time(tiny_model, max_tokens):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    batch = RaggedBatch.from_rows([[1, 5, 6], [1, 7], [1, 4, 4, 4, 4]], [[8, 9, 2], [30, 40, 5, 6, 7, 8], [9]])
    flat = batch_log_probs(model, batch, max_tokens)
    for r in range(batch.num_rows):
        ids = torch.tensor(batch.tokens[batch.row(r)])[None]
        with torch.no_grad():
            log_probs = model(ids).logits.log_softmax(-1)[0]
        prompt = int(batch.prompt_lengths[r])
        expected = log_probs[torch.arange(prompt - 1, ids.shape[1] - 1), ids[0, prompt:]]
        np.testing.assert_allclose(flat[batch.response(r)], expected, atol=1e-5)
    assert (flat[~batch.response_mask] == 0).all()


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_gradients_of_log_probs_and_entropy_reach_the_weights(tiny_model, entropy_gradient):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    batch = RaggedBatch.from_rows([[1, 5, 6], [1, 7]], [[8, 9, 2], [30, 40, 5, 6]])
    weights = model.get_input_embeddings().weight

    (rows,) = lay_out(model, batch, Passes([np.array([1, 0])]), batch.response_mask, ahead=True)
    out = response_log_probs(model, rows, temperature=0.7, entropy_gradient=entropy_gradient)
    assert out.entropy.requires_grad == entropy_gradient
    (ours,) = torch.autograd.grad(out.log_probs.sum() - 0.1 * out.entropy.sum(), weights)

    log_probs, entropy = [], []
    for r in range(batch.num_rows):
        ids, prompt = torch.tensor(batch.tokens[batch.row(r)]), int(batch.prompt_lengths[r])
        distribution = torch.distributions.Categorical(logits=model(ids[None]).logits[0, prompt - 1 : -1] / 0.7)
        log_probs.append(distribution.log_prob(ids[prompt:]))
        entropy.append(distribution.entropy())
    loss = torch.cat(log_probs).sum() - (0.1 * torch.cat(entropy).sum() if entropy_gradient else 0.0)
    torch.testing.assert_close(ours, torch.autograd.grad(loss, weights)[0], atol=1e-5, rtol=1e-4)
