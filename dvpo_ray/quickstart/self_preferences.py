"""Preference pairs from a model's own samples: it answers prompts, and a gold judge scores the answers.

    python -m dvpo_ray.quickstart.self_preferences CONFIG [KEY=VALUE ...] --out FOLDER [--samples 8] [--pairs 2]

samples responses to the prompts of `data.prompts` with the engine of `rollout`, scores them with `evaluation.judge`, and writes
`preferences.train.jsonl` and `preferences.heldout.jsonl`, which `data.preferences` reads. A Global Value Model trained on such
pairs knows the texts that the policy writes, and needs no other data.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dvpo_ray.config import Config, load_config
from dvpo_ray.config.arithmetic import counted
from dvpo_ray.config.options import finite_number, whole_number
from dvpo_ray.config.paths import path_option
from dvpo_ray.errors import InputError, ResourceError
from dvpo_ray.evaluation.judges import make_judge
from dvpo_ray.monitoring.console import RunConsole, Stage

if TYPE_CHECKING:  # importing these imports torch, which reads its environment then; see `main`
    from dvpo_ray.data.prompts import Prompt


class Sampler:
    """The model of a config, answering prompts.

    Attributes:
        inexact: samples left out because their text is blank or does not give their token ids again (such as half a character).
    """

    def __init__(self, config: Config) -> None:
        from dvpo_ray.actors.rollout_engine import make_backend
        from dvpo_ray.data.encoding import Encoder
        from dvpo_ray.models.loading import context_tokens, load_tokenizer

        model = config.model
        # A text that encodes to more tokens than were sampled is left out like every other inexact one.
        data = config.data.model_copy(update={"long_response": "drop"})
        tokenizer = load_tokenizer(model.path, model.trust_remote_code)
        context = context_tokens(model.path, model.trust_remote_code)
        self.encoder = Encoder(tokenizer, data, model.chat_template, context)
        self.inexact = 0
        longest = data.max_prompt_tokens + config.rollout.max_response_tokens
        self._backend = make_backend(config, frozenset(self.encoder.stop_token_ids), "object_store", longest)

    def sample(self, prompts: Sequence[Prompt], samples: int, seed: int, progress: Stage) -> list[tuple[Prompt, list[tuple[str, bool]]]]:
        """Different responses to each prompt: text and whether it is truncated. A prompt that the settings drop is left out.

        Args:
            samples: for each prompt, repeated ones included.
            progress: advanced with every response.
        """
        from dvpo_ray.refresh.samples import exact_text

        encoded = [(prompt, ids) for prompt in prompts if (ids := self.encoder.encode_prompt(prompt)) is not None]
        exact: list[list[tuple[str, bool]]] = [[] for _ in encoded]
        for response in self._backend.generate([ids for _, ids in encoded for _ in range(samples)], seed):
            progress.advance()
            row = response.index // samples
            text = exact_text(self.encoder, encoded[row][0], response.token_ids, response.truncated)
            if text is None:
                self.inexact += 1
            else:
                exact[row].append((text, response.truncated))
        # Engines finish in any order; the file does not depend on it.
        return [(prompt, list(dict(sorted(texts)).items())) for (prompt, _), texts in zip(encoded, exact, strict=True)]


def write_self_preferences(config: Config, folder: Path, samples: int, pairs: int, min_score_gap: float, console: RunConsole) -> None:
    """Sample, judge and write `preferences.train.jsonl` and `preferences.heldout.jsonl` into a folder.

    Raises:
        InputError: the config names no prompts or no judge, or the prompts are bad.
    """
    if config.data.prompts is None:
        raise InputError("data.prompts.path is not set; give the prompts to answer")
    judge = make_judge(config.evaluation.judge)
    if judge is None:
        raise InputError("evaluation.judge is none; name a judge to score the samples, such as vader")
    from dvpo_ray.data.prompts import load_prompts
    from dvpo_ray.data.rows import count_note
    from dvpo_ray.refresh.pairs import preference_rows
    from dvpo_ray.refresh.samples import judged

    sets = load_prompts(config.data.prompts, config.data.on_bad_row)
    for note in sets.notes:
        console.warn(note)
    sampler = Sampler(config)
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, prompts) in enumerate((("train", sets.train), ("heldout", sets.heldout)), start=config.seed):
        with console.stage(f"{split} samples", total=len(prompts) * samples) as progress:
            answered = [(prompt, judged(prompt, texts, judge)) for prompt, texts in sampler.sample(prompts, samples, seed, progress)]
        rows, left_out = preference_rows(answered, pairs, min_score_gap)
        dropped = sorted({prompt.where for prompt in prompts} - {prompt.where for prompt, _ in answered})
        few = [prompt.where for prompt, usable in answered if 2 <= len(usable) < 2 * pairs]
        why = f"they have fewer than {2 * pairs} different usable samples; raise --samples for more"
        notes = count_note("left out", dropped, len(prompts), f"{split} prompts", "dropped by the settings of data")
        for note in [*notes, *left_out, *count_note(f"fewer than {counted(pairs, 'pair')} for", few, len(prompts), f"{split} prompts", why)]:
            console.warn(note)
        path = folder / f"preferences.{split}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        scores = [sample.score for _, answers in answered for sample in answers]
        mean = f"mean gold {np.mean(scores):.3f}" if scores else "no sample was usable"
        console.say(
            f"{path}: {counted(len(rows), 'pair')} of {counted(len(prompts), 'prompt')}, {pairs * len(prompts)} at most; "
            f"{counted(len(scores), 'different sample')}, {mean}"
        )
    console.say(f"{counted(sampler.inexact, 'sample')} left out: the text is blank or does not give the tokens again")


def main(argv: Sequence[str] | None = None) -> int:
    about = "Make preference pairs from a model's own samples."
    parser = argparse.ArgumentParser(prog="python -m dvpo_ray.quickstart.self_preferences", description=about)
    parser.add_argument("config", metavar="CONFIG", help="YAML file with the model, data.prompts, rollout and evaluation.judge")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help="settings that replace those of the file")
    parser.add_argument("--out", metavar="DIR", type=path_option, required=True, help="folder of the two files")
    parser.add_argument("--samples", type=whole_number(at_least=2), default=8, help="responses to each prompt (default 8)")
    parser.add_argument("--pairs", type=whole_number(at_least=1), default=2, help="most pairs of each prompt (default 2)")
    gap = "leave out pairs whose scores are closer (default 0.05)"
    parser.add_argument("--min-score-gap", type=finite_number(at_least=0), default=0.05, help=gap)
    args = parser.parse_intermixed_args(argv)
    try:
        config = load_config(args.config, args.overrides)
        from dvpo_ray.runtime.process import environment

        for name, value in environment(config.rollout).items():  # libraries read it when they are first imported
            os.environ.setdefault(name, value)
        with RunConsole() as console:
            write_self_preferences(config, args.out, args.samples, args.pairs, args.min_score_gap, console)
    except (InputError, ResourceError) as error:
        print(f"self_preferences: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
