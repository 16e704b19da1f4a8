"""The value model: a zero head on the trunk of a language model, without dropout and with fewer layers on request."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.errors import InputError
from dvpo_ray.gvm.model import head_parameters, new_value_model
from dvpo_ray.models.forward import batch_values

BATCH = RaggedBatch.from_rows([[1, 5, 6], [1, 7]], [[8, 9, 2], [30, 40, 5, 6, 7]])


def test_all_values_start_at_zero(tiny_model):
    assert (batch_values(new_value_model(str(tiny_model)), BATCH, 1000) == 0).all()


def test_the_trunk_is_the_language_models(tiny_model):
    trunk = new_value_model(str(tiny_model)).base_model.state_dict()
    expected = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).base_model.state_dict()
    assert trunk.keys() == expected.keys()
    assert all(torch.equal(trunk[name], expected[name]) for name in expected)


def test_the_head_is_one_linear_layer(tiny_model):
    head = dict(head_parameters(new_value_model(str(tiny_model))))
    assert {name: tuple(p.shape) for name, p in head.items()} == {"score.weight": (1, 64), "score.bias": (1,)}
    assert all((p == 0).all() and p.requires_grad for p in head.values())


def test_a_value_is_that_of_the_state_after_its_token(tiny_model):
    """A changed token changes the values at and after its position, and no value before it."""
    model = new_value_model(str(tiny_model))
    torch.nn.init.normal_(model.score.weight)
    before = batch_values(model, BATCH, 1000)
    tokens = BATCH.tokens.copy()
    tokens[4] = 77  # the second response token of row 0
    changed = batch_values(model, RaggedBatch.from_rows([tokens[:3], tokens[6:8]], [tokens[3:6], tokens[8:]]), 1000)
    moved = np.abs(changed - before) > 1e-6
    assert moved.tolist() == [False] * 4 + [True] * 2 + [False] * 7


@pytest.mark.parametrize("max_tokens", [1, 12, 1000])
def test_values_do_not_depend_on_the_micro_batch(tiny_model, max_tokens):
    model = new_value_model(str(tiny_model))
    torch.nn.init.normal_(model.score.weight)
    with torch.no_grad():
        alone = [model(torch.tensor(BATCH.tokens[BATCH.row(r)])[None]).logits[0, :, 0] for r in range(2)]
    np.testing.assert_allclose(batch_values(model, BATCH, max_tokens), torch.cat(alone), atol=1e-5)


def test_dropout_is_off_even_in_training_mode(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "dropout")
    config = json.loads((folder / "config.json").read_text()) | {"attention_dropout": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    model = new_value_model(str(folder)).train()
    torch.nn.init.normal_(model.score.weight)
    np.testing.assert_array_equal(batch_values(model, BATCH, 1000), batch_values(model, BATCH, 1000))
    assert model.config.attention_dropout == 0.0 and model.dropout.p == 0.0


def test_a_truncated_trunk_equals_the_first_layers(tiny_model):
    model = new_value_model(str(tiny_model), num_layers=1)
    assert len(model.model.layers) == 1
    whole = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids = torch.tensor([[1, 5, 6, 8]])
    with torch.no_grad():
        first_layer = whole(ids, output_hidden_states=True).hidden_states[1]
        expected = whole.model.norm(first_layer)
        np.testing.assert_allclose(model.model(ids).last_hidden_state, expected, atol=1e-6)


def test_truncation_cuts_the_settings_of_each_layer(tmp_path):
    layer_types = ["full_attention", "sliding_attention", "full_attention"]
    config = Qwen3Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        layer_types=layer_types,
        use_sliding_window=True,
        sliding_window=4,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    model = new_value_model(str(tmp_path), num_layers=2)
    assert model.config.layer_types == layer_types[:2]
    assert batch_values(model, BATCH, 1000).shape == (BATCH.num_tokens,)


def test_a_checkpoint_without_part_of_its_trunk(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "partial")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="lacks 1 weights of the trunk, first model.layers.1.mlp.up_proj.weight"):
        new_value_model(str(folder))


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        new_value_model(str(tmp_path / "nowhere"))


def test_loading_is_quiet(tiny_model, capfd):
    new_value_model(str(tiny_model), num_layers=1)
    out, err = capfd.readouterr()
    assert out == "" and err == ""
