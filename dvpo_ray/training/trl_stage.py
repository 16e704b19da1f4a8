"""What SFT and DPO have in common: a trainer of TRL in this process, its arguments, metrics and checkpoints, and the result."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback

from dvpo_ray.config import Config
from dvpo_ray.config.schema import TRLStageConfig
from dvpo_ray.errors import InputError, diverged
from dvpo_ray.files import whole_folder
from dvpo_ray.models.loading import load_policy, rehearse_saving, save_policy, torch_dtype
from dvpo_ray.monitoring.console import RunConsole
from dvpo_ray.monitoring.logs import LibraryOutput, library_output
from dvpo_ray.monitoring.metrics import MetricsLog
from dvpo_ray.planning.memory import FULL, MOMENTS
from dvpo_ray.runtime.checkpoints import check_room, problem, write_manifest
from dvpo_ray.training.run import Run, check_finite

logger = logging.getLogger(__name__)

OPTIMIZER_METRICS = {"loss": "loss", "learning_rate": "learning_rate", "grad_norm": "grad_norm"}
"""What every trainer logs: its names, and ours in metrics.jsonl after `<stage>/`."""


def trained_policy(config: Config) -> PreTrainedModel:
    """The model of `model.path` to train, with weights in float32.

    `model.dtype` is the dtype of the computation: AdamW's small steps would vanish in bfloat16 weights. The dropout of the checkpoint is
    on, but DPO's trainer turns it off.

    Raises:
        InputError: the checkpoint is missing or is not a causal language model.
    """
    return load_policy(config.model.model_copy(update={"dtype": "float32"}), keeps_randomness=True)


def training_arguments(config: Config, stage: TRLStageConfig, out: Path) -> dict:
    """Arguments of transformers' trainers that a stage's settings and the run folder decide."""
    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(out / "checkpoints"),
        "learning_rate": stage.learning_rate,
        "lr_scheduler_type": "linear",
        "num_train_epochs": stage.epochs,
        "per_device_train_batch_size": stage.batch_size,
        "gradient_accumulation_steps": stage.gradient_accumulation_steps,
        "bf16": config.model.dtype == "bfloat16",
        "fp16": config.model.dtype == "float16",
        "gradient_checkpointing": on_gpu,
        "use_cpu": not on_gpu,
        "disable_tqdm": True,
        "save_steps": config.checkpoint.every_steps,
        "save_total_limit": config.checkpoint.keep,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # else a loss that is not finite is logged as the mean of the losses before it
        "report_to": [],
        "seed": config.seed,
    }


@contextmanager
def stage_output() -> Iterator[tuple[LibraryOutput, RunConsole]]:
    """What libraries write in this process, kept off the terminal, and the console that still reaches it."""
    with library_output() as output, RunConsole(Console(file=output.terminal, highlight=False)) as console:
        yield output, console


def run_stage(
    run: Run,
    trainer: Trainer,
    metrics: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
    output: LibraryOutput,
    console: RunConsole,
    notes: Sequence[str] = (),
) -> Path:
    """Train, and save the result as a checkpoint that later stages start from.

    Args:
        run: of the stage, with its checkpoint open where it is resumed.
        trainer: with the arguments of `training_arguments`.
        metrics: what goes to metrics.jsonl: the trainer's names, and ours after `<stage>/`. The first is shown beside the progress bar.
        output: of the libraries; goes to `logs/<stage>.log`.
        console: on the terminal, beside that output.
        notes: what the user should know of the data, one line each.

    Returns:
        `final/` of the run folder, a checkpoint of model and tokenizer in `model.dtype`.

    Raises:
        ResourceError: the disk is full, the model cannot be saved, or training has diverged.
    """
    stage, source = run.stage, run.config.model
    trainer.remove_callback(PrinterCallback)
    facts = {"model": source.path, "rows": len(trainer.train_dataset)}

    def summary() -> dict:
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        return {"steps": trainer.state.global_step, "last_step": _metrics_entry(stage, metrics, history[-1]) if history else {}}

    with run.started(stage.upper(), facts, notes, summary, console):
        output.keep(run.folder / "logs" / f"{stage}.log")
        # The trainer saves after the last step too: weights and Adam's moments, all in float32.
        check_room(run.folder, (FULL + MOMENTS) * sum(parameter.numel() for parameter in trainer.model.parameters()))
        with console.stage("rehearsing the saving", quiet=True):
            rehearse_saving(partial(save_policy, trainer.model, {}, tokenizer, source), run.folder, source.path)
        with run.metrics_log() as log, run.held_signals(console) as signals:
            trainer.add_callback(_Progress(run, console, log, metrics, signals))
            trainer.train(resume_from_checkpoint=str(run.checkpoint[0]) if run.checkpoint is not None else None)
        _check_weights(trainer.model, stage)
        with console.stage("saving the model", quiet=True), whole_folder(run.folder / "final") as folder:
            save_policy(trainer.model.to(torch_dtype(source.dtype)), None, tokenizer, source, folder)
    return run.folder / "final"


def _check_weights(model: PreTrainedModel, name: str) -> None:
    """No loss shows what the last update did. A model that it broke must not be saved as a result."""
    broken = next((weight for weight, parameter in model.named_parameters() if not torch.isfinite(parameter).all()), None)
    if broken is not None:
        raise diverged(f"{broken} is not finite after the last step", name)


# ------------------------------------------------------------------------------------------------------- checkpoints


def last_trainer_checkpoint(run_folder: Path) -> tuple[Path, dict]:
    """The last whole checkpoint of a trainer in a run folder, and its step; damaged ones are skipped with a warning.

    Raises:
        InputError: there is no whole checkpoint.
    """
    steps = {folder: folder.name.removeprefix("checkpoint-") for folder in (run_folder / "checkpoints").glob("checkpoint-*")}
    for folder, step in sorted(((f, int(s)) for f, s in steps.items() if s.isdigit()), key=lambda one: one[1], reverse=True):
        damage = problem(folder)
        if damage is None:
            return folder, {"step": step}
        logger.warning("%s is damaged (%s) and is skipped", folder, damage)
    raise InputError(f"{run_folder}: no whole checkpoint to resume from; give another --out, or remove the folder to start anew")


class _Progress(TrainerCallback):
    """A progress bar, the metrics of every optimizer step, and a checkpoint when a signal ends the run.

    Args:
        signals: that have come; `held` keeps them until the trainer is done.
    """

    def __init__(self, run: Run, console: RunConsole, log: MetricsLog, metrics: Mapping[str, str], signals: Sequence[int]) -> None:
        self.console, self.log, self.stage, self.metrics, self.dtype = console, log, run.stage, metrics, run.config.model.dtype
        self.shown = next(iter(metrics))
        self.signals = signals
        self.open = ExitStack()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.signals:
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs) -> None:
        write_manifest(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.progress = self.open.enter_context(self.console.stage(self.stage, state.max_steps, done=state.global_step, unit="steps"))

    def on_log(self, args, state, control, **kwargs) -> None:
        entry = state.log_history[-1]
        if "loss" in entry:
            metrics = _metrics_entry(self.stage, self.metrics, entry)
            check_finite(entry["step"], metrics, self.stage, self.stage, dtype=self.dtype)
            self.progress.advance(details=f"{self.metrics[self.shown]} {entry[self.shown]:.3f}")
            self.log.write(entry["step"], metrics)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.open.close()


def _metrics_entry(stage: str, metrics: Mapping[str, str], entry: Mapping) -> dict[str, float]:
    return {f"{stage}/{ours}": entry[theirs] for theirs, ours in metrics.items()}
