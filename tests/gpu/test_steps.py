"""Every step of `launch/gpu_check.sh` on the GPU of this machine, each in its own process. Speeds that miss their targets are no failure here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dvpo_ray.bench.gpu_check.figures import read_figures
from dvpo_ray.bench.gpu_check.steps import STEPS

GPUS = torch.cuda.device_count()

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use")]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folder of the checkpoints that the steps share."""
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_step(step, tmp_path, models):
    if step.gpus > GPUS:
        pytest.skip(f"needs {step.gpus} GPUs, and here is {GPUS}")
    figures, folder = tmp_path / "figures.jsonl", tmp_path / "work"
    folder.mkdir()
    words = [sys.executable, "-m", "dvpo_ray.bench.gpu_check.inside", step.function, "cuda", str(figures), str(folder), str(models)]
    done = subprocess.run([*words, str(step.seconds)], capture_output=True, text=True, timeout=step.seconds, check=False)
    failed = [figure for figure in read_figures(figures) if figure.verdict == "FAILED"]
    assert (done.returncode, failed) == (0, []), done.stdout[-4000:] + done.stderr[-4000:]
