"""The results of `dvpo bench trl`: samples per second, ratios, and the gap stage by stage; as JSON, and from that as lines for people.

A measured step is a dictionary of seconds: `step`, all of it; `generation`, sampling (here the frozen models score what is finished
meanwhile); `scoring`, log-probs of the reference, values, rewards and advantages (here what is left of it after the sampling);
`training`, the update. The `rest` is weight sync and logging; in TRL the data loader and the garbage collector.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dvpo_ray.bench.measure import Spread, aligned, verdict
from dvpo_ray.bench.overhead import StepProfile, by_round
from dvpo_ray.config.arithmetic import derive_batch
from dvpo_ray.config.schema import Config

SHOWN = ("step", "generation", "scoring", "training", "rest")
TARGETS = {"ppo": 1.4, "dvpo": 2.5}


class Measured(NamedTuple):
    """Measured steps and peak memory of all processes; for TRL also the versions of TRL, transformers and torch."""

    steps: list[dict[str, float]]
    peak_memory_gib: float
    versions: Mapping[str, str] = {}


def of_profile(profile: StepProfile) -> Measured:
    """Steps of this system in the stages of TRL's."""
    scoring = ("score", "reference", "advantage")
    steps = [
        {
            "step": step.total,
            "generation": step.stages["generate"],
            "scoring": sum(step.stages[name] for name in scoring),
            "training": step.stages["update"],
        }
        for step in profile.steps
    ]
    return Measured(steps, profile.peak_memory_gib)


def trl_results(config: Config, trl: Sequence[Measured], ours: Mapping[str, Sequence[Measured]]) -> dict:
    """Everything that `dvpo bench trl` measured, from the rounds of TRL and of each algorithm of ours."""
    plan = derive_batch(config)
    tokens = config.rollout.max_response_tokens
    contestants = {name: _contestant(rounds, plan.samples_per_step) for name, rounds in {"trl_ppo": trl, **ours}.items()}
    seconds = {name: one["seconds"] for name, one in contestants.items()}
    ratios = {name: [theirs / mine for theirs, mine in zip(_steps(trl), _steps(rounds), strict=True)] for name, rounds in ours.items()}
    return {
        "work": f"{plan.samples_per_step} rollouts of {tokens} tokens, {plan.optimizer_steps_per_step} optimizer steps of "
        f"{plan.rows_per_minibatch} rows",
        "contestants": contestants,
        "ratios": {
            name: {
                "ratio": statistics.median(by_rounds),
                "by_round": by_rounds,
                "target": TARGETS[name],
                "gap_seconds": {stage: seconds["trl_ppo"][stage] - seconds[name][stage] for stage in SHOWN},
            }
            for name, by_rounds in ratios.items()
        },
    }


def _contestant(rounds: Sequence[Measured], samples: int) -> dict:
    """Seconds are medians over rounds of a round's median; the range of samples per second is that of all steps."""
    medians = [_medians(run.steps) for run in rounds]
    seconds = {name: statistics.median(one[name] for one in medians) for name in SHOWN}
    rates = [samples / step["step"] for run in rounds for step in run.steps]
    return {
        "samples_per_second": Spread(samples / seconds["step"], min(rates), max(rates))._asdict(),
        "seconds": seconds,
        "peak_memory_gib": max(run.peak_memory_gib for run in rounds),
        "steps_by_round": [run.steps for run in rounds],
    }


def _medians(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    whole = [{**step, "rest": step["step"] - step["generation"] - step["scoring"] - step["training"]} for step in steps]
    return {name: statistics.median(step[name] for step in whole) for name in SHOWN}


def _steps(rounds: Sequence[Measured]) -> list[float]:
    """Median seconds of a step in each round."""
    return [_medians(run.steps)["step"] for run in rounds]


def lines(results: dict) -> list[str]:
    """The results for people."""
    table = [["", "samples/s (range)", *SHOWN, "peak GiB"]]
    for name, one in results["contestants"].items():
        title = "TRL PPO" if name == "trl_ppo" else f"algorithm: {name}"
        table.append([title, f"{Spread(**one['samples_per_second']):.2f}", *_cells(one["seconds"]), f"{one['peak_memory_gib']:.2f}"])
    table += [[f"TRL less {name}", "", *_cells(one["gap_seconds"]), ""] for name, one in results["ratios"].items()]
    verdicts = [
        f"{name}: {one['ratio']:.2f} x the samples per second of TRL's PPO{by_round(one['by_round'], digits=2)}, target "
        + verdict(f">= {one['target']:g}", one["ratio"] >= one["target"])
        for name, one in results["ratios"].items()
    ]
    return [f"{results['work']}; medians, stages in seconds", *aligned(table), *verdicts]


def _cells(seconds: Mapping[str, float]) -> list[str]:
    return [f"{seconds[name]:.3f}" for name in SHOWN]
