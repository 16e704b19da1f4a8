"""Prompt sets: layouts, distinct prompts, held-out prompts."""

import json
import unicodedata

import pytest

from dvpo_ray.config.schema import PreferenceData, PromptData
from dvpo_ray.data.preferences import load_preferences
from dvpo_ray.data.prompts import load_prompts, parse_prompt
from dvpo_ray.errors import InputError

USER = {"role": "user", "content": "What color is the sky?"}
BLUE = {"role": "assistant", "content": "It is blue."}
GREEN = {"role": "assistant", "content": "It is green."}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"prompt": "The sky is"}, "The sky is"),
        ({"prompt": [USER]}, [USER]),
        ({"prompt": "The sky is", "completion": " blue."}, "The sky is"),
        ({"messages": [USER, BLUE]}, [USER]),
        ({"messages": [USER, BLUE, USER]}, [USER, BLUE, USER]),
        ({"instruction": "Translate.", "input": "", "output": "x"}, "Translate."),
        ({"instruction": "Translate.", "input": "Guten Tag", "output": "x"}, "Translate.\n\nGuten Tag"),
        ({"instruction": "Sky?", "completions": [], "models": []}, "Sky?"),
        ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, "The sky is"),
        ({"prompt": "sky?", "chosen": [USER, BLUE], "rejected": [USER, GREEN]}, [USER]),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "The sky is"),
    ],
)
def test_documented_layouts(columns, expected):
    prompt = parse_prompt(columns, "f:1")
    assert prompt.content == expected
    assert prompt.where == "f:1"


def test_text_of_a_dialogue_is_its_contents():
    assert parse_prompt({"prompt": [USER, BLUE, USER]}, "").text == "What color is the sky?\nIt is blue.\nWhat color is the sky?"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"question": "hi"}, "no `prompt`; the row has question"),
        ({"prompt": ""}, "`prompt` is empty text"),
        ({"prompt": [USER, BLUE]}, "ends with an assistant message"),
        ({"messages": [BLUE]}, "`messages` is an empty list"),
        ({"messages": "hi"}, "`messages` must be a list of messages"),
        ({"instruction": "a", "input": 3}, "`instruction` and `input` must be text"),
    ],
)
def test_a_bad_row_names_itself(tmp_path, columns, message):
    path = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "fine"}, columns])
    with pytest.raises(InputError) as error:
        load_prompts(PromptData(path=path), "error")
    assert str(error.value).startswith(f"{path}:2: ")
    assert message in str(error.value)


def test_a_repeated_prompt_is_taken_once(tmp_path):
    rows = [{"prompt": f"Question {i % 30}?", "chosen": f"c{i}", "rejected": "r"} for i in range(90)]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    everything, limited = load_prompts(PromptData(path=path), "error"), load_prompts(PromptData(path=path, limit=20), "error")
    assert len(limited.train) == 20
    texts = [prompt.text for prompt in limited.train + limited.heldout]
    assert len(set(texts)) == len(texts)
    repeats = f"{path}: left out 60 of 90 prompts: exact repeats of an earlier one; the first is {path}:31"
    there, over = len(everything.train), everything.train[20].where
    assert everything.notes == [repeats]
    assert limited.notes == [repeats, f"{path}: left out {there - 20} of {there} training prompts: data.prompts.limit is 20; the first is {over}"]


def test_prompts_that_only_look_alike_stay_and_are_held_out_together(tmp_path):
    rows = []
    for i in range(60):
        question = f"Où est {i}?"
        rows += [{"prompt": text} for text in (question, question.upper(), f" {question}\n", unicodedata.normalize("NFD", question), question)]
        rows += [{"prompt": [{"role": "user", "content": question}]}, {"prompt": [{"role": "system", "content": "Hm."}, USER]}]
    path = write_jsonl(tmp_path / "prompts.jsonl", rows)
    sets = load_prompts(PromptData(path=path, heldout_fraction=0.3), "error")
    assert len(sets.train) + len(sets.heldout) == 60 * 5 + 1
    assert not {prompt.key for prompt in sets.train} & {prompt.key for prompt in sets.heldout}
    assert len({prompt.key for prompt in sets.heldout}) * 5 >= len(sets.heldout) > 40
    assert sets.notes == [f"{path}: left out {60 + 59} of {60 * 7} prompts: exact repeats of an earlier one; the first is {path}:5"]


def test_prompts_and_preferences_hold_out_the_same_prompts(tmp_path):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": f"Question {i}?", "chosen": "c", "rejected": "r"} for i in range(300)])
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": [{"role": "user", "content": f"question {i}?"}]} for i in range(600)])
    trained_on = {pair.key for pair in load_preferences(PreferenceData(path=pairs), "error").train}
    evaluated_on = {prompt.key for prompt in load_prompts(PromptData(path=prompts), "error").heldout}
    assert evaluated_on and not trained_on & evaluated_on


def test_the_hh_pairs_serve_as_prompts(hh_pairs):
    data = PromptData(path=str(hh_pairs / "helpful.train.jsonl"), heldout_path=str(hh_pairs / "helpful.dev.jsonl"))
    sets = load_prompts(data, "error")
    assert len(sets.train) > 1500 and len(sets.heldout) > 200
    assert not any("training prompts too" in note for note in sets.notes)


def test_a_row_that_is_a_bad_pair_still_gives_its_prompt_on_the_same_side(tmp_path):
    rows = [{"prompt": f"Say {i}", "chosen": " a", "rejected": " a" if i % 3 else " b"} for i in range(90)]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    pairs = load_preferences(PreferenceData(path=path, heldout_fraction=0.3), "skip")
    prompts = load_prompts(PromptData(path=path, heldout_fraction=0.3), "error")
    assert len(pairs.train) + len(pairs.heldout) == 30 and len(prompts.train) + len(prompts.heldout) == 90
    for side in ("train", "heldout"):
        of_pairs, of_prompts = ({item.key for item in getattr(sets, side)} for sets in (pairs, prompts))
        assert of_pairs < of_prompts
