"""What a chat template makes of the text that is trained on, on any day and any machine."""

import locale
import re
import time
from datetime import datetime

import pytest
from chat_templates import LONG, LONG_TEXT, SHORT, ZOO, build, byte_level, encoder, limits, message, pair
from conftest import CHAT_TEMPLATE
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from dvpo_ray.data import chat
from dvpo_ray.data.chat import TODAY, fixed_date
from dvpo_ray.data.encoding import Encoder
from dvpo_ray.data.prompts import Prompt
from dvpo_ray.errors import InputError

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
