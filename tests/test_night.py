"""What breaks at night, on real processes: signals, killed and frozen actors, lost files. Each ends in one line, a true record, and a resume."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from gvm_artifacts import make_gvm

from dvpo_ray.monitoring.run_files import living, read_summary

pytestmark = pytest.mark.slow


class Night:
    """A run in the folder `run`, ended and resumed again and again."""

    def __init__(self, folder: Path, model: Path, *command: str) -> None:
        self.folder, self.command, self.out = folder, command, folder / "run"
        pairs = [{"prompt": f"Tell me story {i}", "chosen": " a good day", "rejected": " a bad day"} for i in range(20)]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        small = {"cpus_per_actor": 0.2}
        config = {
            "model": {"path": str(model), "dtype": "float32"},
            "data": {name: {"path": str(folder / "pairs.jsonl")} for name in ("preferences", "prompts")} | {"max_prompt_tokens": 24},
            "gvm": {"path": str(make_gvm(folder / "gvm", model)), "epochs": 500, "pairs_per_step": 4, "checkpoint_every_steps": 1000},
            "rollout": small | {"backend": "transformers", "max_response_tokens": 12},
            **dict.fromkeys(("scorer", "reference", "policy"), small),
            "batch": {"prompts_per_step": 8},
            "train": {"steps": 10_000, "trackers": []},
            "checkpoint": {"every_steps": 1000},
            "ray": {"num_cpus": 2, "object_store_gib": 0.2},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))

    def words(self, *more: str) -> list[str]:
        run = "import sys; from dvpo_ray.cli import main; sys.exit(main())"
        return [sys.executable, "-c", run, *self.command, str(self.folder / "config.yaml"), "--out", str(self.out), *more]

    def start(self, *more: str) -> subprocess.Popen:
        """Start the command and wait until it has taken two steps."""
        before = self.rows()
        running = subprocess.Popen(self.words(*more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while self.rows() < before + 2 and running.poll() is None:
            time.sleep(0.1)
        assert running.poll() is None, running.communicate()
        return running

    def rows(self) -> int:
        path = self.out / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def summary(self) -> dict:
        return read_summary(self.out)

    def process(self, actor: str) -> psutil.Process:
        """The process that writes the log of an actor."""
        log = str(self.out / "logs" / f"{actor}.log")
        return next(p for p in psutil.process_iter() if p.name().startswith("ray::") and log in {file.path for file in p.open_files()})

    def failed(self, running: subprocess.Popen) -> str:
        """The one line of a run that failed, which its record has too."""
        _, errors = running.communicate(timeout=90)
        assert running.returncode == 2 and errors.startswith("dvpo: ") and errors.count("\n") == 1, errors
        summary = self.summary()
        assert summary["state"] == "failed" and errors.startswith(f"dvpo: {summary['error']}")
        return errors


def own_processes(driver: int) -> list[psutil.Process]:
    children = psutil.Process(driver).children(recursive=True)
    return [process for process in children if process.status() != psutil.STATUS_ZOMBIE]


def test_a_run_that_everything_happens_to(tiny_model, tmp_path):
    night = Night(tmp_path, tiny_model, "train")
    running = night.start()
    beside = subprocess.run(night.words("--resume"), capture_output=True, text=True, check=False)
    assert beside.returncode == 2 and f"process {running.pid} on" in beside.stderr and beside.stderr.count("\n") == 1
    running.send_signal(signal.SIGHUP)
    printed, errors = running.communicate(timeout=60)
    assert (running.returncode, errors) == (129, "dvpo: ended by SIGHUP\n")
    summary = night.summary()
    assert summary["state"] == "interrupted" and summary["steps"] == night.rows() >= 2
    assert [path.name for path in (night.out / "checkpoints").iterdir()] == [f"step_{summary['steps']:06d}"]
    assert summary["resume_command"].startswith("dvpo train ") and summary["resume_command"].endswith(" --resume")

    every_step = ("checkpoint.every_steps=1", "--resume")
    running = night.start(*every_step)
    theirs = own_processes(running.pid)
    running.kill()
    running.communicate()
    _, left = psutil.wait_procs(theirs, timeout=10)
    assert [(process, process.parent(), process.cmdline()) for process in left] == []
    assert night.summary()["state"] == "running" and not living(night.summary())

    running = night.start(*every_step)
    night.process("learner-0").kill()
    line = night.failed(running)
    assert line.startswith("dvpo: learner-0 died during ") and f"; its log is {night.out}/logs/learner-0.log; continue with `dvpo train " in line
    assert night.summary()["error_actor"] == "learner-0"

    running = night.start(*every_step, "ray.wait_timeout_seconds=3")
    night.process("rollout-0").send_signal(signal.SIGSTOP)
    assert "rollouts did not finish within 3 seconds (ray.wait_timeout_seconds) of rollout-0" in night.failed(running)

    running = night.start(*every_step)
    shutil.rmtree(night.out / "rollouts")
    (night.out / "rollouts").write_text("in the way")
    assert f"{night.out}/rollouts" in night.failed(running)


def test_a_value_model_that_is_told_to_end(tiny_model, tmp_path):
    night = Night(tmp_path, tiny_model, "gvm", "train")
    running = night.start()
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=60)
    assert (running.returncode, errors) == (143, "dvpo: ended by SIGTERM\n")
    summary = night.summary()
    assert summary["state"] == "interrupted" and (night.out / "checkpoints" / f"step_{summary['steps']:06d}").is_dir()
