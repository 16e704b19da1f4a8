"""From text to token ids: chat templates and plain text, ends of responses, and what happens to rows that are too long.

Four rules hold for every row (each has a property test):

    the prompt has the ids that the rollout engine gets: a response is tokenised as the continuation of its prompt;
    the response has the text of the data, as a sampled response has the text of the model, whatever a chat template makes of it;
    a finished response ends with exactly one end token, whatever the padding token is, and a cut-off one has none;
    the beginning-of-text token is there once, by the chat template or by the tokenizer, not by both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NoReturn

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.config.arithmetic import counted
from dvpo_ray.config.schema import DataConfig
from dvpo_ray.data.chat import ANCHOR, PROBE, Answers, Turn, left_out_message, over_limit, probe_turn, render, special_tokens
from dvpo_ray.data.preferences import PreferencePair
from dvpo_ray.data.prompts import Prompt
from dvpo_ray.data.rows import Content, Messages, content_text, count_note
from dvpo_ray.errors import InputError


@dataclass(frozen=True)
class EncodedPair:
    """A preference pair as token ids.

    Attributes:
        prompt: ids of the prompt, at least one, with the generation prompt of a chat template.
        chosen: ids that continue the prompt; the last one is the end token unless `chosen_truncated`.
        rejected: likewise.
        chosen_truncated: the response was cut off, in the data or by `data.long_response`.
        rejected_truncated: likewise.
        chosen_score: outcome of the chosen response, where the data has scores.
        rejected_score: likewise.
        where: label of the pair's row.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    chosen_truncated: bool
    rejected_truncated: bool
    chosen_score: float | None
    rejected_score: float | None
    where: str


def rows_of_pairs(pairs: Sequence[EncodedPair]) -> RaggedBatch:
    """Two rows for each pair: the chosen response in row 2i and the rejected one in row 2i + 1."""
    return RaggedBatch.from_rows(
        prompts=[pair.prompt for pair in pairs for _ in range(2)],
        responses=[ids for pair in pairs for ids in (pair.chosen, pair.rejected)],
        truncated=[cut for pair in pairs for cut in (pair.chosen_truncated, pair.rejected_truncated)],
    )


_Cut = tuple[list[int], bool]
"""Ids of a response, and whether it has no end token because it was cut off."""

_DROPPED = ("long_prompt", "long_response", "chat_template", "empty", "equal")
_TRUNCATED = ("long_prompt", "long_response")
_NOTED = ("response", "message", "reasoning", "special")
_REASONS = {
    "long_response": "the response is over data.max_response_tokens {max_response_tokens}",
    "chat_template": "the chat template refuses the messages",
    "empty": "a cut-off response has no tokens",
    "equal": "both responses have the same tokens",
    "response": "the chat template changes a response (for example removes text), which is encoded as it is",
    "message": "the chat template leaves out or changes a message of the prompt, in rollouts too",
    "reasoning": "the generation prompt opens a reasoning that a response lacks, which is encoded as its continuation",
    "special": "special tokens that are written out in a response are encoded as text",
}
"""Why rows are dropped, shortened, or kept in a form that the user should know of."""


class Dropped(Exception):
    """The settings leave this row out."""


@dataclass(frozen=True)
class _PromptIds:
    """An encoded prompt, and what its responses need of it.

    Attributes:
        ids: ids after any truncation.
        text: the text as it was tokenised.
        border: the end of the text that a continuation might merge with.
        border_ids: ids of `border`, the last ones of the text's ids.
        messages: the messages behind the text, of a chat prompt.
    """

    ids: list[int]
    text: str
    border: str
    border_ids: list[int]
    messages: Messages | None = None


class Encoder:
    """Token ids of prompts and preference pairs for one tokenizer.

    Attributes:
        is_chat: whether prompts go through the tokenizer's chat template.
        end_token_id: the id that ends every finished response.
        stop_token_ids: ids at which a rollout ends: the end token, the tokenizer's EOS and the checkpoint's own list.
        dropped: labels of the rows left out so far, by reason: `long_prompt`, `long_response`, `chat_template` (the template
            refuses the messages), `empty` (a cut-off response without a token), `equal` (both responses have the same ids, for
            example after truncation).
        truncated: labels of the rows shortened so far, by `long_prompt` and `long_response`.
        noted: labels of the rows kept so far whose `response` or prompt's `message` the chat template changes, whose response lacks
            the `reasoning` that the generation prompt opens, or has `special` tokens written out.
        rows: rows encoded or dropped so far.
        longest_prompt: tokens of the longest prompt so far, before it was shortened.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig, chat_template: str, context_tokens: int) -> None:
        """
        Args:
            tokenizer: of the policy, which the GVM shares.
            data: length limits and what happens to longer rows.
            chat_template: `auto` uses the tokenizer's chat template if there is one; `plain` joins texts as they are.
            context_tokens: limit of prompt and response together.

        Raises:
            InputError: the tokenizer has no EOS token.
        """
        if tokenizer.eos_token_id is None:
            raise InputError(f"{tokenizer.name_or_path}: the tokenizer has no EOS token; set eos_token in its tokenizer_config.json")
        self.tokenizer = tokenizer
        self.data = data
        self.context_tokens = context_tokens
        self.is_chat = chat_template == "auto" and bool(tokenizer.chat_template)
        self.dropped: dict[str, list[str]] = {reason: [] for reason in _DROPPED}
        self.truncated: dict[str, list[str]] = {reason: [] for reason in _TRUNCATED}
        self.noted: dict[str, list[str]] = {reason: [] for reason in _NOTED}
        self.rows = 0
        self.longest_prompt = 0
        self._marks: dict[tuple[str, str], str] = {}  # of the row at work: what is to be counted once the row is kept
        self._special = special_tokens(tokenizer)
        self._anchor_ids = self._ids(ANCHOR)
        self._text_prefix = self._added_before_text()
        self._turn = probe_turn(tokenizer) if self.is_chat else Turn("", "", tokenizer.eos_token, tokenizer.eos_token_id, "")
        self._answers = Answers(tokenizer, self._turn, self._special)
        self._special_lead = self._continuation_ids(self._turn.lead) if self._special.search(self._turn.lead) else []
        self.end_token_id = self._turn.end_id
        self.stop_token_ids = {self.end_token_id, tokenizer.eos_token_id, *_generation_stop_ids(tokenizer.name_or_path)}

    # ---------------------------------------------------------------------------------------------------- public

    def encode_prompt(self, prompt: Prompt) -> list[int] | None:
        """Ids of a prompt, ready for a response; None if the settings drop it.

        Raises:
            InputError: it is too long and `data.long_prompt` is "error", or it leaves no room in the context.
        """
        encoded = self._encode(prompt.content, [], prompt.where)
        return encoded and encoded[0]

    def encode_pair(self, pair: PreferencePair) -> EncodedPair | None:
        """Ids of a preference pair; None if the settings drop it.

        Raises:
            InputError: a part is too long and the setting for it is "error", or the row does not fit the context.
        """
        responses = [(pair.chosen, pair.chosen_truncated), (pair.rejected, pair.rejected_truncated)]
        encoded = self._encode(pair.prompt, responses, pair.where)
        if encoded is None:
            return None
        prompt, [(chosen, chosen_cut), (rejected, rejected_cut)] = encoded
        return EncodedPair(prompt, chosen, rejected, chosen_cut, rejected_cut, pair.chosen_score, pair.rejected_score, pair.where)

    def encode_answer(self, prompt: Content, answer: Content, where: str, truncated: bool = False) -> tuple[list[int], list[int]] | None:
        """Ids of a prompt and of its answer, with the end token unless it was cut off; None if the settings drop it.

        Raises:
            InputError: as in `encode_pair`.
        """
        encoded = self._encode(prompt, [(answer, truncated)], where)
        return encoded and (encoded[0], encoded[1][0][0])

    def encode_text(self, text: str) -> list[int]:
        """Ids of a whole text that is learned without a prompt, with the beginning-of-text and the end token once each."""
        self.rows += 1
        return [*self._plain_prompt(self._without_end(text)).ids, self.end_token_id]

    def _encode(self, prompt: Content, responses: Sequence[tuple[Content, bool]], where: str) -> tuple[list[int], list[_Cut]] | None:
        """Ids of a prompt, and ids of its responses with whether each was cut off; None if the settings drop the row."""
        self.rows += 1
        self._marks = {}
        try:
            encoded = self._prompt(prompt, where)
            answers = [self._response(encoded, content, truncated, where) for content, truncated in responses]
            if len(answers) == 2 and answers[0][0] == answers[1][0]:
                self._drop("equal", where)
        except Dropped:
            return None
        for (kind, reason), label in self._marks.items():
            getattr(self, kind)[reason].append(label)
        prompt_length, response_length = len(encoded.ids), max((len(ids) for ids, _ in answers), default=1)
        if prompt_length + response_length > self.context_tokens:
            raise InputError(
                f"{where}: {prompt_length} prompt and {response_length} response tokens exceed the model's context of {self.context_tokens}; "
                "lower data.max_prompt_tokens or data.max_response_tokens"
            )
        return encoded.ids, answers

    def notes(self, rows: str, long_prompt: str | None = None) -> list[str]:
        """One line for each reason why rows were dropped, shortened or kept in a form that the user should know of.

        Args:
            rows: what the rows are called, in the plural.
            long_prompt: what is said of a prompt over the limit, if that is not `data.max_prompt_tokens`.
        """
        over = over_limit(self.data.max_prompt_tokens, self.longest_prompt, self.template_tokens)
        reasons = {**_REASONS, "long_prompt": long_prompt or over}
        return [
            line
            for start, counted in (("left out", self.dropped), ("shortened", self.truncated), ("kept", self.noted))
            for reason, labels in counted.items()
            for line in count_note(start, labels, self.rows, rows, reasons[reason].format(**self.data.model_dump()))
        ]

    @property
    def template_tokens(self) -> int:
        """Tokens of the chat template's own in a prompt of one message; 0 without a template."""
        if not self.is_chat:
            return 0
        return len(self._ids(render(self.tokenizer, [{"role": "user", "content": PROBE}], generation_prompt=True))) - len(self._ids(PROBE))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response, exactly as it continues the prompt, without special tokens and without the template's own text."""
        kept = [token for token in ids if token not in self.stop_token_ids]
        lead = self._special_lead
        text = self._text(kept[len(lead) :]) if lead and kept[: len(lead)] == lead else self._text(kept).removeprefix(self._turn.lead)
        return text.removesuffix(self._turn.close) if len(kept) < len(ids) else text

    def texts(self, ids: Sequence[int]) -> list[str]:
        """The texts whose encoding may give these ids of a sampled response: the decoded one, and one that begins with what the
        generation prompt begins of the answer. The second is for a reasoning that was cut off."""
        text = self.decode(ids)
        return [text, self._turn.prefill + text] if self._turn.prefill else [text]

    # -------------------------------------------------------------------------------------------------- tokenizer

    def _ids(self, text: str, **options) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, **options)["input_ids"]

    def _continuation_ids(self, text: str, **options) -> list[int]:
        """Ids of a text that follows another one, without the space that some tokenizers put before a text."""
        ids = self._ids(ANCHOR + text, **options)
        anchor = len(self._anchor_ids)
        return ids[anchor:] if ids[:anchor] == self._anchor_ids else self._ids(text, **options)

    def _text(self, ids: Sequence[int]) -> str:
        """Text of ids that follow others, with the leading space that is lost when they are decoded alone."""
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        anchor = self.tokenizer.decode(self._anchor_ids, **options)
        return self.tokenizer.decode([*self._anchor_ids, *ids], **options).removeprefix(anchor)

    def _added_before_text(self) -> list[int]:
        """Ids that the tokenizer itself puts before a text (BOS, or none)."""
        alone, whole = self._ids(PROBE), self.tokenizer(PROBE)["input_ids"]
        start = next(i for i in range(len(whole)) if whole[i : i + len(alone)] == alone)
        return whole[:start]

    # ----------------------------------------------------------------------------------------------------- prompts

    def _prompt(self, content: Content, where: str) -> _PromptIds:
        if self.is_chat:
            prompt = self._chat_prompt([{"role": "user", "content": content}] if isinstance(content, str) else content, where)
        else:
            prompt = self._plain_prompt(content)
        self.longest_prompt = max(self.longest_prompt, len(prompt.ids))
        if self._is_over("prompt", prompt.ids, where):
            prompt = self._shorten_chat(prompt, where) if self.is_chat else self._shorten_plain(prompt)
        role = left_out_message(prompt.messages, prompt.text) if self.is_chat else None
        if role is not None:
            self._marks["noted", "message"] = f"{where} ({role} message)"
        return prompt

    def _chat_prompt(self, messages: Messages, where: str) -> _PromptIds:
        try:
            text = render(self.tokenizer, messages, generation_prompt=True)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            self._refuse("chat_template", where, f"the chat template refuses messages with the roles {roles} ({error})")
        ids = self._ids(text)
        return _PromptIds(ids, text, *self._border(text, ids), messages)

    def _plain_prompt(self, content: Content) -> _PromptIds:
        text = content if isinstance(content, str) else content_text(content) + "\n"
        ids = self._ids(text)
        border = self._border(text, ids)
        has_prefix = ids[: len(self._text_prefix)] == self._text_prefix
        return _PromptIds(ids if has_prefix else self._text_prefix + ids, text, *border)

    def _border(self, text: str, ids: list[int]) -> tuple[str, list[int]]:
        """The end of a text from its last special token on, and its ids: nothing merges across a special token."""
        border = text[max((match.start() for match in self._special.finditer(text)), default=0) :]
        border_ids = self._ids(border)
        return (border, border_ids) if ids[len(ids) - len(border_ids) :] == border_ids else (text, ids)

    def _shorten_plain(self, prompt: _PromptIds) -> _PromptIds:
        """Keep the BOS token and the last tokens of the text."""
        start, limit = self._text_prefix, self.data.max_prompt_tokens
        return replace(prompt, ids=(start + prompt.ids[len(prompt.ids) - limit + len(start) :])[:limit])

    def _shorten_chat(self, prompt: _PromptIds, where: str) -> _PromptIds:
        """Leave out the oldest turns until the rest fits. If the last turn alone is too long, leave out the start of its text.

        A system message stays, and the first turn that stays is a user's, so that the template's form is kept.
        """
        messages = prompt.messages
        system = messages[:1] if messages[0]["role"] == "system" and len(messages) > 1 else []
        turns = messages[len(system) :]
        for start in range(1, len(turns)):
            if turns[start]["role"] == "user":
                prompt = self._chat_prompt([*system, *turns[start:]], where)
                if len(prompt.ids) <= self.data.max_prompt_tokens:
                    return prompt
        return self._shorten_last_turn(prompt, where)

    def _shorten_last_turn(self, prompt: _PromptIds, where: str) -> _PromptIds:
        *earlier, last = prompt.messages
        content = self._ids(last["content"])
        kept = len(content)
        while (excess := len(prompt.ids) - self.data.max_prompt_tokens) > 0:
            kept -= excess
            if kept <= 0:
                without = f"data.max_prompt_tokens {self.data.max_prompt_tokens} even without its last turn's text"
                self._refuse("long_prompt", where, f"the prompt exceeds {without} (the chat template alone takes {self.template_tokens}); raise it")
            # A cut within a character leaves a replacement character at the start.
            text = self._text(content[-kept:]).lstrip("\ufffd")
            prompt = self._chat_prompt([*earlier, {**last, "content": text}], where)
        return prompt

    # --------------------------------------------------------------------------------------------------- responses

    def _response(self, prompt: _PromptIds, response: Content, truncated: bool, where: str) -> _Cut:
        content = self._without_end(content_text(response))
        lead, text, noted = self._answers.text(prompt.text, prompt.messages, content) if self.is_chat else ("", content, [])
        for reason in noted:
            self._marks["noted", reason] = where
        if self._special.search(text):
            self._marks["noted", "special"] = where
        ids = self._body_ids(prompt, lead, text, "" if truncated else self._turn.close)
        if not truncated:
            ids = [*ids, self.end_token_id]
        if not ids:
            self._refuse("empty", where, "a response that is marked as truncated has no tokens")
        return (ids[: self.data.max_response_tokens], True) if self._is_over("response", ids, where) else (ids, truncated)

    def _without_end(self, content: str) -> str:
        """The content without end tokens at its end that the data has written out as text."""
        ends = (self._turn.end, self.tokenizer.eos_token)
        while (stripped := content.rstrip()).endswith(ends):
            content = next(stripped.removesuffix(end) for end in ends if stripped.endswith(end))
        return content

    def _body_ids(self, prompt: _PromptIds, lead: str, text: str, close: str) -> list[int]:
        """Ids of a response's text, with what the template writes around it, as the continuation of the prompt's ids.

        It is tokenised together with the prompt if that leaves the prompt's ids as they are, and apart if a merge would
        cross the border. Special tokens that the data has written out inside a response are text, not tokens.
        """
        if self._special.search(text):
            return self._continuation_ids(lead) + self._continuation_ids(text + close, split_special_tokens=True)
        together = self._ids(prompt.border + lead + text + close)
        start = len(prompt.border_ids)
        return together[start:] if together[:start] == prompt.border_ids else self._continuation_ids(lead + text + close)

    # ------------------------------------------------------------------------------------------------------- rows

    def _is_over(self, part: Literal["prompt", "response"], ids: list[int], where: str) -> bool:
        """Whether a part is too long and must be shortened. `data.long_prompt` and `data.long_response` may drop it or make it an error."""
        limit, setting = getattr(self.data, f"max_{part}_tokens"), getattr(self.data, f"long_{part}")
        if len(ids) <= limit:
            return False
        if setting == "error":
            other = "truncate_left" if part == "prompt" else "truncate"
            raise InputError(
                f"{where}: the {part} has {counted(len(ids), 'token')}, data.max_{part}_tokens is {limit}; raise it or set "
                f"data.long_{part} to {other} or drop"
            )
        if setting == "drop":
            self._drop(f"long_{part}", where)
        self._marks["truncated", f"long_{part}"] = where
        return True

    def _refuse(self, reason: str, where: str, message: str) -> NoReturn:
        """Treat a row that cannot be encoded as `data.on_bad_row` says."""
        if self.data.on_bad_row == "skip":
            self._drop(reason, where)
        raise InputError(f"{where}: {message}")

    def _drop(self, reason: str, where: str) -> NoReturn:
        self.dropped[reason].append(where)
        raise Dropped(reason)


def _generation_stop_ids(model_path: str) -> list[int]:
    """EOS ids of the checkpoint's generation config, if it has one."""
    try:
        eos = GenerationConfig.from_pretrained(model_path).eos_token_id
    except OSError:  # no generation config there
        return []
    return [] if eos is None else eos if isinstance(eos, list) else [eos]
