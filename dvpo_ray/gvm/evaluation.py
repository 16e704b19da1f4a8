"""`dvpo gvm eval`: a value model on held-out pairs, as evaluation.json and three plots."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dvpo_ray.config import Config
from dvpo_ray.config.arithmetic import counted
from dvpo_ray.files import whole_folder
from dvpo_ray.gvm.artifact import load_gvm_of_run
from dvpo_ray.gvm.dataset import load_heldout
from dvpo_ray.gvm.views import (
    POSITIONS,
    HeldoutValues,
    accuracies,
    binary_calibration,
    length_matched,
    regression_by_decile,
    regression_metrics,
    score_calibration,
    value_spread,
    wilson_interval,
)
from dvpo_ray.models.forward import batch_values
from dvpo_ray.models.loading import load_tokenizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WEAK_ACCURACY = 0.60
"""Held-out accuracy under which training has failed according to the paper (arXiv 2502.16944)."""
UNMOVED_SPREAD = 0.05
"""Spread of the values under which they are those of a model that has just begun to learn (docs/gvm.md, "How many pairs and epochs")."""
FITTED_ACCURACY = 0.70
"""Training accuracy from which the model has fitted its training pairs."""
CHOSEN, REJECTED, NEUTRAL = "#0072b2", "#d55e00", "#666666"  # distinct for colour-blind readers


def evaluate_gvm(config: Config, gvm_path: Path, out: Path) -> dict:
    """Evaluate a value model on the config's held-out pairs, in this process.

    The kind of outcome is that of the model's manifest, whatever `gvm.outcome` is.

    Args:
        gvm_path: the artifact.
        out: folder for evaluation.json and the plots.

    Returns:
        The content of evaluation.json: see `heldout_report`; the `objective` of the model; and `notes`, one line for each reason why
        pairs are left out or shortened or the accuracy may mislead.

    Raises:
        InputError: as in `load_gvm` and `load_heldout`.
    """
    tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
    model, manifest = load_gvm_of_run(config.model, gvm_path, tokenizer)
    heldout, notes = load_heldout(config, config.gvm, manifest, tokenizer)
    flat = batch_values(model, heldout.batch, config.scorer.micro_batch_tokens)
    values = HeldoutValues.from_parts(heldout, [(np.arange(heldout.num_pairs), flat[heldout.batch.state_index])])
    report = heldout_report(values, manifest.outcome.kind) | {"objective": manifest.objective.name}
    section, view = ("reward_model", "last") if manifest.objective.name == "bradley_terry" else ("gvm", "mean")
    report["notes"] = [*notes, *unmoved_warning(report, section), *chance_warning(report, view), *length_warning(report, view)]
    write_evaluation(out, values, report)
    return report


def heldout_report(heldout: HeldoutValues, outcome: str) -> dict:
    """All held-out metrics of a value model.

    Args:
        outcome: `binary` or `score`.

    Returns:
        `pairs` and `length_matched_pairs`: their numbers;
        `value_spread`: standard deviation of the values of all states, in standard deviations of their outcomes;
        `heldout_accuracy`: share of pairs ranked right, by view, see `accuracies`; `accuracy_ci95`: the 95 % intervals;
        `regression`: over all states, and `by_position_decile`;
        `calibration`: over all states, see `binary_calibration` and `score_calibration`.
    """
    right = accuracies(heldout)
    calibrate = binary_calibration if outcome == "binary" else score_calibration
    return {
        "pairs": heldout.num_pairs,
        "length_matched_pairs": int(length_matched(heldout).sum()),
        "value_spread": value_spread(heldout),
        "heldout_accuracy": {name: float(pairs.mean()) for name, pairs in right.items()},
        "accuracy_ci95": {name: list(wilson_interval(float(pairs.mean()), len(pairs))) for name, pairs in right.items()},
        "regression": regression_metrics(heldout.values, heldout.state_outcomes) | {"by_position_decile": regression_by_decile(heldout)},
        "calibration": calibrate(heldout.values, heldout.state_outcomes) | {"outcome": outcome},
    }


def write_evaluation(folder: Path, heldout: HeldoutValues, report: dict) -> None:
    """Write evaluation.json and the plots as one folder; it replaces an earlier one."""
    with whole_folder(folder) as draft:
        (draft / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        _plot_accuracy_by_position(draft / "accuracy_by_position.png", report)
        _plot_calibration(draft / "calibration.png", report)
        _plot_value_trajectories(draft / "value_trajectories.png", heldout)


def heldout_warning(heldout: dict[str, float], training_accuracy: float, num_pairs: int, section: str = "gvm", view: str = "mean") -> str | None:
    """One line of warning and advice if held-out pairs are ranked hardly better than at random, else None.

    Args:
        heldout: held-out accuracy by view.
        training_accuracy: on the minibatches of the last epoch; if it is low there was too little training, else too little data.
        num_pairs: number of training pairs.
        section: config section of the training, `gvm` or `reward_model`.
        view: the view that counts: `mean`, or for a reward model `last`, the only value that it was trained on.
    """
    if heldout[view] >= WEAK_ACCURACY:
        return None
    if training_accuracy < FITTED_ACCURACY:
        objective = "" if section == "reward_model" else ", or set gvm.objective=monte_carlo"
        advice = f"it has not fitted its training pairs either: raise {section}.learning_rate or {section}.epochs{objective}"
    else:
        advice = f"it fitted its {counted(num_pairs, 'training pair')}: give more pairs, fewer {section}.epochs, or responses that differ more"
    other = "" if view == "last" else f" ({heldout['last']:.2f} by last value)"
    return (
        f"held-out accuracy {heldout[view]:.2f} by {view} value{other} is under {WEAK_ACCURACY:.2f}; "
        f"training accuracy was {training_accuracy:.2f}, so {advice}"
    )


def unmoved_warning(report: dict, section: str = "gvm", after: str = "") -> list[str]:
    """One line if the values have hardly moved from those of a model that knows nothing, which are all equal.

    A few steps can order easy pairs. The accuracy does not show that so little has been learnt.

    Args:
        report: of `heldout_report`.
        section: as in `heldout_warning`.
        after: what was done, for the line.
    """
    spread = report["value_spread"]
    if spread >= UNMOVED_SPREAD:
        return []
    return [
        f"the values have hardly moved{after}: they spread by {spread:.3f} where outcomes spread by 1, so the model has hardly learnt, whatever its "
        f"accuracy on {counted(report['pairs'], 'pair')}; raise {section}.epochs, lower {section}.pairs_per_step, or raise {section}.learning_rate"
    ]


def chance_warning(report: dict, view: str = "mean") -> list[str]:
    """One line if the held-out pairs are too few to tell a good accuracy from chance.

    Args:
        report, view: as in `length_warning`.
    """
    accuracy, (low, high) = report["heldout_accuracy"][view], report["accuracy_ci95"][view]
    if accuracy < WEAK_ACCURACY or low > 0.5:
        return []
    return [
        f"held-out accuracy {accuracy:.2f} on {counted(report['pairs'], 'pair')} may be chance: its 95 % interval is {low:.2f} to {high:.2f}; hold "
        "out more pairs (data.preferences.heldout_fraction or heldout_path)"
    ]


def length_warning(report: dict, view: str = "mean") -> list[str]:
    """One line if length alone ranks the held-out pairs as well as the model does, and pairs of like lengths don't show that it knows more.

    Intervals are those of the report, so a rule that does well by chance on a few pairs is no reason to warn.

    Args:
        report: of `heldout_report`.
        view: the view that counts, as in `heldout_warning`.
    """
    accuracy, interval, matched = report["heldout_accuracy"], report["accuracy_ci95"], f"length_matched_{view}"
    longer, (low, high) = accuracy["longer_wins"], interval["longer_wins"]
    rule, by_length = ("longer", longer) if longer >= 0.5 else ("shorter", 1 - longer)
    length_tells = by_length >= WEAK_ACCURACY and not low <= 0.5 <= high
    knows_more = interval[view][0] > by_length or interval.get(matched, [0.0])[0] > 0.5
    if not length_tells or knows_more or accuracy[view] < WEAK_ACCURACY:
        return []
    called = "reward model" if view == "last" else "value model"
    alike = f" and {accuracy[matched]:.2f} of them are ranked right" if matched in accuracy else ""
    return [
        f"the {called} may have learnt length alone: held-out accuracy is {accuracy[view]:.2f} by {view} value, and {by_length:.2f} by the "
        f"rule that the {rule} response wins; {report['length_matched_pairs']} of {report['pairs']} pairs have responses of like lengths{alike}; "
        "train on pairs whose responses are about as long as each other, or the policy will learn length too"
    ]


# -------------------------------------------------------------------------------------------------- plots


@contextmanager
def _axes(file: Path, title: str, x: str, y: str) -> Iterator[Axes]:
    """Axes of a figure that is saved at the end. Without pyplot there is no global state and no display."""
    from matplotlib.figure import Figure  # a second to import

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    yield axes
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


def _plot_accuracy_by_position(file: Path, report: dict) -> None:
    """Pairwise accuracy of the value after 25, 50, 75 and 100 % of the response, with 95 % intervals and two baselines."""
    names = [f"position_{percent}" for percent in POSITIONS]
    share, interval = (np.array([report[key][name] for name in names]) for key in ("heldout_accuracy", "accuracy_ci95"))
    with _axes(file, f"Accuracy on {counted(report['pairs'], 'held-out pair')}", "response seen, %", "pairs ranked right") as axes:
        axes.errorbar(POSITIONS, share, yerr=np.abs(interval.T - share), fmt="o-", capsize=4, color=CHOSEN, label="value at this position")
        axes.axhline(report["heldout_accuracy"]["mean"], color=NEUTRAL, label="mean value of the response")
        axes.axhline(report["heldout_accuracy"]["longer_wins"], color=NEUTRAL, linestyle=":", label="longer wins")
        axes.set_xticks(POSITIONS)


def _plot_calibration(file: Path, report: dict) -> None:
    """Observed outcome against predicted outcome; perfect values are on the diagonal."""
    calibration = report["calibration"]
    predicted, observed, states = (np.array([row[key] for row in calibration["bins"]]) for key in ("predicted", "observed", "states"))
    binary = calibration["outcome"] == "binary"
    x, y = ("P(chosen) = (V + 1) / 2", "share of chosen responses") if binary else ("value", "mean outcome")
    ends = [0.0, 1.0] if binary else [min(predicted.min(), observed.min()), max(predicted.max(), observed.max())]
    with _axes(file, f"Calibration, expected error {calibration['error']:.3f}", x, y) as axes:
        axes.plot(ends, ends, color=NEUTRAL, linestyle=":")
        axes.plot(predicted, observed, color=CHOSEN, alpha=0.5)
        axes.scatter(predicted, observed, s=10 + 190 * states / states.max(), color=CHOSEN, label="area: states in the bin")


def _plot_value_trajectories(file: Path, heldout: HeldoutValues) -> None:
    """Mean value along chosen and rejected responses, each with the band between its quartiles."""
    grid = np.linspace(0.0, 1.0, 41)
    curves = np.array([np.interp(grid, np.linspace(0.0, 1.0, len(row)), row) for row in heldout.rows])
    with _axes(file, "Value along the response, held-out pairs", "response seen, %", "value") as axes:
        for name, rows, colour in (("chosen", curves[0::2], CHOSEN), ("rejected", curves[1::2], REJECTED)):
            low, high = np.quantile(rows, [0.25, 0.75], axis=0)
            axes.fill_between(100 * grid, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(100 * grid, rows.mean(axis=0), color=colour, label=f"{name}: mean, and the middle half of the responses")
