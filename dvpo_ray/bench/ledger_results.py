"""The results of `dvpo bench ledger`: as JSON, and from that as lines for people and as Markdown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from dvpo_ray.bench.measure import Spread, aligned, verdict
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
KINDS = ("parameters", "gradients", "optimizer", "activations", "cache", "model_state", "peak")
COMPARED = ("step", "model_state", "peak")
PREDICTED = ("model_state", "activations", "cache")
MODELS = {"gvm": "value model", "reward_model": "reward model"}


# Ratios that should not be exceeded: a quantity, an algorithm, its baseline, the limit.
CPU_TARGETS = (("step", "dvpo", "ppo", 0.65), ("model_state", "dvpo", "ppo", 0.65), ("step", "dvpo", "reinforce", 1.15))
GPU_TARGETS = (("step", "dvpo", "ppo", 0.6), ("peak", "dvpo", "ppo", 0.66))


# ------------------------------------------------------------------------------------------------------------- JSON


def algorithm_results(samples: int, profiles: Sequence[StepProfile], roles: Mapping[str, ActorMemory], predicted: Mapping[str, ActorMemory]) -> dict:
    """What a step of one algorithm costs. Seconds are medians over rounds of a round's median; their range is that of all steps.

    Args:
        samples: in a step.
        profiles: of each round.
        roles: memory by role, over all actors of a role.
        predicted: the same as `dvpo plan` predicts it.
    """
    rounds, stages = [profile.total for profile in profiles], [profile.stage_seconds() for profile in profiles]
    step = Spread(statistics.median(one.median for one in rounds), min(one.low for one in rounds), max(one.high for one in rounds))
    sizes = {role: _sizes(memory) for role, memory in roles.items()} | {"all": _sizes(sum(roles.values(), ActorMemory()))}
    expected = _sizes(sum(predicted.values(), ActorMemory()))
    return {
        "samples_per_step": samples,
        "samples_per_second": samples / step.median,
        "step_seconds": step._asdict(),
        "step_seconds_by_round": [one._asdict() for one in rounds],
        "stage_seconds": {name: statistics.median(one[name] for one in stages) for name in stages[0]},
        "peak_of_all_processes_gib": max(profile.peak_memory_gib for profile in profiles),
        "bytes": sizes,
        "predicted_bytes": {role: _sizes(memory) for role, memory in predicted.items()},
        "prediction_error": {kind: expected[kind] / size - 1 if (size := sizes["all"][kind]) else None for kind in PREDICTED},
    }


def _sizes(memory: ActorMemory) -> dict:
    return asdict(memory) | {"model_state": memory.model_state, "peak": memory.peak}


def ledger_results(algorithms: Mapping[str, dict], training: Mapping[str, dict | None], *, on_gpu: bool) -> dict:
    """Everything that `dvpo bench ledger` measured.

    Args:
        algorithms: see `algorithm_results`, in the order in which they ran.
        training: what training each frozen model cost before, by config section; see `training_cost`.
        on_gpu: the targets are those of a GPU.
    """
    targets = [
        {"quantity": quantity, "algorithm": algorithm, "baseline": baseline, "limit": limit, "ratio": ratio, "met": ratio <= limit}
        for quantity, algorithm, baseline, limit in (GPU_TARGETS if on_gpu else CPU_TARGETS)
        if (ratio := _ratio(algorithms, quantity, algorithm, baseline)) is not None
    ]
    return {
        "algorithms": algorithms,
        "ratio_to_ppo": {name: {quantity: _ratio(algorithms, quantity, name) for quantity in COMPARED} for name in algorithms},
        "paper_ratio_to_ppo": PAPER,
        "step_ratio_to_ppo_by_round": {name: _ratios(algorithms, "step", name) for name in algorithms if BASELINE in algorithms},
        "targets": targets,
        "training_before": training,
        "break_even_steps": _break_even_steps(algorithms, training),
    }


def _ratio(algorithms: Mapping[str, dict], quantity: str, name: str, baseline: str = BASELINE) -> float | None:
    """One algorithm's step (the median over rounds), model state or peak over another's; None unless both were measured."""
    ratios = _ratios(algorithms, quantity, name, baseline)
    return statistics.median(ratios) if ratios else None


def _ratios(algorithms: Mapping[str, dict], quantity: str, name: str, baseline: str = BASELINE) -> list[float]:
    """The ratio of median steps in each round, or the one ratio of bytes; empty unless both algorithms were measured."""
    if not {name, baseline} <= algorithms.keys():
        return []
    pair = (algorithms[name], algorithms[baseline])
    if quantity == "step":
        return [mine["median"] / others["median"] for mine, others in zip(*(one["step_seconds_by_round"] for one in pair), strict=True)]
    mine, others = (one["bytes"]["all"][quantity] for one in pair)
    return [mine / others]


def _break_even_steps(algorithms: Mapping[str, dict], training: Mapping[str, dict | None]) -> float | None:
    """Steps after which DVPO's shorter steps have paid for the longer training of its value model, against PPO's reward model.

    None where a cost is unknown, or a step of DVPO is not shorter.
    """
    gvm, reward_model = training.get("gvm"), training.get("reward_model")
    if gvm is None or reward_model is None or not {"dvpo", BASELINE} <= algorithms.keys():
        return None
    saved = algorithms[BASELINE]["step_seconds"]["median"] - algorithms["dvpo"]["step_seconds"]["median"]
    return max(0.0, gvm["seconds"] - reward_model["seconds"]) / saved if saved > 0 else None


def training_cost(artifact: Path) -> dict | None:
    """What the run that made an artifact took, from the summary.json of its run folder; None where there is none.

    Raises:
        InputError: the summary is there and cannot be read.
    """
    summary = artifact.resolve().parent / "summary.json"
    if not summary.is_file():
        return None
    try:
        content = json.loads(summary.read_text(encoding="utf-8"))
        return {"seconds": float(content["duration_seconds"]), "steps": content["steps"], "peak_memory_gib": content["peak_memory_gib"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{summary}: not the summary of a training run ({error}); move it away, or train the model again") from error


# ------------------------------------------------------------------------------------------------------------- text


def lines(results: dict) -> list[str]:
    """The results for people."""
    tables = [[title, *aligned(rows), ""] for title, rows in _tables(results)]
    return [*(line for table in tables for line in table), *_remarks(results)]


def markdown(results: dict) -> str:
    """The results as Markdown tables."""
    parts = []
    for title, (header, *rows) in _tables(results):
        parts += [f"**{title}**", "", *(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)), ""]
    return "\n".join([*parts, *(f"- {remark}" for remark in _remarks(results))]) + "\n"


def _tables(results: dict) -> list[tuple[str, list[list[str]]]]:
    """Titles and rows, the header first."""
    algorithms, ratios = results["algorithms"], results["ratio_to_ppo"]
    name, unit = ("GiB", 2**30) if max(one["bytes"]["all"]["peak"] for one in algorithms.values()) >= 2**30 else ("MiB", 2**20)
    memory = [["algorithm", "role", *map(_heading, KINDS)]]
    for algorithm, one in algorithms.items():
        memory += [[algorithm, role, *(_cell(size[kind] and size[kind] / unit) for kind in KINDS)] for role, size in one["bytes"].items()]

    stages = list(dict.fromkeys(stage for one in algorithms.values() for stage in one["stage_seconds"]))
    time = [["algorithm", *stages, "step", "samples/s"]]
    for algorithm, one in algorithms.items():
        spent = [_cell(one["stage_seconds"].get(stage)) for stage in stages]
        time.append([algorithm, *spent, f"{Spread(**one['step_seconds']):.3f}", _cell(one["samples_per_second"])])

    rows = ratios | {f"dvpo ({source})": of_paper for source, of_paper in results["paper_ratio_to_ppo"].items()}
    ratio = [["algorithm", "step time", *map(_heading, COMPARED[1:])]]
    ratio += [[algorithm, *(_cell(of_algorithm.get(quantity)) for quantity in COMPARED)] for algorithm, of_algorithm in rows.items()]

    error = [["algorithm", *map(_heading, PREDICTED)]]
    error += [[algorithm, *(_cell(one["prediction_error"][kind], "+.1%") for kind in PREDICTED)] for algorithm, one in algorithms.items()]
    return [
        (f"Memory of a step, {name}", memory),
        ("Seconds of a step, median (range)", time),
        ("Ratio to PPO", ratio),
        ("Error of `dvpo plan`, predicted against measured", error),
    ]


def _heading(kind: str) -> str:
    return "peak without cache" if kind == "peak" else kind.replace("_", " ")


def _cell(value: float | None, spec: str = ".3f") -> str:
    return "–" if value is None else f"{value:{spec}}"


def _remarks(results: dict) -> list[str]:
    remarks = []
    for target in results["targets"]:
        names = target["algorithm"], target["baseline"]
        rounds = by_round(_ratios(results["algorithms"], target["quantity"], *names), digits=3)
        bound = verdict(f"<= {target['limit']:g}", target["met"])
        remarks.append(f"{target['quantity'].replace('_', ' ')} of {' / '.join(names)}: {target['ratio']:.3f}{rounds}, target {bound}")
    for algorithm, one in results["algorithms"].items():
        error = one["prediction_error"]["model_state"]
        if error is not None and abs(error) > WANTED_PREDICTION_ERROR:
            remarks.append(f"{algorithm}: the predicted model state is off by {error:+.0%}, wanted within {WANTED_PREDICTION_ERROR:.0%}")
    for section, cost in results["training_before"].items():
        known = cost and f"{cost['seconds']:.0f} s, {cost['steps']} steps, {cost['peak_memory_gib']:.2f} GiB at most"
        remarks.append(f"training the {MODELS[section]} beforehand: {known or 'unknown, the artifact is in no run folder'}")
    if results["break_even_steps"] is not None:
        remarks.append(f"dvpo has paid for its longer training beforehand after {results['break_even_steps']:.0f} steps")
    return remarks
