"""Compiled decoder layers give the same results as plain ones, for rows of any shape."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import pytest
import torch
from loop_runs import rollouts, run, values_by_hand
from pydantic import ValidationError
from torch._dynamo.utils import counters

from dvpo_ray.actors.frozen import ReferenceModel
from dvpo_ray.actors.vllm_backend import VLLMBackend
from dvpo_ray.batch import RaggedBatch
from dvpo_ray.config.schema import Config, DeepSpeedConfig, LoraConfig, ModelConfig, RolloutConfig
from dvpo_ray.errors import ResourceError
from dvpo_ray.models import compiling, cpu_linear, head
from dvpo_ray.models.compiling import compile_layers, compiles
from dvpo_ray.models.forward import check_rows_apart, response_log_probs
from dvpo_ray.models.layouts import Passes, lay_out
from dvpo_ray.models.loading import load_policy
from dvpo_ray.models.trainable import apply_lora
from dvpo_ray.runtime.process import environment

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++) on this machine")


def _pass(model, ids):
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    logits.log_softmax(-1)[..., 3].sum().backward()
    return logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("with_adapters_and_onednn", "checkpointing"), [(False, False), (True, False), (False, True)])
def test_logits_and_gradients_are_those_of_the_plain_layers(tiny_model, monkeypatch, with_adapters_and_onednn, checkpointing):
    monkeypatch.setattr(cpu_linear, "onednn_is_faster", lambda: with_adapters_and_onednn)
    model = load_policy(ModelConfig(path=str(tiny_model), dtype="float32"))
    if with_adapters_and_onednn:
        model = apply_lora(model, LoraConfig(rank=2))
    if checkpointing:  # around the compiled layer, which runs again in the backward pass
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    names = [name for name, _ in model.named_parameters()]
    batches = [torch.randint(4, 60, shape) for shape in [(2, 9), (3, 12), (1, 5)]]
    plain = [_pass(model, ids) for ids in batches]
    compile_layers(model)
    assert [name for name, _ in model.named_parameters()] == names
    torch.compiler.reset()  # other tests have compiled the same layers
    counters.clear()
    compiled = [_pass(model, ids) for ids in batches]
    assert 0 < counters["frames"]["ok"] <= 4  # compiled, but not again for every layer or shape
    torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-4)


@needs_compiler
@pytest.mark.slow
def test_packed_rows_through_compiled_layers(tiny_model):
    model = load_policy(ModelConfig(path=str(tiny_model), dtype="float32", attention="varlen"), packs=True).train()
    batches = [
        RaggedBatch.from_rows([[1, 5]] * rows, [list(range(4, 4 + length + row)) for row in range(rows)])
        for rows, length in [(2, 9), (5, 3), (3, 12)]
    ]

    def gradients(batch):
        model.zero_grad()
        (rows,) = lay_out(model, batch, Passes([np.arange(batch.num_rows)]), batch.response_mask, ahead=True)
        response_log_probs(model, rows).log_probs.sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = [gradients(batch) for batch in batches]
    compile_layers(model)
    counters.clear()
    compiled = [gradients(batch) for batch in batches]
    assert 0 < counters["frames"]["ok"] <= 8  # not again for every layer or shape
    torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-4)


def test_checks_of_a_model_compile_nothing(tiny_model):
    model = load_policy(ModelConfig(path=str(tiny_model), dtype="float32", attention="varlen"), packs=True)
    compile_layers(model)
    batch = RaggedBatch.from_rows([[1, 5]], [[4, 5, 6]])
    (rows,) = lay_out(model, batch, Passes([np.array([0])]), batch.response_mask, ahead=True)
    counters.clear()
    check_rows_apart(model)
    assert head._is_known(model, rows, None)
    assert not counters["frames"]


def test_layers_are_compiled_where_it_pays(monkeypatch, tmp_path):
    headers = tmp_path / "Python.h"
    monkeypatch.setattr(compiling.sysconfig, "get_config_var", lambda name: str(tmp_path) if name == "INCLUDEPY" else None)
    assert compiles(True, 1) and not compiles(False, 10_000)
    assert not compiles(None, 10_000)  # on a CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CC", sys.executable)
    headers.touch()
    assert compiles(None, 200) and not compiles(None, 199)
    headers.unlink()
    assert not compiles(None, 200)
    headers.touch()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", "")
    assert not compiles(None, 10_000)


@needs_compiler
@pytest.mark.slow
def test_engines_and_frozen_models_on_the_real_loop(loop_settings, tmp_path):
    train = {"train": {"steps": 2, "trackers": []}}
    compiled = {"rollout": {"backend": "vllm", "enforce_eager": False}, "scorer": {"compile": True}, "reference": {"compile": True}}
    metrics = run(loop_settings | train, tmp_path / "run", **compiled)
    assert max(row["mismatch/log_prob_abs_max"] for row in metrics) < 1e-4  # the engine has the learner's weights, also the new ones
    first, second = (rollouts(tmp_path / "run", step) for step in (1, 2))
    for row in first:
        np.testing.assert_allclose(row["reference_log_probs"], row["log_probs"], atol=1e-4)  # still the same model
        np.testing.assert_allclose(row["values"], values_by_hand(loop_settings["gvm"]["path"], row), atol=1e-4)
    assert any(abs(a - b) > 1e-4 for row in second for a, b in zip(row["reference_log_probs"], row["log_probs"], strict=True))


def test_vllm_compiles_nothing_unless_asked():
    eager, compiled = (environment(RolloutConfig(enforce_eager=enforce_eager)) for enforce_eager in (True, False))
    assert eager == compiled | {"TORCHDYNAMO_DISABLE": "1"}


@pytest.mark.parametrize(
    ("key", "ask"),
    [
        ("deepspeed.compile", lambda model, config: compile_layers(load_policy(model))),
        ("reference.compile", lambda model, config: ReferenceModel(config, 0, "run")),
        ("rollout.enforce_eager: false", lambda model, config: VLLMBackend(config, frozenset(), "object_store", 8)),
    ],
)
def test_without_a_compiler_it_is_one_line(tiny_model, monkeypatch, tmp_path, key, ask):
    from torch._inductor import cpp_builder, exc

    def none_found():
        raise exc.InvalidCxxCompiler

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none_found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = ModelConfig(path=str(tiny_model), dtype="float32")
    with pytest.raises(ResourceError, match=rf"^{key} needs a C\+\+ compiler on this node"):
        ask(model, Config(model=model, rollout={"enforce_eager": False}, reference={"compile": True}))


def test_not_with_what_would_undo_it():
    with pytest.raises(ValidationError, match="compile needs zero_stage 0, 1 or 2"):
        DeepSpeedConfig(compile=True, zero_stage=3)
