"""`launch/gpu_check.sh`: a step may fail, hang or be killed, and the results are there; and the steps themselves with tiny shapes on a CPU."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_runs import ROOT
from gpu_check_steps import OUT

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.bench.gpu_check import __main__ as command
from dvpo_ray.bench.gpu_check import runner
from dvpo_ray.bench.gpu_check.figures import Figure, Report, markdown_rows, read_figures
from dvpo_ray.bench.gpu_check.runner import Ended, Step, table
from dvpo_ray.bench.gpu_check.shapes import SHAPES, base_config
from dvpo_ray.bench.gpu_check.steps import STEPS

SCRIPT = """
import sys
from pathlib import Path
from dvpo_ray.bench.gpu_check.__main__ import end_when_told
from dvpo_ray.bench.gpu_check.runner import Step, run_steps
out, seconds, *steps = sys.argv[1:]
end_when_told()
pairs = [text.split("=") for text in steps]
steps = [Step(name, f"gpu_check_steps:{name.partition('-')[0]}", float(limit), "", gpus=int("gpu" in name)) for name, limit in pairs]
run_steps(steps, Path(out), "cpu", float(seconds), [])
"""


def script(out: Path, *steps: str, seconds: float = 600) -> subprocess.Popen:
    """Starts the steps `name=limit` of `gpu_check_steps`."""
    out.mkdir(exist_ok=True)
    words = [sys.executable, "-c", SCRIPT, str(out), str(seconds), *steps]
    return subprocess.Popen(words, env=os.environ | {OUT: str(out)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def results(out: Path) -> dict[str, dict]:
    return {step["step"]: step for step in json.loads((out / "results.json").read_text())["steps"]}


def names(step: dict) -> list[str]:
    return [figure["name"] for figure in step["figures"]]


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


# ---------------------------------------------------------------------------------------------------------- steps


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """Results of a check in which most steps go wrong."""
    out = tmp_path_factory.mktemp("check")
    process = script(out, "works=60", "raises=60", "is_killed=60", "hangs=2", "leaves=60", "looks=60", "works-gpu=60", "works-late=2000")
    (out / "printed").write_text(process.communicate(timeout=120)[0])
    assert process.returncode == 0, (out / "printed").read_text()
    return out


def test_every_step_has_its_end_and_what_it_measured_before(out):
    steps = results(out)
    assert {name: step["state"] for name, step in steps.items()} == {
        "works": "done",
        "raises": "failed: RuntimeError: of the step",
        "is_killed": "killed: by SIGKILL",
        "hangs": "killed: it was not done after 2 s",
        "leaves": "done",
        "looks": "done",
        "works-gpu": "skipped: it has no counterpart on a CPU",
        "works-late": steps["works-late"]["state"],
    }
    assert steps["works-late"]["state"].startswith("skipped: ") and steps["works-late"]["state"].endswith("s are left, and its limit is 2000 s")
    assert names(steps["raises"]) == ["before", "a part", "between", "the step"]
    assert names(steps["is_killed"]) == names(steps["hangs"]) == ["before"]
    assert 2 <= steps["hangs"]["seconds"] < 20


def test_errors_are_whole_in_the_logs(out):
    log = (out / "raises.log").read_text()
    assert log.count("Traceback") == 2 and "ValueError: of a part" in log and 'raise RuntimeError("of the step")' in log
    assert "time.sleep(100)" not in log and "gpu_check_steps.py" in (out / "hangs.log").read_text()  # where it was when its time was over
    kept = (out / "logs" / "works" / "logs-learner-0.log").read_text()
    assert kept.endswith("\nlast\n") and "first" not in kept and len(kept) == 16384


def test_nothing_is_left_of_a_step(out):
    left = (out / "left").read_text().split()
    assert len(left) == 2 and not any(is_alive(int(pid)) for pid in left)


def test_the_results_are_written_after_each_step(out):
    seen = {figure["name"]: figure["value"] for figure in results(out)["looks"]["figures"]}
    assert seen["steps"] == 5
    assert seen["lines"] < (out / "table.md").read_text().count("\n")


def test_steps_that_measure_no_speed_run_beside_each_other_on_a_gpu(tmp_path):
    text = SCRIPT.replace('int("gpu" in name))', 'int("gpu" in name), beside="beside" in name)').replace('"cpu"', '"cuda"')
    steps = ["waits-beside=60", "answers-beside=60", "hangs-beside=4", "works=60"]
    words = [sys.executable, "-c", text, str(tmp_path), "600", *steps]
    done = subprocess.run(words, env=os.environ | {OUT: str(tmp_path)}, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    # The first waits for what the second does, and the end of the second leaves the third alone; the fourth begins after them.
    ends = [(name, step["state"]) for name, step in results(tmp_path).items()]
    assert ends == [("waits-beside", "done"), ("answers-beside", "done"), ("hangs-beside", "killed: it was not done after 4 s"), ("works", "done")]
    assert results(tmp_path)["waits-beside"]["figures"][0]["value"] == 0
    assert not is_alive(int((tmp_path / "left").read_text()))


def test_what_is_printed_fits_on_a_page(out):
    printed = (out / "printed").read_text()
    assert "raises: failed: RuntimeError: of the step, " in printed and "  a part: error: ValueError: of a part  FAILED\n" in printed
    assert max(map(len, printed.splitlines())) < 300


def test_a_script_that_is_ended_leaves_its_results_and_no_process(tmp_path):
    process = script(tmp_path, "works=60", "hangs=60")
    deadline = time.monotonic() + 60
    while not (tmp_path / "left").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    steps = results(tmp_path)
    assert (steps["works"]["state"], steps["hangs"]["state"]) == ("done", "killed: the script was ended")
    assert names(steps["hangs"]) == ["before"] and "| hangs |" in (tmp_path / "table.md").read_text()
    assert not is_alive(int((tmp_path / "left").read_text()))


# -------------------------------------------------------------------------------------------------------- command


def refused(capsys, *arguments: str) -> str:
    assert command.main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("gpu_check.sh: ") and err.count("\n") == 1
    return err.removeprefix("gpu_check.sh: ").rstrip()


def test_bad_arguments_are_refused_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "_gpus", list)
    known = ", ".join(step.name for step in STEPS)
    assert refused(capsys, str(tmp_path), "loop", "--device", "cpu") == f"unknown step loop, did you mean loops? known: {known}"
    assert refused(capsys, str(tmp_path), "xyzzy") == f"unknown step xyzzy; known: {known}"
    assert refused(capsys, str(tmp_path)).startswith("this machine has no NVIDIA GPU; --device cpu runs")
    (tmp_path / "table.md").touch()
    there = f"{tmp_path}: has the results of another check (table.md); give another folder"
    assert refused(capsys, str(tmp_path), "--device", "cpu") == there
    assert refused(capsys, str(tmp_path / "table.md"), "--device", "cpu") == f"{tmp_path / 'table.md'}: a file; give a folder"


def test_the_chosen_steps_run_in_their_order(tmp_path, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(command, "run_steps", lambda *arguments: calls.append(arguments) or [Ended(STEPS[0], "failed: why")])
    monkeypatch.setattr(command, "_gpus", lambda: ["GPU 0"])
    monkeypatch.setattr(command, "end_when_told", lambda: None)
    assert command.main([str(tmp_path), "zero", "imports", "--seconds", "99"]) == 1
    (steps, out, device, seconds, gpus) = calls[0]
    assert ([step.name for step in steps], out, device, seconds, gpus) == (["imports", "zero"], tmp_path, "cuda", 99, ["GPU 0"])


def test_help_names_every_step(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"  {step.name} " in printed for step in STEPS)


def test_the_script_needs_nothing_but_python(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHON")}
    words = ["bash", str(ROOT / "launch" / "gpu_check.sh"), str(tmp_path / "out"), "nothing", "--device", "cpu"]
    done = subprocess.run(words, cwd=tmp_path, env=environment | {"PYTHON": sys.executable}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.partition(",")[0]) == (2, "gpu_check.sh: unknown step nothing; known: imports")


# --------------------------------------------------------------------------------------------------------- figures


def test_targets_have_verdicts_on_a_gpu_and_none_on_a_cpu(tmp_path):
    for device, verdicts in (("cuda", ["met", "MISSED", "met", "MISSED", "MISSED", "", "ok", "FAILED"]), ("cpu", [""] * 6 + ["ok", "FAILED"])):
        file = tmp_path / device
        report = Report(file, device, tmp_path, tmp_path)
        report.figure("a", 0.4, at_least=0.4)
        report.figure("b", 0.39, at_least=0.4)
        report.figure("c", 0.6, at_most=0.6)
        report.figure("d", -0.2, at_least=-0.15, at_most=0.15)
        report.figure("e", math.nan, at_most=0.15)
        report.figure("f", "in words")
        report.check("g", True, "yes")
        report.check("h", False, "no")
        figures = read_figures(file)
        assert [figure.verdict for figure in figures] == verdicts
        assert figures[3].target == (">= -0.15, <= 0.15" if device == "cuda" else "")
    assert read_figures(tmp_path / "absent") == []


def test_a_figure_that_was_cut_off_is_left_out(tmp_path):
    report = Report(tmp_path / "figures", "cpu", tmp_path, tmp_path)
    report.figure("a", 1.0)
    with (tmp_path / "figures").open("a") as file:
        file.write('{"name": "b", "val')
    assert [figure.name for figure in read_figures(tmp_path / "figures")] == ["a"]


def test_the_table_is_narrow_and_whole():
    figures = [Figure("speed", 12345.6, "tokens/s", ">= 1", True), Figure("small", 0.12345), Figure("part", error="a | b\nc " + 500 * "d")]
    text = table([Ended(Step("one", "m:f", 5, "all of it"), "done", 3.4, figures)], {"device": "cpu"})
    lines = text.splitlines()
    assert "| one | 3 | done |" in lines and "## one: all of it" in lines and "| speed | 12,346 tokens/s | >= 1 | met |" in lines
    assert "| small | 0.123 |  |  |" in lines and any(line.startswith("| part | error: a / b c ddd") for line in lines)
    assert max(map(len, lines)) < 250
    assert markdown_rows(["a", "b"], []) == ["| a | b |", "| --- | --- |"]


def test_each_step_has_a_folder_beside_the_one_that_they_share(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda words, **_: started.append([Path(word) for word in words if word.startswith(str(tmp_path))]))
    check = runner._Check(tmp_path, tmp_path, "cuda", ["GPU 0: H100 (UUID)"] * 2)
    for step in STEPS:
        check.begin(step, 1000.0)
        (shared,) = {folders[-1] for folders in started}
        shared.mkdir(exist_ok=True)
    assert len({folders[-2] for folders in started} | {shared}) == len(STEPS) + 1


def test_the_steps_are_there_and_fit_the_time():
    import importlib

    for step in STEPS:
        module, _, function = step.function.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
    assert len({step.name for step in STEPS}) == len(STEPS)


# -------------------------------------------------------------------------------------------------- configs and sums


@pytest.mark.parametrize("name", SHAPES)
def test_configs_of_all_shapes_are_whole(name):
    from transformers import LlamaConfig

    from dvpo_ray.planning.placement import check_local_cluster, plan_placement

    shape = SHAPES[name]
    for device in ("cuda", "cpu"):
        config = base_config(shape, device)
        check_local_cluster(config, plan_placement(config))
    architecture = LlamaConfig(**shape.as_json())
    assert architecture.num_attention_heads % architecture.num_key_value_heads == 0


def test_flops_are_those_of_the_formula(tiny_model):
    from dvpo_ray.bench.gpu_check.alone import model_flops
    from dvpo_ray.config.schema import Config
    from dvpo_ray.planning.architecture import policy_plan

    model = policy_plan(Config.model_validate({"model": {"path": str(tiny_model)}}), trained=True).architecture()
    batch = RaggedBatch.from_rows([[5] * 6, [5] * 2], [[6] * 4, [6] * 3])
    weights = model.layers * (4 * 64 * 64 + 3 * 64 * 128)
    attention = sum(2 * length * length * 64 * model.layers for length in (10, 5))  # causal: half of 4 L^2 d
    forward = 2 * weights * 15 + attention + 2 * 64 * model.vocabulary * 7
    assert model_flops(model, batch, trained=False) == forward
    assert model_flops(model, batch, trained=True) == 3 * forward


def test_a_role_without_enough_memory_is_tried_again_when_the_first_is_gone(monkeypatch, tmp_path):
    from dvpo_ray.bench.gpu_check import alone
    from dvpo_ray.planning.architecture import Architecture
    from dvpo_ray.planning.memory import ActorMemory

    class Model:
        pass

    tried = []

    def rounds(_role, config):
        assert not any(model() for model, _ in tried)
        model = Model()
        tried.append((weakref.ref(model), config.batch.micro_batch_tokens))
        if len(tried) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 2.0, ActorMemory(parameters=2**30)

    monkeypatch.setattr(alone, "_rounds", rounds)
    monkeypatch.setattr(alone, "predict_roles", lambda _: {})
    report = Report(tmp_path / "figures", "cpu", tmp_path, tmp_path)
    role = alone._Role("learner", Architecture(1000, 1000, 40, 800, 2, 2, 8, 8, 16, 10), True, None, None)
    batch = RaggedBatch.from_rows([[5] * 6], [[6] * 4])
    alone._measure(report, role, base_config(SHAPES["1b"], "cpu"), batch, 1e12, None)
    assert [tokens for _, tokens in tried] == [8192, 4096]
    figures = {figure.name: figure.value for figure in read_figures(tmp_path / "figures")}
    assert figures["learner: speed"] == 5.0 and figures["learner: no memory for micro-batches above"] == 4096


def test_the_control_is_one(tiny_model, tmp_path, monkeypatch):
    """Rows that see each other fail as packed rows, and packed rows fail as the control."""
    from dvpo_ray.bench.gpu_check import layouts
    from dvpo_ray.config.schema import Config

    config = Config.model_validate({"model": {"path": str(tiny_model), "dtype": "bfloat16"}})
    monkeypatch.setattr(layouts, "models_of", lambda *_: (None, config))

    def verdicts(name: str) -> list[str]:
        file = tmp_path / name
        layouts.packed(Report(file, "cpu", tmp_path, tmp_path))
        return [figure.verdict for figure in read_figures(file)]

    assert verdicts("right") == ["ok"] * 4
    monkeypatch.setattr(layouts, "as_it_is", layouts.as_one_row)
    monkeypatch.setattr(layouts, "LAYOUTS", {"packed": layouts.as_one_row, "control": layouts.LAYOUTS["packed"]})
    assert verdicts("wrong") == ["FAILED"] * 4


def test_attention_of_packed_rows_is_that_of_each_row():
    from dvpo_ray.bench.gpu_check.environment import ERROR, _plain

    assert _plain("cpu") <= ERROR["cpu"]
    assert np.isfinite(_plain("cpu"))


# ---------------------------------------------------------------------------------------------------------- for real


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> dict[str, dict]:
    """The steps with tiny shapes, those on a card with one start of Ray."""
    out = tmp_path_factory.mktemp("real")
    process = script(out, "card=400", "alone=200")
    printed = process.communicate(timeout=900)[0]
    steps = results(out)
    assert [step["state"] for step in steps.values()] == ["done"] * 2, printed
    return {name: {figure["name"]: figure for figure in step["figures"]} for name, step in steps.items()}


@pytest.mark.slow
def test_every_proof_passes_on_a_cpu(real):
    failed = [figure for step in real.values() for figure in step.values() if figure["verdict"] == "FAILED"]
    assert failed == []
    proven = [name for name, figure in real["card"].items() if figure["verdict"] == "ok"]
    assert len(proven) == 16 and {"remax, float32", "LoRA, adapters alone", "checkpoint, kill, resume: the learner"} <= set(proven)
    assert {name for name, figure in real["alone"].items() if figure["verdict"] == "ok"} >= {"ZeRO 0", "ZeRO 3"}


@pytest.mark.slow
def test_every_measurement_has_a_number(real):
    card, alone = real["card"], real["alone"]
    assert 0.2 < card["engine / bare vLLM"]["value"] < 5
    assert card["dvpo / ppo: step"]["value"] > 0 and 0 < card["dvpo / ppo: peak without cache"]["value"] < 1
    assert card["sync, object_store: later"]["value"] > 0 and 0 < card["dvpo: outside of the stages"]["value"] < 1
    for role in ("learner", "gvm_trainer", "scorer", "reference"):
        assert alone[f"{role}: of the matrix product"]["value"] > 0
        assert alone[f"{role}: speed"]["value"] > 0 and alone[f"{role}: memory"]["value"] > 0
