"""The console of a run, and the files that the output of actors goes to."""

import io
import logging
import os
import re
import shlex
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager

import pytest
from rich.cells import cell_len
from rich.console import Console

from dvpo_ray.monitoring.console import PLAIN_PERIOD_SECONDS, RunConsole, Shell, duration, key_metrics

METRICS = {"reward/gold_mean": 0.6123, "kl/reference_mean": 4.2, "value/terminal_mean": 0.331, "time/step_seconds": 8.11, "policy/loss": 0.1}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def plain(clock) -> tuple[RunConsole, io.StringIO]:
    out = io.StringIO()
    return RunConsole(Console(file=out, force_terminal=False, width=60), clock), out


def live(width: int = 80) -> tuple[RunConsole, io.StringIO]:
    out = io.StringIO()
    return RunConsole(Console(file=out, force_terminal=True, width=width, highlight=False, color_system=None)), out


def test_key_metrics():
    assert key_metrics(METRICS) == "gold 0.612 · KL 4.20 nats · value 0.331 · last step 8.1 s"
    assert key_metrics({"kl/reference_mean": 0.5, "reward/gold_mean": None}) == "KL 0.50 nats"
    assert key_metrics({"kl/reference_mean": -2.5e-5, "reward/model_mean": -0.47188}) == "KL 0.00 nats · reward -0.472"  # of a baseline
    assert key_metrics({}) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (3599.7, "1 h 00 min"), (7800, "2 h 10 min")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_plain_lines_come_from_time_to_time(plain, clock):
    console, out = plain
    with console, console.stage("policy optimisation", 4, unit="steps") as stage:
        for step in (1, 2, 3, 4):
            clock.now += PLAIN_PERIOD_SECONDS * 2 / 3
            stage.step(step, METRICS)
    numbers = key_metrics(METRICS)
    assert out.getvalue().splitlines() == [
        "policy optimisation: 0/4 steps",
        f"policy optimisation: 2/4 steps · {numbers} · 20 s left",
        f"policy optimisation: 4/4 steps · {numbers} · done in 40 s",
    ]


def test_plain_lines_of_a_resumed_stage_estimate_from_what_was_done_here(plain, clock):
    console, out = plain
    with console, console.stage("policy optimisation", 12, done=10, unit="steps") as stage:
        clock.now = 60.0
        stage.step(11, {})
        stage.step(12, {})
    assert out.getvalue().splitlines()[:2] == ["policy optimisation: 10/12 steps", "policy optimisation: 11/12 steps · 1 min 00 s left"]


def test_a_silent_stage_keeps_its_estimate_until_that_time_is_over(plain, clock):
    console, out = plain
    with console, console.stage("policy optimisation", 3, unit="steps") as stage:
        clock.now = 20.0
        stage.step(1, {})
        for clock.now in range(21, 80):
            stage.tick()
    assert out.getvalue().splitlines()[1:-1] == [
        "policy optimisation: 1/3 steps · 40 s left",
        "policy optimisation: 1/3 steps · 28 s so far · 32 s left",
        "policy optimisation: 1/3 steps · 44 s so far · 16 s left",
        "policy optimisation: 1/3 steps · 1 min 16 s so far",
    ]


def test_plain_lines_of_a_stage_of_unknown_length(plain, clock):
    console, out = plain
    with console, console.stage("reading prompts", unit="rows") as stage:
        clock.now = 20.0
        stage.advance(7, "helpful.jsonl")
        stage.advance(1)
    assert out.getvalue().splitlines() == [
        "reading prompts: starts",
        "reading prompts: 7 rows · helpful.jsonl",
        "reading prompts: 8 rows · helpful.jsonl · done in 20 s",
    ]


def test_a_stage_without_items_says_no_number(plain, clock):
    console, out = plain
    with console, console.stage("start of the actors"):
        clock.now += 57
    assert out.getvalue().splitlines() == ["start of the actors: starts", "start of the actors · done in 57 s"]
    console, out = live()
    with console, console.stage("start of the actors"):
        pass
    assert "start of the actors  in 0 s" in out.getvalue()


@pytest.mark.parametrize(
    ("total", "settings", "said"),
    [
        (None, {}, (8, 16, 24, 32, 40, 48, 56)),
        (None, {"quiet": True}, (5, 13, 21, 29, 37, 45, 53)),
        (27, {"unit": "held-out prompts"}, (8, 16, 24, 32, 40, 48, 56)),
        (9, {"unit": "steps"}, (8, 24, 56)),
    ],
)
def test_a_silent_stage_is_said_with_its_seconds_and_steps_ever_more_seldom(total, settings, said, plain, clock):
    console, out = plain
    with console, console.stage("start of the actors", total, **settings) as stage:
        for clock.now in range(1, 61):
            stage.tick()
    lines = [line.rpartition(" · ")[2] for line in out.getvalue().splitlines() if "so far" in line]
    assert lines == [f"{seconds} s so far" for seconds in said]


def test_a_silent_console_ticks_by_itself(monkeypatch):
    monkeypatch.setattr("dvpo_ray.monitoring.console.SILENCE_SECONDS", 0.5)
    out = io.StringIO()
    with RunConsole(Console(file=out, force_terminal=False)) as console, console.stage("start of Ray"):
        deadline = time.monotonic() + 30
        while "so far" not in out.getvalue() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "start of Ray · 1 s so far\n" in out.getvalue()


def test_only_the_innermost_stage_is_said(plain, clock):
    console, out = plain
    with console, console.stage("policy optimisation", 4, unit="steps") as outer:
        with console.stage("saving a checkpoint", quiet=True) as inner:
            clock.now = 7.0
            inner.tick()
        outer.tick()
        clock.now = 14.0
        outer.tick()
    assert out.getvalue().splitlines()[:3] == [
        "policy optimisation: 0/4 steps",
        "saving a checkpoint · 7 s so far",
        "saving a checkpoint · done in 7 s",
    ]
    assert "14 s so far" not in out.getvalue()  # the stage within it was heard of 7 seconds ago


def test_what_a_step_says_or_does_delays_no_line_of_progress(plain, clock):
    """Each step says an alarm, saves a checkpoint in silence and is evaluated."""
    console, out = plain
    with console, console.stage("policy optimisation", 100, unit="steps") as outer:
        for step in range(1, 11):
            clock.now += 6.0
            outer.step(step, {})
            console.warn("ALARM")
            with console.stage("saving a checkpoint", quiet=True):
                clock.now += 1.0
            with console.stage("evaluation", 4):
                clock.now += 1.0
    lines = [line.partition(" · ")[0] for line in out.getvalue().splitlines() if "optimisation" in line]
    assert lines[:-1] == [f"policy optimisation: {step}/100 steps" for step in (0, 3, 5, 7, 9)]


def test_a_silent_quiet_stage_is_no_line_that_the_user_has_seen(plain, clock):
    console, out = plain
    with console, console.stage("policy optimisation", 4, unit="steps") as outer:
        clock.now = 7.0
        with console.stage("saving a checkpoint", quiet=True):
            pass
        clock.now = 8.0
        outer.tick()
    assert "policy optimisation: 0/4 steps · 8 s so far\n" in out.getvalue()


def test_a_line_that_ctrl_c_interrupts_is_not_printed_again(clock):
    class Interrupted(io.StringIO):
        def flush(self) -> None:
            if "steps" in self.getvalue() and "interrupted" not in self.getvalue():
                raise KeyboardInterrupt

    out = Interrupted()
    console = RunConsole(Console(file=out, force_terminal=False), clock)
    with pytest.raises(KeyboardInterrupt), console.stage("policy optimisation", 10, unit="steps"):
        pass
    console.say("interrupted")
    assert out.getvalue() == "policy optimisation: 0/10 steps\ninterrupted\n"


def test_a_quiet_stage_that_is_short_leaves_no_line(plain, clock):
    console, out = plain
    with console, console.stage("saving a checkpoint", quiet=True):
        clock.now = 4.0
    assert out.getvalue() == ""
    console, out = live()
    with console, console.stage("saving a checkpoint", quiet=True):
        pass
    assert "✓" not in out.getvalue()


def test_the_start_of_a_context_is_a_stage(plain, clock):
    @contextmanager
    def slow():
        clock.now += 9
        yield "ready"
        clock.now += 100

    console, out = plain
    with console, console.entering("start of Ray", slow()) as value:
        assert value == "ready"
    assert out.getvalue().splitlines() == ["start of Ray: starts", "start of Ray · done in 9 s"]


def test_the_start_of_actors_says_each_change_once(plain, clock):
    console, out = plain
    with console:
        console.starting({"rollout-0": "importing", "learner-0": "importing"})
        clock.now = 9.0
        console.starting({"rollout-0": "importing", "learner-0": "importing"})
        console.starting({"rollout-0": "loading", "learner-0": "importing"})
        clock.now = 12.0
        console.starting({"rollout-0": "ready", "learner-0": "ready"})
        clock.now = 500.0  # another run in the same console
        console.starting({"rollout-0": "importing"})
    assert out.getvalue().splitlines() == [
        "rollout-0, learner-0: importing",
        "rollout-0: loading after 9 s",
        "rollout-0, learner-0: ready after 12 s",
        "rollout-0: importing",
    ]


def test_a_shell_line_is_broken_so_that_it_can_be_pasted(plain):
    words = ["dvpo", "eval", "runs/policy/config.yaml", "--policy", "runs/a policy/final", f"data.prompts.path={'x' * 50}"]
    line = Shell(shlex.join(words))
    console, out = live(40)
    console.say(line)
    lines = out.getvalue().splitlines()
    assert len(lines) > 2 and all(len(line) <= 40 for line in lines if "xxx" not in line)
    pasted = subprocess.run(["bash", "-c", f"printf '%s\\n' {out.getvalue()}"], capture_output=True, text=True, check=True)
    assert pasted.stdout.splitlines() == words
    console, out = plain
    console.say(line)
    assert out.getvalue() == line + "\n"


@pytest.mark.parametrize("width", [40, 64, 80])
def test_no_line_is_longer_than_the_terminal(width):
    console, out = live(width)
    with console:
        console.header("Global Value Model", {"model": "/data/models/SmolLM2-135M-Instruct", "pairs": "12000 for training, 844 held out"})
        console.warn("held-out accuracy 0.55 by mean value is under 0.60; give more pairs: /data/preferences/ultrafeedback/pairs.jsonl")
        console.starting({f"rollout-{i}": "importing" for i in range(8)})
        with console.stage("evaluation at step 1000", 512, unit="held-out prompts") as stage:
            stage.advance(512, "kl 12.345 · gold 0.123")
        with console.stage("policy optimisation", 100, unit="steps") as stage:
            stage.step(1, METRICS)
            console.bars.refresh()
        with console.stage("start of the actors"):
            console.bars.refresh()
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split("[\r\n]", out.getvalue())]
    assert max(map(cell_len, lines)) <= width
    shown = " ".join(line.strip() for line in lines)
    assert re.search(r"evaluation at step 1000\S* .*0/512 .*0:00:00", shown) and "1/100" in shown


def test_a_failed_stage_does_not_say_done(plain):
    console, out = plain
    with pytest.raises(RuntimeError), console, console.stage("evaluation", 2):
        raise RuntimeError
    assert "done" not in out.getvalue()


def test_plain_output_has_no_control_characters_and_keeps_long_lines_whole(plain):
    console, out = plain
    with console:
        console.header("DVPO", {"model": "SmolLM2-135M-Instruct", "settings": "[bold]" + "x" * 100})
        console.say("[red]" + "y" * 100)
        console.warn("held-out accuracy is low")
    text = out.getvalue()
    assert "\x1b" not in text
    assert text.splitlines() == [
        "DVPO",
        "  model: SmolLM2-135M-Instruct",
        "  settings: [bold]" + "x" * 100,
        "[red]" + "y" * 100,
        "warning: held-out accuracy is low",
    ]


def test_live_bars_show_the_key_metrics():
    console, out = live()
    with console:
        console.header("DVPO", {"model": "SmolLM2"})
        with console.stage("policy optimisation", 2, unit="steps") as stage:
            stage.step(1, METRICS)
            stage.step(2, METRICS)
        console.say("[not markup]")
    text = out.getvalue()
    assert "SmolLM2" in text and "[not markup]" in text
    assert "policy optimisation" in text and "0/2 steps" in text
    assert f"✓ policy optimisation  2 steps in 0 s · {key_metrics(METRICS)}" in text.replace(" \n", " ")


def test_a_live_bar_and_its_details_fit_80_columns():
    console, out = live()
    with console, console.stage("policy optimisation", 100, unit="steps") as stage:
        stage.step(99, METRICS)
        console.bars.refresh()
    assert "99/100 steps" in out.getvalue() and "…" not in out.getvalue()


def test_the_cursor_is_back_after_a_failure():
    console, out = live()
    with pytest.raises(RuntimeError), console, console.stage("evaluation", 2):
        raise RuntimeError
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")


def test_everything_a_process_writes_goes_to_the_file(tmp_path):
    log = tmp_path / "logs" / "actor.log"
    program = f"""
        import os, pathlib, subprocess, sys
        print("before")
        from dvpo_ray.monitoring.logs import redirect_process_output
        redirect_process_output(pathlib.Path({str(log)!r}))
        print("from print")
        print("from stderr", file=sys.stderr)
        os.write(1, b"from C\\n")
        subprocess.run([sys.executable, "-c", "print('from a child')"])
        print("the last words \\udc80")
        os._exit(1)  # without any flush, as a killed actor
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("before\n", "")
    assert log.read_text().splitlines() == ["from print", "from stderr", "from C", "from a child", "the last words \\udc80"]


def test_a_restarted_actor_keeps_the_log_of_its_predecessor(tmp_path):
    program = "import sys, pathlib; from dvpo_ray.monitoring.logs import redirect_process_output as r; r(pathlib.Path(sys.argv[1])); print('hello')"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", program, tmp_path / "a.log"], check=True)
    assert (tmp_path / "a.log").read_text() == "hello\nhello\n"


def test_quiet_libraries_leaves_the_users_choice(monkeypatch):
    from dvpo_ray.monitoring.logs import quiet_libraries

    monkeypatch.setattr(os, "environ", {"TRANSFORMERS_VERBOSITY": "info"})
    monkeypatch.setattr(logging.getLogger("ray"), "level", logging.INFO)
    quiet_libraries()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
    assert os.environ["TQDM_DISABLE"] == "1"
    assert not logging.getLogger("ray").isEnabledFor(logging.INFO)
