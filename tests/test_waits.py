"""No pass waits for the GPU: on tensors that have a shape and no content, whoever asks for a number fails."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_gvm_pairs import PAIRS
from test_layouts import ROWS
from tiny_models import tiny_config
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import AutoModelForCausalLM

from dvpo_ray.actors import gvm_trainer
from dvpo_ray.actors.critic import Critic
from dvpo_ray.actors.gvm_trainer import GVMTrainer
from dvpo_ray.actors.policy_learner import LOSS_FIELDS, PolicyLearner
from dvpo_ray.actors.tally import Tally
from dvpo_ray.actors.update_plan import OptimizerStep
from dvpo_ray.config.schema import Config, CriticConfig, GVMConfig
from dvpo_ray.gvm.model import ValueHead, value_head, value_model_class
from dvpo_ray.gvm.pairs import build_pairs
from dvpo_ray.models import attention, forward, head, layouts
from dvpo_ray.models.deepspeed import _bfloat16_step
from dvpo_ray.models.forward import MinLength, log_probs_of, values_of
from dvpo_ray.models.layouts import Passes, lay_out

PASSES = Passes([np.array([2, 0]), np.array([1, 3])])


@pytest.fixture(params=["sdpa", "varlen"])
def without_content(request, monkeypatch):
    """Within this context tensors have no content. It gives the attention of models; packed rows go to torch's own kernel, as on a GPU."""
    send = lambda arrays, device: [torch.empty(array.shape, dtype=torch.from_numpy(array).dtype) for array in arrays]  # noqa: E731
    monkeypatch.setattr(layouts, "to_device", send)
    monkeypatch.setattr(gvm_trainer, "to_device", send)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(attention, "_row_by_row", attention._on_gpu)
    with FakeTensorMode():
        yield request.param


def trained(model):
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    return model


def value_model(attention: str):
    config = tiny_config("llama")
    config.num_labels = 1
    model = value_model_class(config)._from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    value_head(model).__class__ = ValueHead
    return trained(model)


@pytest.mark.parametrize("blocks", [False, True])
def test_the_learner_asks_for_nothing_until_the_end(without_content, monkeypatch, blocks):
    monkeypatch.setattr(forward, "keeps_logits", lambda model, tokens: not blocks)
    monkeypatch.setattr(head, "BLOCK_LOGITS", 5 * 512)
    monkeypatch.setattr(head, "_is_known", lambda *_: True)  # compared once
    model = trained(AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=torch.bfloat16, attn_implementation=without_content))
    config = Config(model={"path": "model"}, policy={"entropy_coefficient": 0.1})
    sampled = {"temperature": 0.7, "min_length": MinLength(2, (2, 9))}
    learner, tally = SimpleNamespace(model=model, engine=model, config=config, sampled=sampled), Tally()
    batch = ROWS.with_token_fields(**{name: np.zeros(ROWS.num_tokens, np.float32) for name in LOSS_FIELDS})
    for rows in lay_out(model, batch, PASSES, batch.response_mask, ahead=True, fields=LOSS_FIELDS):
        loss = PolicyLearner._loss(learner, OptimizerStep(PASSES, 21), rows, kl_coefficient=0.1, tally=tally, steps=1, first=True)
        assert loss.dtype == torch.float32
        loss.backward()
    assert {share.dtype for shares in tally._shares.values() for share in shares} == {torch.float32, torch.float64}
    assert log_probs_of(model, batch, PASSES, **sampled).dtype == torch.float32
    with pytest.raises(DataDependentOutputException):
        float(loss)


def test_the_critic_asks_for_nothing_until_the_end(without_content):
    model = value_model(without_content)
    critic = SimpleNamespace(model=model, engine=model, settings=CriticConfig())
    batch = ROWS.with_token_fields(**{name: np.zeros(ROWS.num_tokens, np.float32) for name in ("values", "returns")})
    for rows in lay_out(model, batch, PASSES, batch.response_mask, ahead=True, fields=("values", "returns")):
        Critic._loss(critic, rows, 21, Tally(), 1).backward()
    assert values_of(model, batch, PASSES).dtype == torch.float32


@pytest.mark.parametrize("objective", ["td0", "td_lambda", "monte_carlo", "bradley_terry"])
@pytest.mark.parametrize("view", ["last", "mean"])
def test_the_trainer_of_value_models_asks_for_nothing_in_its_passes(without_content, objective, view):
    model, pairs, shares = value_model(without_content), build_pairs(PAIRS, "binary", 1.0), []
    settings = GVMConfig(objective=objective, bradley_terry_value=view, bradley_terry_weight=0.5)
    trainer = SimpleNamespace(model=model, engine=model, settings=settings, index=0)
    for part in GVMTrainer._lay_out(trainer, pairs):
        GVMTrainer._loss(trainer, part, pairs, shares).backward()
    assert torch.stack(shares).dtype == torch.float32


def test_the_step_in_bfloat16_without_zero_asks_for_nothing():
    with FakeTensorMode():
        weights = [torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in ((4, 3), (5,))]
        masters = [torch.nn.Parameter(weight.detach().float()) for weight in weights]
        weights[0].grad = torch.ones_like(weights[0])
        adamw = torch.optim.AdamW(masters, fused=True)
        optimizer = SimpleNamespace(fp16_groups=[weights], fp32_groups=[masters], optimizer=adamw, clip_grad=1.0)
        _bfloat16_step(optimizer)
        assert optimizer._global_grad_norm.dtype == torch.float32
