"""Whether the frozen values stay right as the policy moves: their error against Monte-Carlo continuations, along runs of `dvpo train`.

A value is in the units of the GVM's outcomes and gold in the judge's. So values are first mapped to gold by the line that fits best
on the states of the untrained policy of the same seed. What is measured is how the error grows from there.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from dvpo_ray.config.options import finite_number, whole_number
from dvpo_ray.errors import InputError
from dvpo_ray.experiments.readings import draw_cells
from dvpo_ray.experiments.results import Result, columns
from dvpo_ray.experiments.states import error_metrics, fit_affine
from dvpo_ray.experiments.study import Run, Study, add_numbers, override

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASUREMENT = "states.json"
MIN_STATES = 10
"""A bin with fewer states of a seed says nothing about it."""


class DistributionShift(Study):
    name = "distribution-shift"
    help = "error of the frozen values against Monte-Carlo continuations, by KL from the reference and by position"
    example = "dvpo experiment distribution-shift cluster_configs/stories-cpu.yaml --snapshots 4 --prompts 64 --seeds 0 1"

    @classmethod
    def add_options(cls, parser: ArgumentParser) -> None:
        add_numbers(parser, "--snapshots", 4, "policies measured along a run, beside the untrained one")
        add_numbers(parser, "--prompts", 64, "held-out prompts that are answered")
        add_numbers(parser, "--continuations", 8, "ways to finish a response from each state, 2 or more", whole_number(at_least=2))
        percent = finite_number(at_least=0, at_most=100)
        add_numbers(parser, "--positions", [0, 25, 50, 75, 100], "where to measure values, in percent of a response's tokens", percent, "PERCENT")
        add_numbers(parser, "--kl-bins", [2, 5, 10, 20], "edges of the bins of sequence KL", finite_number(at_least=0), "NATS")

    def runs(self) -> list[Run]:
        self.require("gvm.path", "data.prompts.path", judge=True, continuations=True)
        if not 1 <= self.options.snapshots <= self.config.train.steps:
            raise InputError(f"--snapshots is {self.options.snapshots}; expected 1 to train.steps, which is {self.config.train.steps}")
        return [run for seed in self.seeds for run in self._of_seed(seed)]

    def _of_seed(self, seed: int) -> list[Run]:
        every = self.config.train.steps // self.options.snapshots
        settings = {"every_steps": every, "keep": self.options.snapshots + 1, "save_pretrained": True}
        policy = self.run("policy", "policy", seed, *(override(f"checkpoint.{key}", value) for key, value in settings.items()))
        steps = [every * (i + 1) for i in range(self.options.snapshots)]
        snapshots = {step: str(policy.folder / "checkpoints" / f"step_{step:06d}" / "policy") for step in steps}
        options = {"continuations": self.options.continuations, "positions": list(dict.fromkeys(self.options.positions))}
        prompts = override("evaluation.prompts", self.options.prompts)
        policies = {0: self.config.model.path} | snapshots
        return [policy, *(self.run("shift", f"step{step:04d}", seed, prompts, policy=path, **options) for step, path in policies.items())]

    def result(self, runs: Sequence[Run]) -> Result:
        by_seed = {seed: {run.variant: read_states(run) for run in runs if run.seed == seed and run.stage == "shift"} for seed in self.seeds}
        table = summarise(list(by_seed.values()), self.options.kl_bins)
        return Result(table, lambda figure: draw(figure, table))


def measure_shift(run: Run) -> dict:
    """Sample, judge and score one policy's states, and write them to states.json; see `read_states`."""
    from dvpo_ray.experiments.monte_carlo import kl_from_reference, sample_monte_carlo, values_of

    shares = [percent / 100 for percent in run.options["positions"]]
    sampled = sample_monte_carlo(run.config, run.options["policy"], shares, run.options["continuations"], run.folder)
    values = values_of(run.config, run.config.gvm.path, sampled.batch)[sampled.states.flat_index(sampled.batch)]
    kl = kl_from_reference(run.config, sampled.batch)
    columns = {"value": values, "kl": kl[sampled.states.row], "position": 100 * sampled.states.share, "gold": sampled.gold}
    (run.folder / MEASUREMENT).write_text(json.dumps({name: column.tolist() for name, column in columns.items()}), encoding="utf-8")
    return {"responses": sampled.batch.num_rows, "states": len(values), "kl": float(kl.mean()), "gold": float(sampled.gold.mean())}


def read_states(run: Run) -> dict[str, np.ndarray]:
    """What `measure_shift` wrote: `value`, sequence `kl` of the response, `position` in percent, all [S], and `gold` [S, m]."""
    return {name: np.array(column) for name, column in json.loads((run.folder / MEASUREMENT).read_text(encoding="utf-8")).items()}


def summarise(by_seed: Sequence[dict[str, dict[str, np.ndarray]]], kl_edges: Sequence[float]) -> list[dict]:
    """Errors of the values by policy, by sequence KL and by position in the response, over the seeds.

    Args:
        by_seed: for each seed the states of each policy along its run, the untrained one first; see `read_states`.

    Returns:
        Rows. `group` is `policy`, `KL` or `position`. A row has no numbers where a seed has fewer than `MIN_STATES` states in it.
    """
    pooled = [_pooled(of_seed) for of_seed in by_seed]
    edges = [-np.inf, *sorted(kl_edges), np.inf]
    groups = [("policy", f"policy at {name}", lambda states, name=name: states["policy"] == name) for name in by_seed[0]]
    groups += [
        ("KL", _bin_name(low, high), lambda states, low=low, high=high: (states["kl"] >= low) & (states["kl"] < high))
        for low, high in pairwise(edges)
    ]
    percents = np.unique(pooled[0]["position"])
    groups += [("position", f"after {percent:g} %", lambda states, percent=percent: states["position"] == percent) for percent in percents]
    return [
        _row(group, name, [{key: column[chosen(states)] for key, column in states.items()} for states in pooled]) for group, name, chosen in groups
    ]


def _pooled(of_seed: dict[str, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The states of all policies with their `policy`, and values in the unit of gold."""
    untrained, *_ = every = list(of_seed.values())
    to_gold = fit_affine(untrained["value"], untrained["gold"].mean(axis=1))
    columns = {name: np.concatenate([states[name] for states in every]) for name in untrained}
    policies = np.repeat(list(of_seed), [len(states["value"]) for states in every])
    return columns | {"policy": policies, "value": to_gold(columns["value"])}


def _bin_name(low: float, high: float) -> str:
    if np.isinf(low):
        return f"KL below {high:g} nats"
    return f"KL {low:g} nats and more" if np.isinf(high) else f"KL {low:g} to {high:g} nats"


def _row(group: str, name: str, by_seed: Sequence[dict[str, np.ndarray]]) -> dict:
    row: dict = {"states": name, "group": group}
    if any(len(states["value"]) < MIN_STATES for states in by_seed):
        return row
    measured = [
        {"count": len(states["value"]), "KL": states["kl"].mean(), "value": states["value"].mean(), "gold": states["gold"].mean()}
        | error_metrics(states["value"], states["gold"])
        for states in by_seed
    ]
    return row | columns(measured)


def draw(figure: Figure, table: Sequence[dict]) -> None:
    """RMSE and bias by policy and KL bin, and by position."""
    figure.set_size_inches(11, 4.5)
    for axes, group in zip(figure.subplots(1, 3, sharey=True), ("policy", "KL", "position"), strict=True):
        rows = [row for row in table if row["group"] == group and "rmse" in row]
        for name in ("rmse", "bias"):
            draw_cells(axes, range(len(rows)), rows, name)
        axes.set_xticks(range(len(rows)), [row["states"] for row in rows], rotation=40, ha="right", fontsize=7)
        axes.grid(alpha=0.3)
        axes.axhline(0.0, color="grey", linewidth=0.8)
    axes.legend()
    figure.axes[0].set_ylabel("error of the value, in units of gold")
