"""The `dvpo` command. Bad input ends in one line on stderr and exit status 2."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from dvpo_ray import __version__
from dvpo_ray.commands import bench, doctor, dpo, experiment, gvm, plan, quickstart, report, rm, sft, train
from dvpo_ray.commands import eval as evaluate
from dvpo_ray.errors import InputError, ResourceError
from dvpo_ray.monitoring.logs import quiet_libraries
from dvpo_ray.runtime.termination import Termination

COMMANDS: dict[str, ModuleType] = {
    "quickstart": quickstart,
    "sft": sft,
    "gvm": gvm,
    "rm": rm,
    "dpo": dpo,
    "train": train,
    "eval": evaluate,
    "plan": plan,
    "bench": bench,
    "experiment": experiment,
    "report": report,
    "doctor": doctor,
}
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 2 bad input or a missing resource, 130 interrupted, 143 ended by SIGTERM.

    Every other exception is a defect and keeps its traceback.
    """
    termination = Termination()
    try:
        args = parse_arguments(argv)
        quiet_libraries()
        return args.run(args)
    except (InputError, ResourceError) as error:
        # Ray wraps an actor's error in one of the same class whose text is a traceback; the original is its `cause`.
        print(f"dvpo: {_one_line(getattr(error, 'cause', None) or error)}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except OSError as error:
        print(f"dvpo: {_system_refusal(error)}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("dvpo: ended by SIGTERM" if termination.received else "dvpo: interrupted", file=sys.stderr)
        return EXIT_TERMINATED if termination.received else EXIT_INTERRUPTED
    finally:
        termination.close()


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The parsed command line; `run` in it is the command's function.

    Raises:
        InputError: argparse's complaint, in one line.
    """
    args, rest = build_parser().parse_known_args(argv)
    # argparse takes the overrides before the first option only; those after it arrive here.
    overrides = [text for text in rest if "=" in text and not text.startswith("-")]
    unknown = [text for text in rest if text not in overrides]
    if unknown or (overrides and not hasattr(args, "overrides")):
        raise InputError(args.parser.unknown_argument((unknown or overrides)[0]))
    if overrides:
        args.overrides = [*args.overrides, *overrides]
    return args


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog="dvpo", description="RLHF with a pretrained, frozen value model.", epilog="dvpo quickstart")
    parser.add_argument("--version", action="version", version=f"dvpo {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=f"{module.HELP}.", epilog=module.EXAMPLE)
        command.set_defaults(run=module.run)
        module.add_arguments(command)
    return parser


class _Parser(argparse.ArgumentParser):
    """argparse with whole option names, an example at the end of every help, and errors of one line."""

    def __init__(self, *args, epilog: str, **kwargs) -> None:
        super().__init__(*args, epilog=f"example:\n  {epilog}", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.set_defaults(parser=self)  # of the command that is chosen; the innermost one's default wins

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")

    def unknown_argument(self, argument: str) -> str:
        """The complaint about an argument that this command does not know, with the nearest option."""
        option = argument.partition("=")[0]
        nearest = difflib.get_close_matches(option, self._option_string_actions, n=1) if option.startswith("-") else []
        if nearest:
            return f"unknown argument {argument}; did you mean {nearest[0]}? See `{self.prog} --help`"
        hint = "; overrides are written without dashes, key=value" if option.startswith("-") and "=" in argument else ""
        return f"unknown argument {argument}{hint}; see `{self.prog} --help`"


def _system_refusal(error: OSError) -> str:
    """What the system said about a path, in words.

    Raises:
        OSError: the error itself, where it is about no path, so that nobody's input is to blame.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.filename or 'writing'}: no space left on the disk; free some, then continue with --resume"
    if not isinstance(error.filename, str | os.PathLike) or error.strerror is None:
        raise error
    return f"{error.filename}: the system refuses it: {error.strerror}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
