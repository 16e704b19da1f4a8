"""Log-probabilities and entropies by blocks of rows against PyTorch: values, gradients and memory."""

import pytest
import torch

from dvpo_ray.models import token_log_probs as module
from dvpo_ray.models.token_log_probs import token_log_probs


@pytest.fixture(params=[2**18, 20, 1], ids=["one block", "several", "a row each"])
def blocks(request, monkeypatch):
    monkeypatch.setitem(module.LOGITS_AT_ONCE, "cpu", request.param)


def case(rows=7, vocabulary=9, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    return logits, torch.randint(vocabulary, (rows,), generator=generator)


def pytorchs(logits, targets, temperature):
    distribution = torch.distributions.Categorical(logits=logits / temperature)
    return distribution.log_prob(targets), distribution.entropy()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_are_pytorchs(blocks, temperature):
    logits, targets = case()
    out = token_log_probs(logits, targets, temperature=temperature, entropy=True)
    log_probs, entropy = pytorchs(logits, targets, temperature)
    torch.testing.assert_close(out.log_probs, log_probs)
    torch.testing.assert_close(out.entropy, entropy)
    assert token_log_probs(logits, targets, temperature=temperature).entropy is None


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1.0, -0.3)], ids=["log-probs", "entropy", "both"])
def test_gradients_are_pytorchs(blocks, temperature, weights):
    logits, targets = case()
    of_each_row = torch.linspace(-1.0, 2.0, len(targets), dtype=torch.float64)

    def gradient(log_probs, entropy):
        parts = [weight * part for weight, part in zip(weights, (log_probs, entropy), strict=True) if weight]
        return torch.autograd.grad((of_each_row * sum(parts)).sum(), logits)[0]

    ours = gradient(*token_log_probs(logits, targets, temperature=temperature, entropy=True))
    torch.testing.assert_close(ours, gradient(*pytorchs(logits, targets, temperature)))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_low_precision_is_computed_in_float32_and_its_gradient_is_as_the_logits(blocks, temperature):
    logits, targets = case(dtype=torch.bfloat16)
    before = logits.detach().clone()
    out = token_log_probs(logits, targets, temperature=temperature)
    exact = pytorchs(logits.float(), targets, temperature)[0]
    assert out.log_probs.dtype == torch.float32
    torch.testing.assert_close(out.log_probs, exact)
    (gradient,) = torch.autograd.grad(out.log_probs.sum(), logits)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, torch.autograd.grad(exact.sum(), logits)[0], atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(logits.detach(), before, atol=0.0, rtol=0.0)


def test_no_rows_give_no_log_probs_and_a_gradient_of_none():
    logits = torch.zeros(0, 9, requires_grad=True)
    out = token_log_probs(logits, torch.zeros(0, dtype=torch.int64), entropy=True)
    assert out.log_probs.shape == out.entropy.shape == (0,)
    out.log_probs.sum().backward()
    assert logits.grad.shape == (0, 9)


def test_only_the_logits_are_kept_for_the_backward_pass():
    logits, targets = case(rows=64, vocabulary=50, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        token_log_probs(logits, targets, entropy=True)
    large = [tensor for tensor in kept if tensor.numel() >= logits.numel()]
    assert len(large) == 1 and large[0].data_ptr() == logits.data_ptr()
