"""The `dvpo` command: exit statuses, one-line errors, `--dry-run` and run folders."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
import tomllib
from pathlib import Path

import pytest
from cli_runs import LOCAL_CPU, ROOT, refusal, without_loading

from dvpo_ray import cli
from dvpo_ray.config import dump_config, load_config
from dvpo_ray.errors import InputError, ResourceError
from dvpo_ray.experiments.registry import STUDIES
from dvpo_ray.monitoring.run_files import write_summary
from dvpo_ray.runtime.termination import keeps_termination

GVM_COMMANDS = ("train", "eval", "score")
NESTED = [
    *(["gvm", name] for name in GVM_COMMANDS),
    ["rm", "train"],
    *(["bench", name] for name in ("step", "ledger", "trl", "trl-reward")),
    *(["experiment", name] for name in STUDIES),
]
ALL_COMMANDS = [[name] for name in cli.COMMANDS if name not in ("gvm", "rm", "bench", "experiment")] + NESTED
pytestmark = pytest.mark.usefixtures("in_empty_folder")

STARTERS = [["train"], ["gvm", "train"], ["rm", "train"], ["sft"], ["dpo"]]


# ----------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=" ".join)
def test_help_ends_with_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    assert ended.value.code == 0
    help_text = capsys.readouterr().out
    marker, example = help_text.rstrip().splitlines()[-2:]
    assert marker == "example:"
    words = shlex.split(example)
    assert words[: len(command) + 1] == ["dvpo", *command]
    cli.parse_arguments(words[1:])


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "the following arguments are required: COMMAND; see `dvpo --help`"),
        (["traim"], "argument COMMAND: invalid choice: 'traim'; did you mean train? See `dvpo --help`"),
        (["doc"], "argument COMMAND: invalid choice: 'doc'; did you mean doctor? See `dvpo --help`"),
        (["gvm", "evel"], "argument COMMAND: invalid choice: 'evel'; did you mean eval? See `dvpo gvm --help`"),
        (["zzz"], "argument COMMAND: invalid choice: 'zzz' (choose from "),
        (["train"], "the following arguments are required: CONFIG; see `dvpo train --help`"),
        (["gvm"], "the following arguments are required: COMMAND; see `dvpo gvm --help`"),
        (["train", "x.yaml", "--dryrun"], "unknown argument --dryrun; did you mean --dry-run? See `dvpo train --help`"),
        (["gvm", "eval", "x.yaml", "--gmv", "g"], "unknown argument --gmv; did you mean --gvm? See `dvpo gvm eval --help`"),
        (["train", "x.yaml", "--seed=4"], "unknown argument --seed=4; overrides are written without dashes, seed=4; see `dvpo train --help`"),
        (
            ["train", "x.yaml", "--steps=4"],
            "unknown argument --steps=4; overrides are written without dashes, train.steps=4; see `dvpo train --help`",
        ),
        (["train", "x.yaml", "--steps", "4"], "unknown argument --steps; overrides are written without dashes, train.steps=VALUE; see `dvpo "),
        (["train", "x.yaml", "--zzz=4"], "unknown argument --zzz=4; overrides are written without dashes, key=value; see `dvpo train --help`"),
        (["train", "x.yaml", "--zzz"], "unknown argument --zzz; see `dvpo train --help`"),
        (["report", "runs/a", "--steps=4"], "unknown argument --steps=4; see `dvpo report --help`"),
        (["report", "runs/a", "seed=4"], "unknown argument seed=4; see `dvpo report --help`"),
        (["train", "x.yaml"], "x.yaml: no such file"),
        (["train", LOCAL_CPU.replace(".yaml", ".yml")], f"{LOCAL_CPU.replace('.yaml', '.yml')}: no such file; did you mean {LOCAL_CPU}?"),
        (["train", ""], "the CONFIG argument is empty; give a YAML file, for example cluster_configs/local-cpu.yaml"),
        (
            ["train", LOCAL_CPU, "policy.learning_rat=1"],
            "override policy.learning_rat=1: unknown key policy.learning_rat; did you mean policy.learning_rate?",
        ),
        (
            ["train", LOCAL_CPU, "batch.prompts_per_step=7"],
            "batch.prompts_per_step 7 x batch.samples_per_prompt 1 = 7 samples can't be shared evenly",
        ),
        (["train", LOCAL_CPU], f"{LOCAL_CPU}: gvm.path is not set; train a value model with `dvpo gvm train` and give its folder"),
        (["gvm", "eval", LOCAL_CPU], f"{LOCAL_CPU}: which value model? give --gvm DIR or set gvm.path"),
        (["sft", LOCAL_CPU], f"{LOCAL_CPU}: data.sft is not set; give the instruction-answer rows to train on"),
        (["report", "runs/none"], "runs/none: no such run folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv, line, capsys):
    assert refusal(capsys, *argv).startswith(line)


def test_a_report_of_what_lies_in_a_run_folder_names_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "sp").mkdir(parents=True)
    for name in ("summary.json", "report.html"):
        (tmp_path / "runs" / "sp" / name).write_text("{}")
    assert refusal(capsys, "report", "runs/sp/report.html") == "runs/sp/report.html: a file, not a run folder; did you mean runs/sp?"
    assert refusal(capsys, "report", "runs/sp/fnal") == "runs/sp/fnal: no such run folder; did you mean runs/sp?"


@pytest.mark.parametrize(("command", "section"), [(["train"], "data.prompts"), (["gvm", "train"], "data.preferences"), (["dpo"], "data.preferences")])
def test_data_that_a_command_needs(command, section, capsys):
    assert f"{section}.path is not set" in refusal(capsys, *command, LOCAL_CPU, f"{section}=null", "gvm.path=g")


@pytest.mark.parametrize(
    ("words", "option"), [(["help"], ["--help"]), (["help", "gvm", "train"], ["gvm", "train", "--help"]), (["version"], ["--version"])]
)
def test_help_and_version_may_be_written_as_commands(words, option, capsys):
    printed = []
    for argv in (words, option):
        with pytest.raises(SystemExit) as ended:
            cli.main(argv)
        printed.append(capsys.readouterr().out)
        assert ended.value.code == 0
    assert printed[0] == printed[1] != ""


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (["eval", "data.prompts.path=gone.jsonl"], "data.prompts.path gone.jsonl: no such file or folder"),
        (["eval", "--policy", "./gone"], "--policy ./gone: no such checkpoint folder"),
        (["gvm", "eval", "--gvm", "g", "data.preferences.path=gone.jsonl"], "data.preferences.path gone.jsonl: no such file or folder"),
        (["gvm", "eval", "--gvm", "gone"], "gone: no such folder in "),
        (["gvm", "score", "--gvm", "g", "--input", "gone.jsonl", "--output", "o"], "--input gone.jsonl: no such file or folder"),
    ],
    ids=" ".join,
)
def test_what_an_evaluation_reads_is_looked_for_before_the_libraries_are_loaded(command, line, capsys, tmp_path):
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "gvm.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    words = [word for word in command if word in ("eval", "gvm", "score")]
    argv = [*words, LOCAL_CPU, *command[len(words) :], f"model.path={tmp_path}"]
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"dvpo: {line}")


def test_overrides_may_stand_anywhere_after_the_config():
    args = cli.parse_arguments(["train", "x.yaml", "seed=1", "--dry-run", "seed=2", "--out", "there", "seed=3"])
    assert args.overrides == ["seed=1", "seed=2", "seed=3"]
    assert args.dry_run and args.out == Path("there")


# ------------------------------------------------------------------------------------------------ exit statuses


@pytest.fixture
def failing(monkeypatch):
    """Makes `dvpo report .` raise an error."""

    def failing(error: BaseException) -> list[str]:
        def run(args):
            raise error

        monkeypatch.setattr(cli.COMMANDS["report"], "run", run)
        return ["report", "."]

    return failing


def test_missing_resources_are_status_2(failing, capsys):
    assert refusal(capsys, *failing(ResourceError("no GPU here;\n  use local-cpu.yaml"))) == "no GPU here; use local-cpu.yaml"


def test_error_of_an_actor_is_shown_without_its_traceback(failing, capsys):
    class WrappedByRay(InputError):
        cause = InputError("pairs.jsonl:3: no `rejected`")

    assert refusal(capsys, *failing(WrappedByRay("Traceback\n many lines"))) == "pairs.jsonl:3: no `rejected`"


def test_full_disk_is_status_2(failing, capsys):
    error = OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl")
    assert refusal(capsys, *failing(error)) == "runs/a/metrics.jsonl: no space left on the disk; free some"


def test_interrupt_is_status_130(failing, capsys):
    assert cli.main(failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "dvpo: interrupted\n"


@pytest.mark.parametrize("module", ["dvpo_ray.cli", "pydantic", "dvpo_ray.monitoring.report"])
def test_ctrl_c_during_the_imports_is_one_line_and_status_130(module, tmp_path):
    """By the entry point that pyproject.toml names; the signal comes when a module is about to be imported."""
    entry, _, function = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["dvpo"].partition(":")
    program = f"""
        import os, signal, sys
        class Interrupting:
            def find_spec(self, name, *_):
                if name == {module!r}:
                    os.kill(os.getpid(), signal.SIGINT)
        sys.meta_path.insert(0, Interrupting())
        sys.argv = ["dvpo", "report", {str(tmp_path)!r}]
        from {entry} import {function}
        sys.exit({function}())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "dvpo: interrupted\n")


def test_the_entry_point_runs_the_command():
    done = subprocess.run([sys.executable, "-m", "dvpo_ray", "report", "none"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "dvpo: none: no such run folder\n")


def test_what_the_system_says_of_a_path_is_one_line(failing, capsys):
    error = PermissionError(errno.EACCES, "Permission denied", "pairs.jsonl")
    assert refusal(capsys, *failing(error)) == "pairs.jsonl: the system refuses it: Permission denied"


def test_sigterm_is_status_143_and_unwinds_once(monkeypatch, capsys):
    unwound = []

    def run(args):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)  # an impatient scheduler does not cut off the unwinding
            unwound.append(True)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli.COMMANDS["report"], "run", run)
    assert cli.main(["report", "."]) == 143
    assert capsys.readouterr().err == "dvpo: ended by SIGTERM\n" and unwound
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_library_that_takes_sigterm_gives_it_back(monkeypatch):
    def run(args):
        with keeps_termination():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(cli.COMMANDS["report"], "run", run)
    assert cli.main(["report", "."]) == 143


@pytest.mark.parametrize("error", [RuntimeError("a defect"), PermissionError(errno.EACCES, "of no path"), OSError(errno.EBADF, "Bad file", 7)])
def test_defects_keep_their_traceback(failing, error):
    with pytest.raises(type(error)):
        cli.main(failing(error))


@pytest.fixture
def finished_run(tmp_path):
    """A finished run of `dvpo train` in `run`, and the command that resumes it."""
    settings = ["gvm.path=g", "train.steps=4"]
    (tmp_path / "run" / "final").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step_000004").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(dump_config(load_config(LOCAL_CPU, settings)), encoding="utf-8")
    write_summary(tmp_path / "run", {"stage": "train", "state": "finished", "steps": 4})
    return ["train", LOCAL_CPU, *settings, "--out", "run", "--resume"]


def test_resuming_a_finished_run_is_a_success(finished_run, capsys):
    """A job that is put into its queue again after its end is not a failure."""
    assert cli.main(finished_run) == 0
    told = "run: the run is finished and its result is in final/; --resume with a larger train.steps goes on\n"
    assert capsys.readouterr() == (told, "")
    assert cli.main([*finished_run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "finished"


def test_resuming_as_another_run_is_refused_before_the_libraries_are_loaded(finished_run, capsys):
    """Ray, vLLM and torch take seconds."""
    argv = [*finished_run, "seed=7"]
    code = f"import sys; from dvpo_ray.cli import main; status = main({argv!r}); print(*sys.modules); sys.exit(status)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "seed was 0 and is 7 now" in done.stderr
    assert not {"torch", "ray", "transformers", "vllm"} & set(done.stdout.split())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["--resume", "seed=7"], "run: --resume continues the run of its config.yaml, but seed was 0 and is 7 now"),
        (["--resume"], "run: the run is finished and its result is in final/"),
        ([], "run: already there and not empty; give another --out"),
    ],
    ids=["another seed", "finished", "not new"],
)
def test_a_dry_run_says_what_is_wrong_with_the_run_folder(changes, told, finished_run, capsys):
    """As the run does, and as a note, because a folder can be moved away."""
    command = [word for word in finished_run if word != "--resume"]
    assert cli.main([*command, *changes, "--dry-run"]) == 0
    assert f"# note: {told}" in capsys.readouterr().out
    assert cli.main([*command[:-1], "new", "--dry-run"]) == 0
    assert "run: " not in capsys.readouterr().out


SAYS_ONE_LINE = "cli.COMMANDS['report'].run = lambda args: RunConsole().say('a line')"


@pytest.mark.parametrize("argv", [["train", LOCAL_CPU, "--dry-run"], ["train", "--help"], ["report", "."]], ids=" ".join)
def test_a_reader_that_ends_early_ends_the_command_in_silence(argv):
    """As in `dvpo train CONFIG --dry-run | head`."""
    imports = "import sys; from dvpo_ray import cli; from dvpo_ray.monitoring.console import RunConsole"
    reader, writer = os.pipe()
    os.close(reader)
    code = f"{imports}; {SAYS_ONE_LINE}; sys.exit(cli.main({argv!r}))"
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 141 or ("--help" in argv and done.returncode == 0)  # argparse passes over what it cannot write


def test_a_broken_pipe_of_something_else_is_a_defect(failing):
    with pytest.raises(BrokenPipeError):
        cli.main(failing(BrokenPipeError(errno.EPIPE, "Broken pipe")))


@pytest.mark.parametrize(("override", "advice"), [("model.path=org/name", "a checkpoint folder"), ("data.prompts.path=org/name", "a file or folder")])
def test_a_hub_that_cannot_be_reached_is_one_line_within_ten_seconds(override, advice, tmp_path):
    argv = ["train", LOCAL_CPU, "gvm.path=g", f"model.path={tmp_path}", override]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    started = time.monotonic()
    code = f"import sys; from dvpo_ray import cli; sys.exit(cli.main({argv!r}))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert time.monotonic() - started < 10
    assert done.returncode == 2 and without_loading(done.stdout) == ""
    assert done.stderr.startswith(f"dvpo: {override.replace('=', ' ')}: not on this machine, not in the cache of the hub") and advice in done.stderr
    assert done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------------ dry run


@pytest.mark.parametrize("command", STARTERS, ids=" ".join)
def test_dry_run_prints_a_config_and_starts_nothing(command, capsys, tmp_path):
    assert cli.main([*command, LOCAL_CPU, "--dry-run", "seed=11", "--out", "run"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "resolved.yaml").write_text(printed, encoding="utf-8")
    assert load_config(tmp_path / "resolved.yaml") == load_config(LOCAL_CPU, ["seed=11", "out=run"])
    assert "# batch arithmetic\n" in printed and "# placement\n" in printed
    assert not (tmp_path / "run").exists() and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("config", sorted(path.name for path in (ROOT / "cluster_configs").glob("*.yaml")))
@pytest.mark.parametrize("command", STARTERS, ids=" ".join)
def test_what_a_dry_run_says_of_the_run_ends_its_output_and_fits_a_terminal(command, config, capsys):
    assert cli.main([*command, str(ROOT / "cluster_configs" / config), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = next(i for i, line in enumerate(lines) if line.startswith("#"))
    assert all(line.startswith("#") for line in lines[told:])
    assert sum(-(-len(line) // 80) for line in lines[told:]) <= 40


def test_dry_run_of_train_shows_arithmetic_placement_and_what_is_missing(capsys):
    config = str(ROOT / "cluster_configs" / "single-node-8gpu.yaml")
    assert cli.main(["train", config, "--dry-run", "batch.prompts_per_step=64", "scorer.micro_batch_tokens=100"]) == 0
    lines = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert "# samples per step 64 = prompts_per_step 64 x samples_per_prompt 1" in lines
    assert "# optimizer steps 4 per step = update_epochs 4 x minibatches_per_epoch 1; 5000 in 1250 steps" in lines
    assert "# rollout 8 x (2 CPUs, 1 GPU)" in lines
    assert "# total 48 CPUs, 8 GPUs" in lines
    assert "# note: gvm.path is not set; train a value model with `dvpo gvm train` and give its folder" in lines
    assert any(line.startswith("# note: scorer.micro_batch_tokens 100 is below") for line in lines)


def test_dry_run_of_gvm_train_counts_the_examples(capsys):
    settings = ["data.max_prompt_tokens=100", "data.max_response_tokens=50", "gvm.context.examples=2", "gvm.context.max_tokens=30"]
    assert cli.main(["gvm", "train", LOCAL_CPU, "--dry-run", *settings]) == 0
    assert "210 tokens = 100 prompt + 50 response + 2 x 30 examples" in capsys.readouterr().out


def test_dry_run_loads_neither_torch_nor_ray():
    calls = "; ".join(f"main({[*command, LOCAL_CPU, '--dry-run']!r})" for command in STARTERS)
    code = f"import sys; from dvpo_ray.cli import main; {calls}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()[-1].split()
    assert not {"torch", "ray", "transformers", "vllm", "deepspeed", "datasets"} & set(loaded)


# ---------------------------------------------------------------------------------------------------- run folder


def test_default_run_folders_are_named_and_dated(backend):
    calls = backend("dvpo_ray.training.policy", "train", Path("x"))
    assert cli.main(["train", LOCAL_CPU, "gvm.path=g", "name=mine"]) == 0
    (config,), _ = calls[0]
    assert re.fullmatch(r"runs/mine-\d{8}-\d{6}", config.out)


def test_out_option_precedes_out_of_the_config(backend):
    calls = backend("dvpo_ray.training.policy", "train", Path("x"))
    assert cli.main(["train", LOCAL_CPU, "gvm.path=g", "out=a"]) == 0
    assert cli.main(["train", LOCAL_CPU, "gvm.path=g", "out=a", "--out", "b"]) == 0
    assert [args[0].out for args, _ in calls] == ["a", "b"]


@pytest.mark.parametrize("command", STARTERS, ids=" ".join)
def test_a_folder_with_files_is_kept(command, backend, capsys, tmp_path):
    settings = ["gvm.path=g", "data.sft=s.jsonl"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    line = refusal(capsys, *command, LOCAL_CPU, *settings, "--out", "run")
    assert line == "run: already there and not empty; give another --out, or --resume to continue the run in it"
    assert refusal(capsys, *command, LOCAL_CPU, *settings, "--out", "gone", "--resume") == "gone: no run folder to resume"
    assert refusal(capsys, *command, LOCAL_CPU, *settings, "--resume") == "--resume needs the run folder to continue: --out DIR"


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("file/run", "nothing can be written there: file is a file; give another path"),
        ("file", "already there"),
        ("x" * 300, "File name too long"),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        ["train", LOCAL_CPU, "gvm.path=g"],
        ["sft", LOCAL_CPU, "data.sft=s.jsonl"],
        ["gvm", "eval", LOCAL_CPU, "--gvm", "g"],
        ["eval", LOCAL_CPU],
        ["bench", "step", LOCAL_CPU, "gvm.path=g"],
    ],
    ids=" ".join,
)
def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_loaded(command, out, reason, capsys, tmp_path):
    (tmp_path / "file").write_text("kept")
    line = refusal(capsys, *command, "--out", out)
    assert line.startswith(out) and reason in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"] and (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("command", [["gvm", "eval", LOCAL_CPU, "--gvm", "g"], ["eval", LOCAL_CPU]], ids=lambda words: words[0])
def test_an_evaluation_replaces_no_folder(command, capsys, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    line = refusal(capsys, *command, "--out", "mine")
    assert line == "mine: already there, and the evaluation would take its place; give another path"


def test_a_folder_without_permission_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda *_: False)
    assert refusal(capsys, "eval", LOCAL_CPU, "--out", "there") == "there: you may not write to .; give another path"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a file system of the kernel")
def test_a_folder_that_nobody_can_write_to_is_refused(capsys):
    if not os.access("/proc", os.W_OK):
        pytest.skip("only root is told that it may")
    line = "/proc/there: nothing can be written to /proc (No such file or directory); give another path"
    assert refusal(capsys, "eval", LOCAL_CPU, "--out", "/proc/there") == line
    assert cli.main(["gvm", "train", LOCAL_CPU, "--out", "/proc/there", "--dry-run"]) == 0
    assert f"# note: {line}\n" in capsys.readouterr().out


@pytest.mark.parametrize("command", STARTERS, ids=" ".join)
def test_a_tracker_that_is_not_installed_is_known_before_anything_is_loaded(command, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    argv = [*command, LOCAL_CPU, "gvm.path=g", "data.sft=s.jsonl", "train.trackers=[tensorboard,wandb]"]
    told = "train.trackers: wandb is not installed; run: launch/install.sh wandb"
    assert cli.main([*argv, "--dry-run"]) == 0
    assert f"# note: {told}\n" in capsys.readouterr().out
    assert refusal(capsys, *argv) == f"{LOCAL_CPU}: {told}"


def test_scores_replace_no_file(capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    for output in ("rows.jsonl", "."):
        line = refusal(capsys, "gvm", "score", LOCAL_CPU, "--gvm", "g", "--input", "rows.jsonl", "--output", output)
        assert line == f"{output}: already there, and --output would take its place; give another path"
    assert (tmp_path / "rows.jsonl").read_text() == "{}\n"
