"""Prompt order, checkpoints and statistics: the parts of a run that need no actor."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.config import Config
from dvpo_ray.errors import DiskFull, InputError
from dvpo_ray.health.alarms import HealthMonitor
from dvpo_ray.monitoring.console import RunConsole
from dvpo_ray.monitoring.report import write_report
from dvpo_ray.monitoring.run_files import read_summary
from dvpo_ray.policy.statistics import batch_statistics, explained_variance, sequence_kl
from dvpo_ray.rollouts.schedule import prompt_indices, sampling_seed
from dvpo_ray.runtime import checkpoints
from dvpo_ray.runtime.termination import Termination
from dvpo_ray.training.policy import optimise
from dvpo_ray.training.policy_state import PolicyState
from dvpo_ray.training.run import Run


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 5))
def test_every_pass_takes_every_prompt_once(num_prompts, per_step, seed):
    steps = -(-3 * num_prompts // per_step)
    taken = [i for step in range(1, steps + 1) for i in prompt_indices(num_prompts, per_step, step, seed)]
    for epoch in range(3):
        assert sorted(taken[epoch * num_prompts : (epoch + 1) * num_prompts]) == list(range(num_prompts))


def test_prompt_order_depends_on_seed_and_pass():
    first, second = prompt_indices(50, 50, 1, seed=0), prompt_indices(50, 50, 2, seed=0)
    assert first != second and first != prompt_indices(50, 50, 1, seed=1)
    assert first == prompt_indices(50, 50, 1, seed=0)


def test_sampling_seeds_differ_by_step_and_engine():
    assert len({sampling_seed(0, step, engine) for step in range(20) for engine in range(4)}) == 80


def write_checkpoint(run, step, keep=5):
    with checkpoints.draft(run, step) as draft:
        (draft / "learner").mkdir()
        (draft / "learner" / "model.pt").write_bytes(b"x" * 100)
        return checkpoints.commit(draft, {"step": step}, keep)


def test_the_newest_whole_checkpoint_is_found_and_old_ones_go(tmp_path):
    for step in (5, 10, 15):
        write_checkpoint(tmp_path, step, keep=2)
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["step_000010", "step_000015"]
    folder, state = checkpoints.last_whole(tmp_path)
    assert folder.name == "step_000015" and state == {"step": 15}


DAMAGES = {
    "truncated": "learner/model.pt has 60 of 100 bytes",
    "flipped": "the content of learner/model.pt has changed",
    "missing": "learner/model.pt is missing",
    "no manifest": "no readable manifest.json",
}


@pytest.mark.parametrize("damage", [*DAMAGES, "draft"])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, caplog, damage):
    write_checkpoint(tmp_path, 5)
    if damage == "draft":  # killed while writing
        (tmp_path / "checkpoints" / ".step_000010.draft").mkdir()
    else:
        newest = write_checkpoint(tmp_path, 10)
        file = newest / "learner" / "model.pt"
        if damage == "truncated":
            file.write_bytes(b"x" * 60)
        elif damage == "flipped":
            file.write_bytes(b"x" * 99 + b"y")
        elif damage == "missing":
            file.unlink()
        else:
            (newest / "manifest.json").unlink()
    folder, state = checkpoints.last_whole(tmp_path)
    assert state == {"step": 5}
    assert damage == "draft" or f"step_000010 is damaged ({DAMAGES[damage]}) and is skipped" in caplog.text


def test_a_draft_on_a_full_disk_is_removed_and_the_line_says_what_fills_it(tmp_path):
    write_checkpoint(tmp_path, 5)
    told = "no space left on the disk; .* step 10 had 0.0 MiB already, and the run folder holds checkpoints"
    with pytest.raises(DiskFull, match=told), checkpoints.draft(tmp_path, 10) as draft:
        (draft / "half.pt").write_bytes(b"x")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step_000005"]


def test_room_for_a_checkpoint_is_checked_before_it_is_written(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=50))
    told = r"the checkpoint of step 10 needs 0\.0 MiB, and the disk has 0\.0 MiB free; .* or lower checkpoint\.keep"
    with pytest.raises(DiskFull, match=told), checkpoints.draft(tmp_path, 10):
        pytest.fail("nothing may be written")


def test_room_for_the_first_checkpoint_is_checked_by_what_it_is_going_to_be(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=50 * 2**20))
    told = r"the checkpoint of step 2 needs 60\.0 MiB, and the disk has 50\.0 MiB free; free some, or give an --out on another disk"
    with pytest.raises(DiskFull, match=told), checkpoints.draft(tmp_path, 2, 60 * 2**20):
        pytest.fail("nothing may be written")
    with checkpoints.draft(tmp_path, 2, 40 * 2**20):
        pass


@pytest.mark.parametrize(("last_step", "is_refused"), [(1, False), (3, True)])
def test_a_run_without_room_for_its_first_checkpoint_does_not_begin(tmp_path, monkeypatch, last_step, is_refused):
    """Where no checkpoint is due before the end there is no reason to refuse."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=50))
    run = Run("gvm", Config.model_validate({"model": {"path": "m"}}), tmp_path)
    with pytest.raises(DiskFull, match="a checkpoint of this run needs") if is_refused else nullcontext():
        run.expect_checkpoints(60, every_steps=2, last_step=last_step)


@pytest.mark.parametrize(("dtype", "stage", "bytes_of_a_weight"), [("float32", 0, 12), ("bfloat16", 0, 14), ("bfloat16", 2, 14), ("float32", 3, 12)])
def test_a_checkpoint_has_the_trained_weights_with_their_moments_and_masters(dtype, stage, bytes_of_a_weight):
    model = torch.nn.Sequential(torch.nn.Linear(4, 5, bias=False), torch.nn.Linear(5, 6, bias=False)).to(getattr(torch, dtype))
    model[0].requires_grad_(False)
    rank = SimpleNamespace(model=model, engine=SimpleNamespace(zero_optimization_stage=lambda: stage))
    assert checkpoints.trainer_bytes(rank) == 30 * bytes_of_a_weight
    assert checkpoints.trainer_bytes(rank, with_policy=True) == 30 * bytes_of_a_weight + 50 * model[0].weight.element_size()


def test_no_whole_checkpoint_is_one_line(tmp_path):
    with pytest.raises(InputError, match="no whole checkpoint to resume from"):
        checkpoints.last_whole(tmp_path)


def test_sequence_kl_sums_a_row_alone():
    batch = RaggedBatch.from_rows(
        [[1], [1, 2]], [[3, 4], [5]], by_response_token={"log_probs": [[-1.0, -2.0], [-3.0]], "reference_log_probs": [[-1.5, -2.0], [-2.0]]}
    )
    np.testing.assert_allclose(sequence_kl(batch), [0.5, -1.0])
    impossible = batch.by_token["reference_log_probs"].copy()
    impossible[batch.response(0).start] = -np.inf
    assert sequence_kl(batch.with_token_fields(reference_log_probs=impossible)).tolist() == [np.inf, -1.0]


def test_explained_variance_of_perfect_and_constant_values():
    assert explained_variance([np.full(3, 1.0), np.full(4, -1.0)]) == 1.0
    assert explained_variance([np.array([0.0, 0.0, 1.0]), np.array([0.0, 0.0, -1.0])]) == 0.0
    assert np.isnan(explained_variance([np.array([0.0, 1.0]), np.array([0.5, 1.0])]))


def test_batch_statistics_by_hand():
    fields = {
        "log_probs": [[-1.0, -1.0], [-2.0]],
        "reference_log_probs": [[-2.0, -1.0], [-2.0]],
        "values": [[0.5, 1.0], [-1.0]],
        "advantages": [[1.0, -1.0], [3.0]],
        "loss_mask": [[1.0, 1.0], [0.0]],
    }
    batch = RaggedBatch.from_rows([[1], [1]], [[3, 4], [5]], truncated=[False, True], by_response_token=fields)
    metrics = batch_statistics(batch.with_row_fields(gold=np.array([0.0, 1.0])))
    assert metrics["value/terminal_mean"] == 0.0
    assert metrics["value/mean"] == pytest.approx((0 + 0.5 + 1 + 0 - 1) / 5)
    assert metrics["kl/reference_mean"] == 0.5 and metrics["kl/reference_max"] == 1.0
    assert metrics["advantage/max"] == 1.0 and metrics["advantage/mean"] == 0.0  # the masked row counts for nothing
    assert metrics["response_length/mean"] == 1.5 and metrics["response_length/truncated_fraction"] == 0.5
    assert metrics["reward/gold_mean"] == 0.5


@pytest.mark.parametrize(("free", "kept"), [(2**30, ["step_000003"]), (0, [])])
def test_a_run_saves_its_last_step_so_that_it_can_be_made_longer(tmp_path, monkeypatch, capsys, free, kept):
    """And finishes where the disk has no room for that."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    run = Run("train", Config.model_validate({"model": {"path": "m"}, "train": {"steps": 3, "trackers": []}}), tmp_path)
    nothing = {name: lambda *_: None for name in ("sync_between_steps", "collect", "finish", "evaluate_if_due")}
    numbers = {name: lambda *_: {} for name in ("learn", "refresh", "state_dict")}
    loop = SimpleNamespace(**nothing, **numbers, checkpoint_bytes=lambda: 60, save=Path.touch, save_at_the_end=Path.touch, save_policy=Path.touch)
    health = SimpleNamespace(observe=lambda *_: ({}, []))
    state = SimpleNamespace(**nothing, **numbers, health=health, heed=lambda *_: False, refresh_is_due=False, evaluations={3: {}})
    with RunConsole() as console:
        optimise(run, state, loop, console)
    assert [folder.name for folder in (tmp_path / "checkpoints").glob("step_*")] == kept and (tmp_path / "final").is_dir()
    assert ("so the run cannot be made longer" in capsys.readouterr().out) is (not kept)


def test_an_alarm_that_goes_on_is_said_ever_more_seldom_and_anew_after_a_pause(capsys):
    """Every alarm stops the run, said or not."""
    config = Config.model_validate({"model": {"path": "m"}, "train": {"steps": 99}, "health": {"window_steps": 3, "on_alarm": "stop"}})
    run = SimpleNamespace(last_step=0, tell=lambda **_: None)
    state = SimpleNamespace(run=run, config=config, health=HealthMonitor(config.health), _alarms=[])
    state.refresher = SimpleNamespace(is_due=lambda step, alarmed: False)
    stopped = []
    for step in range(1, 35):
        _, alarms = state.health.observe(step, {"health/gold_correlation": 0.5 if 25 <= step <= 31 else 0.0})
        state.run.last_step = step
        if PolicyState.heed(state, alarms, RunConsole()):
            stopped.append(step)
    assert stopped == [3, 6, 9, 12, 15, 18, 21, 24, 34] == [alarm.step for alarm in state.health.alarms]
    lines = [line.partition(": Over 3 steps")[0] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "warning: ALARM gold_correlation at step 3",
        *(f"warning: ALARM gold_correlation goes on: raised {n} times from step 3 to step {3 * n}" for n in (2, 4, 8)),
        "warning: ALARM gold_correlation at step 34",
    ]


def test_an_interrupted_run_says_what_is_saved_and_a_resumed_one_where_it_goes_on(tmp_path, capsys):
    """Step 3 is done and not saved."""
    config = Config.model_validate({"model": {"path": "m"}})
    write_checkpoint(tmp_path, 2)
    run = Run("gvm", config, tmp_path)
    with pytest.raises(KeyboardInterrupt), RunConsole() as console, run.started("GVM", {}, [], lambda: {"model": "trunk"}, console):
        assert read_summary(tmp_path)["model"] == "trunk"
        run.last_step = 3
        raise KeyboardInterrupt
    assert "\nstep 2 is saved; continue with: dvpo gvm train " in capsys.readouterr().out
    resumed = Run("gvm", config, tmp_path, resume=True)
    resumed.open_checkpoint()
    with RunConsole() as console, resumed.started("GVM", {}, [], dict, console):
        assert "going on from the checkpoint of step 2\n" in capsys.readouterr().out


def interrupted_step(run: Run, console: RunConsole, *signals: int) -> None:
    """A step of a run whose update lasts 0.2 s and gets signals, the second one late enough to count."""
    with run.saved_when_interrupted(Path.touch, dict, console), run.whole_step(console):
        for one in signals:
            os.kill(os.getpid(), one)
        time.sleep(0.2)
        run.last_step += 1


@pytest.mark.parametrize(
    ("signals", "saved", "told"),
    [
        ([signal.SIGINT], 3, ["ending: the step is finished and saved first; Ctrl-C again ends at once"]),
        (
            [signal.SIGINT, signal.SIGINT],
            2,
            ["ending: the step is finished and saved first; Ctrl-C again ends at once", "warning: the step is lost: it was ended by a second Ctrl-C"],
        ),
        (
            [signal.SIGTERM],
            2,
            [
                "ending: the step is finished and saved first, in at most 0.05 s",
                "warning: the step is lost: it took longer than termination.grace_seconds=0.05; raise termination.grace_seconds, and give the "
                "scheduler that time",
            ],
        ),
    ],
    ids=["Ctrl-C", "Ctrl-C twice", "SIGTERM"],
)
def test_a_step_longer_than_the_grace_is_saved_after_ctrl_c_and_lost_by_a_scheduler(tmp_path, capsys, monkeypatch, signals, saved, told):
    monkeypatch.setattr("dvpo_ray.runtime.termination._ECHO_SECONDS", -1.0)
    write_checkpoint(tmp_path, 2)
    run = Run("gvm", Config.model_validate({"model": {"path": "m"}, "termination": {"grace_seconds": 0.05}}), tmp_path)
    run.last_step = 2
    termination = Termination()
    try:
        with pytest.raises(KeyboardInterrupt), RunConsole() as console, run.started("GVM", {}, [], dict, console):
            interrupted_step(run, console, *signals)
    finally:
        termination.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(("ending", "warning"))] == told
    assert lines[-1].startswith(f"step {saved} is saved; continue with: ")


def test_a_note_says_once_that_a_scheduler_would_not_wait_for_a_step(tmp_path, capsys):
    run = Run("gvm", Config.model_validate({"model": {"path": "m"}, "termination": {"grace_seconds": 0.05}}), tmp_path)
    with RunConsole() as console:
        for seconds in (0.0, 0.1, 0.1):
            with run.whole_step(console):
                time.sleep(seconds)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("note: to finish and save a step took 0 s, and termination.grace_seconds is 0.05: SIGTERM or SIGHUP would lose")
    terminal = io.StringIO()
    with RunConsole(Console(file=terminal, force_terminal=True)) as console, Run("gvm", run.config, tmp_path).whole_step(console):
        time.sleep(0.1)
    assert "note" not in terminal.getvalue()


def test_the_peak_memory_of_a_resumed_run_is_that_of_all_its_parts(tmp_path):
    config = Config.model_validate({"model": {"path": "m"}, "train": {"trackers": []}})
    write_checkpoint(tmp_path, 2)
    peaks = []
    for resume, held in ((False, 50.0), (True, 0.0), (True, 70.0)):
        run = Run("gvm", config, tmp_path, resume=resume)
        with RunConsole() as console, pytest.raises(KeyboardInterrupt), run.started("GVM", {}, [], dict, console), run.metrics_log():
            run.memory.peak_gib = held
            raise KeyboardInterrupt
        peaks.append(read_summary(tmp_path)["peak_memory_gib"])
    assert peaks == [50.0, 50.0, 70.0]


def test_a_run_that_goes_on_has_its_facts_and_alarms_in_the_summary_and_the_report(tmp_path):
    """So has one that is killed."""
    config = Config.model_validate({"model": {"path": "m"}, "gvm": {"path": "g"}, "train": {"trackers": []}})
    run = Run("train", config, tmp_path)
    measured = {"heldout_accuracy": {"mean": 0.75, "last": 0.7}, "pairs": 40, "accuracy_ci95": {"mean": [0.6, 0.86], "last": [0.55, 0.82]}}
    state = PolicyState(run, SimpleNamespace(manifest=SimpleNamespace(measured=measured), warnings=[]))
    with RunConsole() as console, run.started("DVPO", {}, ["a note"], state.summary, console):
        summary = read_summary(tmp_path)
        assert summary["state"] == "running" and summary["notes"] == ["a note"]
        assert summary["algorithm"] == "dvpo" and summary["gvm"]["path"] == "g" and summary["gvm"]["heldout_accuracy"]["mean"] == 0.75
        cut_off = {"response_length/truncated_fraction": 1.0}
        with run.metrics_log() as log:
            log.write(1, cut_off)
        _, alarms = state.health.observe(1, cut_off)
        state.heed(alarms, console)
        assert [alarm["name"] for alarm in read_summary(tmp_path)["alarms"]] == ["cut_off"]
        page = write_report(tmp_path).read_text(encoding="utf-8")
        assert "100% of the responses are cut off" in page and "No metric is out of bounds" not in page and "75.0%" in page
