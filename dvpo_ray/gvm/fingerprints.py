"""Hashes of what two models must share for token values to mean the same: the tokenizer and the chat template."""

from __future__ import annotations

import hashlib
import json

from transformers import PreTrainedTokenizerBase

# Tokens that end up in ids. The padding token is left out: no padding is ever read, and users set it freely.
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token")


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over vocabulary, merges, special tokens and added tokens: the same however the files were written."""
    content = {
        "vocabulary": tokenizer.get_vocab(),
        "merges": _merges(tokenizer),
        "special": {name: _text(getattr(tokenizer, name, None)) for name in _SPECIAL_TOKENS},
        "added": {str(i): [token.content, token.special] for i, token in sorted(tokenizer.added_tokens_decoder.items())},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def chat_template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """SHA-256 of the chat template, None without one."""
    template = tokenizer.chat_template
    if template is None:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _merges(tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    """The merges of a BPE tokenizer in order, as pairs; other models have none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return []
    merges = json.loads(backend.to_str())["model"].get("merges") or []
    return [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in merges]


def _text(token) -> str | None:
    return None if token is None else str(token)
