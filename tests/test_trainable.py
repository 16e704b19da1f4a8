"""Partial training, and the weights that the learner sends."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dvpo_ray.config.schema import LoraConfig
from dvpo_ray.models.trainable import adapter_weights, apply_lora, disable_dropout, full_weights, train_last_layers


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def test_full_weights_are_the_checkpoint(model):
    weights = dict(full_weights(model))
    assert weights.keys() == dict(model.named_parameters()).keys()
    model.load_state_dict(weights, strict=False)


def test_merged_lora_computes_what_the_adapter_computes(model, tiny_model):
    lora = apply_lora(model, LoraConfig(rank=2))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    weights = dict(full_weights(lora))
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert weights.keys() == dict(plain.named_parameters()).keys()
    ids = torch.tensor([[1, 5, 9, 12]])
    before = plain(ids).logits
    plain.load_state_dict(weights, strict=False)
    assert not torch.allclose(before, plain(ids).logits, atol=1e-3)
    torch.testing.assert_close(plain(ids).logits, lora(ids).logits, atol=1e-5, rtol=1e-5)


def test_adapters_travel_alone_as_peft_saves_them(model, tiny_model, tmp_path):
    lora = apply_lora(model, LoraConfig(rank=2, target_modules=["q_proj"], layers=[1]))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    weights = dict(adapter_weights(lora))
    lora.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert weights.keys() == saved.keys() and len(saved) == 2
    assert all(torch.equal(weights[name], saved[name]) and not weights[name].requires_grad for name in saved)


def test_last_layers_train_and_travel_whole(model):
    train_last_layers(model, 1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(name.startswith(("model.layers.1.", "model.norm.")) for name in trained)
    assert dict(full_weights(model, changing_only=True)).keys() == trained


def test_a_layer_with_one_adapter_travels_whole(model):
    lora = apply_lora(model, LoraConfig(rank=2, target_modules=["q_proj"], layers=[1]))
    names = set(dict(full_weights(lora, changing_only=True)))
    assert names == {name.replace(".base_layer.", ".") for name, _ in model.named_parameters() if "layers.1." in name and ".lora_" not in name}
    assert "model.layers.1.self_attn.k_proj.weight" in names  # fused with q_proj in an inference engine


def test_dropout_is_off_for_good(model):
    lora = apply_lora(model, LoraConfig(rank=2, dropout=0.5))
    disable_dropout(lora)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    lora.train()
    ids = torch.tensor([[1, 5, 9, 12]])
    assert torch.equal(lora(ids).logits, lora(ids).logits)


def test_adapters_on_chosen_layers_only(model):
    lora = apply_lora(model, LoraConfig(rank=2, layers=[1]))
    adapted = {name for name, _ in lora.named_parameters() if "lora_A" in name}
    assert adapted and all(".layers.1." in name for name in adapted)
    names = {name.split(".lora_A")[0].rpartition(".")[2] for name in adapted}
    assert names == {f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")}
