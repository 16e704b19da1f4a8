"""Linear layers through oneDNN have the same outputs, gradients and names as those of torch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dvpo_ray.config.schema import LoraConfig, ModelConfig
from dvpo_ray.gvm import model
from dvpo_ray.gvm.model import ValueHead, new_value_model
from dvpo_ray.models import cpu_linear
from dvpo_ray.models.cpu_linear import OneDNNLinear, use_fast_linears
from dvpo_ray.models.loading import load_policy
from dvpo_ray.models.trainable import apply_lora

needs_onednn = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN linear layer")


@pytest.fixture
def everywhere(monkeypatch):
    """As on a processor where oneDNN is faster."""
    monkeypatch.setattr(cpu_linear, "onednn_is_faster", lambda: True)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 48), (3, 5, 48), (1, 1, 48), (0, 48), (2, 0, 48)])
def test_outputs_and_gradients_are_those_of_torchs_layer(everywhere, shape, bias):
    torch.manual_seed(0)
    plain = nn.Linear(48, 20, bias=bias)
    fast = use_fast_linears(nn.Sequential(copy.deepcopy(plain)))[0]
    assert type(fast) is OneDNNLinear and isinstance(fast, nn.Linear)
    x = torch.randn(shape)
    outputs, gradients = [], []
    for layer in (plain, fast):
        given = x.clone().requires_grad_()
        out = layer(given)
        (out.sin().sum()).backward()
        outputs.append(out)
        gradients.append([given.grad, *(parameter.grad for parameter in layer.parameters())])
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-5)


@needs_onednn
def test_strided_inputs_and_frozen_weights(everywhere):
    torch.manual_seed(0)
    plain = nn.Linear(16, 8)
    fast = use_fast_linears(nn.Sequential(copy.deepcopy(plain)))[0]
    fast.weight.requires_grad_(False)
    x = torch.randn(5, 16, 3).transpose(1, 2).requires_grad_()
    torch.testing.assert_close(fast(x), plain(x), atol=1e-6, rtol=1e-6)
    fast(x).sum().backward()
    assert fast.weight.grad is None and fast.bias.grad is not None
    torch.testing.assert_close(x.grad, plain.weight.sum(0).expand(5, 3, 16), atol=1e-6, rtol=1e-6)


@needs_onednn
def test_models_are_loaded_with_it_and_adapters_find_its_layers(everywhere, tiny_model):
    policy = load_policy(ModelConfig(path=str(tiny_model), dtype="float32"))
    kinds = {type(module) for module in policy.modules() if isinstance(module, nn.Linear)}
    assert kinds == {OneDNNLinear}
    assert {type(m) for m in new_value_model(str(tiny_model)).modules() if isinstance(m, nn.Linear)} == {OneDNNLinear, ValueHead}
    adapted = apply_lora(policy, LoraConfig(rank=2))
    adapted(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert any("lora_B" in name and p.grad is not None and p.grad.abs().sum() > 0 for name, p in adapted.named_parameters())


@needs_onednn
@pytest.mark.parametrize(("device", "rows"), [("meta", 3), ("cpu", 0), ("cpu", 3)])
def test_a_value_head_computes_on_every_device_beside_such_a_processor(monkeypatch, device, rows):
    """A GPU stands beside it, and the head of a frozen model is float32 there; the device `meta` is in its place here."""
    monkeypatch.setattr(model, "onednn_is_faster", lambda: True)
    head = ValueHead(8, 1, device=device)
    assert head(torch.ones(rows, 8, dtype=torch.bfloat16, device=device)).shape == (rows, 1)


def test_other_dtypes_and_processors_keep_torchs_layer(monkeypatch):
    monkeypatch.setattr(cpu_linear, "onednn_is_faster", lambda: True)
    assert type(use_fast_linears(nn.Sequential(nn.Linear(2, 2, dtype=torch.bfloat16)))[0]) is nn.Linear
    monkeypatch.setattr(cpu_linear, "onednn_is_faster", lambda: False)
    assert type(use_fast_linears(nn.Sequential(nn.Linear(2, 2)))[0]) is nn.Linear


@pytest.mark.parametrize(
    ("machine", "vendor", "faster"), [("x86_64", "AuthenticAMD", True), ("x86_64", "GenuineIntel", False), ("aarch64", "", False)]
)
def test_only_x86_processors_that_are_not_intels_get_it(monkeypatch, machine, vendor, faster):
    monkeypatch.setattr(cpu_linear.platform, "machine", lambda: machine)
    monkeypatch.setattr(cpu_linear.torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(cpu_linear.Path, "read_text", lambda *_a, **_k: f"vendor_id : {vendor}")
    cpu_linear.onednn_is_faster.cache_clear()
    try:
        assert cpu_linear.onednn_is_faster() is (faster and hasattr(torch.ops.mkldnn, "_linear_pointwise"))
    finally:
        cpu_linear.onednn_is_faster.cache_clear()
