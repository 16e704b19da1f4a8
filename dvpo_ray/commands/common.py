"""What the commands share: the config arguments, the run folder, and the print of a plan."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from dvpo_ray.commands.paths import check_writable_folder
from dvpo_ray.config import Config, dump_config, load_config
from dvpo_ray.config.schema import TRLStageConfig
from dvpo_ray.errors import InputError
from dvpo_ray.planning.placement import Bundle, total_resources
from dvpo_ray.training.run_folder import check_new


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG and its overrides."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file, for example cluster_configs/local-cpu.yaml")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help="settings that replace those of the file; the value is YAML")


def add_run_arguments(parser: argparse.ArgumentParser, folder: str) -> None:
    """CONFIG, overrides, and the options of commands that make a run folder."""
    add_config_arguments(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, help=f"run folder, new or empty (default: `out` of the config, else {folder})")
    parser.add_argument("--resume", action="store_true", help="continue the run in the run folder from its last whole checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config, the batch arithmetic and the placement; start nothing")


def load(args: argparse.Namespace) -> Config:
    """The config that the command line names."""
    return load_config(args.config, args.overrides)


def choose_run_folder(args: argparse.Namespace, config: Config, suffix: str = "") -> Path:
    """The run folder: `--out`, else `out` of the config, else `runs/<name><suffix>-<time>`.

    Raises:
        InputError: the folder holds another run's files and `--resume` isn't given, nothing can be written there, or there is nothing to resume.
    """
    named = args.out or (Path(config.out) if config.out else None)
    if args.resume:
        if named is None:
            raise InputError("--resume needs the run folder to continue: --out DIR")
        if not named.is_dir():
            raise InputError(f"{named}: no run folder to resume")
        return named
    folder = named or dated_folder(config, suffix)
    check_new(folder)
    check_writable_folder(folder)
    return folder


def dated_folder(config: Config, suffix: str = "") -> Path:
    """`runs/<name><suffix>-<time>`, the folder of what has no other."""
    return Path("runs") / f"{config.name}{suffix}-{datetime.now():%Y%m%d-%H%M%S}"


def rows_per_optimizer_step(stage: TRLStageConfig, row: str) -> list[str]:
    """The batch arithmetic of a stage that a trainer of TRL runs; `row` is what its rows are."""
    rows = stage.batch_size * stage.gradient_accumulation_steps
    return [
        f"{row}s per optimizer step".ljust(25) + f"{rows} = {stage.batch_size} x {stage.gradient_accumulation_steps} accumulated",
        f"optimizer steps          {stage.epochs:g} epochs x training {row}s / {rows}",
    ]


def print_plan(config: Config, arithmetic: Iterable[str], bundles: Iterable[Bundle], notes: Iterable[str]) -> None:
    """Print a plan that is itself a config file: the resolved YAML, then the rest as comments."""
    print(dump_config(config))
    print("# batch arithmetic", *arithmetic, sep="\n#   ")
    print("# placement", *_placement_lines(list(bundles)), sep="\n#   ")
    for note in notes:
        print(f"# note: {note}")


def _placement_lines(bundles: list[Bundle]) -> list[str]:
    if not bundles:
        return ["this process, on its GPU where there is one"]
    roles = dict.fromkeys(bundle.role for bundle in bundles)
    lines = [_role_line([bundle for bundle in bundles if bundle.role == role]) for role in roles]
    cpus, gpus = total_resources(bundles)
    return [*lines, f"{'total':<12} {cpus:g} CPUs, {gpus:g} GPUs"]


def _role_line(bundles: list[Bundle]) -> str:
    one = bundles[0]
    return f"{one.role:<12} {len(bundles)} x ({one.cpus:g} CPUs, {one.gpus:g} GPUs)"
