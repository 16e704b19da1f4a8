"""Values of a policy's rollouts after examples of the same policy: what a row's values depend on, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from gvm_artifacts import make_gvm

from dvpo_ray.actors.frozen import ValueScorer
from dvpo_ray.batch import RaggedBatch
from dvpo_ray.config.schema import Config
from dvpo_ray.errors import InputError
from dvpo_ray.gvm.artifact import ContextSpec, load_gvm
from dvpo_ray.gvm.context import rollout_values, with_rollout_examples
from dvpo_ray.models.forward import batch_values
from dvpo_ray.training.policy_inputs import load_inputs

TWO = ContextSpec(examples=2, max_tokens=40)


@pytest.fixture(scope="module")
def gvm(tiny_model, tmp_path_factory):
    return make_gvm(tmp_path_factory.mktemp("tau") / "final", tiny_model, context=TWO)


def rows_of(batch: RaggedBatch) -> list[list[int]]:
    return [batch.tokens[batch.row(r)].tolist() for r in range(batch.num_rows)]


def rollouts(rows: int, seed: int, first_id: int = 0) -> RaggedBatch:
    rng = np.random.default_rng(seed)
    prompts = [[1, *rng.integers(5, 300, rng.integers(1, 6))] for _ in range(rows)]
    responses = [rng.integers(5, 300, rng.integers(1, 12)) for _ in range(rows)]
    return RaggedBatch.from_rows(prompts, responses, row_ids=range(first_id, first_id + rows))


@pytest.fixture
def scorer(gvm, tiny_model, tmp_path, monkeypatch) -> ValueScorer:
    monkeypatch.setattr("dvpo_ray.runtime.process.redirect_process_output", lambda _: None)
    config = Config.model_validate({"model": {"path": str(tiny_model), "dtype": "float32"}, "gvm": {"path": str(gvm)}, "seed": 3})
    return ValueScorer(config, 0, str(tmp_path))


def test_the_scorers_values_are_aligned_to_the_original_rows(scorer):
    batch, examples = rollouts(5, 0), rollouts(4, 1)
    values = scorer.score(batch, examples).by_token["values"]
    assert values.shape == (batch.num_tokens,) and values.dtype == np.float32
    extended = with_rollout_examples(batch, examples, TWO, seed=3)
    for r, row in enumerate(rows_of(extended)):
        with torch.no_grad():
            direct = scorer.model(torch.tensor([row])).logits[0, :, 0].numpy()
        np.testing.assert_allclose(values[batch.row(r)], direct[-batch.lengths[r] :], atol=1e-5)
    assert not np.allclose(values, batch_values(scorer.model, batch, 1000), atol=1e-3)


def test_a_rows_values_do_not_depend_on_its_chunk_or_the_order_of_the_examples(scorer):
    batch, examples = rollouts(12, 0), rollouts(6, 1)
    whole = scorer.score(batch, examples).by_token["values"]
    shuffled = examples.select([4, 0, 5, 2, 1, 3])
    for rows in ([7], [11, 2, 3], [0, 1, 4, 5, 6, 8, 9, 10]):
        chunk = batch.with_token_fields(values=whole).select(rows)
        np.testing.assert_allclose(scorer.score(chunk, shuffled).by_token["values"], chunk.by_token["values"], atol=1e-5)


def test_no_rollout_is_its_own_example():
    """The examples are the batch itself: three prompts, and two rows of each."""
    half = rollouts(3, 0)
    batch = RaggedBatch.concatenate([half, rollouts(3, 0, first_id=3)])
    extended = with_rollout_examples(batch, batch, TWO, seed=0)
    lengths = half.lengths.sum()
    assert extended.lengths.tolist() == [lengths] * 6  # each row after one row of each of the other two prompts


def test_a_model_with_a_context_is_not_scored_without(scorer):
    with pytest.raises(InputError, match=r"trained with gvm.context.examples 2 and needs examples of the policy's rollouts, but there are none"):
        scorer.score(rollouts(2, 0))


def test_too_few_rollouts_within_the_limit():
    long = RaggedBatch.from_rows([[1, i] for i in range(4)], [[9] * (40 if i else 3) for i in range(4)])
    with pytest.raises(InputError, match=r"needs 2 examples .* only 1 of 4 rollouts .* another prompt and at most 40 tokens; raise gvm.context.pool"):
        with_rollout_examples(rollouts(1, 0), long, TWO, seed=0)


def test_a_model_without_a_context_reads_no_examples(tiny_model, tmp_path):
    model, manifest = load_gvm(make_gvm(tmp_path / "gvm", tiny_model))
    batch = rollouts(3, 0)
    values = rollout_values(model, batch, 1000, manifest.context, rollouts(4, 1), seed=0)
    np.testing.assert_array_equal(values, batch_values(model, batch, 1000))


def test_policy_optimisation_checks_pool_and_room_before_it_starts(gvm, tiny_model, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Tell me story {i}"}) + "\n" for i in range(20)))

    def inputs(pool=8, max_response_tokens=64):
        return load_inputs(
            Config.model_validate(
                {
                    "model": {"path": str(tiny_model)},
                    "data": {"prompts": {"path": str(prompts)}, "max_prompt_tokens": 64},
                    "rollout": {"max_response_tokens": max_response_tokens},
                    "gvm": {"path": str(gvm), "context": {"pool": pool}},
                }
            )
        )

    assert inputs(pool=3, max_response_tokens=112).manifest.context == TWO  # 2 x 40 + 64 + 112 = 256
    with pytest.raises(InputError, match=r"gvm.context.pool is 2, but .* takes 2 examples of other prompts than a row's own; set it to 3 or more"):
        inputs(pool=2)
    with pytest.raises(InputError, match=r"2 examples of at most 40 tokens before rows of 177 = 257 tokens, but the GVM has a context of 256"):
        inputs(max_response_tokens=113)
