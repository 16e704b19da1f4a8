"""How the gradient of the policy depends on the errors of reward and values: the bound of the DVPO paper (arXiv 2502.16944, Lemma 3.1), measured.

The lemma: if the reward model is within eps_R of the reward, and both value estimates are within eps_Q of Q, then the policy gradients
under the reward model's values and under the GVM's differ by at most some kappa(eps_R, eps_Q) that vanishes with them. Reward models and
GVMs of several qualities, trained on more and more pairs, give the curve. Here gold is the reward, and Q its Monte-Carlo mean.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dvpo_ray.config.options import whole_number
from dvpo_ray.config.paths import name_or_path_option
from dvpo_ray.experiments.results import Result, columns
from dvpo_ray.experiments.states import States, error_metrics, fit_affine
from dvpo_ray.experiments.study import Run, Study, add_numbers, override

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VALUE_MODEL, REWARD_MODEL = "value model", "reward model"
COMPARISONS = ((VALUE_MODEL, "gold"), (REWARD_MODEL, "gold"), (VALUE_MODEL, REWARD_MODEL))


class Bound(Study):
    name = "bound"
    help = "difference of policy gradients under reward-model, Monte-Carlo and GVM values, against the errors of the models"
    example = "dvpo experiment bound cluster_configs/stories-cpu.yaml --pairs 50 150 500 --prompts 32 --seeds 0 1"

    @classmethod
    def add_options(cls, parser: ArgumentParser) -> None:
        add_numbers(parser, "--pairs", [50, 150, 500], "training pairs of the reward models and GVMs that are compared")
        add_numbers(parser, "--prompts", 32, "held-out prompts that are answered")
        add_numbers(parser, "--continuations", 8, "ways to finish a response from each state, 2 or more", whole_number(at_least=2))
        add_numbers(parser, "--segments", 8, "parts of a response; all tokens of a part are credited with Q after it")
        parser.add_argument("--policy", metavar="MODEL", type=name_or_path_option, help="checkpoint to take the gradients of (default: model.path)")

    def runs(self) -> list[Run]:
        self.require("data.preferences.path", "data.prompts.path", judge=True, continuations=True)
        return [run for seed in self.seeds for run in self._of_seed(seed)]

    @property
    def training_pairs(self) -> tuple[str, int]:
        most = max(self.options.pairs)
        return f"--pairs {most}", most

    def _of_seed(self, seed: int) -> list[Run]:
        trained: dict[int, dict[str, Run]] = {}
        for pairs in self.options.pairs:
            limit, ranking = override("data.preferences.limit", pairs), override("gvm.objective", "bradley_terry")
            value_model, reward_model = self.run("gvm", f"gvm-{pairs}", seed, limit), self.run("gvm", f"reward-{pairs}", seed, limit, ranking)
            trained[pairs] = {VALUE_MODEL: value_model, REWARD_MODEL: reward_model}
        options = {
            "policy": self.options.policy or self.config.model.path,
            "continuations": self.options.continuations,
            "segments": self.options.segments,
            "models": {str(pairs): {kind: run.final for kind, run in models.items()} for pairs, models in trained.items()},
        }
        measurement = self.run("bound", "gradients", seed, override("evaluation.prompts", self.options.prompts), **options)
        return [*(run for models in trained.values() for run in models.values()), measurement]

    def result(self, runs: Sequence[Run]) -> Result:
        summaries = [run.summary for run in runs if run.stage == "bound"]
        by_pairs = {str(pairs): [summary["models"][str(pairs)] for summary in summaries] for pairs in self.options.pairs}
        table = [{"training pairs": pairs} | columns(measured) for pairs, measured in by_pairs.items()]
        # Halves are noisier than the whole that the models are compared with: nothing can be told from gold much beyond this.
        halves = [{f"{name}: half / half": number for name, number in summary["halves"].items()} for summary in summaries]
        table.append({"training pairs": "none: gold in two halves"} | columns(halves))
        return Result(table, lambda figure: draw(figure, list(by_pairs.values())))


def measure_bound(run: Run) -> dict:
    """Gradients of one policy under the Monte-Carlo Q of gold and under the models of `options`, and the models' errors."""
    from dvpo_ray.experiments.monte_carlo import gradient_difference, policy_gradients, sample_monte_carlo, values_of
    from dvpo_ray.models.loading import default_device, load_policy
    from dvpo_ray.models.trainable import train_last_layers

    config, options = run.config, run.options
    shares = np.arange(1, options["segments"] + 1) / options["segments"]
    sampled = sample_monte_carlo(config, options["policy"], shares, options["continuations"], run.folder)
    errors, estimates = {}, {"gold": sampled.gold.mean(axis=1), "even": sampled.gold[:, ::2].mean(axis=1), "odd": sampled.gold[:, 1::2].mean(axis=1)}
    for pairs, paths in options["models"].items():
        values = values_of(config, paths[VALUE_MODEL], sampled.batch)[sampled.states.flat_index(sampled.batch)]
        rewards = values_of(config, paths[REWARD_MODEL], sampled.finished)[sampled.finished.offsets[1:] - 1].reshape(sampled.gold.shape)
        errors[pairs], estimates[f"{VALUE_MODEL} {pairs}"], estimates[f"{REWARD_MODEL} {pairs}"] = model_errors(values, rewards, sampled.gold)

    policy = load_policy(config.model.model_copy(update={"path": options["policy"]}), default_device())
    if config.policy.trainable_layers is not None:
        train_last_layers(policy, config.policy.trainable_layers)
    credits = np.stack([token_credits(sampled.states, q, sampled.batch.response_mask) for q in estimates.values()])
    found = policy_gradients(policy, sampled.batch, credits, config.batch.micro_batch_tokens, config.rollout.temperature)
    gradients = dict(zip(estimates, found, strict=True))

    for pairs, of_pairs in errors.items():
        sources = {"gold": gradients["gold"]} | {kind: gradients[f"{kind} {pairs}"] for kind in (VALUE_MODEL, REWARD_MODEL)}
        for source, target in COMPARISONS:
            difference = gradient_difference(sources[source], sources[target])
            of_pairs |= {f"{name}: {source} / {target}": number for name, number in difference.items()}
    norm = float(np.linalg.norm(gradients["gold"]))
    return {"models": errors, "halves": gradient_difference(gradients["even"], gradients["odd"]), "gold_gradient_norm": norm}


def model_errors(values: np.ndarray, rewards: np.ndarray, gold: np.ndarray) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """Errors of a value model and a reward model in units of gold, and Q of every state by each of them.

    Both are mapped to gold by the line that fits best: a preference model's zero and unit are arbitrary, and the gradient is
    compared after such a choice.

    Args:
        values: [S], the value model's values of the states.
        rewards, gold: [S, m], of the whole responses from each state on.

    Returns:
        `eps_R`, `eps_Q: reward model` and `eps_Q: value model`, root mean squares without the noise of the Monte-Carlo means; the value
        model's Q [S]; the reward model's Q [S].
    """
    in_gold = fit_affine(values, gold.mean(axis=1))(values)
    rewards = fit_affine(rewards.reshape(-1), gold.reshape(-1))(rewards)
    errors = {
        "eps_R": float(np.sqrt(np.mean((rewards - gold) ** 2))),
        f"eps_Q: {REWARD_MODEL}": error_metrics(np.zeros(len(gold)), gold - rewards)["rmse"],
        f"eps_Q: {VALUE_MODEL}": error_metrics(in_gold, gold)["rmse"],
    }
    return errors, in_gold, rewards.mean(axis=1)


def token_credits(states: States, q: np.ndarray, response_mask: np.ndarray) -> np.ndarray:
    """The credit of each token, float64 [N]: Q at the end of its part of the response, less the mean over all tokens; 0 on prompts.

    Q after any later token is an unbiased stand-in for Q(s_t, y_t), and a constant baseline leaves the expected gradient as it is.

    Args:
        states: the ends of the parts of every row, row after row in order, the last one the end of the response.
        q: [S].
    """
    starts = np.where(np.diff(states.row, prepend=-1) != 0, 0, np.roll(states.tokens, 1))
    per_token = np.repeat(q, states.tokens - starts)
    credits = np.zeros(len(response_mask))
    credits[response_mask] = per_token - per_token.mean()
    return credits


def draw(figure: Figure, by_pairs: Sequence[Sequence[Mapping[str, float]]]) -> None:
    """The difference of gradients against the error that the lemma bounds it by; a point for each number of pairs and seed."""
    figure.set_size_inches(10, 4.5)
    for axes, name in zip(figure.subplots(1, 2), ("difference", "cosine"), strict=True):
        for source, target in COMPARISONS:
            errors = [f"eps_Q: {model}" for model in (source, target) if model != "gold"]
            points = [(sum(one[error] for error in errors), one[f"{name}: {source} / {target}"]) for measured in by_pairs for one in measured]
            axes.scatter(*zip(*points, strict=True), label=f"{source} / {target}", s=18)
        axes.set_xlabel("eps_Q (the sum, where two models are compared), in units of gold")
        axes.set_ylabel("cosine of the gradients" if name == "cosine" else "norm of the difference / norm of the target")
        axes.grid(alpha=0.3)
    axes.legend()
