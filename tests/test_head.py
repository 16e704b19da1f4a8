"""Log-probs in blocks are those from whole logits, for every architecture; a model that does more to its logits keeps them whole."""

from __future__ import annotations

import pytest
import torch
from test_layouts import ALL, PACKED, ROWS, language_models
from tiny_models import tiny_config

from dvpo_ray.models import forward, head
from dvpo_ray.models.forward import MinLength, response_log_probs
from dvpo_ray.models.layouts import lay_out

CALLS: list[int] = []
SCALES = {"logit_scale": 0.25, "logits_scaling": 3.0, "final_logit_softcapping": 4.0}
"""What some architectures do to their logits."""


@pytest.fixture
def in_blocks(monkeypatch):
    """Keep no logits, and take 5 tokens at a time; CALLS counts the tokens of each block."""
    CALLS.clear()
    monkeypatch.setattr(head, "BLOCK_LOGITS", 5 * 512)
    logits_of = head.logits_of
    monkeypatch.setattr(head, "logits_of", lambda model, hidden: CALLS.append(len(hidden)) or logits_of(model, hidden))

    def switch(on: bool):
        monkeypatch.setattr(forward, "keeps_logits", lambda model, tokens: not on)

    return switch


def log_probs_and_gradients(model, **options):
    model.zero_grad()
    (rows,) = lay_out(model, ROWS, ALL, ROWS.response_mask, ahead=True)
    out = response_log_probs(model, rows, temperature=0.7, entropy_gradient=True, **options)
    (out.log_probs.sum() - 0.1 * out.entropy.sum()).backward()
    return out.log_probs.detach(), out.entropy.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("architecture", [*PACKED, "gemma2", "stablelm"])
def test_blocks_give_the_log_probs_and_gradients_of_whole_logits(in_blocks, architecture):
    config = tiny_config(architecture, randomness=0.0)
    scaled = {name: value for name, value in SCALES.items() if hasattr(config, name)}
    model = language_models(architecture, **scaled)[0].train()
    options = {"min_length": MinLength(2, (2, 9))}
    in_blocks(False)
    whole = log_probs_and_gradients(model, **options)
    in_blocks(True)
    blocks = log_probs_and_gradients(model, **options)
    torch.testing.assert_close(blocks, whole, atol=2e-4, rtol=1e-4)
    forwards = [16, 5, 5, 5, 5, 1]  # the comparison, then the blocks of 21 tokens, and each block again in the backward pass
    assert CALLS[:6] == forwards and sorted(CALLS[6:]) == sorted(forwards[1:])


def test_a_model_that_does_more_to_its_logits_keeps_them_whole(in_blocks, monkeypatch):
    model, _ = language_models("llama")
    plain = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: doubled(plain(**inputs)))
    in_blocks(False)
    whole = log_probs_and_gradients(model)
    in_blocks(True)
    torch.testing.assert_close(log_probs_and_gradients(model), whole)
    assert CALLS == [16]  # compared once, and then left alone


def doubled(output):
    output.logits = 2 * output.logits
    return output


def test_what_keeps_its_logits(monkeypatch):
    model, _ = language_models("llama")
    assert head.keeps_logits(model, 10**9)  # on a CPU the second pass would cost more than it saves
    monkeypatch.setattr(head, "KEPT_BYTES", 100 * 512 * 4)
    projection = torch.nn.Linear(64, 512, bias=False, device="meta")
    monkeypatch.setattr(model, "get_output_embeddings", lambda: projection)
    assert head.keeps_logits(model, 100) and not head.keeps_logits(model, 101)
    projection.weight.ds_id = 7
    assert head.keeps_logits(model, 101)  # a shard can't be used outside of the forward pass
