"""What to do about a value model that does not generalise."""

from __future__ import annotations

WEAK_ACCURACY = 0.60  # the paper's failure signature
FITTED_ACCURACY = 0.70


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
