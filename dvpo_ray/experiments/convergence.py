"""How much gold DVPO and the baselines reach, and how soon: at equal samples, equal wall-clock and equal KL."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dvpo_ray.config import Config
from dvpo_ray.config.algorithms import ALGORITHMS
from dvpo_ray.config.arithmetic import SAME_RUN, check_equal, counted
from dvpo_ray.config.options import add_set_option, refuse_own_key, settings_by_algorithm, whole_number
from dvpo_ray.errors import InputError
from dvpo_ray.experiments.readings import Curve, draw_gold, metrics_of, read_curve, training_seconds
from dvpo_ray.experiments.results import Result, columns, first_reaching, over_seeds
from dvpo_ray.experiments.study import Run, Study, add_kl_option, add_numbers, override, variants

COMPARED = ("dvpo", "ppo", "grpo", "rloo", "remax")
TARGET = "ppo"
"""The others are timed until they reach the best gold of this algorithm."""


class Convergence(Study):
    name = "convergence"
    help = "DVPO against PPO, GRPO, RLOO and ReMax at equal samples, equal wall-clock and equal KL"
    example = (
        "dvpo experiment convergence cluster_configs/stories-cpu.yaml evaluation.every_steps=4 --set ppo:critic.learning_rate=1e-3 "
        "--grid policy.learning_rate=1e-4,3e-4"
    )

    @classmethod
    def add_options(cls, parser: ArgumentParser) -> None:
        help = f"of {', '.join(ALGORITHMS)} (default: {' '.join(COMPARED)})"
        parser.add_argument("--algorithms", nargs="+", choices=list(ALGORITHMS), default=list(COMPARED), metavar="ALGORITHM", help=help)
        meaning = "samples of a prompt for algorithms that compare them; the number of prompts is divided by it, so samples stay equal"
        add_numbers(parser, "--group", 4, meaning, whole_number(at_least=2))
        add_set_option(parser)
        help = "values of a setting to search: every algorithm runs once with each, as in policy.learning_rate=1e-4,3e-4"
        parser.add_argument("--grid", metavar="KEY=VALUE,VALUE", help=help)
        add_kl_option(parser)

    # ------------------------------------------------------------------------------------------------------- runs

    def runs(self) -> list[Run]:
        self.require("data.prompts.path", curves=True)
        models = self._models()
        paths = [override(f"{section}.path", run.final) for section, run in models.items()]
        policies = [
            self.run("policy", variant, seed, *overrides, *paths)
            for seed in self.seeds
            for algorithm in self.options.algorithms
            for variant, overrides in self._of_algorithm(algorithm)
        ]
        check_equal({run.variant: run.config for run in policies if run.seed == self.seeds[0]}, SAME_RUN)
        return [*models.values(), *policies]

    def _models(self) -> dict[str, Run]:
        """By config section, training of each frozen model that an algorithm needs and the config has no path of; one for all seeds."""
        stages = {"gvm": ("gvm", "value-model"), "reward_model": ("rm", "reward-model")}
        needed = {ALGORITHMS[algorithm].section for algorithm in self.options.algorithms}
        missing = [section for section in stages if section in needed and getattr(self.config, section).path is None]
        if missing:
            self.require("data.preferences.path")
        return {section: self.run(*stages[section], self.seeds[0]) for section in missing}

    def _of_algorithm(self, algorithm: str) -> Iterator[tuple[str, list[str]]]:
        """The overrides of its variants, by name."""
        own = settings_by_algorithm(self.options.set, self.options.algorithms)[algorithm]
        common = [override("algorithm", algorithm), *self._batch(algorithm), *own]
        if self.options.grid is None:
            yield algorithm, common
            return
        key, _, values = self.options.grid.partition("=")
        refuse_own_key(f"--grid {self.options.grid}", key.strip())
        if any(setting.startswith(f"{key}=") for setting in common):
            raise InputError(f"--grid {key}: already set for {algorithm}; search it or set it")
        for value in values.split(","):
            yield f"{algorithm}-{value}", [*common, f"{key}={value}"]

    def _batch(self, algorithm: str) -> list[str]:
        if ALGORITHMS[algorithm].min_samples_per_prompt == 1:
            return []
        batch, group = self.config.batch, self.options.group
        samples = batch.prompts_per_step * batch.samples_per_prompt
        if samples % group:
            raise InputError(f"--group {group}: a step has {counted(samples, 'sample')}, which is not a multiple of it")
        return [override("batch.prompts_per_step", samples // group), override("batch.samples_per_prompt", group)]

    # ----------------------------------------------------------------------------------------------------- result

    def result(self, runs: Sequence[Run]) -> Result:
        policies = variants(runs, stage="policy")
        curves = {variant: [read_curve(run) for run in of_variant] for variant, of_variant in policies.items()}
        table = list(compare(curves, self.options.kl))
        for row, of_variant in zip(table, policies.values(), strict=True):
            row["final length"] = over_seeds([metrics_of(run.folder)[-1]["response_length/mean"] for run in of_variant])
            row["seconds before step 1"] = over_seeds([_seconds_of_frozen_model(run.config) for run in of_variant])
        every = [curve for of_variant in curves.values() for curve in of_variant]
        settings = {variant: list(of_variant[0].overrides) for variant, of_variant in policies.items()}
        return Result(table, lambda figure: draw_gold(figure, every, against=("step", "seconds", "kl")), self.details(every, settings=settings))


def compare(curves: dict[str, list[Curve]], kl_grid: Sequence[float]) -> Iterator[dict]:
    """One row per variant.

    Columns: final and best gold; gold when the fastest run of the seed had done all its steps (equal wall-clock) and at each KL; final KL;
    seconds of a step; steps and seconds until gold first reaches PPO's best of the same seed, those seconds as a multiple of PPO's own,
    and the share of seeds that reach it at all.

    Args:
        curves: of each variant, one per seed.
    """
    every = [curve for of_variant in curves.values() for curve in of_variant]
    common = {seed: min(curve.seconds[-1] for curve in every if curve.seed == seed) for seed in {curve.seed for curve in every}}
    target = _best_of_target(every)
    for variant, of_variant in curves.items():
        measured = [
            {
                "final gold": curve.gold[-1],
                "best gold": curve.gold.max(),
                "gold at equal wall-clock": first_reaching(curve.seconds, curve.gold, common[curve.seed]),
                **curve.golds_at(kl_grid),
                "final KL": curve.kl[-1],
                "seconds per step": curve.seconds[-1] / curve.step[-1],
                **(_race(curve, target[curve.seed]) if target else {}),
            }
            for curve in of_variant
        ]
        yield {"algorithm": variant} | columns(measured)


def _race(curve: Curve, target: Curve) -> dict[str, float]:
    """Steps and seconds until a curve first has the most gold that PPO's curve of its seed ever has."""
    goal = target.gold.max()
    steps, seconds = (first_reaching(curve.gold, x, goal) for x in (curve.step, curve.seconds))
    of_ppo = first_reaching(target.gold, target.seconds, goal)
    return {
        "steps to PPO's best": steps,
        "seconds to PPO's best": seconds,
        "of PPO's seconds": seconds / of_ppo if of_ppo else np.nan,
        "seeds that reach it": np.isfinite(steps),
    }


def _best_of_target(curves: Sequence[Curve]) -> dict[int, Curve]:
    """PPO's curve with the most gold (the first of equal ones), by seed; empty where PPO is not compared."""
    of_ppo = [curve for curve in curves if curve.variant == TARGET or curve.variant.startswith(f"{TARGET}-")]
    return {curve.seed: curve for curve in sorted(of_ppo[::-1], key=lambda curve: curve.gold.max())}


def _seconds_of_frozen_model(config: Config) -> float:
    """Seconds of training that the GVM or reward model took, where its run folder is still around it; NaN otherwise."""
    folder = Path(getattr(config, ALGORITHMS[config.algorithm].section).path).parent
    return training_seconds(folder) if (folder / "metrics.jsonl").exists() else float("nan")
