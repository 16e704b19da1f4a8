"""`dvpo dpo`: Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290), by TRL's DPOTrainer, on the value model's pairs."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from dvpo_ray.config import Config
from dvpo_ray.data.encoding import Encoder
from dvpo_ray.data.preferences import load_preferences
from dvpo_ray.errors import InputError
from dvpo_ray.gvm.artifact import refuse_as_policy
from dvpo_ray.models.loading import context_tokens, load_policy, load_tokenizer
from dvpo_ray.training.run import Run
from dvpo_ray.training.trl_stage import OPTIMIZER_METRICS, last_trainer_checkpoint, run_stage, stage_output, trained_policy, training_arguments

METRICS = {
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
    **OPTIMIZER_METRICS,
}


def train_dpo(config: Config, out: Path, resume: bool) -> Path:
    """Fine-tune `model.path` on the training pairs of `data.preferences`; the reference is `model.path` itself.

    Args:
        config: `dpo`, `model`, `data` and `checkpoint` are used.
        out: run folder; see `run_stage`.
        resume: continue from the last whole checkpoint in `out`.

    Returns:
        `out/final`, a checkpoint of model and tokenizer in `model.dtype`.

    Raises:
        InputError: pairs or checkpoint are missing or wrong.
        ResourceError: the disk is full, or training has diverged.
    """
    run = Run("dpo", config, out, resume=resume)
    run.open_checkpoint(last_trainer_checkpoint)
    refuse_as_policy(config.model.path, "model.path")
    arguments = DPOConfig(**training_arguments(config, config.dpo, out), beta=config.dpo.beta, max_length=None)
    with stage_output() as (output, console):
        with console.stage("reading the pairs", quiet=True):
            tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
            rows, notes = encode_pairs(config, tokenizer)
        with console.stage("loading the model", quiet=True):
            trainer = EncodedDPOTrainer(
                model=trained_policy(config),
                ref_model=load_policy(config.model),
                args=arguments,
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
            )
        return run_stage(run, trainer, METRICS, tokenizer, output, console, notes)


def encode_pairs(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[list[dict[str, list[int]]], list[str]]:
    """The ids of every training pair, under the same limits as in `dvpo gvm train`.

    Returns:
        Rows of `prompt_ids`, `chosen_ids` and `rejected_ids`, and one line for each reason why pairs are left out or shortened.

    Raises:
        InputError: a file is missing or unreadable, or no pair is left.
    """
    sets = load_preferences(config.data.preferences, config.data.on_bad_row)
    context = context_tokens(config.model.path, config.model.trust_remote_code)
    encoder = Encoder(tokenizer, config.data, config.model.chat_template, context)
    encoded = [ids for pair in sets.train if (ids := encoder.encode_pair(pair)) is not None]
    if not encoded:
        raise InputError(f"{config.data.preferences.path}: no training pair is left; {'; '.join(encoder.notes('pairs')) or 'give more pairs'}")
    rows = [{"prompt_ids": ids.prompt, "chosen_ids": ids.chosen, "rejected_ids": ids.rejected} for ids in encoded]
    return rows, [*sets.notes, *encoder.notes("pairs")]


class EncodedDPOTrainer(DPOTrainer):
    """TRL's trainer on rows that hold token ids already.

    TRL would tokenise texts itself: with its own end token, with an end token after responses that were cut off, and with other
    ids where the end of the prompt merges with the response.
    """

    def _prepare_dataset(self, dataset: Dataset, processing_class, args, dataset_name: str) -> Dataset:
        return dataset
