"""`dvpo bench trl`: a whole step of this system, as PPO and as DVPO, against TRL's PPOTrainer on the same work."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dvpo_ray.bench.machine import describe_measurement
from dvpo_ray.bench.overhead import StepProfile, profile_steps, round_folder, round_title
from dvpo_ray.bench.trl_results import StageTimes, TRLResults, TRLRun
from dvpo_ray.config import override_config
from dvpo_ray.config.arithmetic import derive_batch
from dvpo_ray.config.schema import Config
from dvpo_ray.errors import ResourceError
from dvpo_ray.gvm.artifact import (
    GVMManifest,
    ObjectiveSpec,
    OutcomeSpec,
    TrainingDataSpec,
    chat_template_hash,
    head_spec,
    read_manifest,
    save_gvm,
    tokenizer_hash,
)
from dvpo_ray.gvm.model import head_parameters, new_value_model
from dvpo_ray.models.loading import load_tokenizer
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

    All three sample exactly `rollout.max_response_tokens` tokens a response and make as many optimizer steps on the same
    prompts. TRL gets as many threads as this process has cores; ours have those of the config.

    Args:
        trl_python: Python of an environment with TRL 1.12.0.
        run_folder: gets the logs, what the steps write and, without `gvm.path`, a value model.
        repeats: measured steps of each; one more of each warms up.
        settings: overrides of each algorithm's own, such as the layout that suits it best; the work has to stay the same.
        rounds: the three take so many turns, each from a new start, in every second one the other way round.

    Returns:
        The results with all that they depend on, ready for JSON.

    Raises:
        InputError, ResourceError: in one line.
    """
    check_trl(trl_python)
    measurement = describe_measurement(config)
    run_folder = run_folder.resolve()
    config = same_work(with_models(config, str(run_folder / "value_model")))
    if config.gvm.path == str(run_folder / "value_model"):
        make_value_model(config, run_folder / "value_model")
    configs = {algorithm: override_config(run_as(config, algorithm), settings[algorithm]) for algorithm in ALGORITHMS}
    inputs = {algorithm: load_inputs(changed) for algorithm, changed in configs.items()}
    profiles: dict[str, list[StepProfile]] = {algorithm: [] for algorithm in configs}
    trl: list[TRLRun] = []
    with RunConsole() as console:

        def measure_trl(number: int) -> None:
            folder = round_folder(run_folder / "trl", number, rounds)
            with console.stage(round_title("TRL PPO", number, rounds), repeats + 1, unit="steps") as progress:
                trl.append(run_trl(trl_request(config, inputs["dvpo"].prompts, repeats), trl_python, folder, progress.advance))

        for number in range(1, rounds + 1):
            forwards = number % 2 == 1
            if not forwards:
                measure_trl(number)
            with connect(config.ray):
                for algorithm in ALGORITHMS if forwards else ALGORITHMS[::-1]:
                    folder = round_folder(run_folder / algorithm, number, rounds)
                    with console.stage(round_title(algorithm, number, rounds), repeats + 1, unit="steps") as progress:
                        profile = profile_steps(configs[algorithm], inputs[algorithm], folder, repeats, progress.advance)
                    profiles[algorithm].append(profile)
            if forwards:
                measure_trl(number)
        results = TRLResults.of(config, trl, profiles)
        for line in results.lines():
            console.say(line)
    layers = {"gvm": read_manifest(Path(config.gvm.path)).num_layers, "reward_model": read_manifest(Path(config.reward_model.path)).num_layers}
    description = {"trl": {"threads": _cores(), "versions": trl[0].versions}, "value_model_layers": layers, "settings": settings}
    return {
        "benchmark": "trl",
        **measurement,
        "rounds": rounds,
        "repeats": repeats,
        **description,
        **results.as_json(),
        "config": config.model_dump(mode="json"),
    }


# ------------------------------------------------------------------------------------------------------- settings


def with_models(config: Config, fallback: str) -> Config:
    """The config with a value model and a reward model: its own, else its value model for both, else the fallback for both."""
    gvm = config.gvm.path or fallback
    reward_model = config.reward_model.path or gvm
    return config.model_copy(
        update={
            "gvm": config.gvm.model_copy(update={"path": gvm}),
            "reward_model": config.reward_model.model_copy(update={"path": reward_model}),
        }
    )


def same_work(config: Config) -> Config:
    """The config with every response as long as the longest: TRL's loop generates until then."""
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"min_response_tokens": config.rollout.max_response_tokens})})


def make_value_model(config: Config, folder: Path) -> Path:
    """An untrained value model with a random head: what a step costs doesn't depend on what it knows.

    Raises:
        InputError: `model.path` is missing or has fewer layers than `gvm.num_layers`.
    """
    model = new_value_model(config.model.path, config.gvm.num_layers, trust_remote_code=config.model.trust_remote_code)
    generator = torch.Generator().manual_seed(config.seed)
    for _, parameter in head_parameters(model):
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
    settings = config.gvm
    manifest = GVMManifest(
        base_model=config.model.path,
        num_layers=model.config.get_text_config().num_hidden_layers,
        tokenizer_sha256=tokenizer_hash(tokenizer),
        chat_template_sha256=chat_template_hash(tokenizer),
        chat_template=config.model.chat_template,
        head=head_spec(model),
        objective=ObjectiveSpec(name="monte_carlo", td_lambda=settings.td_lambda, bradley_terry_weight=0.0, bradley_terry_value="last"),
        outcome=OutcomeSpec(kind="binary", scale=1.0),
        training_data=TrainingDataSpec(path="none: untrained", fingerprint="", pairs=0, heldout_pairs=0),
        heldout_accuracy={},
        heldout_regression={},
    )
    return save_gvm(folder, model, model.state_dict(), tokenizer, manifest)


def run_as(config: Config, algorithm: str) -> Config:
    """The config as that of an algorithm."""
    return config.model_copy(update={"algorithm": algorithm})


def _cores() -> int:
    return len(os.sched_getaffinity(0))


# ------------------------------------------------------------------------------------------------------- TRL's side


def check_trl(python: Path) -> None:
    """Refuse an environment without TRL 1.12.0.

    Raises:
        ResourceError: no Python there, or another TRL in it.
    """
    advice = "launch/bench_trl.sh makes an environment that has it"
    try:
        found = _run([str(python), "-P", "-c", "from importlib.metadata import version; print(version('trl'))"])
    except OSError as error:
        raise ResourceError(f"{python}: no Python to run TRL {TRL_VERSION} with ({error.strerror}); {advice}") from error
    version = found.stdout.strip() if found.returncode == 0 else "none"
    if version != TRL_VERSION:
        raise ResourceError(f"{python}: has TRL {version}, the comparison needs {TRL_VERSION}; {advice}")


def trl_request(config: Config, prompts: list[list[int]], repeats: int) -> dict:
    """What the script in TRL's environment is to do: this config's work in TRL's vocabulary."""
    batch = config.batch
    rows = derive_batch(config).samples_per_step
    chosen = [prompts[i] for step in range(1, repeats + 2) for i in prompt_indices(len(prompts), batch.prompts_per_step, step, config.seed)]
    return {
        "model": os.path.expanduser(config.model.path),
        "dtype": config.model.dtype,
        "trust_remote_code": config.model.trust_remote_code,
        "threads": _cores(),
        "seed": config.seed,
        "rows": rows,
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


def run_trl(request: dict, python: Path, run_folder: Path, after_step) -> TRLRun:
    """Run the script in TRL's environment, alone on the cores: its threads wait as OpenMP has it by default, not passively like those of actors.

    Raises:
        ResourceError: it failed; the line names its log.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
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
        if step["response_tokens"] != wanted:
            raise ResourceError(f"TRL's PPO sampled {step['response_tokens']} tokens in a step, the comparison needs {wanted}; see {log}")
    return TRLRun([StageTimes.of_trl(step) for step in result["steps"][1:]], result["versions"], memory.peak_gib)


def _run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, check=False)
