"""`dvpo bench trl-reward`: a Bradley-Terry reward model by TRL's RewardTrainer, against models made by `dvpo gvm train` and `dvpo rm train`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PrinterCallback, TrainerCallback
from trl import RewardConfig, RewardTrainer

from dvpo_ray.bench.measure import describe_measurement, verdict
from dvpo_ray.config.arithmetic import counted
from dvpo_ray.config.schema import Config
from dvpo_ray.errors import InputError
from dvpo_ray.gvm.dataset import GVMData, load_gvm_data
from dvpo_ray.gvm.evaluation import evaluate_gvm
from dvpo_ray.gvm.model import keep_first_layers
from dvpo_ray.gvm.pairs import PairBatch
from dvpo_ray.gvm.views import ranked_right, wilson_interval
from dvpo_ray.models.loading import torch_dtype
from dvpo_ray.monitoring.console import RunConsole, Stage

VIEWS = {"last": "last value", "mean": "mean value", "position_50": "value at half of the response"}
TARGETS = {"last": 1.0, "position_50": 0.9}
"""Accuracy of the value model over that of TRL's reward model, by view."""
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


class Accuracy(NamedTuple):
    """Share of held-out pairs that are ranked right, and its 95 % interval (Wilson)."""

    share: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.share:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bench_trl_reward(config: Config, out: Path) -> dict:
    """Train TRL's reward model with the settings of `reward_model` and print its accuracy beside that of our models.

    The pairs have the ids that `dvpo gvm train` and `dvpo rm train` train on, and the same pairs are held out.

    Args:
        config: `gvm.path` and `reward_model.path` are the models to compare with, where they are set.
        out: run folder; gets the evaluations of our models and the trainer's files.

    Returns:
        The results with all that they depend on, ready for JSON.

    Raises:
        InputError: anything missing, unreadable or unfit, in one line; found before the training.
    """
    if config.reward_model.lora is not None:
        raise InputError("reward_model.lora is set, but the comparison with TRL trains whole models; leave it out")
    measurement = describe_measurement(config)
    with RunConsole() as console:
        with console.stage("reading the pairs", quiet=True):
            data = load_gvm_data(config, config.reward_model)
            model = new_reward_model(config)
        with console.stage("held-out values of our models", quiet=True):
            ours = {
                name: _our_accuracies(evaluate_gvm(config, Path(path), out / f"{name}-evaluation"))
                for name in ("gvm", "reward_model")
                if (path := getattr(config, name).path) is not None
            }
    with RunConsole() as console:
        for note in data.notes:
            console.warn(note)
        trl = train_with_trl(model, data, config, out, console)
        pairs = f"{data.train.num_pairs} training pairs, {counted(config.reward_model.epochs, 'epoch')}, {data.heldout.num_pairs} held-out pairs"
        for line in [f"{pairs}; accuracy [95 % interval]", *result_lines(trl, ours)]:
            console.say(line)
    return {
        "benchmark": "trl-reward",
        **measurement,
        "training_pairs": data.train.num_pairs,
        "heldout_pairs": data.heldout.num_pairs,
        "accuracy": {"trl": trl._asdict(), **{name: {view: one._asdict() for view, one in views.items()} for name, views in ours.items()}},
        "ratios_to_trl": {name: {view: one.share / trl.share for view, one in views.items()} for name, views in ours.items()},
        "ratio_targets": {"gvm": TARGETS},
        "config": config.model_dump(mode="json"),
    }


def result_lines(trl: Accuracy, ours: Mapping[str, Mapping[str, Accuracy]]) -> list[str]:
    """The results for people."""
    lines = [f"{'TRL RewardTrainer':<52}{trl}"]
    for name, views in ours.items():
        for view, accuracy in views.items():
            ratio, target = accuracy.share / trl.share, TARGETS.get(view) if name == "gvm" else None
            judged = "" if target is None else f", target {verdict(f'>= {target:g}', ratio >= target)}"
            lines.append(f"{f'{name}, {VIEWS[view]}':<52}{accuracy}  {ratio:.3f} x TRL's{judged}")
    return lines


def _our_accuracies(report: Mapping) -> dict[str, Accuracy]:
    return {view: Accuracy(report["heldout_accuracy"][view], *report["accuracy_ci95"][view]) for view in VIEWS}


# ------------------------------------------------------------------------------------------------------ TRL's side


def new_reward_model(config: Config) -> PreTrainedModel:
    """transformers' sequence classifier of one label on the trunk that `dvpo rm train` starts from, in float32, with a random head.

    Raises:
        InputError: `reward_model.num_layers` is above the checkpoint's layers.
    """
    settings = config.reward_model
    path = settings.init_from or config.model.path
    architecture = AutoConfig.from_pretrained(path, num_labels=1, trust_remote_code=config.model.trust_remote_code)
    if settings.num_layers is not None:
        keep_first_layers(architecture, settings.num_layers, path, "reward_model.num_layers")
    torch.manual_seed(config.seed)
    return AutoModelForSequenceClassification.from_pretrained(
        path,
        config=architecture,
        dtype=torch.float32,
        attn_implementation="eager" if config.model.attention == "eager" else "sdpa",
        trust_remote_code=config.model.trust_remote_code,
    )


def train_with_trl(model: PreTrainedModel, data: GVMData, config: Config, out: Path, console: RunConsole) -> Accuracy:
    """Train on the training pairs, in place, and measure on the held-out ones."""
    trainer = RewardTrainer(
        model=model,
        args=_arguments(config, out),
        train_dataset=pair_rows(data.train),
        eval_dataset=pair_rows(data.heldout),
        processing_class=data.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    settings = config.reward_model
    steps = math.ceil(settings.epochs * math.ceil(data.train.num_pairs / settings.pairs_per_step))
    with console.stage("TRL reward model", steps, unit="steps") as stage:
        trainer.add_callback(_Progress(stage))
        trainer.train()
    right = ranked_right(heldout_scores(trainer))
    accuracy = float(right.mean())
    return Accuracy(accuracy, *wilson_interval(accuracy, len(right)))


def pair_rows(pairs: PairBatch) -> Dataset:
    """`chosen_ids` and `rejected_ids` of every pair, prompt included."""
    batch = pairs.batch
    rows = [batch.tokens[batch.row(r)].tolist() for r in range(batch.num_rows)]
    return Dataset.from_dict({"chosen_ids": rows[::2], "rejected_ids": rows[1::2]})


@torch.no_grad()
def heldout_scores(trainer: RewardTrainer) -> np.ndarray:
    """Rewards of the held-out responses, [2P], alternately chosen and rejected."""
    trainer.model.eval()
    scores = []
    for batch in trainer.get_eval_dataloader():
        rewards = trainer.model(**batch).logits.float().squeeze(-1)
        scores.append(torch.stack(rewards.chunk(2), dim=1))  # the collator puts all chosen rows before all rejected ones
    return torch.cat(scores).reshape(-1).cpu().numpy()


def _arguments(config: Config, out: Path) -> RewardConfig:
    settings, dtype = config.reward_model, torch_dtype(config.model.dtype)
    return RewardConfig(
        output_dir=str(out / "trl"),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.pairs_per_step,
        per_device_eval_batch_size=settings.pairs_per_step,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=SCHEDULES[settings.schedule],
        warmup_steps=settings.warmup_fraction,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_epsilon=settings.epsilon,
        max_grad_norm=settings.max_grad_norm,
        max_length=None,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        gradient_checkpointing=settings.deepspeed.gradient_checkpointing,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        seed=config.seed,
    )


class _Progress(TrainerCallback):
    """Moves a progress bar."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def on_log(self, args, state, control, **kwargs) -> None:
        entry = state.log_history[-1]
        if "loss" in entry:
            self.stage.advance(details=f"loss {entry['loss']:.3f} · accuracy {entry['accuracy']:.2f}")
