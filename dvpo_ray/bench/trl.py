"""`dvpo bench trl`: a whole step of this system, as PPO and as DVPO, against TRL's PPOTrainer on the same work."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from dvpo_ray.bench.measure import describe_measurement
from dvpo_ray.bench.overhead import StepProfile, profile_steps, take_rounds
from dvpo_ray.bench.random_weights import make_value_model
from dvpo_ray.bench.trl_results import Measured, lines, of_profile, trl_results
from dvpo_ray.config import override_config
from dvpo_ray.config.arithmetic import derive_batch
from dvpo_ray.config.schema import Config
from dvpo_ray.errors import ResourceError
from dvpo_ray.gvm.artifact import read_manifest
from dvpo_ray.monitoring.console import RunConsole
from dvpo_ray.monitoring.memory import PeakMemory
from dvpo_ray.rollouts.schedule import prompt_indices
from dvpo_ray.runtime.cluster import connect
from dvpo_ray.training.policy_inputs import load_inputs

TRL_VERSION = "1.12.0"
"""The last release that has PPO."""

ALGORITHMS = ("ppo", "dvpo")
SCRIPT = Path(__file__).with_name("trl_ppo_steps.py")


def bench_trl(config: Config, trl_python: Path, run_folder: Path, repeats: int, settings: Mapping[str, Sequence[str]], rounds: int = 1) -> dict:
    """Measure steps of `algorithm: ppo`, of `algorithm: dvpo` and of TRL's PPO, one after the other, and print the results.

    All three sample exactly `rollout.max_response_tokens` tokens for each response and make the same number of optimizer steps on the
    same prompts. TRL gets a thread for each core of this process; ours have the threads of the config.

    Args:
        trl_python: Python of an environment with TRL 1.12.0.
        run_folder: gets the logs, what the steps write and, without `gvm.path`, a value model.
        repeats: measured steps of each; one more of each warms up.
        settings: overrides for each algorithm, such as the layout that suits it best; the work has to stay the same.
        rounds: turns that the three take, each from a new start.

    Returns:
        The results with all that they depend on, ready for JSON.

    Raises:
        InputError, ResourceError: in one line.
    """
    check_trl(trl_python)
    measurement = describe_measurement(config)
    run_folder = run_folder.resolve()
    made = run_folder / "value_model"
    config = same_work(with_models(config, str(made)))
    if config.gvm.path == str(made):
        make_value_model(config, made)
    configs = {algorithm: override_config(config, [f"algorithm={algorithm}", *settings[algorithm]]) for algorithm in ALGORITHMS}
    with RunConsole() as console, console.stage("reading models and prompts", quiet=True):
        inputs = {algorithm: load_inputs(changed) for algorithm, changed in configs.items()}
    request = trl_request(config, inputs["dvpo"].prompts, repeats)

    def profile(algorithm: str, folder: Path, after_step: Callable[[], None]) -> StepProfile:
        with connect(config.ray, console.say):  # for as long as this lasts: TRL has the machine to itself
            return profile_steps(configs[algorithm], inputs[algorithm], folder, repeats, after_step)

    contestants = {algorithm: partial(profile, algorithm) for algorithm in ALGORITHMS} | {"trl": partial(run_trl, request, trl_python)}
    with RunConsole() as console:
        measured = take_rounds(contestants, console, run_folder, rounds, repeats + 1)
        trl: list[Measured] = measured.pop("trl")
        results = trl_results(config, trl, {algorithm: list(map(of_profile, profiles)) for algorithm, profiles in measured.items()})
        for line in lines(results):
            console.say(line)
    return {
        "benchmark": "trl",
        **measurement,
        "rounds": rounds,
        "repeats": repeats,
        "trl": {"threads": request["threads"], "versions": trl[0].versions},
        "value_model_layers": {name: read_manifest(Path(getattr(config, name).path)).num_layers for name in ("gvm", "reward_model")},
        "settings": settings,
        **results,
        "config": config.model_dump(mode="json"),
    }


# ------------------------------------------------------------------------------------------------------- settings


def with_models(config: Config, fallback: str) -> Config:
    """The config with a value model and a reward model: its own, else its value model for both, else the fallback for both."""
    gvm = config.gvm.path or fallback
    return override_config(config, [f"gvm.path={json.dumps(gvm)}", f"reward_model.path={json.dumps(config.reward_model.path or gvm)}"])


def same_work(config: Config) -> Config:
    """The config with every response as long as the longest: TRL's loop generates until then."""
    return override_config(config, [f"rollout.min_response_tokens={config.rollout.max_response_tokens}"])


# ------------------------------------------------------------------------------------------------------- TRL's side


def check_trl(python: Path) -> None:
    """Refuse an environment without TRL 1.12.0.

    Raises:
        ResourceError: there is no Python, or it has another TRL.
    """
    advice = "launch/bench_trl.sh makes an environment that has it"
    command = [str(python), "-P", "-c", "from importlib.metadata import version; print(version('trl'))"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ResourceError(f"{python}: cannot be run as the Python of TRL {TRL_VERSION} ({error.strerror}); {advice}") from error
    version = found.stdout.strip() if found.returncode == 0 else None
    if version != TRL_VERSION:
        raise ResourceError(f"{python}: has {f'TRL {version}' if version else 'no TRL'}, the comparison needs {TRL_VERSION}; {advice}")


def trl_request(config: Config, prompts: list[list[int]], repeats: int) -> dict:
    """What the script in TRL's environment has to do: this config's work in TRL's terms."""
    batch = config.batch
    chosen = [prompts[i] for step in range(1, repeats + 2) for i in prompt_indices(len(prompts), batch.prompts_per_step, step, config.seed)]
    return {
        "model": config.model.path,
        "dtype": config.model.dtype,
        "trust_remote_code": config.model.trust_remote_code,
        "threads": len(os.sched_getaffinity(0)),
        "seed": config.seed,
        "rows": derive_batch(config).samples_per_step,
        "steps": repeats + 1,
        "prompts": [prompt for prompt in chosen for _ in range(batch.samples_per_prompt)],
        "ppo": {
            "response_length": config.rollout.max_response_tokens,
            "temperature": config.rollout.temperature,
            "num_ppo_epochs": batch.update_epochs,
            "num_mini_batches": batch.minibatches_per_epoch,
            "learning_rate": config.policy.learning_rate,
            "kl_coef": config.kl.coefficient if config.kl.placement == "reward" else 0.0,
            "cliprange": config.policy.clip_epsilon,
            "cliprange_value": config.critic.value_clip or float("inf"),
            "lam": config.advantage.gae_lambda,
        },
    }


def run_trl(request: dict, python: Path, run_folder: Path, after_step: Callable[[], None]) -> Measured:
    """Run the script in TRL's environment, alone on the cores. Its threads wait actively, which is OpenMP's default; those of actors sleep.

    Raises:
        ResourceError: it failed; the line names its log.
    """
    request_file, result_file, log = (run_folder / name for name in ("trl_request.json", "trl_result.json", "trl.log"))
    request_file.write_text(json.dumps(request), encoding="utf-8")
    result_file.unlink(missing_ok=True)
    threads = {name: str(request["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    ours = ("PYTHONPATH", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    variables = {name: value for name, value in os.environ.items() if name not in ours} | threads | {"TOKENIZERS_PARALLELISM": "false"}
    command = [str(python), "-P", str(SCRIPT), str(request_file), str(result_file)]
    with (
        log.open("w", encoding="utf-8") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=variables) as process,
        PeakMemory([process.pid]) as memory,
    ):
        try:
            for line in process.stdout:
                if line.startswith("step "):
                    after_step()
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0 or not result_file.is_file():
        raise ResourceError(f"TRL's PPO ended with status {process.returncode}; {log} says why")
    result = json.loads(result_file.read_text(encoding="utf-8"))
    wanted = request["rows"] * request["ppo"]["response_length"]
    for step in result["steps"]:
        if (sampled := step.pop("response_tokens")) != wanted:
            raise ResourceError(f"TRL's PPO sampled {sampled} tokens in a step, the comparison needs {wanted}; see {log}")
    return Measured(result["steps"][1:], memory.peak_gib, result["versions"])
