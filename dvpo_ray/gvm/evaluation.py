"""`dvpo gvm eval`: a value model on held-out pairs, as evaluation.json and plots."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from dvpo_ray.config import Config
from dvpo_ray.files import whole_folder
from dvpo_ray.gvm.artifact import load_gvm_of_run
from dvpo_ray.gvm.dataset import load_heldout
from dvpo_ray.gvm.plots import plot_accuracy_by_position, plot_calibration, plot_value_trajectories
from dvpo_ray.gvm.views import (
    HeldoutValues,
    accuracies,
    binary_calibration,
    length_matched,
    regression_by_decile,
    regression_metrics,
    score_calibration,
    wilson_interval,
)
from dvpo_ray.models.forward import batch_values
from dvpo_ray.models.loading import load_tokenizer

WEAK_ACCURACY = 0.60
"""The paper's failure signature (arXiv 2502.16944)."""
FITTED_ACCURACY = 0.70


def evaluate_gvm(config: Config, gvm_path: Path, out: Path) -> dict:
    """Measure a value model on the config's held-out pairs, in this process.

    Outcomes are of the kind the model was trained on, as its manifest says, whatever `gvm.outcome` is.

    Args:
        gvm_path: the artifact.
        out: folder for evaluation.json and the plots.

    Returns:
        The content of evaluation.json; see `heldout_report`.

    Raises:
        InputError: as in `load_gvm` and `load_heldout`.
    """
    tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
    model, manifest = load_gvm_of_run(config.model, gvm_path, tokenizer)
    heldout = load_heldout(config, config.gvm, manifest, tokenizer)
    flat = batch_values(model, heldout.batch, config.scorer.micro_batch_tokens)
    values = HeldoutValues.from_parts(heldout, [(np.arange(heldout.num_pairs), flat[heldout.batch.state_index])])
    report = heldout_report(values, manifest.outcome.kind)
    write_evaluation(out, values, report)
    return report


def heldout_report(heldout: HeldoutValues, outcome: str) -> dict:
    """Every view of METHOD's evaluation of a value model.

    Args:
        outcome: `binary` or `score`.

    Returns:
        `pairs` and `length_matched_pairs`: how many;
        `heldout_accuracy`: share of pairs ranked right by view, see `accuracies`; `accuracy_ci95`: their 95 % intervals;
        `regression`: over all states, and `by_position_decile`;
        `calibration`: of all states, see `binary_calibration` and `score_calibration`.
    """
    right = accuracies(heldout)
    outcomes = np.repeat(heldout.outcomes, heldout.lengths)
    calibrate = binary_calibration if outcome == "binary" else score_calibration
    return {
        "pairs": heldout.num_pairs,
        "length_matched_pairs": int(length_matched(heldout).sum()),
        "heldout_accuracy": {name: float(pairs.mean()) for name, pairs in right.items()},
        "accuracy_ci95": {name: list(wilson_interval(pairs)) for name, pairs in right.items()},
        "regression": regression_metrics(heldout.values, outcomes) | {"by_position_decile": regression_by_decile(heldout)},
        "calibration": calibrate(heldout.values, outcomes) | {"outcome": outcome},
    }


def write_evaluation(folder: Path, heldout: HeldoutValues, report: dict) -> None:
    """Write evaluation.json and its plots as a whole folder, in place of an earlier one."""
    with whole_folder(folder) as draft:
        (draft / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        plot_accuracy_by_position(draft / "accuracy_by_position.png", report)
        plot_calibration(draft / "calibration.png", report)
        plot_value_trajectories(draft / "value_trajectories.png", heldout)


def heldout_warning(heldout: dict[str, float], training_accuracy: float, num_pairs: int, section: str = "gvm", view: str = "mean") -> str | None:
    """One line of warning and advice where held-out pairs are ranked hardly better than by a coin, else None.

    Args:
        heldout: held-out accuracy by view.
        training_accuracy: on the minibatches of the last epoch, which tells too little training from too little data.
        num_pairs: training pairs.
        section: `gvm` or `reward_model`, where the training is set up.
        view: the one that is judged: `mean`, and of a reward model `last`, the only value that it was trained on.
    """
    if heldout[view] >= WEAK_ACCURACY:
        return None
    if training_accuracy < FITTED_ACCURACY:
        objective = "" if section == "reward_model" else ", or set gvm.objective=monte_carlo"
        advice = f"it has not fitted its training pairs either: raise {section}.learning_rate or {section}.epochs{objective}"
    else:
        advice = f"it fitted its {num_pairs} training pairs: give more pairs, fewer {section}.epochs, or responses that differ more"
    other = "" if view == "last" else f" ({heldout['last']:.2f} by last value)"
    return (
        f"held-out accuracy {heldout[view]:.2f} by {view} value{other} is under {WEAK_ACCURACY:.2f}; "
        f"training accuracy was {training_accuracy:.2f}, so {advice}"
    )
