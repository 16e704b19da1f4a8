"""`dvpo bench step`: the parts of a training step against the bare libraries, and what the step spends outside of them, in one run."""

from __future__ import annotations

from pathlib import Path

from dvpo_ray.bench.comparisons import Bench, compare_frozen, compare_learner, compare_rollout
from dvpo_ray.bench.measure import Spread, aligned, describe_measurement, verdict
from dvpo_ray.bench.overhead import profile_steps
from dvpo_ray.config import override_config
from dvpo_ray.config.arithmetic import counted, derive_batch
from dvpo_ray.config.schema import Config
from dvpo_ray.monitoring.console import RunConsole
from dvpo_ray.runtime.cluster import connect
from dvpo_ray.training.policy_inputs import load_inputs


def bench_step(config: Config, run_folder: Path, repeats: int) -> dict:
    """Measure a step of a config and print the results.

    Rollouts, frozen models and learner are compared with one actor of each role: rollouts and frozen models on what one engine
    generates in a step, the learner on what one of its workers trains on. The whole step is profiled with the config's own actors.

    Args:
        run_folder: gets the actors' logs and what the profiled steps write.
        repeats: measured rounds of each comparison, and measured steps; one more of each warms up.

    Returns:
        The results with all that they depend on, ready for JSON.

    Raises:
        InputError, ResourceError: in one line; bad input is found before any actor starts.
    """
    measurement = describe_measurement(config)
    with RunConsole() as console, console.stage("reading models and prompts", quiet=True):
        inputs, plan = load_inputs(config), derive_batch(config)
    run_folder = run_folder.resolve()
    run_folder.mkdir(parents=True, exist_ok=True)
    rows = max(plan.max_samples_per_engine, plan.samples_per_worker)
    alone = override_config(config, [f"{role}.num_actors=1" for role in ("rollout", "scorer", "reference", "policy")])
    bench = Bench(alone, inputs, str(run_folder), rows, plan.samples_per_worker, repeats)
    stages = (("rollout", compare_rollout, 1), ("scorer and reference", compare_frozen, 2), ("learner", compare_learner, 1))
    comparisons: list[dict] = []
    with RunConsole() as console, console.entering("start of Ray", connect(config.ray, console.say), quiet=True):
        for name, compare, count in stages:
            with console.stage(name, count * (repeats + 1), unit="rounds") as progress:
                bench.after_round = progress.advance
                comparisons += compare(bench)
        with console.stage("whole step", repeats + 1, unit="steps") as progress:
            step = profile_steps(config, inputs, run_folder, repeats, progress.advance).as_json()
        batch = bench.rollouts()
        workload = {
            "rows": batch.num_rows,
            "prompt_tokens": int(batch.prompt_lengths.sum()),
            "response_tokens": int(batch.response_lengths.sum()),
            "longest_row": int(batch.lengths.max()),
            "learner_rows": bench.learner_rows,
        }
        for line in [*_comparison_lines(workload, comparisons), "", *_step_lines(step)]:
            console.say(line)
    results = {"workload": workload, "comparisons": comparisons, "step": step}
    return {"benchmark": "step", **measurement, "repeats": repeats, **results, "config": config.model_dump(mode="json")}


def _comparison_lines(workload: dict, comparisons: list[dict]) -> list[str]:
    rows, learner_rows = workload["rows"], workload["learner_rows"]
    learner = "" if learner_rows == rows else f", the learner on {learner_rows} of them"
    sizes = f"{counted(rows, 'row')}, {workload['prompt_tokens']} prompt and {workload['response_tokens']} response tokens{learner}"
    table = [["", "product", "bare", "", "ratio", "target"]]
    for one in comparisons:
        target = "(for information)" if one["target"] is None else verdict(f">= {one['target']:g}", one["ratio"] >= one["target"])
        rates = (f"{Spread(**rates):,.0f}" for rates in (one["product"], one["bare"][one["baseline"]]))
        table.append([one["name"], *rates, one["baseline"], f"{one['ratio']:.3f}", target])
    return [f"tokens per second, median (range), on {sizes}", *aligned(table)]


def _step_lines(step: dict) -> list[str]:
    total, overhead, target = Spread(**step["seconds"]), Spread(**step["overhead"]), step["overhead_target"]
    return [
        f"a step, median (range): {total:.3f} s, peak memory {step['peak_memory_gib']:.2f} GiB",
        *(f"  {name:<12}{seconds:>9.4f} s{seconds / total.median:>8.1%}" for name, seconds in step["stage_seconds"].items()),
        f"  outside of generate, score, reference, update and sync: {overhead:.1%}, target " + verdict(f"<= {target:.0%}", overhead.median <= target),
        f"  inside of them, engines and learner waiting for the object store and messages: {step['waiting_in_stages']:.1%}",
    ]
