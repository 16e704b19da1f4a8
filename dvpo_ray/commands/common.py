"""What the commands share: their form, the config arguments, the print of a plan, and checks of what they would write."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from dvpo_ray.config import Config, dump_config, load_config
from dvpo_ray.config.inputs import Needed
from dvpo_ray.data import hub
from dvpo_ray.errors import InputError
from dvpo_ray.monitoring.console import RunConsole
from dvpo_ray.planning.placement import Seat, placement_lines


@dataclass
class Command:
    """One command of `dvpo`.

    Attributes:
        help: one line.
        example: a whole command line, shown at the end of the help.
        add_arguments: adds the command's arguments to its parser.
        run: does the work and returns the exit status; nothing means 0. None for a group of commands.
    """

    help: str
    example: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int | None] | None = None


Argument = tuple[str, dict]
"""Name and settings of an argument, as `add_argument` takes them."""


def argument(name: str, **settings) -> Argument:
    return name, settings


def overrides(replaced: str) -> Argument:
    """KEY=VALUE of the settings of `replaced`."""
    return argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help=f"settings that replace those of {replaced}; the value is YAML")


CONFIG = (argument("config", metavar="CONFIG", help="YAML file, for example cluster_configs/local-cpu.yaml"), overrides("the file"))
DRY_RUN = argument(
    "--dry-run", action="store_true", help="print the resolved config, the rows, the batch arithmetic and the placement; start nothing"
)
JSON = argument("--json", action="store_true", help="print the numbers as JSON on standard output, and everything else on standard error")


def command(help: str, example: str, *arguments: Argument) -> Callable[[Callable], Command]:
    """A decorator that makes a function the work of a command with these arguments."""
    return partial(Command, help, example, partial(_add_arguments, arguments))


def group(help: str, commands: Mapping[str, Command]) -> Command:
    """A command that has subcommands. Its example is that of the first one."""
    return Command(help, next(iter(commands.values())).example, partial(add_commands, commands))


def add_commands(commands: Mapping[str, Command], parser: ArgumentParser) -> None:
    """Add commands by their names. `run` of the parsed arguments is the chosen command's function."""
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, one in commands.items():
        subparser = subparsers.add_parser(name, help=one.help, description=f"{one.help}.", epilog=one.example)
        subparser.set_defaults(run=one.run)
        one.add_arguments(subparser)


def _add_arguments(arguments: Iterable[Argument], parser: ArgumentParser) -> None:
    for name, settings in arguments:
        parser.add_argument(name, **settings)


def add_config_arguments(parser: ArgumentParser) -> None:
    """CONFIG and its overrides."""
    _add_arguments(CONFIG, parser)


def load(args: Namespace) -> Config:
    """The config that the command line names."""
    return load_config(args.config, args.overrides)


def dated_folder(config: Config, suffix: str = "") -> Path:
    """`runs/<name><suffix>-<time>`, the default folder of results."""
    return Path("runs") / f"{config.name}{suffix}-{datetime.now():%Y%m%d-%H%M%S}"


# ------------------------------------------------------------------------------------------------------------ checks


def check_new_output(path: Path, what: str) -> None:
    """Refuse a file or folder for results that exists, unless it is an empty folder, and a place that cannot be written to.

    Args:
        what: the results, for the message.

    Raises:
        InputError: names the path.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise InputError(f"{path}: already there, and {what} would take its place; give another path")
    check_writable_folder(path)


def check_writable_folder(folder: Path) -> None:
    """Refuse a place where nothing can be written. Nothing is left there.

    Raises:
        InputError: names the place, and what is in the way.
    """
    there = next(part for part in (folder, *folder.parents) if part.exists())
    if not there.is_dir():
        raise InputError(f"{folder}: nothing can be written there: {there} is a file; give another path")
    if not os.access(there, os.W_OK):
        raise InputError(f"{folder}: you may not write to {there}; give another path")
    try:
        TemporaryDirectory(dir=there).cleanup()  # root may write to a file system of the kernel, and cannot
    except OSError as error:
        raise InputError(f"{folder}: nothing can be written to {there} ({error.strerror}); give another path") from None


# ------------------------------------------------------------------------------------------------- what a user sees


def loading() -> AbstractContextManager:
    """Around the import of the libraries that take seconds. It prints the first line of a command."""
    return stage("loading the libraries")


@contextmanager
def stage(name: str, quiet: bool = False) -> Iterator[None]:
    """Work that has no console of its own, said with its name and its seconds; if `quiet`, only where it takes long."""
    with RunConsole() as console, console.stage(name, quiet=quiet):
        yield


def refuse_unreachable(*needed: Needed) -> None:
    """`hub.refuse_unreachable`, said before it begins: it takes seconds where the hub does not answer."""
    if hub.names(*needed):
        with stage("asking the hub"):
            hub.refuse_unreachable(*needed)


@contextmanager
def only_json(wanted: bool) -> Iterator[None]:
    """Where `--json` is given, send to standard error what this process writes, so that standard output is left for the JSON."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def tell(lines: Iterable[str]) -> None:
    """Print lines for people."""
    console = RunConsole()
    for line in lines:
        console.say(line)


# -------------------------------------------------------------------------------------------------------------- plan


def print_plan(config: Config, data: Mapping[str, str], arithmetic: Mapping[str, str], seats: Sequence[Seat], notes: Iterable[str]) -> None:
    """Print a plan that is itself a config file: the resolved YAML, then the rest as comments."""
    print(dump_config(config))
    for title, facts in (("data", data), ("batch arithmetic", arithmetic)):
        if facts:
            print(f"# {title}", *(f"{name:<25}{numbers}" for name, numbers in facts.items()), sep="\n#   ")
    print("# placement", *(placement_lines(seats) or ["this process, on its GPU if there is one"]), sep="\n#   ")
    for note in notes:
        print(f"# note: {note}")
