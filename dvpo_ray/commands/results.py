"""The commands that judge or show what was trained: `dvpo eval`, `gvm eval`, `gvm score` and `report`."""

from __future__ import annotations

import json
import shlex
import sys
from argparse import Namespace
from pathlib import Path

from dvpo_ray.commands.common import (
    CONFIG,
    JSON,
    argument,
    check_new_output,
    command,
    dated_folder,
    load,
    loading,
    only_json,
    refuse_unreachable,
    stage,
    tell,
)
from dvpo_ray.config import Config
from dvpo_ray.config.arithmetic import counted
from dvpo_ray.config.inputs import Needed, no_artifact, policy_inputs, preference_inputs, problems
from dvpo_ray.config.paths import name_or_path_option, path_option
from dvpo_ray.errors import InputError
from dvpo_ray.monitoring.console import Shell
from dvpo_ray.monitoring.ending import accuracy_words, own_prompts, policy_words
from dvpo_ray.monitoring.run_files import SUMMARY
from dvpo_ray.planning.placement import check_local_cluster, plan_placement


@command(
    "judge a policy's responses to the held-out prompts, or without a judge lay them beside those of model.path",
    "dvpo eval cluster_configs/local-cpu.yaml --policy runs/first/final --out runs/first-eval",
    *CONFIG,
    argument("--policy", metavar="MODEL", type=name_or_path_option, help="checkpoint folder or hub name (default: model.path of the config)"),
    argument("--out", metavar="DIR", type=path_option, help="new folder for the numbers and the judged responses (default: runs/<name>-eval-<time>)"),
    JSON,
)
def evaluate(args: Namespace) -> None:
    config = load(args)
    if config.data.prompts is None:
        raise InputError(f"{args.config}: data.prompts.path is not set; give the prompts to evaluate on")
    out = args.out or dated_folder(config, "-eval")
    check_new_output(out, "the evaluation")
    check_local_cluster(config, (seat for seat in plan_placement(config) if seat.role == "rollout"))
    policy = args.policy or config.model.path
    with only_json(args.json):
        beside = [] if config.evaluation.judge != "none" else [Needed("model.path", config.model.path, "policy")]
        prompts = (one for one in policy_inputs(config) if one.key.startswith("data.prompts"))
        _check(Needed("--policy" if args.policy else "model.path", policy, "policy"), *beside, *prompts)
        with loading():
            from dvpo_ray.training.evaluate import evaluate_policy
        result = evaluate_policy(config, policy, out)
        tell([*policy_words(result), f"responses: {out / 'evaluation.jsonl'}", *_other_side(args, result, config.model.path)])
    # The last line is for scripts.
    print(json.dumps(result, indent=2) if args.json else (out / "evaluation.json").resolve())


def _check(*needed: Needed, gvm: Path | None = None) -> None:
    """Refuse what is not there before the libraries are loaded, which takes seconds. `gvm`: a value model or a reward model."""
    if gvm is not None and (problem := no_artifact(gvm)) is not None:
        raise InputError(problem)
    refuse_unreachable(*needed)
    for problem in problems(needed):
        raise InputError(problem)


def _other_side(args: Namespace, result: dict, start: str) -> list[str]:
    """The command that gives what a result is to be compared with; where that is in it already, what to do with both."""
    same = shlex.join(["dvpo", "eval", args.config, *args.overrides])
    if args.policy in (None, start):
        return ["next, to compare with a trained policy:", Shell(f"{same} --policy RUN/final")]
    if "beside" in result:
        return ["next: read `before` and `response` of each row there, or give the file to a judge of yours (docs/training.md, Without a judge)"]
    return [f"next, to compare with {start}:", Shell(same)]


def _notes(result: dict) -> list[str]:
    return [f"note: {note}" for note in result["notes"]]


GVM = argument("--gvm", metavar="DIR", type=path_option, help="GVM folder (default: gvm.path of the config)")


def _load_with_gvm(args: Namespace) -> tuple[Config, Path]:
    config = load(args)
    if args.gvm is None and config.gvm.path is None:
        raise InputError(f"{args.config}: which value model? give --gvm DIR or set gvm.path")
    return config, args.gvm or Path(config.gvm.path)


@command(
    "measure a value model on held-out pairs",
    "dvpo gvm eval cluster_configs/local-cpu.yaml --gvm runs/gvm/final --out runs/gvm-eval",
    *(*CONFIG, GVM),
    argument("--out", metavar="DIR", type=path_option, help="new folder for the numbers and the plots (default: runs/<name>-gvm-eval-<time>)"),
    JSON,
)
def evaluate_gvm(args: Namespace) -> None:
    config, gvm = _load_with_gvm(args)
    out = args.out or dated_folder(config, "-gvm-eval")
    check_new_output(out, "the evaluation")
    with only_json(args.json):
        _check(*(one for one in preference_inputs(config) if one.key == "model.path" or one.kind == "data"), gvm=gvm)
        with loading():
            from dvpo_ray.gvm.evaluation import evaluate_gvm
        with stage("values of the held-out pairs"):
            result = evaluate_gvm(config, gvm, out)
        is_reward_model = result["objective"] == "bradley_terry"
        more = [f"gvm.path={gvm}"] if not is_reward_model else ["algorithm=ppo", f"reward_model.path={gvm}"]
        use = shlex.join(["dvpo", "train", args.config, *args.overrides, *more]) + own_prompts(config.model_dump(mode="json"))
        words = accuracy_words(result, ["last"] if is_reward_model else ["mean", "last"])
        tell([*_notes(result), *words, f"plots: {out}", "next, to use it:", Shell(use)])
    print(json.dumps(result, indent=2) if args.json else (out / "evaluation.json").resolve())


@command(
    "write the values of every response of a file",
    "dvpo gvm score cluster_configs/local-cpu.yaml --gvm runs/gvm/final --input pairs.jsonl --output values.jsonl",
    *(*CONFIG, GVM),
    argument("--input", metavar="FILE", type=path_option, required=True, help="rows with a prompt and responses"),
    argument("--output", metavar="FILE", type=path_option, required=True, help="new JSONL file, one object per row"),
)
def score(args: Namespace) -> None:
    config, gvm = _load_with_gvm(args)
    check_new_output(args.output, "--output")
    _check(Needed("model.path", config.model.path, "policy"), Needed("--input", str(args.input), "data"), gvm=gvm)

    with loading():
        from dvpo_ray.gvm.scoring import score_file
    with stage(f"values of {args.input}"):
        rows = score_file(config, gvm, args.input, args.output)
    print(f"{args.output}: {counted(rows, 'row')}")


@command(
    "write report.html of a run folder",
    "dvpo report runs/first",
    argument("run_folder", metavar="RUN", type=path_option, help="run folder of a command that trains"),
)
def report(args: Namespace) -> None:
    if not args.run_folder.is_dir():
        around = next((parent for parent in args.run_folder.parents if (parent / SUMMARY).is_file()), None)
        meant = f"; did you mean {around}?" if around is not None else ""
        raise InputError(f"{args.run_folder}: {'a file, not a' if args.run_folder.exists() else 'no such'} run folder{meant}")

    from dvpo_ray.monitoring.report import write_report

    print(write_report(args.run_folder, lambda note: print(f"dvpo: warning: {note}", file=sys.stderr)).resolve())
