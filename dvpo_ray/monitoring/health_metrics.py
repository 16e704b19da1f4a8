"""The metrics of the value estimate's health; see docs/health.md."""

from __future__ import annotations

from dvpo_ray.monitoring.metric import Metric

_REFRESH = "Refresh the GVM (gvm.refresh)"

HEALTH_METRICS = (
    Metric(
        "health/estimate_mean",
        "value or reward",
        "Mean over the rollouts of what the policy is optimised towards: V after the last token, or the reward model's reward.",
        "Rises while reward/gold_mean falls.",
        f"Raise kl.coefficient; {_REFRESH[0].lower()}{_REFRESH[1:]}.",
    ),
    Metric("health/estimate_std", "value or reward", "Standard deviation of the estimate over the rollouts.", "Near 0: responses score alike.", ""),
    Metric(
        "health/gold_correlation",
        "",
        "Correlation of the estimate and the gold score over the step's rollouts.",
        "Near 0 or below: the estimate no longer orders the policy's responses. It also falls, harmlessly, when all responses score alike.",
        f"{_REFRESH}; at the start of a run, train it on more pairs.",
    ),
    Metric(
        "health/gold_correlation_half",
        "",
        "Correlation of the value at half of the response and the gold score.",
        "Far below health/gold_correlation from the start: early tokens get little credit.",
        "Use gvm.objective monte_carlo, or train the GVM on more pairs.",
    ),
    Metric(
        "health/gold_divergence",
        "standard deviations",
        "What the estimate has gained more than the gold score since the start or the last refresh, each divided by its spread then.",
        "Grows: part of the gain is not real.",
        f"Raise kl.coefficient; {_REFRESH[0].lower()}{_REFRESH[1:]}; take an earlier checkpoint.",
    ),
    *(
        Metric(
            f"health/value_error_kl_{name}",
            "standard deviations",
            f"Root mean square of z(estimate) - z(gold) over {rows}; 0 is perfect, 1.41 is a guess.",
            trouble,
            f"Raise kl.coefficient or set kl.adaptive_target_nats; {_REFRESH[0].lower()}{_REFRESH[1:]}." if trouble else "",
        )
        for name, rows, trouble in (
            ("low", "the third of the rollouts nearest to the reference", ""),
            ("mid", "the middle third", ""),
            ("high", "the third farthest from the reference", "Far above that of the low third: the estimate fails where the policy is going."),
        )
    ),
    Metric(
        "health/value_bias_kl_high",
        "standard deviations",
        "Mean of z(estimate) - z(gold) over the third of the rollouts farthest from the reference.",
        "Clearly above 0 for many steps: distance from the reference itself is rewarded.",
        "Raise kl.coefficient or set kl.adaptive_target_nats.",
    ),
    *(
        Metric(
            f"health/calibration_error_{name}",
            "value",
            f"Mean absolute difference of value and final estimate over ten equally full bins of the value, in the {rows} third of the responses.",
            "Grows during the run: the values are those of another policy than the current one.",
            "As for health/value_drift.",
        )
        for name, rows in (("early", "first"), ("mid", "middle"), ("late", "last"))
    ),
    Metric(
        "health/value_drift",
        "value",
        "Mean of the estimate less the value of the prompt. The values of the current policy itself would have none.",
        "Grows with the policy's gain: the GVM expects less of a prompt than this policy delivers.",
        "Harmless for gae with λ = 1, which subtracts one baseline per prefix; else refresh the GVM, or train it with gvm.context.",
    ),
    Metric(
        "health/disagreement",
        "value",
        "Standard deviation of the value over gvm.path and scorer.ensemble, mean over all states of the responses.",
        "Grows: the policy reaches texts that the value models know too little of.",
        f"Set advantage.disagreement_coefficient; raise kl.coefficient; {_REFRESH[0].lower()}{_REFRESH[1:]}.",
    ),
)

REFRESH_METRICS = (
    Metric("refresh/count", "", "Refreshes of the GVM so far.", "", ""),
    Metric("refresh/pairs_total", "pairs", "Preferences collected by all refreshes so far, ties left out: what the feedback cost.", "", ""),
    Metric(
        "refresh/heldout_accuracy",
        "fraction",
        "Share of the last refresh's held-out pairs whose chosen response has the higher last value, by the new GVM.",
        "Not above refresh/heldout_accuracy_before: the refresh taught nothing.",
        "Raise gvm.refresh.prompts, gvm.refresh.epochs or gvm.learning_rate.",
    ),
    Metric(
        "refresh/heldout_accuracy_before",
        "fraction",
        "The same by the GVM that it replaced.",
        "Far below gvm.heldout_accuracy of the first GVM: the policy has left what it knew.",
        "Refresh more often (gvm.refresh_every_steps).",
    ),
)
