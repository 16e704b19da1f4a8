"""`dvpo quickstart`: DVPO makes a real language model better, on two cores and in minutes.

checkpoint → preference pairs (shipped) → Global Value Model → policy optimisation → gold before and after → report.html
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from dvpo_ray.config import Config, load_config
from dvpo_ray.config.arithmetic import counted
from dvpo_ray.data.rows import content_text
from dvpo_ray.evaluation.gain import read_evaluation
from dvpo_ray.monitoring.console import PipedConsole, RunConsole, duration
from dvpo_ray.monitoring.ending import verdict_of, whereabouts
from dvpo_ray.monitoring.memory import PeakMemory
from dvpo_ray.monitoring.report import write_report
from dvpo_ray.monitoring.run_files import write_summary
from dvpo_ray.quickstart.checkpoint import smollm2_checkpoint
from dvpo_ray.runtime.cluster import connect
from dvpo_ray.training.policy import train
from dvpo_ray.training.value_model import train_value_model

FOLDER = Path(__file__).parent
CONFIG = FOLDER / "config.yaml"
DATA = FOLDER / "data"
SHOWN_PROMPTS = 4
"""Prompts whose responses before and after are printed side by side. report.html has all of them."""


def quickstart_config(overrides: Sequence[str] = (), checkpoint: str | Path | None = None) -> Config:
    """The quickstart's settings with the shipped data in place.

    Args:
        overrides: `key.sub=value` each; they replace everything else.
        checkpoint: folder of SmolLM2-135M-Instruct; its hub name when not given.

    Raises:
        InputError: a bad override.
    """
    files = {
        "data.preferences.path": DATA / "preferences.train.jsonl",
        "data.preferences.heldout_path": DATA / "preferences.heldout.jsonl",
        "data.prompts.path": DATA / "prompts.train.jsonl",
        "data.prompts.heldout_path": DATA / "prompts.heldout.jsonl",
    }
    if checkpoint is not None:
        files["model.path"] = Path(checkpoint)
    return load_config(CONFIG, [*(f"{key}={json.dumps(str(path))}" for key, path in files.items()), *overrides])


def quickstart(out: Path, overrides: Sequence[str] = ()) -> Path:
    """Run all stages in one Ray session and return the path of report.html.

    Args:
        out: run folder of the policy optimisation; the GVM's run folder is its `gvm/`.
        overrides: settings that replace those of the quickstart's config.

    Raises:
        InputError, ResourceError: in one line.
    """
    started = time.time()
    config = quickstart_config(overrides)
    with RunConsole() as console, PeakMemory() as memory:
        console.header("DVPO quickstart", _facts(config, out))
        if not any(override.startswith("model.path=") for override in overrides):
            config = quickstart_config(overrides, smollm2_checkpoint(say=console.say))
        with connect(config.ray, console.say):
            gvm = train_value_model(config, config.gvm, out / "gvm", console=console)
            value_model = config.gvm.model_copy(update={"path": str(gvm)})
            train(config.model_copy(update={"gvm": value_model, "out": str(out)}), console=console)
    # Time and memory of the whole quickstart replace those of its last stage.
    whole = {"duration_seconds": round(time.time() - started, 1), "peak_memory_gib": round(memory.peak_gib, 3)}
    write_summary(out, _summary(out) | whole)
    report = write_report(out)
    print_result(out)
    return report


def _facts(config: Config, out: Path) -> dict[str, object]:
    return {
        "task": "continue the opening of a sentence; VADER, a sentiment lexicon, is the gold judge",
        "stages": f"value model from preference pairs, then {counted(config.train.steps, 'step')} of DVPO with it frozen",
        "judged": f"{counted(config.evaluation.prompts, 'held-out prompt')}, before and after",
        "run folder": out,
    }


def _summary(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------------ result


def print_result(out: Path) -> None:
    """The gold scores before and after, some responses side by side, and where everything is."""
    summary = _summary(out)
    console = PipedConsole(highlight=False)
    console.print(samples_table(out, summary["steps"]))
    console.print(gold_table(summary["gold"]))
    console.print(verdict_of(summary), style="bold")
    console.print(f"{duration(summary['duration_seconds'])}, {summary['peak_memory_gib']:.1f} GiB of memory at most", highlight=False)
    for line in whereabouts(out, "train"):
        RunConsole(console).say(line)


def gold_table(gold: dict) -> Table:
    """Mean gold score before and after, and the gain, each with its 95 % interval."""
    table = Table("", "gold score", "95 % interval", title=f"VADER, {counted(gold['prompts'], 'held-out prompt')}")
    for name in ("before", "after"):
        table.add_row(name, f"{gold[name]['mean']:+.3f}", interval(gold[name]["ci95"]))
    table.add_row("gain", f"{gold['gain']:+.3f}", interval(gold["gain_ci95"]), style="bold")
    return table


def samples_table(out: Path, last_step: int) -> Table:
    """The same held-out prompts answered before and after training, each response with its gold score."""
    table = Table("prompt", "before", "after", title="Some held-out prompts", show_lines=True)
    before, after = read_evaluation(out, 0), read_evaluation(out, last_step)
    for first, last in list(zip(before, after, strict=True))[:SHOWN_PROMPTS]:
        table.add_row(content_text(first["prompt"]), *(f"{row['response'].strip()} ({row['gold']:+.2f})" for row in (first, last)))
    return table


def interval(ends: Sequence[float]) -> str:
    return f"[{ends[0]:+.3f}, {ends[1]:+.3f}]"
