"""SIGTERM to a run whose actors are at work: one line, a summary, exit status 143, and a checkpoint to go on from."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from gvm_artifacts import make_gvm

pytestmark = pytest.mark.slow


def rows(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("command", [["train"], ["gvm", "train"]], ids=" ".join)
def test_sigterm_ends_a_run_in_order(tiny_model, tmp_path, command):
    pairs = [{"prompt": f"Tell me story {i}", "chosen": " a good day", "rejected": " a bad day"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    small = {"cpus_per_actor": 0.2}
    config = {
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "data": {name: {"path": str(tmp_path / "pairs.jsonl")} for name in ("preferences", "prompts")} | {"max_prompt_tokens": 24},
        "gvm": {"path": str(make_gvm(tmp_path / "gvm", tiny_model)), "epochs": 500, "pairs_per_step": 4, "checkpoint_every_steps": 1},
        "rollout": small | {"backend": "transformers", "max_response_tokens": 12},
        **dict.fromkeys(("scorer", "reference", "policy"), small),
        "batch": {"prompts_per_step": 8},
        "train": {"steps": 10_000, "trackers": []},
        "checkpoint": {"every_steps": 1},
        "ray": {"num_cpus": 2, "object_store_gib": 0.2},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "run"
    words = [
        sys.executable,
        "-c",
        "import sys; from dvpo_ray.cli import main; sys.exit(main())",
        *command,
        str(tmp_path / "config.yaml"),
        "--out",
        str(out),
    ]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        while rows(out / "metrics.jsonl") < 2 and running.poll() is None:
            time.sleep(0.1)
        running.send_signal(signal.SIGTERM)
        _, errors = running.communicate(timeout=60)
    assert (running.returncode, errors) == (143, "dvpo: ended by SIGTERM\n")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["state"] == "interrupted" and summary["steps"] >= 2
    assert any((out / "checkpoints").glob("step_*"))
