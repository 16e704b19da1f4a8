"""What to do about a value model that does not generalise."""

from __future__ import annotations

WEAK_ACCURACY = 0.60  # the paper's failure signature
FITTED_ACCURACY = 0.70


def heldout_warning(heldout: dict[str, float], training_accuracy: float, num_pairs: int) -> str | None:
    """One line of warning and advice where held-out pairs are ranked hardly better than by a coin, else None.

    Args:
        heldout: held-out accuracy by view; `mean` is the one that is judged.
        training_accuracy: on the minibatches of the last epoch, which tells too little training from too little data.
        num_pairs: training pairs.
    """
    if heldout["mean"] >= WEAK_ACCURACY:
        return None
    if training_accuracy < FITTED_ACCURACY:
        advice = "it has not fitted its training pairs either: raise gvm.learning_rate or gvm.epochs, or set gvm.objective=monte_carlo"
    else:
        advice = f"it fitted its {num_pairs} training pairs: give more pairs, fewer gvm.epochs, or responses that differ more"
    return (
        f"held-out accuracy {heldout['mean']:.2f} by mean value ({heldout['last']:.2f} by last value) is under {WEAK_ACCURACY:.2f}; "
        f"training accuracy was {training_accuracy:.2f}, so {advice}"
    )
