"""What can be known before a run: `dvpo plan` predicts memory, fit and time; `dvpo doctor` checks the machine."""

from __future__ import annotations

import json
from argparse import Namespace
from functools import partial

from dvpo_ray.commands.common import CONFIG, argument, check_new_output, command, load, loading, stage
from dvpo_ray.config.inputs import not_made_yet, plan_inputs, policy_misfits, problems
from dvpo_ray.config.notes import training_notes
from dvpo_ray.config.options import finite_number
from dvpo_ray.config.paths import path_option
from dvpo_ray.errors import InputError
from dvpo_ray.planning.placement import Seat, check_device, total_resources

GPUS_PER_NODE = 8
"""Of most nodes with several GPUs."""


@command(
    "predict memory and step time of a run, and whether it fits, without loading weights",
    "dvpo plan cluster_configs/single-node-8gpu.yaml --device a100-80gb --node-memory-gib 1000",
    *CONFIG,
    argument("--device", metavar="NAME", help="GPU that the run will have, for example a100-80gb (default: this machine's)"),
    argument("--calibrate", action="store_true", help="measure the speed of this machine on two layers of the model, in seconds"),
    argument("--node-memory-gib", metavar="GIB", type=finite_number(above=0), help="host memory of a node (default: this machine's)"),
    argument("--json", metavar="FILE", type=path_option, help="also write the plan as JSON, to a new file"),
)
def plan(args: Namespace) -> None:
    config = load(args)
    if args.calibrate and args.device is not None:
        raise InputError(f"--calibrate measures this machine and --device {args.device} names another; give one of them")
    check_device(config, args.device)
    if args.json is not None:
        check_new_output(args.json, "--json")
    for problem in [*problems(plan_inputs(config)), *policy_misfits(config)]:
        raise InputError(problem)

    with loading():
        from dvpo_ray.files import whole_file
        from dvpo_ray.planning.report import Plan
        from dvpo_ray.planning.times import calibrate, choose_device

    if args.calibrate:
        with stage("measuring the speed of this machine"):
            device = calibrate(config)
    else:
        device = choose_device(config, args.device)
    with stage("predicting memory and time", quiet=True):
        plan = Plan(config, device, args.node_memory_gib)
    notes = [note for note in (not_made_yet(config), _many_gpus(plan.seats), *training_notes(config)) if note is not None]
    print(*plan.lines(), *(f"note: {note}" for note in notes), sep="\n")
    if args.json is not None:
        with whole_file(args.json) as file:
            json.dump({**plan.as_json(), "notes": notes}, file, indent=2)


def _many_gpus(seats: list[Seat]) -> str | None:
    """A note on a run that does not fit the usual node."""
    gpus = total_resources(seats)[1]
    if gpus <= GPUS_PER_NODE:
        return None
    nodes = f"{gpus} GPUs take {-(-gpus // GPUS_PER_NODE)} nodes of {GPUS_PER_NODE}, a cluster that ray.address joins"
    return f"{nodes}; host memory is counted as if all actors were on one node"


@command("check that this machine has what a run needs, and say how to fix the rest", "dvpo doctor")
def doctor(args: Namespace) -> int:
    from dvpo_ray.runtime.doctor import print_report, run_checks

    say = partial(print, flush=True)  # also into a pipe
    say("importing every library in its own process, about half a minute ...")
    return print_report(run_checks(say), say)
