"""The first line of every command comes before the libraries that take seconds to import."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
from cli_runs import LOCAL_CPU, SHIPPED
from report_pages import finished_run

from dvpo_ray import cli

HEAVY = ["torch", "ray", "transformers", "vllm", "deepspeed", "datasets", "trl", "matplotlib"]
GIVEN = ["gvm.path=g", "data.sft=s.jsonl", "--out", "new"]
PROGRAM = """
    import json, sys

    class FirstLine(BaseException):
        pass

    class Stop:
        # Standard output that ends the command at its first line.
        encoding, errors = "utf-8", "strict"

        def write(self, text):
            if text.strip():
                raise FirstLine(text)

        def flush(self):
            pass

        def isatty(self):
            return False

    from dvpo_ray import cli
    loaded = {"the import of the package": set(sys.modules)}
    terminal, sys.stdout = sys.stdout, Stop()
    for argv in json.loads(sys.argv[1]):
        try:
            status = cli.main(argv)
            print(argv, "ended with status", status, "before its first line", file=sys.stderr)
        except FirstLine as line:
            loaded[" ".join(argv)] = set(sys.modules)
    print(json.dumps({name: sorted(set(json.loads(sys.argv[2])) & found) for name, found in loaded.items()}), file=terminal)
"""


@pytest.fixture
def commands(tmp_path) -> list[list[str]]:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "reported").mkdir()
    finished_run(tmp_path / "reported")
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "gvm.json").touch()
    (tmp_path / "i.jsonl").touch()
    model = [f"model.path={tmp_path / 'model'}"]
    with_pairs = [*model, f"data.preferences.path={SHIPPED}/preferences.train.jsonl", "data.preferences.heldout_path=null"]
    with_prompts = [*model, f"data.prompts.path={SHIPPED}/prompts.train.jsonl", "data.prompts.heldout_path=null"]
    return [
        ["quickstart", "--out", "new"],
        ["sft", LOCAL_CPU, *GIVEN],
        ["gvm", "train", LOCAL_CPU, *GIVEN],
        ["gvm", "eval", LOCAL_CPU, *with_pairs, *GIVEN],
        ["gvm", "score", LOCAL_CPU, *model, "gvm.path=g", "--input", "i.jsonl", "--output", "o.jsonl"],
        ["rm", "train", LOCAL_CPU, *GIVEN],
        ["dpo", LOCAL_CPU, *GIVEN],
        ["train", LOCAL_CPU, *GIVEN],
        ["eval", LOCAL_CPU, *with_prompts, *GIVEN],
        ["plan", LOCAL_CPU, *model],
        ["bench", "step", LOCAL_CPU, *GIVEN],
        ["bench", "ledger", LOCAL_CPU, *GIVEN],
        ["bench", "trl", LOCAL_CPU, *GIVEN, "--trl-python", "p"],
        ["bench", "trl-reward", LOCAL_CPU, *with_pairs, "--out", "new"],
        ["experiment", "gvm-quality", LOCAL_CPU, "--out", "new"],
        ["report", "reported"],
        ["doctor"],
    ]


def test_no_heavy_library_is_loaded_before_the_first_line(commands, tmp_path):
    assert {argv[0] for argv in commands} == set(cli.COMMANDS)
    argv = [sys.executable, "-c", textwrap.dedent(PROGRAM), json.dumps(commands), json.dumps(HEAVY)]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    loaded = json.loads(done.stdout)
    assert loaded == dict.fromkeys(["the import of the package", *map(" ".join, commands)], [])
