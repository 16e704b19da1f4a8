"""The distribution that is sampled is the one that is trained: engines report the log-probs that the learner computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dvpo_ray.actors.rollout_engine import make_backend
from dvpo_ray.batch import RaggedBatch
from dvpo_ray.config.inputs import biased_sampling
from dvpo_ray.config.schema import Config
from dvpo_ray.errors import ResourceError
from dvpo_ray.models.forward import MinLength, batch_log_probs
from dvpo_ray.models.loading import load_policy
from dvpo_ray.models.token_log_probs import Excluded, token_log_probs
from dvpo_ray.policy.mismatch import START_BOUNDS, check_same_weights

PROMPTS = [[1, 5, 7, 11], [1, 13, 17], [1, 19, 23, 29, 31], [1, 37]] * 4
STOPS = frozenset(range(40, 240))  # so many that almost every response would end at once


@pytest.fixture(scope="module")
def suggesting(tiny_model, tmp_path_factory) -> Path:
    """A checkpoint whose generation_config.json suggests to sample in another way."""
    folder = tmp_path_factory.mktemp("suggesting") / "model"
    folder.mkdir()
    for file in Path(tiny_model).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    suggestions = {"do_sample": True, "temperature": 0.2, "top_k": 3, "top_p": 0.5, "repetition_penalty": 1.5, "suppress_tokens": [9]}
    (folder / "generation_config.json").write_text(json.dumps(suggestions))
    return folder


@pytest.mark.parametrize("min_tokens", [0, 5])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.4])
def test_sampled_log_probs_are_the_learners(suggesting, temperature, min_tokens):
    rollout = {"backend": "transformers", "temperature": temperature, "min_response_tokens": min_tokens, "max_response_tokens": 12}
    config = Config.model_validate({"model": {"path": str(suggesting), "dtype": "float32"}, "rollout": rollout})
    responses = list(make_backend(config, STOPS, "object_store", 64).generate(PROMPTS, seed=0))
    assert min(len(response.token_ids) for response in responses) == (6 if min_tokens else 1)
    batch = RaggedBatch.from_rows(PROMPTS, [response.token_ids for response in responses])
    policy, min_length = load_policy(config.model), MinLength.of(min_tokens, STOPS)
    computed = batch_log_probs(policy, batch, 4096, temperature, min_length=min_length)[batch.response_mask]
    np.testing.assert_allclose([p for response in responses for p in response.log_probs], computed, atol=1e-4)
    if min_tokens:  # a learner that did not know of the minimum would be far off
        unaware = batch_log_probs(policy, batch, 4096, temperature)[batch.response_mask]
        assert np.abs(unaware - computed).max() > 0.1


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_excluded_tokens_have_no_probability_and_no_gradient(temperature):
    torch.manual_seed(0)
    logits = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 1, 3, 4, 0, 5])
    rows, tokens = torch.tensor([True, False, True, False, True, False]), torch.tensor([2, 7])
    out = token_log_probs(logits, targets, temperature=temperature, entropy=True, excluded=Excluded(rows, tokens))
    (out.log_probs.sum() + 0.3 * out.entropy.sum()).backward()
    gradient, logits.grad = logits.grad, None

    masked = (logits / temperature).masked_fill(rows[:, None] & torch.isin(torch.arange(9), tokens), -torch.inf)
    log_p = masked.log_softmax(-1)
    entropy = -torch.where(log_p.isfinite(), log_p.exp() * log_p, 0).sum(-1)
    torch.testing.assert_close(out.log_probs, log_p[torch.arange(6), targets])
    torch.testing.assert_close(out.entropy, entropy)
    possible = log_p.isfinite()
    kept = torch.where(possible, masked, 0).masked_fill(~possible, -1e30).log_softmax(-1)
    (kept[torch.arange(6), targets].sum() + 0.3 * -torch.where(possible, kept.exp() * kept, 0).sum()).backward()
    torch.testing.assert_close(gradient, logits.grad)
    assert (gradient[~possible] == 0).all()


def test_a_nucleus_is_for_evaluation_only():
    def config(top_p: float) -> Config:
        return Config.model_validate({"model": {"path": "m"}, "rollout": {"top_p": top_p}})

    assert biased_sampling(config(1.0)) is None
    assert biased_sampling(config(0.9)).startswith("rollout.top_p is 0.9: ")


def test_adapters_are_trained_as_they_sample():
    with pytest.raises(ValueError, match="lora.dropout must be 0: the policy that is trained would not be the one that sampled"):
        Config.model_validate({"model": {"path": "m"}, "policy": {"lora": {"dropout": 0.1}}})


# ---------------------------------------------------------------------------------------------------- the check at the start


@pytest.mark.parametrize("dtype", START_BOUNDS)
def test_equal_weights_agree_within_the_bounds_of_the_dtype(dtype):
    mean, largest = START_BOUNDS[dtype]
    reference = np.full(1000, -2.0, dtype=np.float32)
    noise = np.zeros(1000)
    noise[:2] = 0.9 * largest, -0.9 * largest
    check_same_weights(reference + noise, reference, dtype)
    check_same_weights(reference + 0.9 * mean, reference, dtype)
    scattered = np.random.default_rng(0).choice([-largest / 2, largest / 2], 1000)  # a mean that chance alone explains
    check_same_weights(reference + scattered, reference, dtype)
    noise[0] = 1.1 * largest
    with pytest.raises(ResourceError, match=rf"differ on the first 1000 tokens: KL .*\(at most {mean:g} in {dtype}\), largest difference"):
        check_same_weights(reference + noise, reference, dtype)
    with pytest.raises(ResourceError, match="KL -"):
        check_same_weights(reference - 1.1 * mean, reference, dtype)
    with pytest.raises(ResourceError, match="nan"):
        check_same_weights(np.full(1000, np.nan), reference, dtype)


# ---------------------------------------------------------------------------------------------------- vLLM


@pytest.mark.slow
def test_vllm_agrees_before_and_after_a_sync(tiny_model):
    """Experts, and an engine of two processes; test_loop.py has a model without."""
    pytest.importorskip("vllm")
    architectures = ["qwen3_moe", "llama:2"]
    script = [sys.executable, str(Path(__file__).parent / "vllm_agreement.py"), str(tiny_model), *architectures]
    ended = subprocess.run(script, capture_output=True, text=True, timeout=600)
    results = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert [result["architecture"] for result in results] == architectures, ended.stderr[-2000:]
    for result in results:
        assert "error" not in result, result
        assert result["checkpoint"] < 1e-3 and result["synced"] < 1e-3 and result["moved"] > 0.1, result
        assert result["own_seeds"], result
