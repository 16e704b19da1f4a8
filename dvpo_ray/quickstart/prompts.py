"""The quickstart's prompts: openings of everyday sentences, made from the word lists of `data/prompts.yaml`.

`python -m dvpo_ray.quickstart.prompts FOLDER` writes `prompts.train.jsonl` and `prompts.heldout.jsonl`, as it wrote the shipped
files. No opening says how the sentence goes on, so the model's own continuations are of every mood.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path

import yaml

WORDS = Path(__file__).parent / "data" / "prompts.yaml"
HELDOUT_PROMPTS = 256
SEED = 0


def all_prompts() -> list[str]:
    """All prompts of the word lists, without repetition, shuffled in the same order each time."""
    prompts = []
    for template, words in yaml.safe_load(WORDS.read_text(encoding="utf-8")).items():
        prompts += [template.format(**dict(zip(words, choice, strict=True))) for choice in itertools.product(*words.values())]
    random.Random(SEED).shuffle(prompts)
    return prompts


def write_prompts(folder: Path) -> tuple[Path, Path]:
    """Write the training and the held-out prompts, no prompt in both. Returns the two files."""
    prompts = all_prompts()
    files = (folder / "prompts.train.jsonl", folder / "prompts.heldout.jsonl")
    for file, part in zip(files, (prompts[HELDOUT_PROMPTS:], prompts[:HELDOUT_PROMPTS]), strict=True):
        file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in part), encoding="utf-8")
    return files


if __name__ == "__main__":
    for written in write_prompts(Path(sys.argv[1])):
        print(written)
