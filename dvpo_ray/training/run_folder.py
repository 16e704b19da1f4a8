"""Who may write into a run folder: a new run, the same run resumed, or nobody.

`summary.json` says which stage made the folder (`stage`) and how far it came; `config.yaml` says with which settings.
Nothing here loads torch or ray, and nothing is written before `begin`.
"""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

from dvpo_ray.config import Config, dump_config, load_config
from dvpo_ray.config.resuming import STAGES, check_resumable
from dvpo_ray.errors import InputError
from dvpo_ray.files import whole_file
from dvpo_ray.monitoring.run_files import CONFIG, SUMMARY, last_saved_step, living, read_summary, saved_checkpoints, this_process, write_summary

LOCK = ".lock"
_OF_AN_END = ("error", "error_actor", "resume_command")

_LEFTOVERS = (
    *(CONFIG, LOCK, SUMMARY, "report.html", "metrics.jsonl", "trackers.json", "logs/*.log", "tensorboard/events.out.tfevents.*", "wandb/**/*"),
    *("evaluation/step_000000.jsonl", "rollouts/step_000001.jsonl", "checkpoints/.step_*.draft/**/*"),
)
"""Files that a run leaves when it ends before its first step is done."""


class RunIsFinished(InputError):
    """There is nothing to resume. For a job that is put into its queue again, that is a success."""


def begin(folder: Path, stage: str, config: Config, *, resumed: bool) -> None:
    """Make the folder belong to a run that starts now: write its settings and a summary. Call it when all inputs are loaded.

    Files of a run that never took a step are removed first. The summary of a resumed run keeps its numbers until there are new ones, and the
    command that made the run; those that went on with it are beside it.
    """
    if not resumed and _ended_before_its_first_step(folder):
        _remove_leftovers(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / CONFIG) as file:
        file.write(dump_config(config))
    kept = {key: value for key, value in read_summary(folder).items() if key not in _OF_AN_END} if resumed else {}
    own = {"name": config.name, "stage": stage, "state": "running", "seed": config.seed, "process": this_process()}
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    later = kept.get("resumed_by", [])
    commands = {"resumed_by": [*later, *([command] if command not in later else [])]} if "command" in kept else {"command": command}
    write_summary(folder, kept | own | commands)


def locked(folder: Path) -> TextIO:
    """Make this process the only one that writes in a run folder, as long as the returned file is open.

    Raises:
        InputError: another process does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / LOCK).open("w", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _is_run_by(folder, read_summary(folder)) from None
    return lock


def _is_run_by(folder: Path, summary: Mapping) -> InputError:
    process = summary.get("process")
    whose = f"process {process['pid']} on {process['host']}" if process else "another process"
    return InputError(f"{folder}: {whose} still runs in it; wait for its end or stop it, or give another --out")


# --------------------------------------------------------------------------------------------------------- a new run


def check_new(folder: Path) -> None:
    """Refuse a folder for a new run unless it is absent, empty, or holds only files of a run that never took a step.

    Raises:
        InputError: says what is there, and what to do.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a file with this name is already there; give another --out")
    if all(path.is_dir() or path == folder / LOCK for path in folder.rglob("*")):
        return
    if not _ended_before_its_first_step(folder):
        raise InputError(f"{folder}: already there and not empty; give another --out{_hint(folder)}")
    foreign = next(_foreign_files(folder), None)
    if foreign is not None:
        raise InputError(
            f"{folder}: the run in it ended before its first step, but {foreign} is not one of its files; move it, or give another --out"
        )


def _ended_before_its_first_step(folder: Path) -> bool:
    summary = read_summary(folder)
    over = summary.get("state") in ("failed", "interrupted") or (summary.get("state") == "running" and not living(summary))
    return over and not summary.get("steps") and not _has_results(folder)


def _has_results(folder: Path) -> bool:
    metrics = folder / "metrics.jsonl"
    return (folder / "final").exists() or any(saved_checkpoints(folder)) or (metrics.is_file() and metrics.stat().st_size > 0)


def _hint(folder: Path) -> str:
    """What else can be done with a folder that holds a run."""
    summary = read_summary(folder)
    state = summary.get("state")
    if living(summary):
        return f"; process {summary['process']['pid']} on {summary['process']['host']} still runs in it"
    if state == "finished":
        return f" (the run in it is finished{_longer(folder, summary.get('stage'))})"
    if state is None or any(saved_checkpoints(folder)):
        return ", or --resume to continue the run in it"
    return f" (the run in it has no checkpoint to continue from: its state is {state}; once it is over, remove the folder to start anew)"


def _longer(folder: Path, stage: str | None) -> str:
    """How a finished run is trained further. Only a run of `dvpo train` can be made longer."""
    if stage != "train":
        return ""
    if any(saved_checkpoints(folder)):
        return "; --resume with a larger train.steps goes on"
    return f"; it kept no checkpoint, so train further by a new run with model.path={folder / 'final'}"


def _foreign_files(folder: Path) -> Iterator[Path]:
    own = set(_leftovers(folder))
    return (path for path in sorted(folder.rglob("*")) if not path.is_dir() and path not in own)


def _leftovers(folder: Path) -> Iterator[Path]:
    return (path for pattern in _LEFTOVERS for path in folder.glob(pattern) if not path.is_dir())


def _remove_leftovers(folder: Path) -> None:
    """Remove the files of a run that never took a step, but its lock, and the folders that this leaves empty."""
    for path in list(_leftovers(folder)):
        if path != folder / LOCK:
            path.unlink()
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()


# ----------------------------------------------------------------------------------------------------- a resumed run


def check_resume(folder: Path, stage: str, config: Config) -> None:
    """Refuse to continue the run of a folder as another one.

    Args:
        stage: key of `STAGES`: the command that asks.
        config: its settings.

    Raises:
        InputError: another command made the folder, the settings differ, there is no checkpoint or one of a later step, or it is not a run folder.
    """
    kept_file = folder / CONFIG
    if not kept_file.is_file():
        raise InputError(f"{folder}: no {CONFIG}, so this is not a run folder; give the --out of the run")
    summary = read_summary(folder)
    if living(summary):
        raise _is_run_by(folder, summary)
    maker = summary.get("stage", stage)
    if maker in STAGES and maker != stage:
        made_by, command = STAGES[maker].command, STAGES[stage].command
        raise InputError(f"{folder}: a run of `{made_by}`, which `{command}` cannot resume; resume it with its own command")
    check_resumable(stage, load_config(kept_file), config, folder)
    if _is_over(folder, stage, config):
        raise RunIsFinished(f"{folder}: the run is finished and its result is in final/{_longer(folder, stage)}")
    saved, steps = last_saved_step(folder), config.train.steps
    if stage == "train" and saved > steps:
        raise InputError(f"{folder}: train.steps is {steps}, but the run has a checkpoint of step {saved}; give {saved} or more to resume")
    if not saved:
        if summary.get("state") == "finished":
            raise InputError(f"{folder}: the run is finished{_longer(folder, stage)}")
        over = "start it again without --resume" if _ended_before_its_first_step(folder) else "give another --out, or remove the folder to start anew"
        raise InputError(f"{folder}: no checkpoint to resume from; {over}")


def _is_over(folder: Path, stage: str, config: Config) -> bool:
    """Whether a run has its result and no step is left."""
    summary = read_summary(folder)
    done = summary.get("state") == "finished" and (folder / "final").is_dir()
    return done and (stage != "train" or (summary.get("steps") or 0) >= config.train.steps)
