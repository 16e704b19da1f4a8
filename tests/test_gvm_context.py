"""Trajectory conditioning: which rows are examples, which tokens the values belong to, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from gvm_artifacts import make_gvm
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dvpo_ray.actors.frozen import ValueScorer
from dvpo_ray.batch import RaggedBatch
from dvpo_ray.config.schema import Config
from dvpo_ray.errors import InputError
from dvpo_ray.gvm.artifact import ContextSpec, load_gvm, read_manifest
from dvpo_ray.gvm.context import (
    Origin,
    TooFewExamples,
    choose_examples,
    rollout_values,
    with_context,
    with_peer_examples,
    with_rollout_examples,
    without_context,
)
from dvpo_ray.gvm.dataset import load_gvm_data, manifest_entries
from dvpo_ray.gvm.evaluation import evaluate_gvm
from dvpo_ray.gvm.scoring import score_file
from dvpo_ray.models.forward import batch_values
from dvpo_ray.training.policy_inputs import load_inputs

TWO = ContextSpec(examples=2, max_tokens=40)


def gvm_data(config):
    return load_gvm_data(config, config.gvm)


def rows_of(batch: RaggedBatch) -> list[list[int]]:
    return [batch.tokens[batch.row(r)].tolist() for r in range(batch.num_rows)]


# ---------------------------------------------------------------------------------------------------------- choice


@given(
    st.lists(st.integers(0, 9), max_size=20),
    st.lists(st.integers(0, 9), max_size=20),
    st.integers(0, 4),
    st.integers(0, 2**31 - 1),
)
def test_examples_are_of_distinct_other_prompts_or_refused(prompts, pool, k, seed):
    short = [row for row, own in enumerate(prompts) if len(set(pool) - {own}) < k]
    if short:
        with pytest.raises(TooFewExamples) as caught:
            choose_examples(range(len(prompts)), prompts, pool, k, seed)
        assert caught.value.args == (short[0], len(set(pool) - {prompts[short[0]]}))
        return
    choices = choose_examples(range(len(prompts)), prompts, pool, k, seed)
    assert choices.shape == (len(prompts), k)
    for own, row in zip(prompts, choices, strict=True):
        drawn = [pool[i] for i in row]
        assert own not in drawn and len(set(drawn)) == k


def test_a_draw_depends_on_the_rows_id_the_pool_and_the_seed_alone():
    ids, prompts, pool = [7, 3, 11, 5], ["a", "b", "c", "d"], ["a", "b", "c", "d", "e", "e", "f"]
    drawn = choose_examples(ids, prompts, pool, 2, seed=1)
    order = [2, 0, 3]
    np.testing.assert_array_equal(choose_examples([ids[i] for i in order], [prompts[i] for i in order], pool, 2, seed=1), drawn[order])
    many = range(100), ["z"] * 100, pool, 2
    assert (choose_examples(*many, seed=1) != choose_examples(*many, seed=2)).any()
    assert len({tuple(row) for row in choose_examples(*many, seed=1)}) > 10


def test_all_other_prompts_are_drawn_alike_however_many_examples_they_have():
    pool = ["own"] * 5 + ["a"] * 4 + ["b", "c", "d"]
    drawn = choose_examples(range(3000), ["own"] * 3000, pool, 1, seed=0)[:, 0]
    counts = {prompt: sum(pool[i] == prompt for i in drawn) for prompt in "abcd"}
    assert all(650 < count < 850 for count in counts.values())  # 750 each, standard deviation 24
    assert set(drawn.tolist()) == set(range(5, 12))


# ---------------------------------------------------------------------------------------------------------- layout

BATCH = RaggedBatch.from_rows([[1, 10], [1, 20, 21]], [[11, 12, 2], [22]], row_ids=[4, 9], truncated=[False, True], policy_version=3)
EXAMPLES = RaggedBatch.from_rows([[1, 30], [1, 40], [1]], [[31, 2], [41], [50, 51, 2]], by_response_token={"log_probs": [[1, 1], [1], [1, 1, 1]]})


def test_examples_stand_before_the_prompt_in_the_order_chosen():
    extended = with_context(BATCH, EXAMPLES, np.array([[2, 0], [0, 1]]))
    assert rows_of(extended) == [[1, 50, 51, 2, 1, 30, 31, 2, 1, 10, 11, 12, 2], [1, 30, 31, 2, 1, 40, 41, 1, 20, 21, 22]]
    assert extended.prompt_lengths.tolist() == [10, 10]
    for name in ("response_lengths", "row_ids", "truncated", "steps"):
        np.testing.assert_array_equal(getattr(extended, name), getattr(BATCH, name))
    for r in range(2):  # the supervised states are the same tokens
        np.testing.assert_array_equal(extended.tokens[extended.states(r)], BATCH.tokens[BATCH.states(r)])


def test_no_examples_and_no_rows():
    assert rows_of(with_context(BATCH, EXAMPLES, np.zeros((2, 0), np.int64))) == rows_of(BATCH)
    assert with_context(BATCH.select([]), EXAMPLES, np.zeros((0, 2), np.int64)).num_rows == 0


@st.composite
def batches(draw, max_rows=6):
    rows = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=max_rows))
    return RaggedBatch.from_rows([[1] * p for p, _ in rows], [[2] * t for _, t in rows])


@given(batches(), batches(), st.integers(0, 3), st.randoms(use_true_random=False))
def test_the_way_back_finds_every_original_token(batch, examples, k, rng):
    choices = np.array([rng.randrange(examples.num_rows) for _ in range(batch.num_rows * k)], dtype=np.int64).reshape(batch.num_rows, k)
    extended = with_context(batch, examples, choices)
    expected = [r * 1000 + length - j for r, length in enumerate(batch.lengths) for j in range(length)]  # row and distance to its end
    field = np.array([r * 1000 + length - j for r, length in enumerate(extended.lengths) for j in range(length)])
    assert without_context(field, extended, batch).tolist() == expected


# ------------------------------------------------------------------------------------------------- rows of a data set


def peers(*rows: tuple[int, str, int], pad: int = 0) -> tuple[RaggedBatch, list[Origin]]:
    """Rows (prompt, source, response token): the prompt's token is 100 + prompt, the response is its token and the end token."""
    batch = RaggedBatch.from_rows([[100 + prompt] for prompt, _, _ in rows], [[token] + [0] * pad + [2] for _, _, token in rows])
    return batch, [Origin(f"f:{r // 2 + 1}", r // 2, str(prompt), source) for r, (prompt, source, _) in enumerate(rows)]


PAIRS = [(p, source, 10 * p + i) for p in range(1, 7) for i, source in enumerate(("a", "a") if p % 2 else ("a", "b"))]
# Prompts 1, 3, 5: both responses by a. Prompts 2, 4, 6: chosen by a, rejected by b.


def examples_of(extended: RaggedBatch, r: int, length: int = 3) -> list[tuple[int, int]]:
    """(prompt, response token) of the examples before a row."""
    context = extended.tokens[extended.row(r)][:-length].reshape(-1, length)
    return [(int(row[0]) - 100, int(row[1])) for row in context]


def test_examples_are_by_the_same_model_and_of_other_prompts():
    batch, origins = peers(*PAIRS)
    extended = with_peer_examples(batch, origins, TWO, seed=0, context_tokens=9)
    wrote = {(prompt, token): source for prompt, source, token in PAIRS}
    for r, (prompt, source, _) in enumerate(PAIRS):
        examples = examples_of(extended, r)
        assert [wrote[example] for example in examples] == [source] * 2
        assert len({prompt, *(p for p, _ in examples)}) == 3
    assert {examples_of(extended, r)[0][1] % 10 for r in range(12)} == {0, 1}  # both chosen and rejected ones


def test_responses_of_one_model_to_one_prompt_have_the_same_examples():
    batch, origins = peers(*PAIRS)
    extended = with_peer_examples(batch, origins, TWO, seed=0, context_tokens=9)
    same = [examples_of(extended, r) == examples_of(extended, r + 1) for r in range(0, 12, 2)]
    assert same == [True, False] * 3


def test_rows_without_a_source_count_as_one_model():
    batch, origins = peers(*((p, None, 10 * p + i) for p in range(3) for i in range(2)))
    extended = with_peer_examples(batch, origins, TWO, seed=0, context_tokens=9)
    assert [sorted(p for p, _ in examples_of(extended, r)) for r in (0, 2, 4)] == [[1, 2], [0, 2], [0, 1]]


def test_longer_examples_are_not_used():
    batch, origins = peers(*PAIRS)
    longer, more = peers(*((p + 10, "a", 7) for p in range(6)), pad=38)  # one token too many
    both = RaggedBatch.concatenate([batch, longer])
    extended = with_peer_examples(both, [*origins, *more], TWO, seed=0, context_tokens=100)
    assert extended.lengths.tolist() == [9] * 12 + [6 + 41] * 6


def test_too_few_examples_and_too_long_rows_name_the_row():
    batch, origins = peers(*PAIRS)
    with pytest.raises(InputError, match=r"^f:2: the row needs 3 examples of source_model b, but only 2 other prompts have one of at most 40"):
        with_peer_examples(batch, origins, ContextSpec(examples=3, max_tokens=40), 0, 100)
    with pytest.raises(InputError, match=r"^f:1: the row needs 2 examples of source_model a, but only 0 other prompts .* at most 2 tokens"):
        with_peer_examples(batch, origins, ContextSpec(examples=2, max_tokens=2), 0, 100)
    with pytest.raises(InputError, match=r"^f:1: 3 tokens of prompt and response and 6 of examples exceed the model's context of 8; lower"):
        with_peer_examples(batch, origins, TWO, 0, 8)


# ---------------------------------------------------------------------------------------------------- preference data


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_of(model, train, heldout, **context) -> Config:
    return Config.model_validate(
        {
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"preferences": {"path": train, "heldout_path": heldout}, "max_prompt_tokens": 64, "max_response_tokens": 64},
            "gvm": {"context": {"examples": 2, "max_tokens": 30} | context},
        }
    )


def texts_before(extended: RaggedBatch, tokenizer) -> list[list[str]]:
    """The examples before each row as text; every example begins with the BOS token."""
    contexts = []
    for r in range(extended.num_rows):
        row = extended.tokens[extended.row(r)]
        starts = np.flatnonzero(row == tokenizer.bos_token_id)
        contexts.append([tokenizer.decode(part, skip_special_tokens=True) for part in np.split(row, starts[1:])[:-1]])
    return contexts


def ultrafeedback(name: str, count: int) -> list[dict]:
    """Instructions with answers by models A and B; each is better in turn."""

    def completion(model, i, score):
        return {"response": f" {name} by {model} {i}", "overall_score": score, "model": model}

    return [{"instruction": f"{name} {i}", "completions": [completion("A", i, 1 + i % 2), completion("B", i, 2 - i % 2)]} for i in range(count)]


def test_contexts_of_raw_ultrafeedback_keep_models_and_sides_apart(tiny_model, tmp_path):
    """Each response gets examples from its own model and its own side of the split."""
    config = config_of(
        tiny_model, write(tmp_path / "t.jsonl", ultrafeedback("train", 6)), write(tmp_path / "h.jsonl", ultrafeedback("held", 5)), max_tokens=64
    )
    data = gvm_data(config)
    for pairs, side in ((data.train, "train"), (data.heldout, "held")):
        batch = pairs.batch
        for r, context in enumerate(texts_before(batch, data.tokenizer)):
            own = data.tokenizer.decode(batch.tokens[batch.response(r)])
            assert len(context) == 2 and all(text.startswith(side) for text in context)
            assert all(f"by {'A' if 'by A' in own else 'B'}" in text for text in context)
    entries = manifest_entries(config, config.gvm, data)
    assert entries["context"] == ContextSpec(examples=2, max_tokens=64)


def test_contexts_are_the_same_every_time_and_change_with_the_seed(tiny_model, tmp_path):
    config = config_of(tiny_model, write(tmp_path / "t.jsonl", plain_pairs(12)), write(tmp_path / "h.jsonl", plain_pairs(12, "held")))
    first, again = gvm_data(config), gvm_data(config)
    other = gvm_data(config.model_copy(update={"seed": 5}))
    assert rows_of(first.train.batch) == rows_of(again.train.batch) != rows_of(other.train.batch)


def test_without_examples_nothing_changes(tiny_model, tmp_path):
    paths = write(tmp_path / "t.jsonl", plain_pairs(4)), write(tmp_path / "h.jsonl", plain_pairs(4, "held"))
    config = config_of(tiny_model, *paths, examples=0)
    data = gvm_data(config)
    assert data.train.batch.prompt_lengths.max() < 20
    assert manifest_entries(config, config.gvm, data)["context"] == ContextSpec(examples=0, max_tokens=0)


def test_rows_that_do_not_fit_the_context_are_refused(tiny_model, tmp_path):
    """The tiny model has 256 positions."""
    long = [{"prompt": f"p{i}", "chosen": " dog" * 60, "rejected": " rain" * 60} for i in range(6)]
    config = config_of(tiny_model, write(tmp_path / "t.jsonl", long), write(tmp_path / "h.jsonl", plain_pairs(6)), examples=4, max_tokens=70)
    with pytest.raises(InputError, match=r"t.jsonl:\d: \d+ tokens of prompt and response and \d+ of examples exceed the model's context of 256"):
        gvm_data(config)


def plain_pairs(count: int, name: str = "train") -> list[dict]:
    return [{"prompt": f"{name} {i}", "chosen": f" a good day {i}", "rejected": f" the rain {i}"} for i in range(count)]


# ------------------------------------------------------------------------------------------------ artifact and commands


@pytest.fixture(scope="module")
def gvm(tiny_model, tmp_path_factory):
    return make_gvm(tmp_path_factory.mktemp("tau") / "final", tiny_model, context=TWO)


@pytest.fixture(scope="module")
def plain_gvm(tiny_model, tmp_path_factory):
    return make_gvm(tmp_path_factory.mktemp("plain") / "final", tiny_model)


def test_the_manifest_names_the_context_and_older_ones_have_none(gvm, plain_gvm):
    assert read_manifest(gvm).context == TWO
    content = json.loads((plain_gvm / "gvm.json").read_text())
    del content["context"]
    (plain_gvm / "gvm.json").write_text(json.dumps(content))
    assert read_manifest(plain_gvm).context.examples == 0


def test_evaluation_reads_what_the_artifact_says_whatever_the_config(gvm, plain_gvm, tiny_model, tmp_path):
    """The same weights with and without a context."""
    paths = write(tmp_path / "t.jsonl", plain_pairs(4)), write(tmp_path / "h.jsonl", plain_pairs(8, "held"))

    def mse(artifact, examples):
        return evaluate_gvm(config_of(tiny_model, *paths, examples=examples), artifact, tmp_path / "out")["regression"]["mse"]

    assert mse(gvm, 0) == mse(gvm, 1) != mse(plain_gvm, 0) == mse(plain_gvm, 1)


def test_scores_are_those_of_the_rows_with_examples_of_their_model(gvm, tiny_model, tmp_path):
    """With three rows per model and two examples, the examples of a row are the other two rows, in either order."""
    rows = [{"prompt": f"Tell {i}", "response": f" a {word} day", "source_model": word} for word in ("good", "bad") for i in range(3)]
    config = config_of(tiny_model, "unused", "unused")
    assert score_file(config, gvm, write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl") == 6
    scored = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    tokenizer, (model, _) = AutoTokenizer.from_pretrained(tiny_model), load_gvm(gvm)
    ids = [tokenizer(row["prompt"])["input_ids"] + out["response"]["token_ids"] for row, out in zip(rows, scored, strict=True)]

    def states(*parts):
        with torch.no_grad():
            return model(torch.tensor([sum(parts, [])])).logits[0, :, 0].numpy()

    for r, out in enumerate(scored):
        values = out["response"]["values"]
        one, two = (ids[i] for i in range(r // 3 * 3, r // 3 * 3 + 3) if i != r)
        expected = [states(*context, ids[r])[-len(values) :] for context in ((one, two), (two, one))]
        assert any(np.allclose(values, row, atol=1e-5) for row in expected)
        assert not np.allclose(values, states(ids[r])[-len(values) :], atol=1e-3)


def test_scoring_pairs_tells_their_models_apart_and_needs_enough_rows(gvm, tiny_model, tmp_path):
    rows = [{**pair, "source_model": "a", "rejected_model": "b"} for pair in plain_pairs(3)]
    config = config_of(tiny_model, "unused", "unused")
    assert score_file(config, gvm, write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl") == 3
    with pytest.raises(InputError, match=r"in.jsonl:1: the row needs 2 examples of source_model a, but only 1 other prompts have one"):
        score_file(config, gvm, write(tmp_path / "in.jsonl", rows[:2]), tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


# -------------------------------------------------------------------------------------- rollouts of a policy


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
    """The examples are the batch itself: two rows for each of three prompts."""
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
    told = r"gvm.context.pool is 2, but .* takes 2 examples, none of them of the row's own prompt; set it to 3 or more"
    with pytest.raises(InputError, match=told):
        inputs(pool=2)
    with pytest.raises(InputError, match=r"2 examples of at most 40 tokens before rows of 177 = 257 tokens, but the GVM has a context of 256"):
        inputs(max_response_tokens=113)
