"""`dvpo sft`: supervised fine-tuning before the method, by TRL's SFTTrainer, on answers encoded like every later rollout."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from dvpo_ray.config import Config
from dvpo_ray.data.answers import Answer, load_answers
from dvpo_ray.data.encoding import Encoder
from dvpo_ray.data.rows import count_note
from dvpo_ray.errors import InputError
from dvpo_ray.gvm.artifact import refuse_as_policy
from dvpo_ray.models.loading import context_tokens, load_tokenizer
from dvpo_ray.training.run import Run
from dvpo_ray.training.trl_stage import OPTIMIZER_METRICS, last_trainer_checkpoint, run_stage, stage_output, trained_policy, training_arguments

IGNORED_LABEL = -100
"""Label of tokens outside the loss, as in torch's cross entropy."""


def train_sft(config: Config, out: Path, resume: bool) -> Path:
    """Fine-tune `model.path` on `data.sft` with the loss on the answers.

    Args:
        config: `sft`, `model`, `data` and `checkpoint` are used.
        out: run folder; see `run_stage`.
        resume: continue from the last whole checkpoint in `out`.

    Returns:
        `out/final`, a checkpoint of model and tokenizer in `model.dtype`.

    Raises:
        InputError: rows or checkpoint are missing or wrong.
        ResourceError: the disk is full, or training has diverged.
    """
    run = Run("sft", config, out, resume=resume)
    run.open_checkpoint(last_trainer_checkpoint)
    refuse_as_policy(config.model.path, "model.path")
    arguments = SFTConfig(**training_arguments(config, config.sft, out), max_length=None)
    with stage_output() as (output, console):
        with console.stage("reading the rows", quiet=True):
            tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
            answers, notes = load_answers(config.data.sft, config.data.on_bad_row)
            rows, more_notes = encode_answers(answers, tokenizer, config)
        with console.stage("loading the model", quiet=True):
            dataset = Dataset.from_list(rows)
            trainer = SFTTrainer(model=trained_policy(config), args=arguments, train_dataset=dataset, processing_class=tokenizer)
        return run_stage(run, trainer, OPTIMIZER_METRICS, tokenizer, output, console, [*notes, *more_notes])


# ---------------------------------------------------------------------------------------------------- encoding


def encode_answers(answers: Iterable[Answer], tokenizer: PreTrainedTokenizerBase, config: Config) -> tuple[list[dict[str, list[int]]], list[str]]:
    """`input_ids` and `labels` of every answer that fits; rows over `sft.max_tokens` are cut off at the end.

    The encoder is the one of preference pairs and rollouts, so that later stages see the ids that are learned here.

    Returns:
        The rows, and one line for each reason why answers are left out, cut off or kept in a form that the user should know of.

    Raises:
        InputError: no row is left.
    """
    context = context_tokens(config.model.path, config.model.trust_remote_code)
    longest = min(config.sft.max_tokens, context)
    limit = f"sft.max_tokens {longest}" if longest == config.sft.max_tokens else f"the model's context of {longest} tokens"
    limits = {"max_prompt_tokens": longest - 1, "max_response_tokens": sys.maxsize, "long_prompt": "drop"}
    encoder = Encoder(tokenizer, config.data.model_copy(update=limits), config.model.chat_template, sys.maxsize)
    encoded = [(answer.where, row) for answer in answers if (row := _encode(answer, encoder)) is not None]
    if not encoded:
        raise InputError(f"{config.data.sft}: no row is left; no prompt leaves room for its answer in {limit}")
    cut = [where for where, row in encoded if len(row["input_ids"]) > longest]
    notes = encoder.notes("answers", long_prompt=f"the prompt leaves no room for the answer in {limit}")
    notes += count_note("cut off the end of", cut, encoder.rows, "answers", f"with their prompt they are over {limit}")
    return [{name: ids[:longest] for name, ids in row.items()} for _, row in encoded], notes


def _encode(answer: Answer, encoder: Encoder) -> dict[str, list[int]] | None:
    if answer.prompt is None:
        ids = encoder.encode_text(answer.answer)
        return {"input_ids": ids, "labels": ids}
    encoded = encoder.encode_answer(answer.prompt, answer.answer, answer.where)
    if encoded is None:
        return None
    prompt_ids, answer_ids = encoded
    return {"input_ids": prompt_ids + answer_ids, "labels": [IGNORED_LABEL] * len(prompt_ids) + answer_ids}
