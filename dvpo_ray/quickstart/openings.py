"""Prompts that a model makes itself: openings, sampled after nothing but its beginning-of-text token.

    python -m dvpo_ray.quickstart.openings MODEL --tokens 16 --count 2000 --out prompts.jsonl

For a model that only continues text (such as the TinyStories ones) these are prompts from its own distribution.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from dvpo_ray.config.arithmetic import counted
from dvpo_ray.config.options import whole_number
from dvpo_ray.config.paths import name_or_path_option, path_option
from dvpo_ray.errors import InputError
from dvpo_ray.files import whole_file


def sample_openings(model_path: str, tokens: int, count: int, seed: int) -> tuple[list[str], str]:
    """Distinct openings that encode to exactly `tokens` tokens after the beginning-of-text token.

    Args:
        count: openings sampled.

    Returns:
        The openings, and how many of the sampled ones are left out, and why.

    Raises:
        InputError: the tokenizer has no beginning-of-text token.
    """
    import torch

    from dvpo_ray.config.schema import ModelConfig
    from dvpo_ray.models.loading import load_policy, load_tokenizer

    tokenizer = load_tokenizer(model_path)
    if tokenizer.bos_token_id is None:
        raise InputError(f"{model_path}: the tokenizer has no beginning-of-text token to start an opening from")
    model = load_policy(ModelConfig(path=model_path, dtype="float32"))
    torch.manual_seed(seed)
    start = torch.full((count, 1), tokenizer.bos_token_id)
    sampled = model.generate(start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, max_new_tokens=tokens)
    texts = sorted({tokenizer.decode(row, skip_special_tokens=True) for row in sampled})
    exact = [text for text in texts if len(tokenizer(text).input_ids) == tokens + 1]
    why = f"{count - len(texts)} that repeat another one, {len(texts) - len(exact)} whose text does not have {counted(tokens, 'token')}"
    return exact, f"of {counted(count, 'sample')}, {count - len(exact)} are left out: {why}; a larger --count gives more"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dvpo_ray.quickstart.openings", description="Sample openings of texts as prompts.")
    parser.add_argument("model", metavar="MODEL", type=name_or_path_option, help="checkpoint folder or hub name")
    positive = whole_number(at_least=1)
    parser.add_argument("--tokens", type=positive, default=16, help="length without the beginning-of-text token (default 16)")
    parser.add_argument("--count", type=positive, default=2000, help="openings sampled, before repeated ones are left out (default 2000)")
    parser.add_argument("--seed", type=whole_number(at_least=0), default=0)
    parser.add_argument("--out", metavar="FILE", type=path_option, required=True, help="JSONL file of prompts")
    args = parser.parse_args(argv)
    try:
        openings, left_out = sample_openings(args.model, args.tokens, args.count, args.seed)
    except InputError as error:
        print(f"openings: {error}", file=sys.stderr)
        return 2
    with whole_file(args.out) as file:
        file.writelines(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in openings)
    print(f"{args.out}: {counted(len(openings), 'opening')}; {left_out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
