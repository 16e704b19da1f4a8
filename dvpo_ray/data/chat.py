"""How a tokenizer's chat template writes an assistant's turn, found by rendering a probe."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from dvpo_ray.config.arithmetic import counted
from dvpo_ray.data.rows import Messages
from dvpo_ray.errors import InputError

if TYPE_CHECKING:  # a dry run renders templates too, and transformers takes seconds
    from transformers import PreTrainedTokenizerBase

PROBE = "dvpo-probe"
ANCHOR = "\n"
"""No merge rule joins this text to what follows it. Tokenised before a continuation, it keeps a tokenizer of the SentencePiece kind from
putting its leading space there."""

TODAY = datetime(2024, 7, 26)
"""The date that every template writes, whatever the day: the default of the Llama 3 family. A fixed date keeps runs repeatable."""
_BY_LOCALE = {
    "a": "Fri",
    "A": "Friday",
    "b": "Jul",
    "B": "July",
    "h": "Jul",
    "c": "Fri Jul 26 00:00:00 2024",
    "x": "07/26/24",
    "X": "00:00:00",
    "p": "AM",
    "P": "am",
    "r": "12:00:00 AM",
    "s": "1721952000",
    "z": "",
    "Z": "",
}
"""What the codes of `strftime` that follow the locale or the time zone give for `TODAY` in the C locale and in UTC."""

_TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_OPENING_TAG_AT_END = re.compile(r"(?:<(?!/)[^<>|｜\s]+>|\[(?!/)[^\[\]\s]+\])\s*\Z")


def fixed_date(pattern: str) -> str:
    """`TODAY` in the form of a `strftime` pattern, in English on every machine.

    transformers gives templates a `strftime_now` that writes the present day in the machine's language; this takes its place.
    """

    def in_english(code: re.Match) -> str:
        flag, letter = code.groups()
        text = _BY_LOCALE.get(letter)
        if text is None:
            return f"%{flag}{letter}"  # without the modifiers E and O, which ask for the locale's own form
        return text.upper() if flag == "^" else text

    return TODAY.strftime(re.sub(r"%([-_0^#]?)[EO]?([A-Za-z%])", in_english, pattern))


TEMPLATE_ARGUMENTS = {"date_string": fixed_date("%d %b %Y"), "strftime_now": fixed_date}
"""What a template would otherwise take from the day, the machine or its language."""


@dataclass(frozen=True)
class Turn:
    """How an assistant's turn looks: `lead` + content + `tail`. Its ids end with the end token, before the rest of `tail`.

    Attributes:
        lead: the template's text between the generation prompt and the content, often empty. Some templates write an empty
            reasoning there.
        close: text between the content and the end token, often empty.
        end: text of the end token.
        end_id: id of the end token.
        tail: all text after the content: `close`, `end`, and what may follow it.
        prefill: what the generation prompt begins of the answer itself, often empty (`<think>` and a line break).
        asks_reasoning: `prefill` opens a reasoning that the template does not write before an answer without one.
    """

    lead: str
    close: str
    end: str
    end_id: int
    tail: str
    prefill: str = ""
    asks_reasoning: bool = False

    def after_prefill(self, content: str) -> str | None:
        """The rest of an answer that begins with `prefill`; None where it does not. White space around a tag does not count."""
        if self.prefill and content.startswith(self.prefill):
            return content.removeprefix(self.prefill)
        tag, begun = self.prefill.strip(), content.lstrip()
        if not _TAG.fullmatch(tag) or not begun.startswith(tag):
            return None
        start = self.prefill.lstrip()
        return begun.removeprefix(start if begun.startswith(start) else tag)

    def lacks_reasoning(self, content: str) -> bool:
        """Whether an answer that does not begin with `prefill` goes on from it without the reasoning that it opens."""
        tag = self.prefill.strip()
        return self.asks_reasoning and f"{tag[0]}/{tag[1:]}" not in content


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, generation_prompt: bool) -> str:
    """The text of a dialogue; with `generation_prompt` it ends where the assistant's next answer begins.

    The text is the same on every day and every machine.

    Raises:
        TemplateError: the template refuses these messages.
    """
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt, **TEMPLATE_ARGUMENTS)


def over_limit(limit: int, longest: int, template: int, part: str = "prompt") -> str:
    """Why prompts or responses are shortened, left out or refused, and the remedy.

    Args:
        limit: `data.max_<part>_tokens`.
        longest: tokens of the longest one.
        template: tokens of the chat template's own in a prompt of one message; 0 without a template.
        part: `prompt` or `response`.
    """
    own = f", and the chat template alone takes {template}" if template else ""
    key, tokens = f"data.max_{part}_tokens", counted(longest, "token")
    return f"the {part} is over {key} {limit}; the longest has {tokens}{own}; {key}={longest} keeps all whole"


def writes_itself(content: str, lead: str) -> bool:
    """Whether an answer has the reasoning that a template's lead is there for: it begins with the lead's first tag or has its last."""
    tags = _TAG.findall(lead)
    return bool(tags) and (content.lstrip().startswith(tags[0]) or tags[-1] in content)


def left_out_message(messages: Messages, text: str) -> str | None:
    """The role of a message whose content is not in a rendered text as it is, apart from white space at its ends; else None.

    The longest contents are looked for first, of equal ones the last, and each place counts for one message.
    """
    for message in sorted(reversed(messages), key=lambda message: len(message["content"]), reverse=True):
        content = message["content"].strip()
        if content and content not in text:
            return message["role"]
        if content:
            text = text.replace(content, "\0", 1)
    return None


def probe_turn(tokenizer: PreTrainedTokenizerBase) -> Turn:
    """What the template writes around an assistant's answer, and which token ends it: the first added token after the answer.

    Raises:
        InputError: the template cannot write a question and its answer.
    """
    question = [{"role": "user", "content": "?"}]
    try:
        opening = render(tokenizer, question, generation_prompt=True)
        dialogue = render(tokenizer, [*question, {"role": "assistant", "content": PROBE}], generation_prompt=False)
        if PROBE not in dialogue:
            raise ValueError("it leaves out the text of the answer")
    except (TemplateError, ValueError) as error:
        name = tokenizer.name_or_path
        raise InputError(f"{name}: the chat template cannot write a question and its answer ({error}); use model.chat_template: plain") from error
    before, tail = dialogue.rsplit(PROBE, 1)
    lead = before.removeprefix(opening) if before.startswith(opening) else ""
    is_longer = opening.startswith(before) and opening != before
    prefill = opening.removeprefix(before) if is_longer else _opening_tag(opening, tokenizer)
    asks_reasoning = is_longer and bool(_opening_tag(prefill, tokenizer))
    end = _any_of([str(token) for token in tokenizer.added_tokens_decoder.values()]).search(tail)
    if end is None:
        return Turn(lead, "", tokenizer.eos_token, tokenizer.eos_token_id, tail, prefill, asks_reasoning)
    return Turn(lead, tail[: end.start()], end.group(), tokenizer.convert_tokens_to_ids(end.group()), tail, prefill, asks_reasoning)


@dataclass(frozen=True)
class Answers:
    """What a tokenizer's chat template writes around answers.

    Attributes:
        turn: of `probe_turn`.
        special: of `special_tokens`.
    """

    tokenizer: PreTrainedTokenizerBase
    turn: Turn
    special: re.Pattern

    def text(self, prompt: str, messages: Messages, content: str) -> tuple[str, str, list[str]]:
        """What follows the prompt's text up to `close`: the template's own text, then the content.

        The content stays as it is, so that a response of the data and the same response sampled by the policy have the same ids.
        The template only says what it writes before this content. Two parts are not written twice: what the generation prompt
        has begun of the answer, and a reasoning that the content has itself.

        Args:
            prompt: rendered for a generation.
            messages: behind the prompt.

        Returns:
            The template's text, the content after it, and what the user should know: `response`, the template changes the content;
            `reasoning`, the content lacks the reasoning that the prompt opens.
        """
        turn = self.turn
        opening = prompt.removesuffix(turn.prefill)
        has_prefill = prompt.endswith(turn.prefill)
        dialogue = self._dialogue(messages, content)
        start = len(dialogue) - len(content + turn.tail)
        is_kept = dialogue.endswith(content + turn.tail) and (start >= len(opening) or not dialogue.startswith(opening))
        before = dialogue[len(prompt) : start] if is_kept and dialogue.startswith(prompt) else None
        rest = turn.after_prefill(content) if has_prefill else None
        if rest is not None:
            lead, content = "", rest
        elif self._is_own(content, turn.lead):
            lead = "" if before is None or self._is_own(content, before) else before
        elif before in (None, turn.lead):
            lead = turn.lead
        else:  # a lead of this prompt's own, or a content whose first characters happen to be those of the template around it
            lead = self._lead(prompt, messages)
            is_kept = before == lead
        noted = [] if is_kept else ["response"]
        if rest is None and has_prefill and turn.lacks_reasoning(content):
            noted.append("reasoning")
        return lead, content, noted

    def _is_own(self, content: str, lead: str) -> bool:
        """Whether a content has itself what the tags of a lead are there for. Special tokens are no tags: in a content they are text."""
        return writes_itself(content, self.special.sub("", lead))

    def _dialogue(self, messages: Messages, content: str) -> str:
        """The prompt and an answer as the template writes them; empty if it refuses the answer."""
        try:
            return render(self.tokenizer, [*messages, {"role": "assistant", "content": content}], generation_prompt=False)
        except TemplateError:
            return ""

    def _lead(self, prompt: str, messages: Messages) -> str:
        """What the template writes between a prompt and any answer to it."""
        before, _, tail = self._dialogue(messages, PROBE).rpartition(PROBE)
        return before.removeprefix(prompt) if before.startswith(prompt) and tail == self.turn.tail else self.turn.lead


def _opening_tag(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The opening tag at the end of a text, with the white space after it; empty if there is none. A special token is not a tag."""
    tag = _OPENING_TAG_AT_END.search(text)
    return "" if tag is None or special_tokens(tokenizer).fullmatch(tag.group().strip()) else tag.group()


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern:
    """A pattern that matches each special token as text."""
    flagged = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return _any_of([*tokenizer.all_special_tokens, *flagged])


def _any_of(tokens: list[str]) -> re.Pattern:
    """A pattern that matches any of these texts, the longest first, and nothing if there are none."""
    longest_first = sorted(set(tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
