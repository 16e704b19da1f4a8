"""Preference pairs of a model's own samples: what is paired, what is written, and that the data readers take it."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dvpo_ray.actors.rollout_backend import Response
from dvpo_ray.config import load_config
from dvpo_ray.config.schema import PreferenceData
from dvpo_ray.data.encoding import Encoder
from dvpo_ray.data.preferences import load_preferences
from dvpo_ray.data.prompts import Prompt
from dvpo_ray.models.loading import load_tokenizer
from dvpo_ray.quickstart import openings
from dvpo_ray.quickstart.self_preferences import main
from dvpo_ray.refresh.pairs import pair_row, pair_up
from dvpo_ray.refresh.samples import Sample


def samples(*scores: float) -> list[Sample]:
    return [Sample(f"text {i}", truncated=False, score=score) for i, score in enumerate(scores)]


def test_the_best_is_paired_with_the_worst_and_so_on_inwards():
    pairs = pair_up(samples(0.1, 0.9, -0.5, 0.4), pairs=2, min_score_gap=0.0)
    assert [(chosen.score, rejected.score) for chosen, rejected in pairs] == [(0.9, -0.5), (0.4, 0.1)]


def test_close_and_equal_scores_make_no_pair():
    assert pair_up(samples(0.5, 0.46), pairs=1, min_score_gap=0.05) == []
    assert pair_up(samples(0.5, 0.5), pairs=1, min_score_gap=0.0) == []
    assert len(pair_up(samples(0.5, 0.25), pairs=1, min_score_gap=0.25)) == 1


@given(scores=st.lists(st.floats(-1, 1), max_size=9), pairs=st.integers(1, 5), gap=st.floats(0, 1))
def test_pairs_prefer_the_higher_score_and_use_no_sample_twice(scores, pairs, gap):
    made = pair_up(samples(*scores), pairs, gap)
    assert len(made) <= pairs
    assert all(chosen.score > rejected.score and chosen.score - rejected.score >= gap for chosen, rejected in made)
    used = [sample.text for pair in made for sample in pair]
    assert len(used) == len(set(used))


def test_rows_of_messages_answer_with_messages():
    chosen, rejected = samples(0.5, -0.5)
    row = pair_row(Prompt([{"role": "user", "content": "hello"}]), chosen, rejected)
    assert row["chosen"] == [{"role": "assistant", "content": "text 0"}]
    assert pair_row(Prompt("hello"), chosen, rejected)["chosen"] == "text 0"


PROMPTS = ["Once upon a time", "The big dog", "I love this", "Tell me a story", "It was a great day", "The rain"]
ANSWERS = [" was a great day in the park.", " hate the terrible awful storm.", " went home to cry", " had a wonderful, kind friend."]


@pytest.fixture
def config_file(tiny_model, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    config = {
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "data": {"prompts": {"path": str(prompts), "heldout_fraction": 0.4}, "max_response_tokens": 64},
        "rollout": {"backend": "transformers", "max_response_tokens": 64},
        "evaluation": {"judge": "vader"},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


class Scripted:
    """A rollout backend that answers with known texts, one of them in tokens that no tokenizer would choose."""

    def __init__(self, tokenizer) -> None:
        self.answers = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ANSWERS]
        self.letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "inexact"]
        self.end = tokenizer.eos_token_id

    def generate(self, prompts, seed):
        for index in reversed(range(len(prompts))):  # engines finish in any order
            answer = index % 5
            if answer == 4:
                yield Response(index, self.letters, [0.0] * len(self.letters), truncated=True)
            elif answer == 2:
                yield Response(index, self.answers[2], [0.0] * len(self.answers[2]), truncated=True)
            else:
                ids = [*self.answers[answer], self.end]
                yield Response(index, ids, [0.0] * len(ids), truncated=False)


def test_files_hold_split_prompts_and_token_exact_text(config_file, tmp_path, monkeypatch, capsys):
    config = load_config(config_file)
    tokenizer = load_tokenizer(config.model.path)
    backend = Scripted(tokenizer)
    monkeypatch.setattr("dvpo_ray.actors.rollout_engine.make_backend", lambda *_: backend)
    assert main([str(config_file), "--out", str(tmp_path / "out"), "--samples", "5", "--pairs", "2"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "6 samples left out" in said and "pairs of 3 prompts, 6 at most; " in said and "fewer than 2 pairs for" not in said

    encoder = Encoder(tokenizer, config.data, config.model.chat_template, context_tokens=256)
    files = [str(tmp_path / "out" / f"preferences.{split}.jsonl") for split in ("train", "heldout")]
    sets = load_preferences(PreferenceData(path=files[0], heldout_path=files[1]), "error")
    prompts = [{pair.prompt for pair in pairs} for pairs in (sets.train, sets.heldout)]
    assert prompts[0] | prompts[1] == set(PROMPTS) and not prompts[0] & prompts[1]
    assert len(sets.train) + len(sets.heldout) == 2 * len(PROMPTS)
    for pair in [*sets.train, *sets.heldout]:
        encoded = encoder.encode_pair(pair)
        for ids, truncated in ((encoded.chosen, pair.chosen_truncated), (encoded.rejected, pair.rejected_truncated)):
            assert (ids if truncated else ids[:-1]) in backend.answers
        assert pair.chosen_score > pair.rejected_score


def test_a_real_model_answers_in_its_own_tokens(config_file, stories, tmp_path, capsys):
    out = tmp_path / "out"
    overrides = [f"model.path={stories}", "rollout.max_response_tokens=24", "seed=3"]
    for name in ("first", "again"):
        assert main([str(config_file), *overrides, "--out", str(out / name), "--samples", "4", "--min-score-gap", "0"]) == 0
    assert "preferences.train.jsonl: 0 pairs" not in capsys.readouterr().out
    for split in ("train", "heldout"):
        first, again = ((out / name / f"preferences.{split}.jsonl").read_text() for name in ("first", "again"))
        assert first == again


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("evaluation.judge=none", "evaluation.judge"),
        ("data.prompts=null", "data.prompts.path"),
        ("data.prompts.path=/no/such.jsonl", "/no/such.jsonl"),
    ],
)
def test_bad_input_is_one_line_and_status_2(config_file, tmp_path, capsys, override, says):
    assert main([str(config_file), override, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert says in error and "\n" not in error


def test_fewer_pairs_than_asked_for_are_explained(config_file, tmp_path, monkeypatch, capsys):
    backend = Scripted(load_tokenizer(load_config(config_file).model.path))
    monkeypatch.setattr("dvpo_ray.actors.rollout_engine.make_backend", lambda *_: backend)
    assert main([str(config_file), "--out", str(tmp_path / "out"), "--samples", "5", "--pairs", "3"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    why = "they have fewer than 6 different usable samples; raise --samples"
    for split in ("train", "heldout"):
        assert re.search(rf"fewer than 3 pairs for (\d) of \1 {split} prompts: {why}", said)


def test_a_response_sampled_twice_is_in_one_pair(config_file, tmp_path, monkeypatch, capsys):
    backend = Scripted(load_tokenizer(load_config(config_file).model.path))
    monkeypatch.setattr("dvpo_ray.actors.rollout_engine.make_backend", lambda *_: backend)
    assert main([str(config_file), "--out", str(tmp_path / "out"), "--samples", "10", "--pairs", "4", "--min-score-gap", "0"]) == 0
    assert re.search(r"fewer than 4 pairs for (\d) of \1 train prompts: they have fewer than 8 different", " ".join(capsys.readouterr().out.split()))
    rows = [json.loads(line) for split in ("train", "heldout") for line in (tmp_path / "out" / f"preferences.{split}.jsonl").open()]
    texts = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    assert len(texts) == len(set(texts)) == 4 * len(PROMPTS)


def test_openings_that_are_left_out_are_counted(stories, tmp_path, capsys):
    out = tmp_path / "p.jsonl"
    assert openings.main([str(stories), "--tokens", "4", "--count", "60", "--out", str(out)]) == 0
    said = re.fullmatch(
        r".*p.jsonl: (\d+) openings; of 60 samples, (\d+) are left out: (\d+) that repeat another one, (\d+) whose text .*\n", capsys.readouterr().out
    )
    written, left_out, repeated, inexact = map(int, said.groups())
    assert written == len(out.read_text().splitlines()) and written + left_out == 60 and repeated + inexact == left_out > 0
