"""What holds for every causal language model of transformers: no randomness in training, a value head, exact adapters and checkpoints."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_config, tiny_language_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dvpo_ray.config.schema import LoraConfig, ModelConfig
from dvpo_ray.models.loading import load_policy, save_policy, turn_off_randomness
from dvpo_ray.models.trainable import apply_lora, disable_dropout, full_weights

IDS = torch.tensor([[1, 5, 7, 11, 13, 17, 19, 23]])
FEWEST = 125
"""Architectures that can be built tiny, of those that the installed transformers has."""

CHECKED = ("llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma2", "gemma3_text", "mistral", "phi3", "gpt2", "opt", "gpt_neox")
CHECKED += ("olmo2", "granite", "cohere", "starcoder2", "gpt_bigcode", "smollm3", "stablelm", "glm4")


@torch.no_grad()
def log_probs(model) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits.float().log_softmax(-1)


def difference_in_training(model) -> float:
    torch.manual_seed(1)
    return float((log_probs(model.train()) - log_probs(model.eval())).abs().max())


def test_no_architecture_is_random_in_training_mode():
    """Dropout as a module, as a number passed to a function, as a skipped layer, as noise in a router."""
    built, random = [], {}
    for architecture in ARCHITECTURES:
        try:
            config = tiny_config(architecture, randomness=0.3)
            turn_off_randomness(config)
            model = tiny_language_model(config)
            log_probs(model)
        except Exception:  # it can't be built tiny, or needs other inputs than tokens
            continue
        built.append(architecture)
        disable_dropout(model)
        if (difference := difference_in_training(model)) > 0:
            random[architecture] = difference
    assert random == {}
    assert len(built) >= FEWEST and set(CHECKED) <= set(built), sorted(set(ARCHITECTURES) - set(built))


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "starcoder2", "gpt_bigcode"])
def test_the_dropout_of_a_config_would_show(architecture):
    assert difference_in_training(tiny_language_model(tiny_config(architecture, randomness=0.3))) > 0.01
    turned_off = tiny_language_model(tiny_config(architecture, randomness=0.3))
    disable_dropout(turned_off)  # for a model that is built already
    assert difference_in_training(turned_off) == 0


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
    """Folders of tiny checkpoints by architecture, with dropout in their configs."""

    def make(architecture: str):
        folder = tmp_path_factory.mktemp(architecture)
        config = tiny_config(architecture, randomness=0.1)
        config.tie_word_embeddings = False
        model = tiny_language_model(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("architecture", CHECKED)
def test_adapters_checkpoints_and_values_are_exact(architecture, checkpoint, tmp_path):
    from dvpo_ray.gvm.model import new_value_model, value_head

    path = checkpoint(architecture)
    source = ModelConfig(path=str(path), dtype="float32")
    model = apply_lora(load_policy(source), LoraConfig(rank=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # as after training
    moved = float((log_probs(model) - log_probs(load_policy(source))).abs().max())
    weights = {name: tensor.clone() for name, tensor in full_weights(model)}
    save_policy(model.get_base_model(), weights, AutoTokenizer.from_pretrained(path), source, tmp_path / "saved")
    saved, report = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32, output_loading_info=True)
    assert moved > 0.01 and not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(log_probs(saved.eval()), log_probs(model), atol=1e-5, rtol=0)
    was, now = (AutoModelForCausalLM.from_pretrained(folder).config.to_dict() for folder in (path, tmp_path / "saved"))
    assert {key: value for key, value in was.items() if "drop" in key} == {key: value for key, value in now.items() if "drop" in key}

    value_model = new_value_model(str(path))
    assert (value_model(input_ids=IDS, use_cache=False).logits == 0).all()
    head = value_head(value_model)
    torch.nn.init.normal_(head.weight)
    read = {}  # what the language model's own output projection reads
    language_model = load_policy(source)
    language_model.get_output_embeddings().register_forward_pre_hook(lambda _, args: read.update(hidden=args[0]))
    log_probs(language_model)
    expected = torch.nn.functional.linear(read["hidden"], head.weight, head.bias)
    torch.testing.assert_close(value_model(input_ids=IDS, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "opt", "qwen3_moe"])
def test_values_are_float32_in_low_precision_and_train(architecture, dtype, checkpoint):
    """One architecture whose token classifier transformers has, and others that take the head made here."""
    from dvpo_ray.gvm.model import new_value_model, value_head

    path = str(checkpoint(architecture))
    models = [new_value_model(path, dtype=kind) for kind in (torch.float32, dtype)]
    for model in models:
        torch.manual_seed(0)
        head = value_head(model)
        head.weight.data.copy_(torch.randn(head.weight.shape) / head.weight.shape[1] ** 0.5)
    exact, low = (model(input_ids=IDS, use_cache=False).logits for model in models)
    assert exact.dtype == low.dtype == torch.float32
    assert 0 < float((exact - low).detach().abs().max()) < 0.2
    low.square().sum().backward()
    gradients = [parameter.grad for parameter in models[1].parameters() if parameter.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients) and value_head(models[1]).weight.grad.abs().sum() > 0
