"""The `dvpo` command. Bad input ends in one line on stderr and exit status 2."""

from __future__ import annotations

import argparse
import difflib
import os
import select
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from dvpo_ray import __version__
from dvpo_ray.commands import bench, experiment, plan, quickstart, results, train
from dvpo_ray.commands.common import Command, add_commands, group
from dvpo_ray.config.keys import nearest_keys
from dvpo_ray.errors import InputError, ResourceError, one_line
from dvpo_ray.monitoring.logs import quiet_libraries
from dvpo_ray.runtime.termination import Termination

COMMANDS: dict[str, Command] = {
    "quickstart": quickstart.quickstart,
    "sft": train.SFT,
    "gvm": group(
        "train, evaluate or apply a Global Value Model",
        {"train": train.GVM, "eval": results.evaluate_gvm, "score": results.score},
    ),
    "rm": group("train a Bradley-Terry reward model for the baselines", {"train": train.REWARD_MODEL}),
    "dpo": train.DPO,
    "train": train.TRAIN,
    "eval": results.evaluate,
    "plan": plan.plan,
    "bench": Command(bench.HELP, bench.EXAMPLE, bench.add_arguments, bench.run),
    "experiment": Command(experiment.HELP, experiment.EXAMPLE, experiment.add_arguments, experiment.run),
    "report": results.report,
    "doctor": plan.doctor,
}
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 2 bad input or a missing resource, 130 interrupted, 143 ended by SIGTERM, 129 by SIGHUP.

    Every other exception is a bug and keeps its traceback.
    """
    termination = Termination()
    try:
        args = parse_arguments(argv)
        quiet_libraries()
        status = args.run(args) or 0
        sys.stdout.flush()  # a reader that is gone shows here, and not when Python ends
        return status
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (InputError, ResourceError, OSError) as error:
        line = one_line(error)
        if line is None:
            raise
        print(f"dvpo: {line}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        if termination.received is None:
            print("dvpo: interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        print(f"dvpo: ended by {termination.received.name}", file=sys.stderr)
        return 128 + termination.received
    finally:
        termination.close()


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The parsed command line; `run` in it is the command's function.

    Raises:
        InputError: argparse's error, in one line.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    elif words == ["version"]:
        words = ["--version"]
    args, rest = build_parser().parse_known_args(words)
    # argparse takes only the overrides before the first option; the others arrive in `rest`.
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
    add_commands(COMMANDS, parser)
    return parser


class _Parser(argparse.ArgumentParser):
    """argparse that takes whole option names only, shows an example at the end of every help, and raises errors of one line."""

    def __init__(self, *args, epilog: str, **kwargs) -> None:
        super().__init__(*args, epilog=f"example:\n  {epilog}", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.set_defaults(parser=self)  # the innermost parser wins, which is that of the chosen command

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()  # as in `main`
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} See `{self.prog} --help`" if message.endswith("?") else f"{message}; see `{self.prog} --help`")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        """argparse's check of a choice, with the nearest one in its error."""
        if action.choices is None or not isinstance(value, str) or value in action.choices:
            return super()._check_value(action, value)
        beginning = [choice for choice in action.choices if value and str(choice).startswith(value)]
        nearest = beginning or difflib.get_close_matches(value, action.choices, n=1)
        if nearest:
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}; did you mean {nearest[0]}?")
        super()._check_value(action, value)

    def unknown_argument(self, argument: str) -> str:
        """The error about an argument that this command does not know, with the nearest option."""
        option, equals, value = argument.partition("=")
        hint = ""
        if option.startswith("-"):
            options = {name.lstrip("-"): name for name in self._option_string_actions}
            nearest = difflib.get_close_matches(option.lstrip("-"), options, n=1)
            if nearest:
                return f"unknown argument {argument}; did you mean {options[nearest[0]]}? See `{self.prog} --help`"
            keys = nearest_keys(option.lstrip("-"))
            if (keys or equals) and any(action.dest == "overrides" for action in self._actions):
                meant = " or ".join(f"{key}={value or 'VALUE'}" for key in keys)
                hint = f"; overrides are written without dashes, {meant or 'key=value'}"
        return f"unknown argument {argument}{hint}; see `{self.prog} --help`"


def _reader_is_gone() -> bool:
    """Whether what reads this command's output has ended, as `head` does."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
