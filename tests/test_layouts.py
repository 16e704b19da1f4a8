"""Packed rows give the same numbers as padded ones, and a control in which rows see each other does not."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tiny_models import tiny_config, tiny_language_model
from transformers import AttentionInterface, masking_utils

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.errors import InputError, ResourceError
from dvpo_ray.gvm.model import value_model_class
from dvpo_ray.models import attention
from dvpo_ray.models.attention import VARLEN, attention_for, varlen_attention, why_not_packed
from dvpo_ray.models.forward import batch_log_probs, batch_values, check_rows_apart, response_log_probs, token_values
from dvpo_ray.models.layouts import Passes, lay_out, to_device

PACKED = ("llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma3_text", "mistral", "phi3", "gpt2", "opt", "gpt_neox")
PACKED += ("olmo2", "granite", "cohere", "starcoder2", "gpt_bigcode", "smollm3", "glm4")
ROWS = RaggedBatch.from_rows(
    [[1, 5, 6], [1, 7], [1, 4, 4, 4, 4], [2, 3]], [[8, 9, 2], [30, 40, 5, 6, 7, 8, 9, 10, 11, 12], [9], [13, 14, 15, 16, 17, 18, 19]]
)
ALL = Passes([np.array([2, 0, 3, 1])])


def both_layouts(make):
    """A model twice, with the same weights: once for padded and once for packed rows."""
    padded = make().eval()
    packed = copy.deepcopy(padded)
    packed.config._attn_implementation = VARLEN
    assert padded.config._attn_implementation == "sdpa"
    return padded, packed


def language_models(architecture: str, **changes):
    config = tiny_config(architecture, randomness=0.0)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)

    def make():
        model = tiny_language_model(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        return model

    return both_layouts(make)


@pytest.mark.parametrize("architecture", PACKED)
def test_packed_log_probs_equal_padded_ones_of_every_architecture(architecture):
    padded, packed = language_models(architecture)
    assert why_not_packed(packed.config) is None
    expected = batch_log_probs(padded, ROWS, 1000)
    np.testing.assert_allclose(batch_log_probs(packed, ROWS, 1000), expected, atol=2e-5)
    np.testing.assert_allclose(batch_log_probs(packed, ROWS, 12), expected, atol=2e-5)
    assert np.ptp(expected) > 1


def test_the_window_of_sliding_attention_is_kept():
    padded, packed = language_models("mistral", sliding_window=3)
    np.testing.assert_allclose(batch_log_probs(packed, ROWS, 1000), batch_log_probs(padded, ROWS, 1000), atol=2e-5)
    wider = copy.deepcopy(packed)
    wider.config.sliding_window = None
    assert np.abs(batch_log_probs(wider, ROWS, 1000) - batch_log_probs(padded, ROWS, 1000)).max() > 0.01


def test_packed_values_and_gradients_equal_padded_ones():
    config = tiny_config("llama", randomness=0.0)
    config.num_labels = 1
    torch.manual_seed(0)
    gradients = []
    for model in both_layouts(lambda: value_model_class(config)(config)):
        np.testing.assert_allclose(batch_values(model, ROWS, 1000), batch_values(model, ROWS, 1), atol=1e-6)
        (rows,) = lay_out(model, ROWS, ALL, ROWS.response_mask, ahead=False)
        token_values(model, rows).square().sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]))
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)
    assert gradients[0].abs().max() > 1e-4


def test_packed_gradients_of_log_probs_and_entropies_equal_padded_ones():
    gradients = []
    for model in language_models("qwen2"):
        (rows,) = lay_out(model, ROWS, ALL, ROWS.response_mask, ahead=True)
        out = response_log_probs(model, rows, temperature=0.7, entropy_gradient=True)
        (out.log_probs.sum() - 0.1 * out.entropy.sum()).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_under_gradient_checkpointing(checkpointing):
    gradients = []
    for model in language_models("llama"):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        (rows,) = lay_out(model, ROWS, ALL, ROWS.response_mask, ahead=True)
        response_log_probs(model, rows).log_probs.sum().backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-4)


@pytest.fixture
def rows_that_see_each_other(monkeypatch):
    """The control: attention over the whole packed sequence."""

    def mixed(module, query, key, value, mask, *, cu_seq_lens_q, max_length_q, **others):
        bounds = cu_seq_lens_q[[0, -1]]
        return varlen_attention(module, query, key, value, mask, cu_seq_lens_q=bounds, max_length_q=query.shape[2], **others)

    monkeypatch.setitem(AttentionInterface._global_mapping, VARLEN, mixed)


def test_a_control_whose_rows_see_each_other_differs_and_is_refused(rows_that_see_each_other):
    padded, packed = language_models("llama")
    assert np.abs(batch_log_probs(packed, ROWS, 1000) - batch_log_probs(padded, ROWS, 1000)).max() > 0.1
    with pytest.raises(ResourceError, match="model.attention=sdpa"):
        check_rows_apart(packed)
    check_rows_apart(padded)  # nothing to check


def test_rows_that_are_apart_pass_the_check():
    for architecture in ("llama", "qwen3_moe", "gpt2"):
        check_rows_apart(language_models(architecture)[1])


@pytest.mark.parametrize(
    ("architecture", "reason"), [("gemma2", "caps the attention's logits"), ("stablelm", "no choice of attention"), ("qwen3_next", "layers of type")]
)
def test_what_can_not_be_packed_is_padded_or_refused(architecture, reason):
    config = tiny_config(architecture, randomness=0.0)
    assert attention_for("auto", config, torch.bfloat16, on_gpu=True) == "sdpa"
    with pytest.raises(InputError, match=reason):
        attention_for("varlen", config, torch.bfloat16, on_gpu=True)


def test_auto_packs_16_bit_models_on_gpus():
    config = tiny_config("llama", randomness=0.0)
    config.head_dim = 64
    assert attention_for("auto", config, torch.bfloat16, on_gpu=True) == VARLEN
    assert attention_for("auto", config, torch.float32, on_gpu=True) == "sdpa"
    assert attention_for("auto", config, torch.bfloat16, on_gpu=False) == "sdpa"
    config.head_dim = 20  # no multiple of 8
    assert attention_for("auto", config, torch.bfloat16, on_gpu=True) == "sdpa"


@pytest.mark.parametrize(
    ("head", "dtype", "capability", "reason"),
    [
        (64, torch.float32, (9, 0), "bfloat16 or float16"),
        (20, torch.bfloat16, (9, 0), "20 elements"),
        (64, torch.float16, (7, 5), "this one has 7.5"),
    ],
)
def test_what_flash_attention_can_not_compute_is_padded_or_refused(monkeypatch, head, dtype, capability, reason):
    config = tiny_config("llama", randomness=0.0)
    config.head_dim = head
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert attention_for("auto", config, dtype, on_gpu=True) == "sdpa"
    with pytest.raises(InputError, match=reason):
        attention_for("varlen", config, dtype, on_gpu=True)
    assert attention_for("varlen", config, dtype, on_gpu=False) == VARLEN


def test_packed_attention_without_bounds_of_rows_is_refused():
    _, packed = language_models("llama")
    with pytest.raises(RuntimeError, match="use model.attention sdpa"):
        packed(input_ids=torch.tensor([[1, 2, 3]]))


def test_torchs_kernel_gets_bounds_window_and_fewer_heads(monkeypatch):
    """On a GPU torch's own kernel computes; here a stand-in with its signature checks what it is given."""
    seen = {}

    def kernel(query, key, value, bounds_q, bounds_k, longest_q, longest_k, *, scale, window_size, enable_gqa):
        seen.update(longest=(longest_q, longest_k), window=window_size, heads=(query.shape[1], key.shape[1]), bounds=bounds_q.tolist())
        return attention._row_by_row(query, key, value, bounds_q, longest_q, scale, window_size)

    monkeypatch.setattr(attention, "_torch_kernel", lambda: (kernel, {"enable_gqa": True}))
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
    by_row, _ = varlen_attention(torch.nn.Module(), query, key, key, None, scaling=0.3, cu_seq_lens_q=bounds, max_length_q=3, sliding_window=2)
    kernel_input = [tensor[0].transpose(0, 1) for tensor in (query, key, key)]
    torch.testing.assert_close(attention._on_gpu(*kernel_input, bounds, 3, 0.3, (1, 0))[None], by_row)
    assert seen == {"longest": (3, 3), "window": (1, 0), "heads": (4, 2), "bounds": [0, 2, 5]}


@pytest.mark.parametrize(("capability", "implementations"), [((9, 0), ["FA3"]), ((8, 0), []), ((10, 0), [])])
def test_flash_attention_3_computes_on_hopper_alone(monkeypatch, capability, implementations):
    activated = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(attention, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activated.append, raising=False)
    attention._torch_kernel.__wrapped__()
    assert activated == implementations


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text"])
def test_no_forward_pass_looks_for_packed_rows_in_positions(monkeypatch, architecture):
    """On a GPU each pass would wait for the one before it."""
    padded, packed = language_models(architecture)
    expected = batch_log_probs(padded, ROWS, 12)

    def search(position_ids):
        raise AssertionError("looked for packed rows")

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", search)
    for model in (padded, packed):
        np.testing.assert_allclose(batch_log_probs(model, ROWS, 12), expected, atol=2e-5)
    assert masking_utils.find_packed_sequence_indices is search
    with pytest.raises(AssertionError, match="looked for"):
        padded(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)


def test_arrays_reach_the_device_whole():
    arrays = [np.arange(6).reshape(2, 3), np.zeros((0,), np.int64), np.ones(3, np.float32)]
    for tensor, array in zip(to_device(arrays, torch.device("cpu")), arrays, strict=True):
        assert tensor.shape == array.shape and (tensor.numpy() == array).all() and tensor.dtype == torch.from_numpy(array).dtype
