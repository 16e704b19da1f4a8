"""What a run of policy optimisation says of itself: the header on the console, and its part of summary.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from dvpo_ray.config import Config
from dvpo_ray.config.algorithms import ALGORITHMS
from dvpo_ray.evaluation.gain import gold_gain
from dvpo_ray.health.alarms import Alarm
from dvpo_ray.training.policy_inputs import Inputs
from dvpo_ray.training.refresh import Refreshed
from dvpo_ray.training.run import Run


def header(config: Config, inputs: Inputs) -> dict[str, object]:
    """What runs, and with what."""
    batch, section = config.batch, ALGORITHMS[config.algorithm].section
    accuracy = ", ".join(f"{view} {value:.3f}" for view, value in inputs.manifest.heldout_accuracy.items() if view in ("mean", "last"))
    model = f"{getattr(config, section).path} (held-out accuracy {accuracy or 'unknown'})"
    return {
        "model": config.model.path,
        {"gvm": "value model", "reward_model": "reward model"}[section]: model,
        "prompts": f"{len(inputs.prompts)} training, {len(inputs.heldout)} held out",
        "batch": f"{batch.prompts_per_step} prompts x {batch.samples_per_prompt} samples, {config.train.steps} steps",
        "advantage": f"{_advantage_mode(config)}, KL in {config.kl.placement} x {config.kl.coefficient:g}",
    }


def summary(
    run: Run, inputs: Inputs, evaluations: Mapping[int, Mapping[str, float]], alarms: Sequence[Alarm], refreshed: Refreshed
) -> dict[str, object]:
    """The entries of summary.json that only policy optimisation has."""
    config, section = run.config, ALGORITHMS[run.config.algorithm].section
    entries: dict[str, object] = {
        "algorithm": config.algorithm,
        "advantage_mode": _advantage_mode(config),
        section: {"path": getattr(config, section).path, "heldout_accuracy": inputs.manifest.heldout_accuracy},
        "alarms": [asdict(alarm) for alarm in alarms],
        **({"refresh": asdict(refreshed)} if refreshed.steps else {}),
        "evaluations": {str(step): result for step, result in sorted(evaluations.items())},
    }
    last = max(evaluations, default=0)
    if last > 0:
        entries["kl"] = {"after_mean": evaluations[last]["kl"]}
        if "gold" in evaluations[last]:
            entries["gold"] = gold_gain(run.folder, last)
    return entries


def _advantage_mode(config: Config) -> str:
    return config.advantage.mode if ALGORITHMS[config.algorithm].section == "gvm" else config.algorithm
