"""Whole runs by the `dvpo` command: the training of a value model that is killed and goes on, and what needs two GPUs."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

from dvpo_ray.bench.gpu_check.figures import Report
from dvpo_ray.bench.gpu_check.shapes import changed, config_file, models_of
from dvpo_ray.errors import ResourceError

_DVPO = "import sys; from dvpo_ray.cli import main; sys.exit(main())"
_PAIRS, _PAIRS_PER_STEP = 48, 2
_POLL_SECONDS = 0.1


def gvm(report: Report) -> None:
    """Train a value model, kill the run after its first checkpoint, and resume it."""
    _, config = models_of(report, "tiny")
    pairs = _write_pairs(report.folder / "pairs.jsonl")
    data = [f"data.preferences.path={pairs}", "data.long_response=truncate"]
    config = changed(config, *data, f"gvm.pairs_per_step={_PAIRS_PER_STEP}", "gvm.checkpoint_every_steps=2")
    file, out = config_file(config, report.folder), report.folder / "gvm"
    started = time.perf_counter()
    run = _start(report, "gvm", "train", str(file), "--out", str(out))
    while run.poll() is None and not list((out / "checkpoints").glob("step_*")):
        time.sleep(_POLL_SECONDS)
    if run.poll() is not None:
        raise ResourceError(f"dvpo gvm train ended with status {run.returncode} before it could be killed; its output is in the step's log")
    run.kill()
    run.wait()
    report.figure("value model: from the command to a checkpoint", time.perf_counter() - started, "s")
    _dvpo(report, "gvm", "train", str(file), "--out", str(out), "--resume")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    whole = [row["step"] for row in rows] == list(range(1, len(rows) + 1)) and (out / "final" / "gvm.json").is_file()
    report.check("value model: killed and resumed", whole, f"{len(rows)} steps, loss {rows[-1]['gvm/loss']:.3g}")
    report.figure("value model: a step", min(row["time/step_seconds"] for row in rows), "s")


def _write_pairs(file: Path) -> Path:
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnop", k=4)) for _ in range(100)]
    rows = [{name: " ".join(generator.choices(words, k=2)) for name in ("prompt", "chosen", "rejected")} for _ in range(_PAIRS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def nccl(report: Report) -> None:
    """Engine and learner on a GPU each, the frozen models on the CPU."""
    _train(report, "NCCL", "placement=separate", "weight_sync.transport=nccl", "scorer.gpus_per_actor=0", "reference.gpus_per_actor=0")


def two_ranks(report: Report) -> None:
    """Two ranks of the learner and two engines on the same GPUs, for each stage of ZeRO."""
    for stage in (1, 2, 3):
        _train(report, f"ZeRO {stage}, two ranks", "policy.num_actors=2", "rollout.num_actors=2", f"policy.deepspeed.zero_stage={stage}")


def tensor_parallel(report: Report) -> None:
    """An engine over two GPUs, on which two ranks of the learner sit."""
    _train(report, "tensor parallel", "rollout.tensor_parallel_size=2", "policy.num_actors=2")


def _train(report: Report, name: str, *overrides: str) -> None:
    """Two steps of DVPO; the run itself refuses an engine that disagrees with the learner."""
    with report.part(name):
        _, config = models_of(report, "tiny")
        config = changed(config, "ray.num_gpus=2", "train.steps=2", *overrides)
        out = report.folder / name.replace(" ", "-").replace(",", "")
        _dvpo(report, "train", str(config_file(config, out.with_suffix(".config"))), "--out", str(out))
        last = json.loads((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        found = f"engine apart {last['mismatch/log_prob_abs_mean']:.2g} nats, sync {last['time/sync_seconds']:.2f} s"
        report.check(name, last["step"] == 2, found)


def _start(report: Report, *arguments: str) -> subprocess.Popen:
    """A `dvpo` command; its output is in this step's log."""
    return subprocess.Popen([sys.executable, "-c", _DVPO, *arguments], stdin=subprocess.DEVNULL, cwd=report.folder)


def _dvpo(report: Report, *arguments: str) -> None:
    status = _start(report, *arguments).wait()
    if status:
        raise ResourceError(f"dvpo {' '.join(arguments[:2])} ended with status {status}; its output is in the step's log")
