"""Every metric of a run: its unit, what it means, which values mean trouble, and what to do then.

docs/metrics.md is made from this list:

    python -m dvpo_ray.monitoring.catalogue > docs/metrics.md
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from functools import lru_cache

_HEAD = """\
# Metrics

<!-- Generated: python -m dvpo_ray.monitoring.catalogue > docs/metrics.md -->

`metrics.jsonl` in the run folder has one object per step: `step`, `time` (Unix seconds) and these metrics. A value that
is not finite is `null`. TensorBoard, Weights & Biases and MLflow get the same names (`train.trackers`), Ray's Prometheus
endpoints have them as gauges ([installing](install.md#metrics-in-prometheus-and-grafana)), and `report.html` draws them.

⚠ marks a bound: if the mean over the last steps is out of bounds, the report says so.
"""


@dataclass(frozen=True)
class Metric:
    """One metric, or one metric per role if the name contains `<role>`.

    Attributes:
        name: `group/name`, as in metrics.jsonl.
        unit: "" for a pure number.
        meaning: what is measured, over what.
        trouble: the observation that should worry the reader.
        advice: what to do then.
        above, below: the report flags the metric outside these bounds. None if only a trend or a comparison tells.
    """

    name: str
    unit: str
    meaning: str
    trouble: str = ""
    advice: str = ""
    above: float | None = None
    below: float | None = None

    def is_trouble(self, value: float) -> bool:
        """Whether a value is out of the metric's bounds."""
        return (self.above is not None and value > self.above) or (self.below is not None and value < self.below)


@lru_cache(maxsize=1)
def _patterns() -> list[tuple[re.Pattern, Metric]]:
    return [(re.compile(re.escape(metric.name).replace("<role>", "[a-z][a-z0-9_]*")), metric) for metric in METRICS]


def find_metric(name: str) -> Metric | None:
    """The metric of this name; None if it is not in `METRICS`."""
    return next((metric for pattern, metric in _patterns() if pattern.fullmatch(name)), None)


def markdown() -> str:
    """docs/metrics.md."""
    parts = [_HEAD]
    for group, text in GROUPS.items():
        items = [_item(metric) for metric in METRICS if metric.name.split("/")[0] == group]
        parts.append("\n".join([f"## {group}\n", textwrap.fill(text, 120), "", *items]) + "\n")
    return "\n".join(parts)


def _item(metric: Metric) -> str:
    """A list item: name and unit, meaning, trouble and advice."""
    bounds = [f"above {metric.above:g}"] if metric.above is not None else [f"below {metric.below:g}"] if metric.below is not None else []
    notes = ", ".join(filter(None, [metric.unit, *(f"⚠ {bound}" for bound in bounds)]))
    lines = [f"- **`{metric.name}`**{f' ({notes})' if notes else ''}: {metric.meaning}"]
    lines += [f"  - *{label}:* {text}" for label, text in (("Trouble", metric.trouble), ("What to do", metric.advice)) if text]
    return "\n".join(textwrap.fill(line, 120, subsequent_indent=" " * (line.index("-") + 2), break_long_words=False) for line in lines)


GROUPS = {
    "reward": "Scores from a gold judge or a reward model. The Global Value Model (GVM) never writes here.",
    "value": "Predictions of the frozen GVM, or of PPO's critic, for the rollouts: V(s) is the return on the scale of the outcomes (±1 by default).",
    "health": "Whether the estimate that the policy is optimised towards can still be trusted. Metrics that need gold scores or values appear "
    "only in runs that have them. [health.md](health.md) has the formulas.",
    "refresh": "Semi-online refresh of the GVM. These metrics appear after the first refresh.",
    "advantage": "Token advantages as the learner uses them, after whitening if `advantage.whiten` is on.",
    "policy": "The update of the policy.",
    "critic": "The update of the critic, the online value model of `algorithm: ppo`.",
    "kl": "Distance from the reference, the frozen SFT policy.",
    "mismatch": "Difference between the log-probs of the rollout engine and of the learner for the same tokens and weights. A run also checks "
    "its first rollouts, before the first update: engine and reference have the same weights then. The run stops if the mean difference of "
    "a token's log-prob (the KL to the reference, within three standard errors) or the largest one is out of bounds: 1e-4 and 0.01 nats in "
    "float32, 0.01 and 3 in bfloat16, 0.005 and 1 in float16. Measured: 3e-9 and 1.5e-5 in float32, 8e-4 and 0.54 in bfloat16, by `python "
    "tests/vllm_agreement.py` on the stories model of 260K parameters (4096 tokens, 2 CPU cores, vLLM 0.32.0, seed 0, 26 November 2026). "
    "float16 was not measured, and nothing was on a GPU.",
    "response_length": "Length of the sampled responses, including EOS.",
    "time": "Wall-clock time of the stages of a step, one after the other. The frozen models' work during generation costs no time here.",
    "padding": "What the learner computes for nothing.",
    "balance": "How evenly the learner's ranks share the work.",
    "throughput": "Work per second.",
    "memory": "Memory of the actors of a role.",
    "idle": "Time that a role waits.",
    "policy_version": "The weights in use.",
    "gvm": "Training of the GVM (`dvpo gvm train`), measured on the minibatch of each step. Held-out results are in `evaluation/` and `gvm.json`.",
    "sft": "The supervised warm start (`dvpo sft`), measured on the rows of each step.",
    "dpo": "The DPO baseline (`dvpo dpo`), measured on the pairs of each step. Its reward of a whole response is beta * (log pi - log pi_ref).",
}
"""What each group of metrics is about, in the order of the documentation."""

_JUMPS = "It jumps by an order of magnitude."
_REFRESH = "refresh the GVM (gvm.refresh)"

METRICS = (
    Metric(
        "reward/gold_mean",
        "gold score",
        "Mean score of the step's rollouts by the gold judge. Held-out results are in evaluation/ and summary.json.",
        "It falls while value/mean rises: the policy exploits the GVM.",
        "Take the checkpoint from the step where gold peaked. Raise kl.coefficient, lower policy.learning_rate, or train the GVM on more pairs.",
    ),
    Metric(
        "reward/gold_std",
        "gold score",
        "Standard deviation of the gold score over the step's rollouts.",
        "It is near 0: the responses have become alike.",
        "Look at policy/entropy and the sample texts. Raise kl.coefficient or policy.entropy_coefficient.",
    ),
    Metric(
        "reward/model_mean",
        "reward",
        "Mean reward of the step's rollouts by the baseline's reward model, before KL.",
        "It rises while reward/gold_mean falls: the policy exploits the reward model.",
        "See reward/gold_mean. Train the reward model on more pairs.",
    ),
    Metric(
        "reward/model_std",
        "reward",
        "Standard deviation of that reward over the step's rollouts.",
        "It is near 0: all responses score alike.",
        "Raise rollout.temperature.",
    ),
    Metric(
        "value/mean",
        "value",
        "Mean of V over all states of the responses.",
        "It rises far above the range of the training outcomes while gold does not rise.",
        "The policy has left the texts that the GVM knows. Raise kl.coefficient or refresh the GVM.",
    ),
    Metric(
        "value/std",
        "value",
        "Standard deviation of V over all states of the responses.",
        "It is near 0: the GVM gives every state the same value, and the advantages are noise.",
        "Check gvm.heldout_accuracy. Train the GVM longer or on more pairs.",
        below=1e-3,
    ),
    Metric(
        "value/terminal_mean",
        "value",
        "Mean of V after the last response token: the GVM's prediction of the outcome.",
        "It rises and reward/gold_mean does not.",
        "See value/mean.",
    ),
    Metric(
        "value/explained_variance",
        "",
        "1 - Var(V_terminal - V) / Var(V_terminal) over the states of the responses: how well earlier values predict the terminal one.",
        "It is below 0: earlier values predict the terminal one worse than its mean does.",
        "Use gvm.objective monte_carlo or a higher gvm.td_lambda. Look at accuracy by position in `dvpo gvm eval`.",
    ),
    Metric("advantage/mean", "", "Mean over response tokens.", "It is not 0 although advantage.whiten is on.", "This is a bug: please report it."),
    Metric(
        "advantage/std",
        "",
        "Standard deviation over response tokens.",
        "It is near 0 without whitening: there is nothing to learn from.",
        "See value/std.",
    ),
    Metric(
        "advantage/min",
        "",
        "Smallest advantage of a response token.",
        "It is below -20 after whitening: single tokens dominate the gradient.",
        "Look at the coloured response in the report. Raise batch.prompts_per_step.",
        below=-20.0,
    ),
    Metric(
        "advantage/max",
        "",
        "Largest advantage of a response token.",
        "It is above 20 after whitening: single tokens dominate the gradient.",
        "Look at the coloured response in the report. Raise batch.prompts_per_step.",
        above=20.0,
    ),
    Metric(
        "policy/loss",
        "",
        "Mean clipped surrogate over response tokens, with the entropy bonus and the KL term if they are on.",
        "It jumps. By construction it stays near 0, so its level means nothing.",
        "Look at policy/grad_norm and policy/ratio_max at that step.",
    ),
    Metric(
        "policy/approx_kl",
        "nats per token",
        "k3 estimate of the KL from the policy before the update to the policy at each optimizer step, mean over the steps. With one "
        "optimizer step per batch it is 0: the policy has not moved yet.",
        "It is above 0.1: the update went far outside the trust region.",
        "Lower policy.learning_rate or batch.update_epochs.",
        above=0.1,
    ),
    Metric(
        "policy/clip_fraction",
        "fraction",
        "Share of response tokens whose probability ratio is farther than policy.clip_epsilon from 1, mean over optimizer steps.",
        "It is above 0.3: a large part of the batch teaches nothing. It is exactly 0 with several optimizer steps per batch: the steps are tiny.",
        "Above 0.3: lower policy.learning_rate or batch.update_epochs. At 0: raise policy.learning_rate.",
        above=0.3,
    ),
    Metric(
        "policy/ratio_max",
        "",
        "Largest ratio of a token's probability at an optimizer step to its probability before the update. With one optimizer step per batch "
        "it is 1.",
        "It is above 10: single tokens have moved far.",
        "Lower policy.learning_rate. If the ratio is large at the first optimizer step already, check mismatch/.",
        above=10.0,
    ),
    Metric(
        "policy/entropy",
        "nats per token",
        "Mean entropy of the policy's next-token distribution over response tokens.",
        "It falls towards 0: the policy collapses onto few texts.",
        "Raise kl.coefficient or policy.entropy_coefficient, or lower policy.learning_rate.",
        below=0.05,
    ),
    Metric(
        "policy/grad_norm",
        "",
        "Global gradient norm before clipping, mean over the step's optimizer steps.",
        "It jumps by an order of magnitude, or it is not finite.",
        "Lower policy.learning_rate. Use bfloat16 instead of float16.",
    ),
    Metric("policy/learning_rate", "", "Learning rate of the step's last optimizer step.", "It is 0 before the last step.", "Check policy.schedule."),
    Metric(
        "critic/loss",
        "",
        "Half the squared error of the critic's values against the returns, clipped by critic.value_clip; mean over tokens and minibatches.",
        "It does not fall.",
        "Raise critic.learning_rate, or start from the reward model (critic.init).",
    ),
    Metric(
        "critic/clip_fraction",
        "fraction",
        "Share of tokens whose clipped value is farther from the return than the unclipped one.",
        "It is above 0.5: clipping holds the critic back.",
        "Raise critic.value_clip, a distance in units of reward.",
    ),
    Metric("critic/value_mean", "reward", "Mean of the values during the update.", "It is far from critic/return_mean.", "See critic/loss."),
    Metric("critic/return_mean", "reward", "Mean of the returns that the critic is trained to predict."),
    Metric("critic/grad_norm", "", "Global gradient norm before clipping, mean over optimizer steps.", _JUMPS, "Lower critic.learning_rate."),
    Metric("critic/learning_rate", "", "Learning rate of the last optimizer step."),
    Metric(
        "kl/reference_mean",
        "nats per response",
        "Mean over responses of the sequence KL from the reference: the sum of log π - log π_ref over the sampled tokens.",
        "It grows and gold does not. It is clearly negative: policy and reference do not belong together.",
        "Raise kl.coefficient or set kl.adaptive_target_nats. Stop earlier.",
        below=-1.0,
    ),
    Metric(
        "kl/reference_max",
        "nats per response",
        "Largest sequence KL of a response.",
        "It is many times the mean: a few responses have run away.",
        "Read those responses in rollouts/.",
    ),
    Metric(
        "kl/coefficient",
        "",
        "Weight of the KL penalty in this step. It changes if kl.adaptive_target_nats is set.",
        "It still climbs at the end: the run cannot hold the target.",
        "Lower policy.learning_rate or raise the target.",
    ),
    Metric(
        "mismatch/kl",
        "nats per token",
        "k3 estimate of the KL from the rollout engine to the learner on sampled tokens.",
        "It is above 0.01: the rollouts are off-policy from the start.",
        "Check rollout.temperature, rollout.top_p, and the dtype of engine and learner.",
        above=0.01,
    ),
    Metric(
        "mismatch/log_prob_abs_max",
        "nats",
        "Largest absolute difference of a sampled token's log-prob.",
        "It is above 1 in bfloat16, or above 0.01 in float32.",
        "See mismatch/kl.",
        above=1.0,
    ),
    Metric(
        "mismatch/log_prob_abs_mean",
        "nats",
        "Mean absolute difference of a sampled token's log-prob.",
        "It is above 0.05 in bfloat16, or above 0.001 in float32.",
        "See mismatch/kl.",
        above=0.05,
    ),
    Metric(
        "mismatch/token_mult_error",
        "",
        "Mean of exp |log p_engine - log p_learner| over sampled tokens. 1 is perfect.",
        "It is above 1.05 and grows. The run stops at mismatch.max_token_mult_error.",
        "See mismatch/kl. If the error grows, a weight sync probably misses some parameters.",
        above=1.05,
    ),
    Metric(
        "response_length/mean",
        "tokens",
        "Mean response length.",
        "It runs to the limit, or to almost nothing.",
        "The GVM may prefer length: compare it with the longer-wins baseline of `dvpo gvm eval`.",
    ),
    Metric("response_length/max", "tokens", "Length of the longest response."),
    Metric(
        "response_length/truncated_fraction",
        "fraction",
        "Share of responses that were cut off at rollout.max_response_tokens.",
        "It rises during training: the policy stops ending its answers.",
        "Raise rollout.max_response_tokens, or set advantage.truncated to mask or penalty.",
    ),
    Metric(
        "time/generate_seconds",
        "s",
        "Sampling, from the first request to the last finished rollout.",
        "It is more than 80 % of the step.",
        "Raise rollout.num_actors or rollout.max_concurrent_sequences, or shorten the responses.",
    ),
    Metric(
        "time/score_seconds",
        "s",
        "GVM scoring that generation did not hide.",
        "It is a visible share of the step.",
        "Lower rollout.rollouts_per_chunk or raise scorer.num_actors.",
    ),
    Metric(
        "time/reference_seconds",
        "s",
        "Reference log-probs that generation did not hide.",
        "It is a visible share of the step.",
        "Lower rollout.rollouts_per_chunk or raise reference.num_actors.",
    ),
    Metric(
        "time/advantage_seconds",
        "s",
        "Computing the advantages of the whole batch.",
        "It is more than 1 % of the step.",
        "This is a bug: please report it.",
    ),
    Metric(
        "time/update_seconds",
        "s",
        "The learner's optimizer steps.",
        "throughput/trained_tokens_per_second is low although the devices are busy.",
        "Raise batch.micro_batch_tokens as far as memory allows.",
    ),
    Metric(
        "time/sync_seconds",
        "s",
        "Sending new weights to every rollout engine.",
        "It is more than a few percent of the step.",
        "Use weight_sync.transport nccl or ipc. Raise weight_sync.bucket_mib.",
    ),
    Metric("time/refresh_seconds", "s", "The GVM refresh before this step: samples, labels, training. Not part of time/step_seconds."),
    Metric("time/step_seconds", "s", "The whole step.", "It grows from step to step.", "Look at response_length/mean and memory/."),
    Metric(
        "padding/update_fraction",
        "",
        "Share of padding, and of passes that only keep step, in the tokens of the learner's training passes.",
        "It is above 0.2: rows of a micro-batch have very different lengths, or a rank has few rows.",
        "Set model.attention=varlen on a GPU, or raise batch.prompts_per_step.",
    ),
    Metric(
        "balance/update_ratio",
        "",
        "Tokens that the busiest learner rank computes, over the mean of the ranks.",
        "It is well above 1: the other ranks wait.",
        "Raise batch.prompts_per_step, or lower batch.minibatches_per_epoch.",
    ),
    Metric("throughput/samples_per_second", "rollouts/s", "Rollouts of the step divided by the time of the step."),
    Metric(
        "throughput/generated_tokens_per_second",
        "tokens/s",
        "Response tokens divided by the time of generation.",
        advice="See time/generate_seconds.",
    ),
    Metric("throughput/trained_tokens_per_second", "tokens/s", "Response tokens times batch.update_epochs, divided by the time of the update."),
    Metric(
        "memory/<role>_gib",
        "GiB",
        "Memory of the role's largest actor: with a GPU the most that torch has held there so far, else the resident set size, which counts "
        "shared pages in every actor. summary.json has the peak of the run in host memory.",
        "It grows from step to step.",
        "Lower micro_batch_tokens, rollout.kv_cache_gib or ray.object_store_gib.",
    ),
    Metric(
        "idle/<role>_fraction",
        "fraction",
        "Share of the step that the role's actors waited, mean over the actors.",
        "It is above 0.5 in a role that has devices of its own.",
        "Give its devices to the busiest role, or let roles share devices (placement: colocated).",
    ),
    Metric(
        "policy_version",
        "",
        "Version of the policy's weights at the end of the step, in the learner and in every rollout engine. Every weight sync adds 1.",
        "It does not change.",
        "The weights are not synced. See logs/.",
    ),
    Metric(
        "gvm/loss",
        "",
        "Value regression loss, plus the Bradley-Terry term if it has a weight.",
        "It does not fall within the first epoch.",
        "Raise gvm.learning_rate.",
    ),
    Metric(
        "gvm/regression_loss",
        "squared outcome",
        "Half the mean squared difference of value and target over all states. With outcomes +1 and -1 and monte_carlo it starts at 0.5.",
        "It is near 0 with td0 or td_lambda while accuracy stays at 0.5: the outcomes have not reached the early states.",
        "Set gvm.objective=monte_carlo or raise gvm.td_lambda.",
    ),
    Metric(
        "gvm/bradley_terry_loss",
        "nats",
        "Mean of -log sigmoid of the difference of the two responses' values: 0.693 if they are equal. It is measured at weight 0 too.",
        "It is far above 0.693: the GVM is confident and wrong.",
        "Lower gvm.learning_rate or gvm.epochs.",
    ),
    Metric(
        "gvm/accuracy",
        "fraction",
        "Share of the minibatch's pairs whose chosen response has the higher value, by gvm.bradley_terry_value (last or mean).",
        "It is near 1 while held-out accuracy is far lower: the GVM has memorised the pairs.",
        "Lower gvm.epochs or use more pairs.",
    ),
    Metric("gvm/grad_norm", "", "Global gradient norm before clipping.", _JUMPS, "Lower gvm.learning_rate."),
    Metric("gvm/learning_rate", "", "Learning rate of the step.", "It is 0 before the last step.", "Check gvm.schedule."),
    Metric("sft/loss", "nats per token", "Cross entropy of the answers' tokens.", "It rises.", "Lower sft.learning_rate."),
    Metric("sft/learning_rate", "", "Learning rate of the step."),
    Metric("sft/grad_norm", "", "Global gradient norm before clipping.", _JUMPS, "Lower sft.learning_rate."),
    Metric(
        "dpo/accuracy",
        "",
        "Share of pairs whose chosen response has the higher reward.",
        "It stays at 0.5.",
        "Raise dpo.learning_rate or dpo.epochs.",
    ),
    Metric("dpo/margin", "", "Reward of the chosen response minus reward of the rejected one, mean over pairs."),
    Metric(
        "dpo/chosen_reward",
        "",
        "Mean reward of the chosen responses.",
        "It is far below 0: the policy unlearns the chosen responses too, only more slowly than the rejected ones.",
        "Lower dpo.learning_rate or dpo.epochs, or raise dpo.beta.",
    ),
    Metric("dpo/rejected_reward", "", "Mean reward of the rejected responses."),
    Metric("dpo/loss", "nats", "-log sigmoid of the margin, mean over pairs: 0.693 at the start.", "It rises.", "Lower dpo.learning_rate."),
    Metric("dpo/learning_rate", "", "Learning rate of the step."),
    Metric("dpo/grad_norm", "", "Global gradient norm before clipping.", _JUMPS, "Lower dpo.learning_rate."),
    Metric(
        "health/estimate_mean",
        "value or reward",
        "Mean estimate over the rollouts. The policy is optimised towards it: V after the last token, or the reward model's reward.",
        "It rises while reward/gold_mean falls.",
        f"Raise kl.coefficient or {_REFRESH}.",
    ),
    Metric(
        "health/estimate_std", "value or reward", "Standard deviation of the estimate over the rollouts.", "It is near 0: all responses score alike."
    ),
    Metric(
        "health/gold_correlation",
        "",
        "Correlation of the estimate and the gold score over the step's rollouts.",
        "It is near 0 or below: the estimate no longer ranks the policy's responses. It also falls, harmlessly, if all responses score alike.",
        f"During a run, {_REFRESH}. At the start, train the GVM on more pairs.",
    ),
    Metric(
        "health/gold_correlation_half",
        "",
        "Correlation of the value at half of the response and the gold score.",
        "It is far below health/gold_correlation from the start: early tokens get little credit.",
        "Use gvm.objective monte_carlo, or train the GVM on more pairs.",
    ),
    Metric(
        "health/gold_divergence",
        "standard deviations",
        "Gain of the estimate minus gain of the gold score since the start or the last refresh, each divided by its spread at that time.",
        "It grows: part of the gain is not real.",
        f"Raise kl.coefficient, {_REFRESH}, or take an earlier checkpoint.",
    ),
    *(
        Metric(
            f"health/value_error_kl_{name}",
            "standard deviations",
            f"Root mean square of z(estimate) - z(gold) over the third of the rollouts {rows}. 0 is perfect, 1.41 is a guess.",
            *trouble,
        )
        for name, rows, trouble in (
            ("low", "nearest to the reference", ()),
            ("mid", "between the nearest and the farthest", ()),
            (
                "high",
                "farthest from the reference",
                (
                    "It is far above the error of the low third: the estimate fails where the policy is going.",
                    f"Raise kl.coefficient, set kl.adaptive_target_nats, or {_REFRESH}.",
                ),
            ),
        )
    ),
    Metric(
        "health/value_bias_kl_high",
        "standard deviations",
        "Mean of z(estimate) - z(gold) over the third of the rollouts farthest from the reference.",
        "It is clearly above 0 for many steps: the estimate rewards distance from the reference itself.",
        "Raise kl.coefficient or set kl.adaptive_target_nats.",
    ),
    *(
        Metric(
            f"health/calibration_error_{name}",
            "value",
            f"Mean absolute difference of value and final estimate over ten equally full bins of the value, in the {rows} third of the responses.",
            "It grows during the run: the values are those of another policy.",
            "See health/value_drift.",
        )
        for name, rows in (("early", "first"), ("mid", "middle"), ("late", "last"))
    ),
    Metric(
        "health/value_drift",
        "value",
        "Mean of the estimate minus the value of the prompt. It would be 0 for the values of the current policy itself.",
        "It grows with the policy's gain: the GVM expects less of a prompt than this policy delivers.",
        "Ignore it for gae with λ = 1, which subtracts one baseline per prefix. Otherwise refresh the GVM, or train it with gvm.context.",
    ),
    Metric(
        "health/disagreement",
        "value",
        "Standard deviation of the value over gvm.path and scorer.ensemble, mean over all states of the responses.",
        "It grows: the policy writes texts that the value models know too little of.",
        f"Set advantage.disagreement_coefficient, raise kl.coefficient, or {_REFRESH}.",
    ),
    Metric("refresh/count", "", "GVM refreshes so far."),
    Metric("refresh/pairs_total", "pairs", "Preferences that all refreshes have collected so far, without ties: the cost of the feedback."),
    Metric(
        "refresh/heldout_accuracy",
        "fraction",
        "Share of the last refresh's held-out pairs whose chosen response has the higher last value, by the new GVM.",
        "It is not above refresh/heldout_accuracy_before: the refresh taught nothing.",
        "Raise gvm.refresh.prompts, gvm.refresh.epochs or gvm.learning_rate.",
    ),
    Metric(
        "refresh/heldout_accuracy_before",
        "fraction",
        "The same share by the GVM that was replaced.",
        "It is far below gvm.heldout_accuracy of the first GVM: the policy has left the texts that the GVM knew.",
        "Refresh more often (gvm.refresh_every_steps).",
    ),
)


if __name__ == "__main__":
    print(markdown(), end="")
