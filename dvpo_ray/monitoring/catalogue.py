"""Every metric of a run: its unit, what it means, when it is trouble and what to do then.

`MetricsLog` refuses a name that is not listed here, and docs/metrics.md is generated from the list:

    python -m dvpo_ray.monitoring.catalogue > docs/metrics.md
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import lru_cache

_ROLE = "<role>"
_ROLE_PATTERN = "[a-z][a-z0-9_]*"


@dataclass(frozen=True)
class Metric:
    """One metric, or one for each role where the name holds `<role>`.

    Attributes:
        name: `group/name`, as in metrics.jsonl.
        unit: "" for a pure number.
        meaning: what is measured, over what.
        trouble: the observation that should worry.
        advice: what to do then.
        above, below: bounds beyond which the report raises the metric by itself; None where only a trend or a comparison tells.
    """

    name: str
    unit: str
    meaning: str
    trouble: str = ""
    advice: str = ""
    above: float | None = None
    below: float | None = None

    @property
    def group(self) -> str:
        return self.name.split("/")[0]

    def is_trouble(self, value: float) -> bool:
        """Whether a value lies beyond the metric's bounds."""
        return (self.above is not None and value > self.above) or (self.below is not None and value < self.below)


GROUPS = {
    "reward": "Outcomes, from a gold judge only. The Global Value Model (GVM) never writes here.",
    "value": "What the frozen GVM says of the rollouts. V(s) is a return prediction: on the scale of the outcomes it was trained on (±1 by default).",
    "advantage": "Token advantages as the learner uses them: after whitening where that is on.",
    "policy": "The policy's update.",
    "kl": "Distance from the reference, the frozen SFT policy.",
    "mismatch": "Difference between the log-probs of the rollout engine and of the learner for the same tokens and weights.",
    "response_length": "Sampled responses, EOS included.",
    "time": "Wall-clock time of the stages of a step, one after the other. What the frozen models do while others generate costs no time here.",
    "throughput": "Work per second of a whole step.",
    "memory": "Host memory of the processes of a role.",
    "idle": "Waiting of a role.",
    "policy_version": "The weights in use.",
    "gvm": "Training of the GVM (`dvpo gvm train`), on the minibatch of a step. Held-out figures are in evaluation/ and gvm.json.",
}

METRICS = (
    Metric(
        "reward/gold_mean",
        "gold score",
        "Mean score of the step's rollouts by the gold judge. The held-out figures are in evaluation/ and summary.json.",
        "Falls while value/mean rises: the policy exploits the GVM.",
        "Stop at the step where gold peaked; raise kl.coefficient, lower policy.learning_rate, or train the GVM on more pairs.",
    ),
    Metric(
        "reward/gold_std",
        "gold score",
        "Standard deviation of the gold score over the step's rollouts.",
        "Near 0: the responses have become alike.",
        "Look at policy/entropy and the sample texts; raise kl.coefficient or policy.entropy_coefficient.",
    ),
    Metric(
        "value/mean",
        "value",
        "Mean of V over all states of the responses.",
        "Rises far beyond the range of the training outcomes while gold stands still.",
        "The policy has left the region that the GVM knows; raise kl.coefficient or refresh the GVM.",
    ),
    Metric(
        "value/std",
        "value",
        "Standard deviation of V over all states of the responses.",
        "Near 0: the GVM says the same of everything, and advantages are noise.",
        "Check gvm.heldout_accuracy; train the GVM longer or on more pairs.",
        below=1e-3,
    ),
    Metric(
        "value/terminal_mean",
        "value",
        "Mean of V after the last response token, the GVM's prediction of the outcome.",
        "Rises without reward/gold_mean.",
        "As for value/mean.",
    ),
    Metric(
        "value/explained_variance",
        "",
        "1 - Var(V_terminal - V) / Var(V_terminal) over the states of the responses: how well earlier values foresee the terminal one.",
        "Below 0: earlier values say less of the terminal one than its mean does.",
        "Use gvm.objective monte_carlo or a higher gvm.td_lambda; look at accuracy by position in `dvpo gvm eval`.",
    ),
    Metric(
        "advantage/mean",
        "",
        "Mean over response tokens.",
        "Away from 0 although advantage.whiten is on.",
        "A fault: please report it.",
    ),
    Metric(
        "advantage/std",
        "",
        "Standard deviation over response tokens.",
        "Near 0 without whitening: there is nothing to learn from.",
        "As for value/std.",
    ),
    Metric(
        "advantage/min",
        "",
        "Smallest over response tokens.",
        "Under -20 after whitening: single tokens dominate the gradient.",
        "Look at the coloured response in the report; raise batch.prompts_per_step.",
        below=-20.0,
    ),
    Metric(
        "advantage/max",
        "",
        "Largest over response tokens.",
        "Over 20 after whitening: single tokens dominate the gradient.",
        "Look at the coloured response in the report; raise batch.prompts_per_step.",
        above=20.0,
    ),
    Metric(
        "policy/loss",
        "",
        "Clipped surrogate, with the entropy bonus and the KL term where they are on; mean over response tokens.",
        "It hovers around 0 by construction; only a jump tells something.",
        "Look at policy/grad_norm and policy/ratio_max at that step.",
    ),
    Metric(
        "policy/approx_kl",
        "nats per token",
        "k3 estimate of the KL between the policy that the update began with and the one it reached.",
        "Over 0.1: the update went far beyond the trust region.",
        "Lower policy.learning_rate or batch.update_epochs.",
        above=0.1,
    ),
    Metric(
        "policy/clip_fraction",
        "fraction",
        "Share of response tokens whose ratio was clipped.",
        "Over 0.3: most of the batch teaches nothing. Exactly 0 with several optimizer steps a batch: the steps are tiny.",
        "Lower (or raise) policy.learning_rate; fewer batch.update_epochs.",
        above=0.3,
    ),
    Metric(
        "policy/ratio_max",
        "",
        "Largest probability ratio of the current policy to the one that the update began with.",
        "Over 10: single tokens have moved far.",
        "Lower policy.learning_rate; check mismatch/ if it is large at the first optimizer step.",
        above=10.0,
    ),
    Metric(
        "policy/entropy",
        "nats per token",
        "Mean entropy of the policy's next-token distribution over response tokens.",
        "Falls towards 0: the policy collapses onto few texts.",
        "Raise kl.coefficient or policy.entropy_coefficient, lower policy.learning_rate.",
        below=0.05,
    ),
    Metric(
        "policy/grad_norm",
        "",
        "Global gradient norm before clipping, mean over the step's optimizer steps.",
        "Jumps by an order of magnitude, or is not finite.",
        "Lower policy.learning_rate; with float16 use bfloat16.",
    ),
    Metric("policy/learning_rate", "", "Learning rate of the step's last optimizer step.", "0 before the last step.", "Check policy.schedule."),
    Metric(
        "kl/reference_mean",
        "nats per response",
        "Mean over responses of the sequence KL from the reference: the sum over tokens of log π - log π_ref on sampled tokens.",
        "Grows without gold growing. Clearly negative: the log-probs of policy and reference do not belong together.",
        "Raise kl.coefficient or set kl.adaptive_target_nats; stop earlier.",
        below=-1.0,
    ),
    Metric(
        "kl/reference_max",
        "nats per response",
        "Largest sequence KL of a response.",
        "Many times the mean: a few responses have run away.",
        "Read those responses in rollouts/.",
    ),
    Metric(
        "kl/coefficient",
        "",
        "Weight of the KL penalty in force, which changes when kl.adaptive_target_nats is set.",
        "Still climbing at the end: the target cannot be held.",
        "Lower policy.learning_rate or raise the target.",
    ),
    Metric(
        "mismatch/kl",
        "nats per token",
        "k3 estimate of the KL from the rollout engine to the learner on sampled tokens.",
        "Over 0.01: rollouts are off-policy from the start.",
        "Check rollout.temperature and rollout.top_p, and the dtype of engine and learner.",
        above=0.01,
    ),
    Metric(
        "mismatch/log_prob_abs_max",
        "nats",
        "Largest absolute difference of a sampled token's log-prob.",
        "Over 1 in bfloat16, over 0.01 in float32.",
        "As for mismatch/kl.",
        above=1.0,
    ),
    Metric(
        "mismatch/log_prob_abs_mean",
        "nats",
        "Mean absolute difference of a sampled token's log-prob.",
        "Over 0.05 in bfloat16, over 0.001 in float32.",
        "As for mismatch/kl.",
        above=0.05,
    ),
    Metric(
        "mismatch/token_mult_error",
        "",
        "Mean of exp |log p_engine - log p_learner| over sampled tokens; 1 is perfect.",
        "Over 1.05 and growing. The run stops at mismatch.max_token_mult_error.",
        "As for mismatch/kl; a growing error points at a weight sync that does not reach every parameter.",
        above=1.05,
    ),
    Metric(
        "response_length/mean",
        "tokens",
        "Mean response length.",
        "Runs to the limit, or to almost nothing.",
        "The GVM may prefer length: compare it with the longer-wins baseline of `dvpo gvm eval`.",
    ),
    Metric("response_length/max", "tokens", "Longest response.", "", ""),
    Metric(
        "response_length/truncated_fraction",
        "fraction",
        "Share of responses cut off at rollout.max_response_tokens.",
        "Rises during training: the policy stops ending its answers.",
        "Raise rollout.max_response_tokens, or set advantage.truncated to mask or penalty.",
    ),
    Metric(
        "time/generate_seconds",
        "s",
        "Sampling, from the first request to the last finished rollout.",
        "More than 80 % of the step.",
        "More rollout.num_actors, more rollout.max_concurrent_sequences, shorter responses.",
    ),
    Metric(
        "time/score_seconds",
        "s",
        "GVM scoring that was not hidden behind generation.",
        "A visible share of the step.",
        "Smaller rollout.rollouts_per_chunk, more scorer.num_actors.",
    ),
    Metric(
        "time/reference_seconds",
        "s",
        "Reference log-probs that were not hidden behind generation.",
        "A visible share of the step.",
        "Smaller rollout.rollouts_per_chunk, more reference.num_actors.",
    ),
    Metric("time/advantage_seconds", "s", "Advantages of the whole batch.", "More than a percent of the step.", "A fault: please report it."),
    Metric(
        "time/update_seconds",
        "s",
        "The learner's optimizer steps.",
        "Low throughput/trained_tokens_per_second at full devices.",
        "Raise batch.micro_batch_tokens as far as memory allows.",
    ),
    Metric(
        "time/sync_seconds",
        "s",
        "New weights on their way to every rollout engine.",
        "More than a few percent of the step.",
        "Use weight_sync.transport nccl or ipc; raise weight_sync.bucket_mib.",
    ),
    Metric("time/step_seconds", "s", "The whole step.", "Grows from step to step.", "Look at response_length/mean and memory/."),
    Metric("throughput/samples_per_second", "rollouts/s", "Rollouts of the step over its time.", "", ""),
    Metric("throughput/generated_tokens_per_second", "tokens/s", "Response tokens over the time of generation.", "", "As for time/generate_seconds."),
    Metric("throughput/trained_tokens_per_second", "tokens/s", "Response tokens, times batch.update_epochs, over the time of the update.", "", ""),
    Metric(
        "memory/<role>_gib",
        "GiB",
        "Memory of the role's largest actor, as proportional set size: a page shared by n processes counts 1/n. The run's peak is in summary.json.",
        "Grows from step to step.",
        "Lower micro_batch_tokens, rollout.kv_cache_gib or ray.object_store_gib.",
    ),
    Metric(
        "idle/<role>_fraction",
        "fraction",
        "Share of the step in which the role's actors waited, on average.",
        "Over 0.5 in a role that holds devices of its own.",
        "Give its devices to the busiest role, or share one device between roles (gpus_per_actor).",
    ),
    Metric(
        "policy_version",
        "",
        "Version of the policy's weights that the step ends with, in the learner and in every rollout engine; one more with every weight sync.",
        "Stands still.",
        "The weight sync does not happen; see logs/.",
    ),
    Metric(
        "gvm/loss",
        "",
        "Value regression, with the Bradley-Terry term where it has a weight.",
        "Does not fall within the first epoch.",
        "Raise gvm.learning_rate.",
    ),
    Metric(
        "gvm/regression_loss",
        "squared outcome",
        "Half the mean squared difference of value and target over all states. With outcomes of +1 and -1 it starts at 0.5 for monte_carlo.",
        "Near 0 with td0 or td_lambda while accuracy stands at 0.5: the outcomes have not travelled to the early states.",
        "Set gvm.objective=monte_carlo or raise gvm.td_lambda.",
    ),
    Metric(
        "gvm/bradley_terry_loss",
        "nats",
        "Mean of -log sigmoid of the difference of the two responses' values; 0.693 where they are equal. Measured also at weight 0.",
        "Far over 0.693: confident and wrong.",
        "Lower gvm.learning_rate; fewer gvm.epochs.",
    ),
    Metric(
        "gvm/accuracy",
        "fraction",
        "Share of the minibatch's pairs whose chosen response has the higher value, by gvm.bradley_terry_value (last or mean).",
        "Near 1 while held-out accuracy is far lower: the pairs are learnt by heart.",
        "Fewer gvm.epochs, more pairs.",
    ),
    Metric("gvm/grad_norm", "", "Global gradient norm before clipping.", "Jumps by an order of magnitude.", "Lower gvm.learning_rate."),
    Metric("gvm/learning_rate", "", "Learning rate of the step.", "0 before the last step.", "Check gvm.schedule."),
)


def find_metric(name: str) -> Metric:
    """The catalogue's entry for a metric name.

    Raises:
        ValueError: the name is not in the catalogue.
    """
    for pattern, metric in _patterns():
        if pattern.fullmatch(name):
            return metric
    close = difflib.get_close_matches(name, [metric.name for metric in METRICS], n=1)
    hint = f", did you mean {close[0]!r}" if close else ""
    raise ValueError(f"unknown metric {name!r}{hint}? Every metric is listed in dvpo_ray/monitoring/catalogue.py")


@lru_cache(maxsize=1)
def _patterns() -> list[tuple[re.Pattern, Metric]]:
    return [(re.compile(re.escape(metric.name).replace(re.escape(_ROLE), _ROLE_PATTERN)), metric) for metric in METRICS]


def markdown() -> str:
    """docs/metrics.md."""
    parts = [
        "# Metrics",
        "",
        "<!-- Generated: python -m dvpo_ray.monitoring.catalogue > docs/metrics.md -->",
        "",
        "`metrics.jsonl` in the run folder holds one object per step: `step`, `time` (Unix seconds) and these metrics.",
        "A value that is not finite is `null`.",
        "TensorBoard, Weights & Biases and MLflow get the same names (`train.trackers`), and `report.html` draws them.",
        "",
        "A metric marked ⚠ has bounds: when the mean over its last steps lies beyond them, the report says so by itself.",
    ]
    for group, text in GROUPS.items():
        rows = [metric for metric in METRICS if metric.group == group]
        if rows:
            parts += ["", f"## {group}", "", text, "", "| metric | unit | meaning | trouble when | what to do |", "| --- | --- | --- | --- | --- |"]
            parts += [_markdown_row(metric) for metric in rows]
    return "\n".join(parts) + "\n"


def _markdown_row(metric: Metric) -> str:
    bounded = metric.above is not None or metric.below is not None
    cells = [f"`{metric.name}`" + (" ⚠" if bounded else ""), metric.unit, metric.meaning, metric.trouble, metric.advice]
    return "| " + " | ".join(cell.replace("|", "\\|") or "–" for cell in cells) + " |"


if __name__ == "__main__":
    print(markdown(), end="")
