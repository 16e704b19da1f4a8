"""What a dry run can say of the data: bad rows, prompts that are too long, held-out rows of other data. It loads neither torch nor a tokenizer of
transformers, so it takes about a second; what is not one JSON file, or has no tokenizer.json here, is left to the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from jinja2 import TemplateError

from dvpo_ray.config import Config
from dvpo_ray.config.notes import foreign_heldout
from dvpo_ray.data.chat import PROBE, TEMPLATE_ARGUMENTS, over_limit
from dvpo_ray.data.preferences import parse_pair
from dvpo_ray.data.prompts import parse_prompt
from dvpo_ray.data.reading import JSONL_SUFFIXES, read_rows
from dvpo_ray.data.rows import Content, content_text, count_note, parse_rows
from dvpo_ray.errors import InputError

ROWS = 500
"""Rows that are read, from the first."""


def preview(config: Config, section: str) -> list[str]:
    """Lines on the first rows of `data.preferences` or `data.prompts`.

    Args:
        section: `data.preferences` or `data.prompts`.
    """
    data = getattr(config.data, section.removeprefix("data."))
    heldout = foreign_heldout(section, data)
    if Path(data.path).suffix not in (*JSONL_SUFFIXES, ".json") or not Path(data.path).is_file():
        return heldout
    parse = {"data.preferences": lambda *row: parse_pair(*row).prompt, "data.prompts": lambda *row: parse_prompt(*row).content}[section]
    try:
        rows = islice(read_rows(data.path, data.split), ROWS)
        prompts, notes = parse_rows(data.path, rows, lambda columns, where: (parse(columns, where), where), config.data.on_bad_row)
    except InputError as error:
        return [*heldout, str(error)]
    return [*heldout, *notes, *_too_long(config, data.path, prompts)]


def _too_long(config: Config, path: str, prompts: Sequence[tuple[Content, str]]) -> list[str]:
    """One line if more than half of the prompts are over the limit; nothing where their tokens cannot be counted here."""
    count = _token_counter(Path(config.model.path), config.model.chat_template == "auto")
    if count is None:
        return []
    limit = config.data.max_prompt_tokens
    try:
        lengths = [count(content) for content, _ in prompts]
        template = count(PROBE) - count(None)
    except TemplateError:  # of some row; the run names it
        return []
    over = [where for (_, where), length in zip(prompts, lengths, strict=True) if length > limit]
    if 2 * len(over) <= len(lengths):
        return []
    what = {"truncate_left": "shortens", "drop": "leaves out", "error": "stops at"}[config.data.long_prompt]
    rows = "prompts" if len(prompts) < ROWS else f"prompts of the first {ROWS} rows"
    start = f"{path}: data.long_prompt {config.data.long_prompt} {what}"
    return count_note(start, over, len(prompts), rows, over_limit(limit, max(lengths), template))


def _token_counter(model: Path, wants_chat: bool) -> Callable[[Content | None], int] | None:
    """Counts the tokens of a prompt, and for None those of `PROBE` alone; None if this machine has no fast tokenizer of the model."""
    try:
        settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
        whole = (model / "tokenizer.json").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(whole)
    template = _chat_template(model, settings) if wants_chat else None

    def count(content: Content | None) -> int:
        if content is None or template is None:
            text = PROBE if content is None else content if isinstance(content, str) else content_text(content) + "\n"
            return len(tokenizer.encode(text, add_special_tokens=template is None).ids)
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
        return len(tokenizer.encode(template(messages), add_special_tokens=False).ids)

    return count


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
