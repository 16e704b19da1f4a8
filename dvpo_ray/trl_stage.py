"""What the stages that a trainer of TRL runs have in common: arguments, progress, metrics, checkpoints and the finished checkpoint folder."""

from __future__ import annotations

import json
import logging
import time
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback

from dvpo_ray.config import Config
from dvpo_ray.config.trl_stages import TRLStageConfig
from dvpo_ray.divergence import check_finite, diverged
from dvpo_ray.errors import InputError
from dvpo_ray.files import whole_folder
from dvpo_ray.models.loading import load_policy, torch_dtype
from dvpo_ray.monitoring.console import RunConsole
from dvpo_ray.monitoring.logs import LibraryOutput
from dvpo_ray.monitoring.memory import PeakMemory
from dvpo_ray.monitoring.run_files import finite
from dvpo_ray.monitoring.summary import write_summary
from dvpo_ray.run_folder import begin, check_resume

logger = logging.getLogger(__name__)

OPTIMIZER_METRICS = {"loss": "loss", "learning_rate": "learning_rate", "grad_norm": "grad_norm"}
"""What every trainer logs, by its names, and the names in metrics.jsonl after the stage's."""


def trained_policy(config: Config) -> PreTrainedModel:
    """The model of `model.path` to train, with weights in float32.

    `model.dtype` is the dtype of the computation: AdamW's small steps would vanish in bfloat16 weights.

    Raises:
        InputError: the checkpoint is missing or is no causal language model.
    """
    return load_policy(config.model.model_copy(update={"dtype": "float32"}))


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
        "logging_nan_inf_filter": False,  # else a loss that is no number is logged as the mean of those before it
        "report_to": [],
        "seed": config.seed,
    }


def run_stage(
    trainer: Trainer,
    name: str,
    metrics: Mapping[str, str],
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    checkpoint: Path | None,
    output: LibraryOutput,
    notes: Sequence[str] = (),
) -> Path:
    """Train, and save the result as a checkpoint that later stages start from.

    Args:
        trainer: with the arguments of `training_arguments`.
        name: of the stage, in metric names and summary.
        metrics: what goes to metrics.jsonl: the trainer's names, and ours after `name/`. The first is shown beside the progress bar.
        out: run folder; gets `config.yaml`, `metrics.jsonl`, `checkpoints/`, `final/` and `summary.json`.
        checkpoint: of `checkpoint_to_resume`, to continue from; None starts anew.
        output: of the libraries; goes to `logs/<name>.log`.
        notes: what the user should know of the data, one line each.

    Returns:
        `out/final`, a checkpoint of model and tokenizer in `model.dtype`.

    Raises:
        ResourceError: the disk is full, or training has diverged.
    """
    begin(out, name, config, resumed=checkpoint is not None)
    output.keep(out / "logs" / f"{name}.log")
    trainer.remove_callback(PrinterCallback)
    started, state, final = time.time(), "failed", out / "final"
    memory = PeakMemory()
    try:
        with memory, RunConsole(Console(file=output.terminal, highlight=False)) as console:
            for note in notes:
                console.warn(note)
            trainer.add_callback(_Progress(console, name, metrics, out / "metrics.jsonl", config.model.dtype))
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        _check_weights(trainer.model, name)
        with whole_folder(final) as folder:
            trainer.model.to(torch_dtype(config.model.dtype)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        state = "finished"
    except KeyboardInterrupt:
        state = "interrupted"
        raise
    finally:
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        last = _metrics_entry(name, metrics, history[-1]) if history else {}
        measured = {"duration_seconds": round(time.time() - started, 1), "peak_memory_gib": round(memory.peak_gib, 3)}
        facts = {"name": config.name, "stage": name, "model": config.model.path, "seed": config.seed, "notes": list(notes), "state": state}
        write_summary(out, facts | {"steps": trainer.state.global_step, "last_step": last} | measured)
    return final


def _check_weights(model: PreTrainedModel, name: str) -> None:
    """The last step's update shows in no loss; it must not be saved as a result where it broke the model."""
    broken = next((weight for weight, parameter in model.named_parameters() if not torch.isfinite(parameter).all()), None)
    if broken is not None:
        raise diverged(f"{broken} is not finite after the last step", name)


# ------------------------------------------------------------------------------------------------------- checkpoints


def checkpoint_to_resume(out: Path, name: str, config: Config) -> Path:
    """The last whole checkpoint of the run in a folder; damaged ones are named in a warning and passed over.

    Args:
        name: of the stage that asks.
        config: its settings.

    Raises:
        InputError: as in `check_resume`, or there is no whole checkpoint.
    """
    check_resume(out, name, config)
    folders = [folder for folder in (out / "checkpoints").glob("checkpoint-*") if folder.name.removeprefix("checkpoint-").isdigit()]
    for folder in sorted(folders, key=lambda folder: int(folder.name.removeprefix("checkpoint-")), reverse=True):
        problem = _problem(folder)
        if problem is None:
            return folder
        logger.warning("%s is not whole (%s) and is passed over", folder, problem)
    raise InputError(f"{out}: no whole checkpoint to resume from; give another --out, or remove the folder to start anew")


def _problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint of transformers' trainer, or None. The trainer writes trainer_state.json last."""
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "no readable trainer_state.json"
    weights = list(folder.glob("*.safetensors"))
    if not weights:
        return "no weights"
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError):
            return f"{file.name} is damaged or truncated"
    torn = [file.name for file in (*folder.glob("*.pt"), *folder.glob("*.pth")) if not zipfile.is_zipfile(file)]
    return f"{torn[0]} is damaged or truncated" if torn else None


class _Progress(TrainerCallback):
    """A progress bar, and metrics.jsonl with one object per optimizer step; a resumed run continues both."""

    def __init__(self, console: RunConsole, name: str, metrics: Mapping[str, str], metrics_file: Path, dtype: str) -> None:
        self.console, self.name, self.metrics, self.metrics_file, self.dtype = console, name, metrics, metrics_file, dtype
        self.shown = next(iter(metrics))
        self.open = ExitStack()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.stage = self.open.enter_context(self.console.stage(self.name, state.max_steps, done=state.global_step, unit="steps"))
        self.metrics_file.write_text("".join(map(self._line, state.log_history)), encoding="utf-8")

    def on_log(self, args, state, control, **kwargs) -> None:
        entry = state.log_history[-1]
        if "loss" in entry:
            check_finite(entry["step"], _metrics_entry(self.name, self.metrics, entry), self.name, self.name, dtype=self.dtype)
            self.stage.advance(details=f"{self.metrics[self.shown]} {entry[self.shown]:.3f}")
            with open(self.metrics_file, "a", encoding="utf-8") as lines:
                lines.write(self._line(entry))

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.open.close()

    def _line(self, entry: dict) -> str:
        return json.dumps(finite({"step": entry["step"], **_metrics_entry(self.name, self.metrics, entry)})) + "\n"


def _metrics_entry(stage: str, metrics: Mapping[str, str], entry: Mapping) -> dict[str, float]:
    return {f"{stage}/{ours}": entry[theirs] for theirs, ours in metrics.items()}
