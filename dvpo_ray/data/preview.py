"""What a dry run can say of the data: how many rows, how long, which are bad, held-out rows of other data. It loads neither torch nor a
tokenizer of transformers, so it takes a second or two; what is not on this machine, or has no tokenizer.json here, is left to the run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from jinja2 import TemplateError

from dvpo_ray.config import Config
from dvpo_ray.config.arithmetic import counted
from dvpo_ray.config.inputs import NAMED_DATA, model_number, no_data
from dvpo_ray.config.notes import foreign_heldout, is_shipped
from dvpo_ray.config.schema import SplitData
from dvpo_ray.data.answers import Answer, load_answers
from dvpo_ray.data.chat import ANCHOR, PROBE, TEMPLATE_ARGUMENTS, over_limit
from dvpo_ray.data.preferences import PreferencePair, load_preferences, parse_pair
from dvpo_ray.data.prompts import Prompt, load_prompts
from dvpo_ray.data.reading import read_rows
from dvpo_ray.data.rows import BadRow, Content, NothingSaid, content_text, count_note, first_of
from dvpo_ray.data.splitting import Sets
from dvpo_ray.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

T = TypeVar("T")

ROWS = 2000
"""Rows whose tokens are counted, from the first."""


@dataclass(frozen=True)
class Preview:
    """What a dry run says of `data.preferences`, `data.prompts` or `data.sft`.

    Attributes:
        facts: numbers by name.
        notes: what the user should know, one line each.
        train: how many pairs, prompts or answers there are to train on; None where only the run finds out how many it leaves out.
        unscored: the label of the first pair without scores.
    """

    facts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    train: int | None = None
    unscored: str | None = None


def preview(config: Config, section: str) -> Preview:
    """Read the rows that a section of the data names, and count the tokens of the first ones.

    Args:
        section: `data.preferences`, `data.prompts` or `data.sft`, which is set.

    Where bad rows stop the run, what is counted is the rest of the rows, and every fault is named.
    """
    if section == "data.sft":
        return _preview_answers(config, config.data.sft)
    data = getattr(config.data, section.removeprefix("data."))
    if not _is_at_hand(data.path, data.heldout_path):
        return Preview(notes=foreign_heldout(section, data))
    load = load_preferences if section == "data.preferences" else load_prompts
    sets, stops = _load(lambda on_bad_row: load(data, on_bad_row), config)
    if sets is None:
        return Preview(notes=[*foreign_heldout(section, data), *stops])
    longest, of_lengths, left_out = _lengths(config, data.path, [*sets.train, *sets.heldout])
    facts = {section.removeprefix("data."): _counted(sets), **longest}
    train = _kept(len(sets.train), sum(index < len(sets.train) for index in left_out))
    unscored = [item.where for item in [*sets.train, *sets.heldout] if isinstance(item, PreferencePair) and item.score_gap is None]
    notes = [*stops, *_of_rows(sets.notes, stops), *of_lengths, *(_cut_off_answers(config) if section == "data.prompts" else [])]
    return Preview(facts, notes, train, first_of(unscored) if unscored else None)


def _preview_answers(config: Config, path: str) -> Preview:
    if not _is_at_hand(path):
        return Preview()
    loaded, stops = _load(lambda on_bad_row: load_answers(path, on_bad_row), config)
    if loaded is None:
        return Preview(notes=stops)
    answers, notes = loaded
    longest, of_lengths, too_long = _answer_lengths(config, path, answers)
    return Preview({"sft": counted(len(answers), "answer"), **longest}, [*stops, *_of_rows(notes, stops), *of_lengths], _kept(len(answers), too_long))


def _kept(rows: int, left_out: int) -> int | None:
    """How many rows are left without those of the first `ROWS` that are left out; None where there are more rows than these, or none is left."""
    return None if left_out and rows > ROWS else (rows - left_out or None)


def _load(load: Callable[[str], T], config: Config) -> tuple[T | None, list[str]]:
    """What `load` gives, of the good rows where bad ones stop the run, and the line that the run ends with; None where there are none."""
    stops: list[str] = []
    try:
        try:
            return load(config.data.on_bad_row), stops
        except InputError as error:
            stops = [str(error)]
            return load("skip"), stops
    except InputError:  # not because of a bad row
        return None, stops


def _of_rows(notes: Sequence[str], stops: Sequence[str]) -> list[str]:
    """The notes on rows that are left out. Where bad rows stop the run, those on them say what is counted, and name the other faults alone."""
    told = []
    for note in notes:
        path, marked, bad = note.partition(": left out ")
        rows, is_bad, faults = bad.partition(" rows: bad (data.on_bad_row skip)")
        if stops and marked and is_bad:
            others = "" if any(stop.startswith(faults.removeprefix("; the first is ")) for stop in stops) else faults
            told.append(f"{path}: {rows} rows are bad{others}; the counts above are without them, as with data.on_bad_row=skip")
        elif not any(stop.startswith(re.sub(r" \(\d+ such rows\)$", "", note)) for stop in stops):
            told.append(note)
    return told


def _is_at_hand(*paths: str | None) -> bool:
    """Whether all rows are in files and folders of this machine that can be read."""
    return all(path not in NAMED_DATA and Path(path).exists() and no_data(path) is None for path in paths if path is not None)


def _counted(sets: Sets) -> str:
    items = [*sets.train, *sets.heldout]
    what = counted(len(items), "distinct prompt")
    if isinstance(items[0], PreferencePair):
        what = f"{counted(len(items), 'pair')} on {counted(len({item.key for item in items}), 'distinct prompt')}"
    return f"{what}: {len(sets.train)} for training, {len(sets.heldout)} held out"


# -------------------------------------------------------------------------------------------------------- lengths


def _lengths(config: Config, path: str, items: Sequence[PreferencePair | Prompt]) -> tuple[dict[str, str], list[str], set[int]]:
    """The longest prompt and response, a line for each limit that does not fit, and the indices of the items that are left out for one;
    nothing where tokens cannot be counted here."""
    counter = _token_counter(Path(config.model.path), config.model.chat_template == "auto")
    if counter is None:
        return {}, [], set()
    items, facts, notes, left_out = items[:ROWS], {}, [], set()
    pairs = [item for item in items if isinstance(item, PreferencePair)]
    try:
        parts = {"prompt": [counter.prompt(item.prompt if pairs else item.content) for item in items]}
        template = counter.template_tokens
    except TemplateError:  # of some row; the run names it
        return {}, [], set()
    if pairs:
        parts["response"] = [
            max(counter.response(pair.chosen, pair.chosen_truncated), counter.response(pair.rejected, pair.rejected_truncated)) for pair in pairs
        ]
    for part, lengths in parts.items():
        limit, setting, longest = getattr(config.data, f"max_{part}_tokens"), getattr(config.data, f"long_{part}"), max(lengths)
        over = [index for index, length in enumerate(lengths) if length > limit]
        left_out.update(over if setting == "drop" else [])
        row, first = "pair" if pairs else "prompt", f" of the first {ROWS}" if len(items) == ROWS else ""
        facts[f"longest {part}"] = f"{counted(longest, 'token')}, data.max_{part}_tokens is {limit}" + (
            f"; over it: {counted(len(over), row)}{first}" if over else ""
        )
        if setting == "error" or 2 * len(over) > len(lengths):
            does = {"error": "stops the run at", "drop": "leaves out"}.get(setting, "shortens")
            start = f"{path}: data.long_{part}={setting} {does}"
            why, labels = over_limit(limit, longest, template if part == "prompt" else 0, part), [items[index].where for index in over]
            notes += count_note(start, labels, len(items), f"{row}s{first}", why)
    return facts, notes, left_out


def _cut_off_answers(config: Config) -> list[str]:
    """One line if a policy that writes as one's own pairs do is cut off. The pairs are those of the config, else those of the prompts' file."""
    counter = _token_counter(Path(config.model.path), config.model.chat_template == "auto")
    if counter is None:
        return []
    for data in (config.data.preferences, config.data.prompts):
        pairs = _first_pairs(data) if data is not None and not is_shipped(data.path) else ()
        both = (one for pair in pairs for one in ((pair.chosen, pair.chosen_truncated), (pair.rejected, pair.rejected_truncated)))
        lengths = [counter.response(response) for response, cut_off in both if not cut_off]
        longer = [length for length in lengths if length > config.rollout.max_response_tokens]
        if longer:
            return [
                f"rollout.max_response_tokens {config.rollout.max_response_tokens} is below {len(longer)} of {counted(len(lengths), 'response')} "
                f"in the pairs of {data.path}, the longest of {counted(max(longer), 'token')}: a policy that writes as they do is cut off there; "
                f"rollout.max_response_tokens={max(longer)} has room for all"
            ]
        if lengths:
            break
    return []


def _first_pairs(data: SplitData) -> Iterator[PreferencePair]:
    """The good pairs among the first `ROWS` rows; nothing where the rows are no pairs or not at hand."""
    if not _is_at_hand(data.path):
        return
    try:
        for row in islice(read_rows(data.path, data.split), ROWS):
            try:
                yield parse_pair(row.columns, row.where)
            except (BadRow, NothingSaid):
                continue
    except InputError:  # the run says why
        return


def _answer_lengths(config: Config, path: str, answers: Sequence[Answer]) -> tuple[dict[str, str], list[str], int]:
    """The longest answer with its prompt, a line for answers that are left out and for those that are cut off, and the number of the former."""
    counter = _token_counter(Path(config.model.path), config.model.chat_template == "auto")
    if counter is None or not answers:
        return {}, [], 0
    answers, context = answers[:ROWS], model_number(config.model.path, "max_position_embeddings")
    setting = config.sft.max_tokens
    limit, named = (context, f"the model's context of {context} tokens") if context and context < setting else (setting, f"sft.max_tokens {setting}")
    try:
        prompts = [0 if answer.prompt is None else counter.prompt(answer.prompt) for answer in answers]
    except TemplateError:  # of some row; the run names it
        return {}, [], 0
    lengths = [
        prompt + (counter.text(answer.answer) if answer.prompt is None else counter.response(answer.answer))
        for answer, prompt in zip(answers, prompts, strict=True)
    ]
    left_out = [answer.where for answer, prompt in zip(answers, prompts, strict=True) if prompt >= limit]
    cut = [answer.where for answer, prompt, length in zip(answers, prompts, lengths, strict=True) if prompt < limit < length]
    first = f" of the first {ROWS}" if len(answers) == ROWS else ""
    notes = count_note(f"{path}: leaves out", left_out, len(answers), f"answers{first}", f"the prompt leaves no room for the answer in {named}")
    notes += count_note(f"{path}: cuts off the end of", cut, len(answers), f"answers{first}", f"with their prompt they are over {named}")
    return {"longest answer": f"{counted(max(lengths), 'token')} with its prompt, the limit is {named}"}, notes, len(left_out)


@dataclass(frozen=True)
class _Counter:
    """Counts tokens as the run does.

    Attributes:
        template: renders messages for a generation; None for plain text.
    """

    tokenizer: Tokenizer
    template: Callable[[list], str] | None

    def prompt(self, content: Content) -> int:
        if self.template is None:
            text = content if isinstance(content, str) else content_text(content) + "\n"
            return len(self.tokenizer.encode(text).ids)
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
        return self._text(self.template(messages))

    def response(self, content: Content, truncated: bool = False) -> int:
        """With its end token unless it was cut off. What a template writes before and after an answer, which is mostly nothing, is left out."""
        return self._text(ANCHOR + content_text(content)) - self._text(ANCHOR) + (not truncated)

    def text(self, content: Content) -> int:
        """Of a text that is learned without a prompt, with its end token."""
        return len(self.tokenizer.encode(content_text(content)).ids) + 1

    @property
    def template_tokens(self) -> int:
        """Of the template's own in a prompt of one message."""
        return 0 if self.template is None else self.prompt(PROBE) - self._text(PROBE)

    def _text(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)


def _token_counter(model: Path, wants_chat: bool) -> _Counter | None:
    """None if this machine has no fast tokenizer of the model."""
    try:
        settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
        whole = (model / "tokenizer.json").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    from tokenizers import Tokenizer

    return _Counter(Tokenizer.from_str(whole), _chat_template(model, settings) if wants_chat else None)


def _chat_template(model: Path, settings: dict) -> Callable[[list], str] | None:
    """Renders messages as transformers would, for a generation; None if the tokenizer has no template, or several."""
    file = model / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    if not isinstance(template, str):
        return None
    from transformers.utils.chat_template_utils import render_jinja_template

    special = {name: value["content"] if isinstance(value, dict) else value for name, value in settings.items() if name.endswith("_token")}

    def render(messages: list) -> str:
        texts, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **special, **TEMPLATE_ARGUMENTS)
        return texts[0]

    return render
