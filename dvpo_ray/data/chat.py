"""How a tokenizer's chat template writes an assistant's turn, found by rendering a probe."""

from __future__ import annotations

import re
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dvpo_ray.data.rows import Messages
from dvpo_ray.errors import InputError

PROBE = "dvpo-probe"
# Templates of the Llama 3 family write today's date into the system prompt; a fixed date keeps runs repeatable.
TEMPLATE_ARGUMENTS = {"date_string": "26 Jul 2024"}


@dataclass(frozen=True)
class Turn:
    """How an assistant's turn looks: `lead` + content + `tail`. Its ids end with the end token, before the rest of `tail`.

    Attributes:
        lead: the template's text between the generation prompt and the content, often empty.
        close: text between the content and the end token, often empty.
        end: text of the end token.
        end_id: id of the end token.
        tail: all text after the content: `close`, `end`, and what may follow it.
    """

    lead: str
    close: str
    end: str
    end_id: int
    tail: str


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, generation_prompt: bool) -> str:
    """The text of a dialogue; with `generation_prompt` it ends where the assistant's next answer begins.

    Raises:
        TemplateError: the template refuses these messages.
    """
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt, **TEMPLATE_ARGUMENTS)


def probe_turn(tokenizer: PreTrainedTokenizerBase) -> Turn:
    """What the template writes around an assistant's answer, and which token ends it: the first added token after the answer.

    Raises:
        InputError: the template cannot write a question and its answer.
    """
    question = [{"role": "user", "content": "?"}]
    try:
        opening = render(tokenizer, question, generation_prompt=True)
        dialogue = render(tokenizer, [*question, {"role": "assistant", "content": PROBE}], generation_prompt=False)
        before, tail = dialogue.rsplit(PROBE, 1)
    except (TemplateError, ValueError) as error:
        name = tokenizer.name_or_path
        raise InputError(f"{name}: the chat template cannot write a question and its answer ({error}); use model.chat_template: plain") from error
    lead = before.removeprefix(opening) if before.startswith(opening) else ""
    end = _any_of([str(token) for token in tokenizer.added_tokens_decoder.values()]).search(tail)
    if end is None:
        return Turn(lead, "", tokenizer.eos_token, tokenizer.eos_token_id, tail)
    return Turn(lead, tail[: end.start()], end.group(), tokenizer.convert_tokens_to_ids(end.group()), tail)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern:
    """A pattern that matches each special token as text."""
    flagged = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return _any_of([*tokenizer.all_special_tokens, *flagged])


def _any_of(tokens: list[str]) -> re.Pattern:
    """A pattern that matches any of these texts, the longest first, and nothing if there are none."""
    longest_first = sorted(set(tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
