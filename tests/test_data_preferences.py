"""Preference pairs: every documented layout, every bad row by name, and the split by prompt."""

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpo_ray.config.schema import PreferenceData
from dvpo_ray.data.preferences import PreferencePair, dataset_fingerprint, load_preferences, parse_pair
from dvpo_ray.data.rows import BadRow
from dvpo_ray.data.splitting import is_heldout, prompt_key, split_by_prompt
from dvpo_ray.errors import InputError

USER = {"role": "user", "content": "What color is the sky?"}
SYSTEM = {"role": "system", "content": "Be brief."}
BLUE = {"role": "assistant", "content": "It is blue."}
GREEN = {"role": "assistant", "content": "It is green."}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def text_pairs(count, **extra):
    return [{"prompt": f"Question {i}?", "chosen": f"Good {i}.", "rejected": f"Bad {i}.", **extra} for i in range(count)]


def parts(pair):
    return pair.prompt, pair.chosen, pair.rejected


# ------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        # The layouts of TRL's documentation.
        ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, ("The sky is", " blue.", " green.")),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, ("The sky is", " blue.", " green.")),
        ({"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}, ([USER], [BLUE], [GREEN])),
        ({"chosen": [USER, BLUE], "rejected": [USER, GREEN]}, ([USER], [BLUE], [GREEN])),
        # Whole dialogues beside a prompt column: as text (ultrafeedback_binarized) and as messages.
        ({"prompt": USER["content"], "chosen": [USER, BLUE], "rejected": [USER, GREEN]}, ([USER], [BLUE], [GREEN])),
        ({"prompt": [USER], "chosen": [USER, BLUE], "rejected": [USER, GREEN]}, ([USER], [BLUE], [GREEN])),
        # A text prompt with single messages, and a longer dialogue.
        ({"prompt": "Sky?", "chosen": [BLUE], "rejected": [GREEN]}, ("Sky?", [BLUE], [GREEN])),
        (
            {"chosen": [SYSTEM, USER, GREEN, USER, BLUE], "rejected": [SYSTEM, USER, GREEN, USER, GREEN]},
            ([SYSTEM, USER, GREEN, USER], [BLUE], [GREEN]),
        ),
        # Implicit text prompts end where a word begins, and hh-rlhf's at the last turn, whatever words its answers share.
        ({"chosen": "Say grey\nnow", "rejected": "Say green\nnow"}, ("Say", " grey\nnow", " green\nnow")),
        ({"chosen": "Sky?\nblue", "rejected": "Sky?\nblack"}, ("Sky?\n", "blue", "black")),
        (
            {"chosen": "\n\nHuman: Hi\n\nAssistant: I am well", "rejected": "\n\nHuman: Hi\n\nAssistant: I am ill"},
            ("\n\nHuman: Hi\n\nAssistant:", " I am well", " I am ill"),
        ),
        # Arrow adds null keys to messages; other keys are not ours.
        ({"prompt": [{**USER, "tool_calls": None}], "chosen": [BLUE], "rejected": [GREEN]}, ([USER], [BLUE], [GREEN])),
    ],
)
def test_documented_layouts(columns, expected):
    assert parts(parse_pair(columns, "here")) == expected


def test_optional_columns_under_both_names():
    base = text_pairs(1)[0]
    pair = parse_pair({**base, "chosen_score": 2, "rejected_score": 0.5, "source_model": "m", "chosen_truncated": True}, "f:1")
    assert (pair.chosen_score, pair.rejected_score, pair.score_gap) == (2.0, 0.5, 1.5)
    assert (pair.source_model, pair.chosen_truncated, pair.rejected_truncated, pair.where) == ("m", True, False, "f:1")

    pair = parse_pair({**base, "score_chosen": 2, "score_rejected": 2, "model": "n"}, "f:1")
    assert pair.response_models == ("n", "n")
    assert parse_pair({**base, "source_model": "m", "rejected_model": "n"}, "f:1").response_models == ("m", "n")
    assert parse_pair(base, "f:1").response_models == (None, None)
    assert (pair.chosen_score, pair.rejected_score, pair.source_model) == (2.0, 2.0, "n")

    pair = parse_pair({**base, "chosen_score": None, "rejected_score": None, "model": None, "chosen_truncated": None}, "f:1")
    assert (pair.chosen_score, pair.rejected_score, pair.score_gap, pair.source_model, pair.chosen_truncated) == (None, None, None, None, False)


def completion(response, score, model="m"):
    return {"response": response, "overall_score": score, "model": model, "principle": "honesty", "annotations": {}}


def test_ultrafeedback_pairs_the_best_with_a_lower_one():
    row = {"instruction": "Sky?", "completions": [completion("red", 3.0, "a"), completion("blue", 8.5, "b"), completion("aqua", 8.5, "c")]}
    pair = parse_pair(row, "uf[0]")
    assert parts(pair) == ("Sky?", "blue", "red")
    assert (pair.chosen_score, pair.rejected_score, pair.response_models) == (8.5, 3.0, ("b", "a"))


def test_ultrafeedback_draws_all_others_alike_and_always_the_same():
    completions = [completion("best", 9.0), completion("x", 1.0), completion("y", 2.0), completion("z", 3.0)]
    drawn = [parse_pair({"instruction": f"Question {i}", "completions": completions}, "uf").rejected for i in range(900)]
    assert drawn == [parse_pair({"instruction": f"Question {i}", "completions": completions}, "uf").rejected for i in range(900)]
    assert all(240 < drawn.count(other) < 360 for other in "xyz")


def test_ultrafeedback_ties_state_no_preference_and_unscored_completions_do_not_count(tmp_path):
    rows = [{"instruction": f"q{i}", "completions": [completion("a", 5.0), completion("b", 4.0)]} for i in range(20)]
    rows.append({"instruction": "tied", "completions": [completion("a", 5.0), completion("b", 5.0), completion("c", None), completion(" ", 1.0)]})
    path = write_jsonl(tmp_path / "uf.jsonl", rows)
    sets = load_preferences(PreferenceData(path=path), "error")
    assert len(sets.train) + len(sets.heldout) == 20
    assert sets.notes == [f"{path}: left out 1 of 21 rows: all scored completions have the same score; the first is {path}:21"]
    only_ties = write_jsonl(tmp_path / "ties.jsonl", rows[-1:])
    with pytest.raises(InputError, match="ties.jsonl: in every pair the scores tie"):
        load_preferences(PreferenceData(path=only_ties), "skip")
    with pytest.raises(BadRow, match="has 1 scored response; a pair needs two"):
        parse_pair({"instruction": "q", "completions": [completion("a", 5.0), completion("b", None)]}, "uf")


# ------------------------------------------------------------------------------------------------------ bad rows

GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}
BAD_ROWS = [
    ({"prompt": "p", "chosen": "c"}, "no `rejected`; the row has prompt, chosen"),
    ({"prompt": "p", "rejected": "r"}, "no `chosen`"),
    ({**GOOD, "rejected": None}, "no `rejected`"),
    ({"chosen": "blue", "rejected": "green"}, "share no leading words that could be the prompt"),
    ({"chosen": [BLUE], "rejected": [GREEN]}, "share no leading messages that could be the prompt"),
    ({**GOOD, "prompt": 3}, "`prompt` must be text or a list of messages, got int"),
    ({**GOOD, "chosen": {"a": 1}}, "`chosen` must be text or a list of messages, got dict"),
    ({**GOOD, "prompt": "  \n"}, "`prompt` is empty text"),
    ({**GOOD, "rejected": ""}, "`rejected` is empty text"),
    ({**GOOD, "prompt": []}, "`prompt` is an empty list"),
    ({**GOOD, "prompt": [{"role": "user", "content": " "}]}, "`prompt` ends with a message whose content is empty"),
    ({**GOOD, "prompt": [{"content": "hi"}]}, "`prompt[0]` needs `role` as text, got NoneType"),
    ({**GOOD, "prompt": [USER, {"role": "user"}]}, "`prompt[1]` needs `content` as text, got NoneType"),
    ({**GOOD, "prompt": ["hi"]}, "`prompt[0]` must be a message with `role` and `content`, got str"),
    ({**GOOD, "prompt": [USER, BLUE]}, "`prompt` ends with an assistant message"),
    ({**GOOD, "chosen": "same", "rejected": " same\n"}, "`chosen` and `rejected` are equal"),
    ({"chosen": "both are same", "rejected": "both are same"}, "`chosen` and `rejected` are equal"),
    ({"prompt": [USER], "chosen": [BLUE], "rejected": [BLUE]}, "`chosen` and `rejected` are equal"),
    ({**GOOD, "chosen": [BLUE]}, "must both be text or both be lists of messages"),
    ({"chosen": [USER, BLUE, USER, BLUE], "rejected": [USER, GREEN, USER, GREEN]}, "`chosen` must be one assistant message after the prompt, got 3"),
    ({"prompt": [USER], "chosen": [USER], "rejected": [BLUE]}, "`chosen` must be one assistant message"),
    ({**GOOD, "chosen_score": "high", "rejected_score": 1}, "`chosen_score` must be a number, got str 'high'"),
    ({**GOOD, "chosen_score": True, "rejected_score": 0}, "`chosen_score` must be a number, got bool"),
    ({**GOOD, "chosen_score": math.nan, "rejected_score": 1}, "`chosen_score` must be a finite number, got nan"),
    ({**GOOD, "chosen_score": 1, "rejected_score": -math.inf}, "`rejected_score` must be a finite number, got -inf"),
    ({**GOOD, "chosen_score": 1}, "no `rejected_score`; give both scores or neither"),
    ({**GOOD, "chosen_score": 1, "rejected_score": 2}, "`chosen_score` 1 is below `rejected_score` 2"),
    ({**GOOD, "chosen_truncated": "yes"}, "`chosen_truncated` must be true or false, got str 'yes'"),
    ({**GOOD, "source_model": 7}, "`source_model` must be text, got int"),
    ({**GOOD, "chosen": "bad \ud800 text"}, "`chosen` has an unpaired surrogate at character 4"),
    ({"instruction": "q", "completions": ["a"]}, "`completions` must be a list of objects"),
    ({**GOOD, "prompt": [USER, {**BLUE, "tool_calls": [{"name": "look"}]}, USER]}, "`prompt[1]` has `tool_calls` beside `content`, and only"),
    ({"prompt": [USER], "chosen": [{**BLUE, "reasoning_content": "Why?"}], "rejected": [GREEN]}, "`chosen[0]` has `reasoning_content` beside"),
    ({"prompt": [USER], "chosen": [BLUE], "rejected": [{**GREEN, "thinking": "Hm"}]}, "`rejected[0]` has `thinking` beside `content`"),
    ({**GOOD, "prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "`prompt[0]` needs `content` as text, got list"),
]


@pytest.mark.parametrize(("columns", "message"), BAD_ROWS)
def test_a_bad_row_names_file_line_and_fault(tmp_path, columns, message):
    path = write_jsonl(tmp_path / "pairs.jsonl", [*text_pairs(2), columns])
    with pytest.raises(InputError) as error:
        load_preferences(PreferenceData(path=path), "error")
    assert str(error.value).startswith(f"{path}:3: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_skipped_rows_are_counted_by_fault(tmp_path):
    rows = text_pairs(20)
    rows[4] = {"prompt": "p", "chosen": "c"}
    rows[6] = {"prompt": "p", "chosen": "c", "extra": "e"}
    rows[8] = {**rows[8], "chosen_score": 1, "rejected_score": 2}
    rows[9] = {**rows[9], "chosen_score": 3.5, "rejected_score": 11}
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, rows)
    path.write_bytes(path.read_bytes() + b"\xff\n")
    sets = load_preferences(PreferenceData(path=str(path)), "skip")
    assert len(sets.train) + len(sets.heldout) == 16
    assert sets.notes == [
        f"{path}: left out 5 of 21 rows: bad (data.on_bad_row skip), with 3 faults",
        f"{path}:5: no `rejected`; the row has prompt, chosen (2 such rows)",
        f"{path}:9: `chosen_score` 1 is below `rejected_score` 2; swap the responses or leave the scores out (2 such rows)",
        f"{path}:21: not UTF-8 at byte 0; save the file as UTF-8",
    ]


def test_repeated_pairs_stay_and_are_told(tmp_path):
    rows = text_pairs(20)
    path = write_jsonl(tmp_path / "pairs.jsonl", [*rows, rows[3], {**rows[3], "rejected": " other"}, rows[5], rows[3]])
    sets = load_preferences(PreferenceData(path=path), "error")
    assert len(sets.train) + len(sets.heldout) == 24
    assert sets.notes == [f"{path}: kept 3 of 24 pairs: exact repeats of an earlier one, which count again; the first is {path}:21"]
    assert load_preferences(PreferenceData(path=write_jsonl(tmp_path / "once.jsonl", rows)), "error").notes == []


def test_an_empty_or_wholly_bad_set_is_an_error(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(InputError, match="empty.jsonl: no rows; the data set is empty"):
        load_preferences(PreferenceData(path=str(empty)), "skip")
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "p"}] * 3)
    with pytest.raises(InputError, match="all 3 rows are bad; the first is .*bad.jsonl:1: no `chosen`"):
        load_preferences(PreferenceData(path=bad), "skip")


# --------------------------------------------------------------------------------------------------------- split


def test_heldout_prompts_never_appear_in_training(tmp_path):
    rows = [{"prompt": f"Question {i // 3}?", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(300)]
    sets = load_preferences(PreferenceData(path=write_jsonl(tmp_path / "pairs.jsonl", rows), heldout_fraction=0.2), "error")
    train, heldout = {pair.prompt for pair in sets.train}, {pair.prompt for pair in sets.heldout}
    assert not train & heldout
    assert len(train) + len(heldout) == 100
    assert 10 <= len(heldout) <= 30
    assert len(sets.heldout) == 3 * len(heldout)


prompts = st.lists(st.text(alphabet="abc \n", min_size=1, max_size=4).filter(str.strip), min_size=2, max_size=40)


@given(prompts, st.floats(0.05, 0.8), st.randoms(use_true_random=False))
def test_the_split_ignores_row_order_and_keeps_prompts_apart(texts, fraction, rng):
    pairs = [PreferencePair(text, f"c{i}", "r") for i, text in enumerate(texts)]
    if len({pair.key for pair in pairs}) < 2 or all(is_heldout(pair.key, fraction) for pair in pairs):
        with pytest.raises(InputError):
            split_by_prompt(pairs, fraction)
        return
    train, heldout = split_by_prompt(pairs, fraction)
    assert heldout and train
    assert not {pair.key for pair in train} & {pair.key for pair in heldout}
    assert sorted(pair.chosen for pair in train + heldout) == sorted(pair.chosen for pair in pairs)
    rng.shuffle(pairs)
    again_train, again_heldout = split_by_prompt(pairs, fraction)
    assert {pair.key for pair in heldout} == {pair.key for pair in again_heldout}
    assert {pair.key for pair in train} == {pair.key for pair in again_train}


def test_a_prompt_keeps_its_side_when_the_set_grows_and_when_the_fraction_rises():
    pairs = [PreferencePair(f"Question {i}?", "c", "r") for i in range(1000)]
    _, heldout = split_by_prompt(pairs, 0.1)
    _, of_half = split_by_prompt(pairs[:500], 0.1)
    _, of_more = split_by_prompt(pairs, 0.3)
    assert {pair.key for pair in of_half} <= {pair.key for pair in heldout} <= {pair.key for pair in of_more}
    assert 70 < len(heldout) < 130


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("What  is\nit? ", "what is it?", True),
        ("Caf\u00e9?", "Cafe\u0301?", True),
        ("What is it?", [{"role": "user", "content": "What is it?"}], True),
        ("What is it?", [{"role": "system", "content": "What is it?"}], False),
        ("What is it?", "What is it", False),
        ([USER, BLUE, USER], [USER, GREEN, USER], False),
    ],
)
def test_prompt_keys(one, other, equal):
    assert (prompt_key(one) == prompt_key(other)) is equal


def test_heldout_file_is_used_as_it_is_and_its_overlap_reported(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", text_pairs(10))
    heldout = write_jsonl(tmp_path / "heldout.jsonl", text_pairs(12)[8:])
    sets = load_preferences(PreferenceData(path=train, heldout_path=heldout), "error")
    assert (len(sets.train), len(sets.heldout)) == (10, 4)
    assert sets.notes == [f"{train}: 2 of 4 held-out prompts are training prompts too; held-out results are too good"]
    limited = load_preferences(PreferenceData(path=train, heldout_path=heldout, limit=9), "error")
    assert limited.notes[1] == f"{train}: 1 of 4 held-out prompts is a training prompt too; held-out results are too good"


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"heldout_split": "test"}, "data.preferences.heldout_split: .* is a single file and has no splits"),
        ({"heldout_path": "train.jsonl"}, "the held-out set is the training set"),
        ({"split": "test"}, "data.preferences.split is test, but train.jsonl is a single file and has no splits"),
    ],
)
def test_a_heldout_set_that_cannot_be_is_refused(tmp_path, monkeypatch, settings_, message):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "train.jsonl", text_pairs(3))
    with pytest.raises(InputError, match=message):
        load_preferences(PreferenceData(path="train.jsonl", **settings_), "error")


def test_too_few_prompts_to_split(tmp_path):
    path = write_jsonl(tmp_path / "one.jsonl", [{"prompt": "p", "chosen": f"c{i}", "rejected": "r"} for i in range(5)])
    with pytest.raises(InputError, match="one.jsonl: 1 distinct prompt cannot be split"):
        load_preferences(PreferenceData(path=path), "error")
    two = write_jsonl(tmp_path / "two.jsonl", text_pairs(2))
    assert len(load_preferences(PreferenceData(path=two, heldout_fraction=0.001), "error").heldout) == 1


def test_limit_and_min_score_gap(tmp_path):
    rows = [{**row, "chosen_score": 1.0, "rejected_score": 1.0 - 0.1 * (i % 3)} for i, row in enumerate(text_pairs(60))]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    everything = load_preferences(PreferenceData(path=path), "error")
    apart = load_preferences(PreferenceData(path=path, min_score_gap=0.15, limit=5), "error")
    assert len(everything.train) + len(everything.heldout) == 60
    assert len(apart.train) == 5
    assert all(pair.score_gap > 0.15 for pair in apart.train + apart.heldout)
    assert [pair.where for pair in apart.train] == [pair.where for pair in everything.train if pair.score_gap > 0.15][:5]
    far = [pair.where for pair in everything.train if pair.score_gap > 0.15]
    assert everything.notes == [] and apart.notes == [
        f"{path}: left out 40 of 60 pairs: the scores are closer than data.preferences.min_score_gap 0.15; the first is {path}:1",
        f"{path}: left out {len(far) - 5} of {len(far)} training pairs: data.preferences.limit is 5; the first is {far[5]}",
    ]

    unscored = write_jsonl(tmp_path / "unscored.jsonl", text_pairs(20))
    with pytest.raises(InputError, match=r"min_score_gap: .*unscored.jsonl has no scores"):
        load_preferences(PreferenceData(path=unscored, min_score_gap=0.1), "error")
    with pytest.raises(InputError, match="in every pair the scores tie or are closer"):
        load_preferences(PreferenceData(path=path, min_score_gap=9.0), "error")


# --------------------------------------------------------------------------------------------------- fingerprint


@settings(max_examples=25)
@given(st.randoms(use_true_random=False))
def test_fingerprint_ignores_order_and_source(rng):
    pairs = [parse_pair(row, f"f:{i}") for i, row in enumerate(text_pairs(8, chosen_score=1, rejected_score=0))]
    moved = [parse_pair(row, "elsewhere") for row in text_pairs(8, chosen_score=1, rejected_score=0)]
    rng.shuffle(moved)
    assert dataset_fingerprint(pairs) == dataset_fingerprint(moved)


def test_fingerprint_sees_every_part():
    base = {"prompt": "p", "chosen": "c", "rejected": "r", "chosen_score": 1.0, "rejected_score": 0.0, "source_model": "m"}
    changes = [{"prompt": "q"}, {"chosen": "d"}, {"rejected": "s"}, {"chosen_score": 2.0}, {"source_model": "n"}, {"rejected_truncated": True}]
    prints = [dataset_fingerprint([parse_pair({**base, **change}, "")]) for change in [{}, *changes]]
    prints.append(dataset_fingerprint([parse_pair(base, "")] * 2))
    assert len(set(prints)) == len(prints)
    assert all(len(value) == 64 for value in prints)


# ----------------------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize(("name", "count"), [("helpful.train", 1639), ("helpful.dev", 233), ("harmless.train", 1611), ("harmless.dev", 230)])
def test_all_of_the_hh_pairs_load(hh_pairs, name, count):
    sets = load_preferences(PreferenceData(path=str(hh_pairs / f"{name}.jsonl")), "error")
    assert len(sets.train) + len(sets.heldout) == count
    assert 0.05 < len(sets.heldout) / count < 0.15
    pair = random.Random(0).choice(sets.train)
    assert pair.prompt[-1]["role"] == "user"
    assert [message["role"] for message in pair.chosen] == ["assistant"]
