"""From text to token ids: chat templates and plain text, ends of responses, and what happens to what is too long.

Three rules hold for every row (each has a property test):

    the prompt's ids are those that the rollout engine gets: the response is tokenised as their continuation;
    a finished response ends with exactly one end token, whatever the padding token is, and a cut-off one with none;
    the beginning-of-text token is there once, by the chat template or by the tokenizer, not by both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.config.schema import DataConfig
from dvpo_ray.data.chat import PROBE, Turn, probe_turn, render, special_tokens
from dvpo_ray.data.preferences import PreferencePair
from dvpo_ray.data.prompts import Prompt
from dvpo_ray.data.rows import Content, Messages, content_text
from dvpo_ray.errors import InputError

# Text that no merge rule joins to what follows it: tokenised before a continuation, it keeps a tokenizer of the
# SentencePiece kind from putting its leading space there.
ANCHOR = "\n"
DROP_REASONS = ("long_prompt", "long_response", "chat_template", "empty", "equal")


@dataclass(frozen=True)
class EncodedPair:
    """A preference pair as token ids.

    Attributes:
        prompt: ids of the prompt, at least one, the generation prompt of a chat template included.
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
    """Two rows a pair, the chosen response in row 2i and the rejected one in row 2i + 1."""
    return RaggedBatch.from_rows(
        prompts=[pair.prompt for pair in pairs for _ in range(2)],
        responses=[ids for pair in pairs for ids in (pair.chosen, pair.rejected)],
        truncated=[cut for pair in pairs for cut in (pair.chosen_truncated, pair.rejected_truncated)],
    )


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
        dropped: labels of the rows left out so far, by reason: `long_prompt`, `long_response`, `chat_template` (which
            refused the messages), `empty` (a cut-off response without a token), `equal` (both responses have the same ids,
            as after truncation).
        truncated: labels of the rows shortened so far, by `long_prompt` and `long_response`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig, chat_template: str, context_tokens: int) -> None:
        """
        Args:
            tokenizer: of the policy, which the GVM shares.
            data: length limits and what happens to longer rows.
            chat_template: `auto` uses the tokenizer's chat template where it has one; `plain` joins texts as they are.
            context_tokens: what prompt and response may have together.

        Raises:
            InputError: the tokenizer has no EOS token.
        """
        if tokenizer.eos_token_id is None:
            raise InputError(f"{tokenizer.name_or_path}: the tokenizer has no EOS token; set eos_token in its tokenizer_config.json")
        self.tokenizer = tokenizer
        self.data = data
        self.context_tokens = context_tokens
        self.is_chat = chat_template == "auto" and bool(tokenizer.chat_template)
        self.dropped: dict[str, list[str]] = {reason: [] for reason in DROP_REASONS}
        self.truncated: dict[str, list[str]] = {"long_prompt": [], "long_response": []}
        self._special = special_tokens(tokenizer)
        self._anchor_ids = self._ids(ANCHOR)
        self._text_prefix = self._added_before_text()
        self._turn = probe_turn(tokenizer) if self.is_chat else Turn("", "", tokenizer.eos_token, tokenizer.eos_token_id, "")
        self.end_token_id = self._turn.end_id
        self.stop_token_ids = {self.end_token_id, tokenizer.eos_token_id, *_generation_stop_ids(tokenizer.name_or_path)}

    # ---------------------------------------------------------------------------------------------------- public

    def encode_prompt(self, prompt: Prompt) -> list[int] | None:
        """Ids of a prompt, ready for a response; None where the settings drop it.

        Raises:
            InputError: it is too long and `data.long_prompt` is "error", or it leaves no room in the context.
        """
        try:
            ids = self._prompt(prompt.content, prompt.where).ids
        except Dropped:
            return None
        self._check_context(len(ids), 1, prompt.where)
        return ids

    def encode_pair(self, pair: PreferencePair) -> EncodedPair | None:
        """Ids of a preference pair; None where the settings drop it.

        Raises:
            InputError: a part is too long and the setting for it is "error", or the row does not fit the context.
        """
        try:
            prompt = self._prompt(pair.prompt, pair.where)
            chosen, chosen_cut = self._response(prompt, pair.chosen, pair.chosen_truncated, pair.where)
            rejected, rejected_cut = self._response(prompt, pair.rejected, pair.rejected_truncated, pair.where)
            if chosen == rejected:
                self._drop("equal", pair.where)
        except Dropped:
            return None
        self._check_context(len(prompt.ids), max(len(chosen), len(rejected)), pair.where)
        return EncodedPair(prompt.ids, chosen, rejected, chosen_cut, rejected_cut, pair.chosen_score, pair.rejected_score, pair.where)

    def encode_answer(self, prompt: Content, answer: Content, where: str, truncated: bool = False) -> tuple[list[int], list[int]] | None:
        """Ids of a prompt and of its answer, with the end token unless it was cut off; None where the settings drop it.

        Raises:
            InputError: as in `encode_pair`.
        """
        try:
            encoded = self._prompt(prompt, where)
            answer_ids, _ = self._response(encoded, answer, truncated, where)
        except Dropped:
            return None
        self._check_context(len(encoded.ids), len(answer_ids), where)
        return encoded.ids, answer_ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response, exactly as it continues the prompt, without special tokens and what the template puts around it."""
        text = self._text([token for token in ids if token not in self.stop_token_ids])
        return text.removeprefix(self._turn.lead).removesuffix(self._turn.close)

    # -------------------------------------------------------------------------------------------------- tokenizer

    def _ids(self, text: str, **options) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, **options)["input_ids"]

    def _continuation_ids(self, text: str, **options) -> list[int]:
        """Ids of a text that stands after another one, without the space that some tokenizers put before a text."""
        ids = self._ids(ANCHOR + text, **options)
        anchor = len(self._anchor_ids)
        return ids[anchor:] if ids[:anchor] == self._anchor_ids else self._ids(text, **options)

    def _text(self, ids: Sequence[int]) -> str:
        """Text of ids that stand after others, with the leading space that decoding them alone would lose."""
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        anchor = self.tokenizer.decode(self._anchor_ids, **options)
        return self.tokenizer.decode([*self._anchor_ids, *ids], **options).removeprefix(anchor)

    def _added_before_text(self) -> list[int]:
        """Ids that the tokenizer itself puts before a text (BOS, or none)."""
        alone, dressed = self._ids(PROBE), self.tokenizer(PROBE)["input_ids"]
        start = next(i for i in range(len(dressed)) if dressed[i : i + len(alone)] == alone)
        return dressed[:start]

    # ----------------------------------------------------------------------------------------------------- prompts

    def _prompt(self, content: Content, where: str) -> _PromptIds:
        prompt = self._chat_prompt(_as_messages(content), where) if self.is_chat else self._plain_prompt(content)
        length, limit = len(prompt.ids), self.data.max_prompt_tokens
        if length <= limit:
            return prompt
        if self.data.long_prompt == "error":
            raise InputError(
                f"{where}: the prompt has {length} tokens, data.max_prompt_tokens is {limit}; "
                "raise it or set data.long_prompt to truncate_left or drop"
            )
        if self.data.long_prompt == "drop":
            self._drop("long_prompt", where)
        self.truncated["long_prompt"].append(where)
        return self._shorten_chat(prompt, where) if self.is_chat else self._shorten_plain(prompt)

    def _render_prompt(self, messages: Messages, where: str) -> str:
        try:
            return render(self.tokenizer, messages, generation_prompt=True)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            self._refuse("chat_template", where, f"the chat template refuses messages with the roles {roles} ({error})")

    def _chat_prompt(self, messages: Messages, where: str) -> _PromptIds:
        text = self._render_prompt(messages, where)
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
        start = self._text_prefix
        kept = self.data.max_prompt_tokens - len(start)
        ids = (start + prompt.ids[len(prompt.ids) - kept :])[: self.data.max_prompt_tokens]
        return replace(prompt, ids=ids)

    def _shorten_chat(self, prompt: _PromptIds, where: str) -> _PromptIds:
        """Leave out the oldest turns until the rest fits; if the last turn alone is too long, the start of its text.

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
                limit = self.data.max_prompt_tokens
                self._refuse("long_prompt", where, f"the prompt exceeds data.max_prompt_tokens {limit} even without its last turn's text; raise it")
            # A cut within a character leaves a replacement character at the start.
            text = self._text(content[-kept:]).lstrip("\ufffd")
            prompt = self._chat_prompt([*earlier, {**last, "content": text}], where)
        return prompt

    # --------------------------------------------------------------------------------------------------- responses

    def _response(self, prompt: _PromptIds, response: Content, truncated: bool, where: str) -> tuple[list[int], bool]:
        """Ids of a response, and whether it has no end token because it was cut off."""
        content = self._without_end(content_text(response))
        body = self._turn_text(prompt, content, truncated)
        ids = self._body_ids(prompt, body, content)
        if not truncated:
            ids = [*ids, self.end_token_id]
        if not ids:
            self._refuse("empty", where, "a response that is marked as truncated has no tokens")
        return self._limited(ids, truncated, where)

    def _without_end(self, content: str) -> str:
        """The content without end tokens that the data has written out as text."""
        ends = (self._turn.end, self.tokenizer.eos_token)
        while (stripped := content.rstrip()).endswith(ends):
            content = next(stripped.removesuffix(end) for end in ends if stripped.endswith(end))
        return content

    def _turn_text(self, prompt: _PromptIds, content: str, truncated: bool) -> str:
        """What follows the prompt's text up to the end token, as the chat template has it."""
        close = "" if truncated else self._turn.close
        if not self.is_chat:
            return content
        dialogue = render(self.tokenizer, [*prompt.messages, {"role": "assistant", "content": content}], generation_prompt=False)
        if dialogue.startswith(prompt.text) and dialogue.endswith(self._turn.tail):
            return dialogue[len(prompt.text) :].removesuffix(self._turn.tail) + close
        return content + close  # the template writes a past answer unlike one that is to be generated

    def _body_ids(self, prompt: _PromptIds, body: str, content: str) -> list[int]:
        """Ids of a response's text as the continuation of the prompt's ids.

        Tokenised together with the prompt where that leaves the prompt's ids as they are, apart where a merge would
        cross the border. Special tokens that the data has written out inside a response are text, not tokens.
        """
        if self._special.search(content):
            lead = body[: max(body.find(content.strip()), 0)]
            return self._continuation_ids(lead) + self._continuation_ids(body.removeprefix(lead), split_special_tokens=True)
        together = self._ids(prompt.border + body)
        start = len(prompt.border_ids)
        return together[start:] if together[:start] == prompt.border_ids else self._continuation_ids(body)

    def _limited(self, ids: list[int], truncated: bool, where: str) -> tuple[list[int], bool]:
        limit = self.data.max_response_tokens
        if len(ids) <= limit:
            return ids, truncated
        if self.data.long_response == "error":
            raise InputError(
                f"{where}: a response has {len(ids)} tokens, data.max_response_tokens is {limit}; "
                "raise it or set data.long_response to truncate or drop"
            )
        if self.data.long_response == "drop":
            self._drop("long_response", where)
        self.truncated["long_response"].append(where)
        return ids[:limit], True

    # ------------------------------------------------------------------------------------------------------- rows

    def _refuse(self, reason: str, where: str, message: str) -> NoReturn:
        """What `data.on_bad_row` says of a row that cannot be encoded."""
        if self.data.on_bad_row == "skip":
            self._drop(reason, where)
        raise InputError(f"{where}: {message}")

    def _drop(self, reason: str, where: str) -> NoReturn:
        self.dropped[reason].append(where)
        raise Dropped(reason)

    def _check_context(self, prompt: int, response: int, where: str) -> None:
        if prompt + response > self.context_tokens:
            raise InputError(
                f"{where}: {prompt} prompt and {response} response tokens exceed the model's context of {self.context_tokens}; "
                "lower data.max_prompt_tokens or data.max_response_tokens"
            )


def _as_messages(content: Content) -> Messages:
    return [{"role": "user", "content": content}] if isinstance(content, str) else content


def _generation_stop_ids(model_path: str) -> list[int]:
    """EOS ids of the checkpoint's generation config, where it has one."""
    try:
        eos = GenerationConfig.from_pretrained(model_path).eos_token_id
    except OSError:  # no generation config there
        return []
    return [] if eos is None else eos if isinstance(eos, list) else [eos]
