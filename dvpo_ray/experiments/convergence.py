"""Who gets where, by which step and when: DVPO and the baselines at equal samples, equal wall-clock and equal KL."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dvpo_ray.config import Config
from dvpo_ray.config.algorithms import ALGORITHMS
from dvpo_ray.config.arithmetic import SAME_RUN, check_equal
from dvpo_ray.config.options import add_set_option, refuse_own_key, settings_by_algorithm, whole_number
from dvpo_ray.errors import InputError
from dvpo_ray.experiments.advantage_modes import add_kl_option
from dvpo_ray.experiments.curves import Curve, draw_gold, last_metric, read_curve, training_seconds
from dvpo_ray.experiments.results import Result, first_reaching, over_seeds
from dvpo_ray.experiments.study import Run, Study, override, variants

COMPARED = ("dvpo", "ppo", "grpo", "rloo", "remax")
TARGET = "ppo"
"""The algorithm whose best gold the others are timed to."""


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
        help = "samples of a prompt for those that compare them; they take so many times fewer prompts, so samples stay equal (default: 4)"
        parser.add_argument("--group", type=whole_number(at_least=2), default=4, metavar="N", help=help)
        add_set_option(parser)
        help = "settings to search: every algorithm once with every value, such as policy.learning_rate=1e-4,3e-4"
        parser.add_argument("--grid", metavar="KEY=VALUE,VALUE", help=help)
        add_kl_option(parser)

    # ------------------------------------------------------------------------------------------------------- runs

    def runs(self) -> list[Run]:
        self.require("data.prompts.path")
        self.require_curves()
        models = self._models()
        paths = [override(f"{section}.path", str(run.folder / "final")) for section, run in models.items()]
        policies = [
            self.run("policy", variant, seed, *overrides, *paths)
            for seed in self.seeds
            for algorithm in self.options.algorithms
            for variant, overrides in self._of_algorithm(algorithm)
        ]
        _check_comparable(policies)
        return [*models.values(), *policies]

    def _models(self) -> dict[str, Run]:
        """Training of the frozen models that the algorithms need and the config has no path of, by config section; one for all seeds."""
        needed = {ALGORITHMS[algorithm].scorer for algorithm in self.options.algorithms}
        models: dict[str, Run] = {}
        if "scorer" in needed and self.config.gvm.path is None:
            self.require("data.preferences.path")
            models["gvm"] = self.run("gvm", "value-model", self.seeds[0])
        if "reward_model" in needed and self.config.reward_model.path is None:
            self.require("data.preferences.path")
            models["reward_model"] = self.run("rm", "reward-model", self.seeds[0])
        return models

    def _of_algorithm(self, algorithm: str) -> Iterator[tuple[str, list[str]]]:
        """Its variants, by name."""
        common = [
            override("algorithm", algorithm),
            *self._batch(algorithm),
            *settings_by_algorithm(self.options.set, self.options.algorithms)[algorithm],
        ]
        if self.options.grid is None:
            yield algorithm, common
            return
        key, _, values = self.options.grid.partition("=")
        refuse_own_key(f"--grid {self.options.grid}", key.strip())
        if any(setting.startswith(f"{key}=") for setting in common):
            raise InputError(f"--grid {key}: is set for {algorithm} already; search it or set it")
        for value in values.split(","):
            yield f"{algorithm}-{value}", [*common, f"{key}={value}"]

    def _batch(self, algorithm: str) -> list[str]:
        if ALGORITHMS[algorithm].min_samples_per_prompt == 1:
            return []
        batch, group = self.config.batch, self.options.group
        prompts, rest = divmod(batch.prompts_per_step * batch.samples_per_prompt, group)
        if rest or not prompts:
            raise InputError(f"--group {group}: a step's {batch.prompts_per_step * batch.samples_per_prompt} samples are no multiple of it")
        return [override("batch.prompts_per_step", prompts), override("batch.samples_per_prompt", group)]

    # ----------------------------------------------------------------------------------------------------- result

    def result(self, runs: Sequence[Run]) -> Result:
        policies = variants(runs, stage="policy")
        curves = {variant: [read_curve(run) for run in of_variant] for variant, of_variant in policies.items()}
        table = list(compare(curves, self.options.kl))
        for row, of_variant in zip(table, policies.values(), strict=True):
            row["final length"] = over_seeds([last_metric(run, "response_length/mean") for run in of_variant])
            row["seconds before step 1"] = over_seeds([_seconds_of_frozen_model(run.config) for run in of_variant])
        every = [curve for of_variant in curves.values() for curve in of_variant]
        batch = self.config.batch
        details = {
            "steps": self.config.train.steps,
            "samples_per_step": batch.prompts_per_step * batch.samples_per_prompt,
            "settings": {variant: list(of_variant[0].overrides) for variant, of_variant in policies.items()},
            "curves": [curve.as_json() for curve in every],
        }
        return Result(table, lambda figure: draw_gold(figure, every, against=("step", "seconds", "kl")), details)


def _check_comparable(policies: Sequence[Run]) -> None:
    """Refuse runs that cannot be compared, and two variants that are the same run.

    Raises:
        InputError: names the variants.
    """
    configs = {run.variant: run.config for run in policies if run.seed == policies[0].seed}
    check_equal(configs, SAME_RUN)
    by_settings: dict[str, str] = {}
    for variant, config in configs.items():
        same = by_settings.setdefault(config.model_dump_json(exclude={"out"}), variant)
        if same != variant:
            raise InputError(f"the variants {same} and {variant} are the same run; name every variant once")


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
        columns = {
            "final gold": [curve.gold[-1] for curve in of_variant],
            "best gold": [curve.gold.max() for curve in of_variant],
            "gold at equal wall-clock": [first_reaching(curve.seconds, curve.gold, common[curve.seed]) for curve in of_variant],
            **{f"gold at {kl:g} nats": [curve.gold_at_kl(kl) for curve in of_variant] for kl in kl_grid},
            "final KL": [curve.kl[-1] for curve in of_variant],
            "seconds per step": [curve.seconds[-1] / curve.step[-1] for curve in of_variant],
        }
        if target:
            columns |= _race(of_variant, target)
        yield {"algorithm": variant} | {name: over_seeds(values) for name, values in columns.items()}


def _race(curves: Sequence[Curve], target: dict[int, Curve]) -> dict[str, list[float]]:
    """Steps and seconds until each curve first has the most gold that PPO's curve of its seed ever has."""
    goal = {seed: best.gold.max() for seed, best in target.items()}
    steps = [first_reaching(curve.gold, curve.step, goal[curve.seed]) for curve in curves]
    seconds = [first_reaching(curve.gold, curve.seconds, goal[curve.seed]) for curve in curves]
    of_ppo = [first_reaching(target[curve.seed].gold, target[curve.seed].seconds, goal[curve.seed]) for curve in curves]
    return {
        "steps to PPO's best": steps,
        "seconds to PPO's best": seconds,
        "of PPO's seconds": [mine / ppos if ppos else np.nan for mine, ppos in zip(seconds, of_ppo, strict=True)],
        "seeds that reach it": np.isfinite(steps).tolist(),
    }


def _best_of_target(curves: Sequence[Curve]) -> dict[int, Curve]:
    """PPO's curve with the most gold, by seed; empty where PPO isn't compared."""
    best: dict[int, Curve] = {}
    for curve in curves:
        is_target = curve.variant == TARGET or curve.variant.startswith(f"{TARGET}-")
        if is_target and (curve.seed not in best or curve.gold.max() > best[curve.seed].gold.max()):
            best[curve.seed] = curve
    return best


def _seconds_of_frozen_model(config: Config) -> float:
    """Seconds of training that the GVM or reward model took, where its run folder is still around it; NaN otherwise."""
    folder = Path(getattr(config, ALGORITHMS[config.algorithm].section).path).parent
    return training_seconds(folder) if (folder / "metrics.jsonl").exists() else float("nan")
