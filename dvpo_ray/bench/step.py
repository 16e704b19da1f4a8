"""`dvpo bench step`: the parts of a training step against the bare libraries, and what the step spends besides, in one run."""

from __future__ import annotations

from pathlib import Path

from dvpo_ray.bench.comparisons import Bench, compare_frozen, compare_learner, compare_rollout
from dvpo_ray.bench.machine import describe_measurement
from dvpo_ray.bench.overhead import profile_steps
from dvpo_ray.bench.results import StepResults, Workload
from dvpo_ray.config.arithmetic import derive_batch
from dvpo_ray.config.schema import Config
from dvpo_ray.monitoring.console import RunConsole
from dvpo_ray.runtime.cluster import connect
from dvpo_ray.training.policy_inputs import Inputs, load_inputs


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
    inputs = load_inputs(config)
    run_folder = run_folder.resolve()
    run_folder.mkdir(parents=True, exist_ok=True)
    with RunConsole() as console, connect(config.ray):
        results = _measure(config, inputs, run_folder, repeats, console)
        for line in results.lines():
            console.say(line)
    return {"benchmark": "step", **measurement, "repeats": repeats, **results.as_json(), "config": config.model_dump(mode="json")}


def _measure(config: Config, inputs: Inputs, run_folder: Path, repeats: int, console: RunConsole) -> StepResults:
    plan = derive_batch(config)
    rows = max(plan.max_samples_per_engine, plan.samples_per_worker)
    bench = Bench(one_actor_each(config), inputs, str(run_folder), rows, plan.samples_per_worker, repeats)
    rounds = repeats + 1
    with console.stage("rollout", rounds, unit="rounds") as progress:
        bench.after_round = progress.advance
        comparisons = [compare_rollout(bench)]
    with console.stage("scorer and reference", 2 * rounds, unit="rounds") as progress:
        bench.after_round = progress.advance
        comparisons += compare_frozen(bench)
    with console.stage("learner", rounds, unit="rounds") as progress:
        bench.after_round = progress.advance
        comparisons += compare_learner(bench)
    with console.stage("whole step", rounds, unit="steps") as progress:
        profile = profile_steps(config, inputs, run_folder, repeats, progress.advance)
    return StepResults(Workload.of(bench.rollouts(), bench.learner_rows), comparisons, profile)


def one_actor_each(config: Config) -> Config:
    """The config with one actor of each role."""
    roles = {role: getattr(config, role).model_copy(update={"num_actors": 1}) for role in ("rollout", "scorer", "reference", "policy")}
    return config.model_copy(update=roles)
