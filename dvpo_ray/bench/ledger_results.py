"""The results of `dvpo bench ledger`: as lines for people, as Markdown and as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dvpo_ray.bench.measure import Spread
from dvpo_ray.bench.overhead import StepProfile, by_round
from dvpo_ray.errors import InputError
from dvpo_ray.planning.memory import ActorMemory

BASELINE = "ppo"
WANTED_PREDICTION_ERROR = 0.15
PAPER = {
    # arXiv 2502.16944, 8 x A100, DVPO / PPO: GB per GPU, seconds per step.
    "paper, 3B, ZeRO-1": {"peak": 27.50 / 41.43, "step": 13 / 23},
    "paper, 8B, ZeRO-3": {"peak": 60.49 / 78.96, "step": 48 / 70},
}
KINDS = ("parameters", "gradients", "optimizer", "activations", "cache")


@dataclass(frozen=True)
class Target:
    """A ratio of two algorithms that should not be exceeded.

    Attributes:
        quantity: `step`, `model_state` or `peak`.
    """

    quantity: str
    algorithm: str
    baseline: str
    limit: float


CPU_TARGETS = (Target("step", "dvpo", "ppo", 0.65), Target("model_state", "dvpo", "ppo", 0.65), Target("step", "dvpo", "reinforce", 1.15))
GPU_TARGETS = (Target("step", "dvpo", "ppo", 0.6), Target("peak", "dvpo", "ppo", 0.66))


@dataclass(frozen=True)
class AlgorithmLedger:
    """What a step of one algorithm costs.

    Attributes:
        algorithm: its name.
        samples: in a step.
        rounds: times of the measured steps of each round.
        roles: memory by role, over all actors of a role.
        predicted: the same as `dvpo plan` predicts it.
    """

    algorithm: str
    samples: int
    rounds: Sequence[StepProfile]
    roles: dict[str, ActorMemory]
    predicted: dict[str, ActorMemory]

    @property
    def step_seconds(self) -> Spread:
        """The median over rounds of a round's median, and the range of all steps."""
        rounds = [profile.total for profile in self.rounds]
        return Spread(statistics.median(one.median for one in rounds), min(one.low for one in rounds), max(one.high for one in rounds))

    @property
    def stage_seconds(self) -> dict[str, float]:
        """The same median of each stage."""
        rounds = [profile.stage_seconds() for profile in self.rounds]
        return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}

    @property
    def total(self) -> ActorMemory:
        return sum(self.roles.values(), ActorMemory())

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.step_seconds.median

    def quantity(self, name: str) -> float:
        """`step` in seconds, `model_state` or `peak` in bytes."""
        return self.step_seconds.median if name == "step" else getattr(self.total, name)

    def prediction_error(self, quantity: str) -> float | None:
        """Predicted over measured bytes of all roles, less 1; None where nothing was measured."""
        measured, predicted = getattr(self.total, quantity), getattr(sum(self.predicted.values(), ActorMemory()), quantity)
        return predicted / measured - 1 if measured else None

    def as_json(self) -> dict:
        return {
            "samples_per_step": self.samples,
            "samples_per_second": self.samples_per_second,
            "step_seconds": asdict(self.step_seconds),
            "step_seconds_by_round": [asdict(profile.total) for profile in self.rounds],
            "stage_seconds": self.stage_seconds,
            "peak_of_all_processes_gib": max(profile.peak_memory_gib for profile in self.rounds),
            "bytes": {role: _with_sums(memory) for role, memory in self.roles.items()} | {"all": _with_sums(self.total)},
            "predicted_bytes": {role: _with_sums(memory) for role, memory in self.predicted.items()},
            "prediction_error": {name: self.prediction_error(name) for name in ("model_state", "activations", "cache")},
        }


@dataclass(frozen=True)
class LedgerResults:
    """Everything that `dvpo bench ledger` measured.

    Attributes:
        algorithms: in the order in which they ran.
        training: what training each frozen model cost before: `seconds`, `steps`, `peak_memory_gib`; None where nobody knows.
        on_gpu: the targets are those of a GPU.
    """

    algorithms: Sequence[AlgorithmLedger]
    training: dict[str, dict | None]
    on_gpu: bool

    @property
    def _by_name(self) -> dict[str, AlgorithmLedger]:
        return {ledger.algorithm: ledger for ledger in self.algorithms}

    def ratio(self, quantity: str, algorithm: str, baseline: str = BASELINE) -> float | None:
        """One algorithm's step (the median over rounds), model state or peak over another's; None unless both were measured."""
        pair = self._by_name
        if not {algorithm, baseline} <= pair.keys():
            return None
        if quantity == "step":
            return statistics.median(self.step_ratios_of_rounds(algorithm, baseline))
        return pair[algorithm].quantity(quantity) / pair[baseline].quantity(quantity)

    def step_ratios_of_rounds(self, algorithm: str, baseline: str = BASELINE) -> list[float]:
        """The ratio of median steps in each round by itself."""
        pair = (self._by_name[name].rounds for name in (algorithm, baseline))
        return [mine.total.median / others.total.median for mine, others in zip(*pair, strict=True)]

    def verdicts(self) -> list[tuple[Target, float]]:
        """Each target whose algorithms were measured, and the ratio that was."""
        rated = ((target, self.ratio(target.quantity, target.algorithm, target.baseline)) for target in (GPU_TARGETS if self.on_gpu else CPU_TARGETS))
        return [(target, ratio) for target, ratio in rated if ratio is not None]

    def break_even_steps(self) -> float | None:
        """Steps after which DVPO's shorter steps have paid for what its value model took longer to train than PPO's reward model.

        None where a cost is unknown, or a step of DVPO is not shorter.
        """
        gvm, reward_model = self.training.get("gvm"), self.training.get("reward_model")
        if gvm is None or reward_model is None or not {"dvpo", BASELINE} <= self._by_name.keys():
            return None
        saved = self._by_name[BASELINE].quantity("step") - self._by_name["dvpo"].quantity("step")
        return max(0.0, gvm["seconds"] - reward_model["seconds"]) / saved if saved > 0 else None

    def as_json(self) -> dict:
        """The results for programs."""
        names = [ledger.algorithm for ledger in self.algorithms]
        return {
            "algorithms": {ledger.algorithm: ledger.as_json() for ledger in self.algorithms},
            "ratio_to_ppo": {name: {q: self.ratio(q, name) for q in ("step", "model_state", "peak")} for name in names},
            "paper_ratio_to_ppo": PAPER,
            "step_ratio_to_ppo_by_round": {name: self.step_ratios_of_rounds(name) for name in names if BASELINE in names},
            "targets": [asdict(target) | {"ratio": ratio, "met": ratio <= target.limit} for target, ratio in self.verdicts()],
            "training_before": self.training,
            "break_even_steps": self.break_even_steps(),
        }

    def lines(self) -> list[str]:
        """The results for people."""
        lines = []
        for title, header, rows in self._tables():
            lines += [title, *_aligned([header, *rows]), ""]
        return [*lines, *self._remarks()]

    def markdown(self) -> str:
        """The results as Markdown tables."""
        parts = []
        for title, header, rows in self._tables():
            parts += [f"**{title}**", "", _row(header), _row(["---"] * len(header)), *map(_row, rows), ""]
        return "\n".join([*parts, *(f"- {remark}" for remark in self._remarks())]) + "\n"

    # ------------------------------------------------------------------------------------------------- tables

    def _tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        return [self._memory_table(), self._time_table(), self._ratio_table(), self._prediction_table()]

    def _memory_table(self) -> tuple[str, list[str], list[list[str]]]:
        name, unit = ("GiB", 2**30) if max(ledger.total.peak for ledger in self.algorithms) >= 2**30 else ("MiB", 2**20)
        rows = []
        for ledger in self.algorithms:
            rows += [[ledger.algorithm, role, *_cells(memory, unit)] for role, memory in ledger.roles.items()]
            rows.append([ledger.algorithm, "all", *_cells(ledger.total, unit)])
        return f"Memory of a step, {name}", ["algorithm", "role", *KINDS, "model state", "peak without cache"], rows

    def _time_table(self) -> tuple[str, list[str], list[list[str]]]:
        stages = list(dict.fromkeys(name for ledger in self.algorithms for name in ledger.stage_seconds))
        rows = []
        for ledger in self.algorithms:
            total, seconds = ledger.step_seconds, ledger.stage_seconds
            spent = [f"{seconds[name]:.3f}" if name in seconds else "–" for name in stages]
            rows.append([ledger.algorithm, *spent, f"{total.median:.3f} ({total.low:.3f}–{total.high:.3f})", f"{ledger.samples_per_second:.3f}"])
        return "Seconds of a step, median (range)", ["algorithm", *stages, "step", "samples/s"], rows

    def _ratio_table(self) -> tuple[str, list[str], list[list[str]]]:
        quantities = ("step", "model_state", "peak")
        rows = [[ledger.algorithm, *(_ratio(self.ratio(q, ledger.algorithm)) for q in quantities)] for ledger in self.algorithms]
        rows += [[f"dvpo ({source})", *(_ratio(ratios.get(q)) for q in quantities)] for source, ratios in PAPER.items()]
        return "Ratio to PPO", ["algorithm", "step time", "model state", "peak without cache"], rows

    def _prediction_table(self) -> tuple[str, list[str], list[list[str]]]:
        quantities = ("model_state", "activations", "cache")
        rows = [[ledger.algorithm, *(_error(ledger.prediction_error(q)) for q in quantities)] for ledger in self.algorithms]
        return "Error of `dvpo plan`, predicted against measured", ["algorithm", "model state", "activations", "cache"], rows

    def _remarks(self) -> list[str]:
        remarks = [
            f"{target.quantity.replace('_', ' ')} of {target.algorithm} / {target.baseline}: {ratio:.3f}{self._by_round(target)}, "
            f"target <= {target.limit:g}, {'met' if ratio <= target.limit else 'MISSED'}"
            for target, ratio in self.verdicts()
        ]
        for ledger in self.algorithms:
            error = ledger.prediction_error("model_state")
            if error is not None and abs(error) > WANTED_PREDICTION_ERROR:
                remarks.append(f"{ledger.algorithm}: the predicted model state is off by {error:+.0%}, wanted within {WANTED_PREDICTION_ERROR:.0%}")
        remarks += [_training_remark(section, cost) for section, cost in self.training.items()]
        steps = self.break_even_steps()
        if steps is not None:
            remarks.append(f"dvpo has paid for its longer training beforehand after {steps:.0f} steps")
        return remarks

    def _by_round(self, target: Target) -> str:
        return by_round(self.step_ratios_of_rounds(target.algorithm, target.baseline), digits=3) if target.quantity == "step" else ""


def training_cost(artifact: Path) -> dict | None:
    """What the run that made an artifact took, from the summary.json of its run folder; None where there is none.

    Raises:
        InputError: the summary is there and can't be read.
    """
    summary = artifact.resolve().parent / "summary.json"
    if not summary.is_file():
        return None
    try:
        content = json.loads(summary.read_text(encoding="utf-8"))
        return {"seconds": float(content["duration_seconds"]), "steps": content["steps"], "peak_memory_gib": content["peak_memory_gib"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{summary}: not the summary of a training run ({error}); move it away, or train the model again") from error


def _training_remark(section: str, cost: dict | None) -> str:
    name = {"gvm": "value model", "reward_model": "reward model"}[section]
    if cost is None:
        return f"training the {name} beforehand: unknown, the artifact lies in no run folder"
    return f"training the {name} beforehand: {cost['seconds']:.0f} s, {cost['steps']} steps, {cost['peak_memory_gib']:.2f} GiB at most"


# -------------------------------------------------------------------------------------------------------- formatting


def _with_sums(memory: ActorMemory) -> dict:
    return asdict(memory) | {"model_state": memory.model_state, "peak": memory.peak}


def _cells(memory: ActorMemory, unit: int) -> list[str]:
    sizes = [*(getattr(memory, kind) for kind in KINDS), memory.model_state, memory.peak]
    return ["–" if size is None else f"{size / unit:.3f}" for size in sizes]


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:+.1%}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
