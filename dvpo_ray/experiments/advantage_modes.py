"""Which advantage mode is best: gold against KL, every mode, several seeds, the same samples.

Every run is an ordinary `dvpo train` in a folder of its own, evaluated on the held-out prompts every few steps. A finished run
is kept, so the experiment can be stopped and started again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dvpo_ray.config.schema import Config
from dvpo_ray.files import whole_file
from dvpo_ray.monitoring.console import RunConsole
from dvpo_ray.monitoring.run_files import finite
from dvpo_ray.orchestration.cluster import connect
from dvpo_ray.orchestration.run import train


@dataclass(frozen=True)
class Curve:
    """Held-out evaluations of one run, in the order of its steps.

    Attributes:
        kl: mean sequence KL from the reference in nats, float64 [n].
        gold: mean gold score, float64 [n].
    """

    mode: str
    seed: int
    kl: np.ndarray
    gold: np.ndarray

    def gold_at(self, kl_nats: float) -> float:
        """Gold where the run first reaches a KL, linear between evaluations; NaN when it never does."""
        reached = np.flatnonzero(self.kl >= kl_nats)
        if len(reached) == 0:
            return float("nan")
        i = int(reached[0])
        if i == 0:
            return float(self.gold[0])
        share = (kl_nats - self.kl[i - 1]) / (self.kl[i] - self.kl[i - 1])
        return float(self.gold[i - 1] + share * (self.gold[i] - self.gold[i - 1]))


def run_modes(config: Config, out: Path, modes: Sequence[str], seeds: Sequence[int], kl_grid: Sequence[float]) -> dict:
    """Train with every mode and seed, and compare.

    Args:
        config: a `dvpo train` config with a judge and `evaluation.every_steps`.
        kl_grid: KLs in nats at which gold is compared.

    Returns:
        What `result.json` holds: `table`, one row per mode with mean and standard deviation over seeds, and `curves`.
    """
    with connect(config.ray), RunConsole() as console:
        curves = [_curve(config, out, mode, seed, console) for seed in seeds for mode in modes]
    result = {
        "seeds": list(seeds),
        "steps": config.train.steps,
        "samples_per_step": config.batch.prompts_per_step * config.batch.samples_per_prompt,
        "table": list(summarise(curves, kl_grid)),
        "curves": [{"mode": c.mode, "seed": c.seed, "kl": c.kl.tolist(), "gold": c.gold.tolist()} for c in curves],
    }
    for name, text in (("result.json", json.dumps(finite(result), indent=1)), ("table.md", markdown(result["table"]))):
        with whole_file(out / name) as file:
            file.write(text)
    plot(curves, out / "gold-by-kl.png")
    return result


def _curve(config: Config, out: Path, mode: str, seed: int, console: RunConsole) -> Curve:
    folder = out / f"{mode}-seed{seed}"
    summary = folder / "summary.json"
    if not summary.exists() or json.loads(summary.read_text())["state"] != "finished":
        advantage = config.advantage.model_copy(update={"mode": mode})
        train(config.model_copy(update={"advantage": advantage, "seed": seed, "out": str(folder)}), console=console)
    evaluations = json.loads(summary.read_text())["evaluations"]
    points = [evaluations[step] for step in sorted(evaluations, key=int)]
    return Curve(mode, seed, np.array([p["kl"] for p in points]), np.array([p["gold"] for p in points]))


def summarise(curves: Sequence[Curve], kl_grid: Sequence[float]) -> Iterator[dict]:
    """One row per mode: mean and standard deviation over seeds of gold at each KL, of final gold and of final KL."""
    for mode in dict.fromkeys(curve.mode for curve in curves):
        runs = [curve for curve in curves if curve.mode == mode]
        columns = {f"gold at {kl:g} nats": [run.gold_at(kl) for run in runs] for kl in kl_grid}
        columns |= {
            "gold before": [run.gold[0] for run in runs],
            "final gold": [run.gold[-1] for run in runs],
            "final KL": [run.kl[-1] for run in runs],
        }
        yield {"mode": mode, "seeds": len(runs)} | {
            name: {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}
            for name, values in columns.items()
        }


def markdown(table: Sequence[dict]) -> str:
    """The table for the docs; a KL that not every seed reached is a dash."""
    names = [name for name in table[0] if name not in ("mode", "seeds")]

    def cell(value: dict) -> str:
        return "–" if np.isnan(value["mean"]) else f"{value['mean']:.3f} ± {value['std']:.3f}"

    lines = ["| mode | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    lines += [f"| `{row['mode']}` | " + " | ".join(cell(row[name]) for name in names) + " |" for row in table]
    return "\n".join(lines) + "\n"


def plot(curves: Sequence[Curve], path: Path) -> None:
    """Gold against KL, one line per run, one colour per mode."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="KL from the reference (nats per response)", ylabel="gold, held-out prompts")
    modes = list(dict.fromkeys(curve.mode for curve in curves))
    for curve in curves:
        label = curve.mode if curve.seed == curves[0].seed else None
        axes.plot(curve.kl, curve.gold, marker="o", markersize=3, color=f"C{modes.index(curve.mode)}", label=label, alpha=0.8)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
