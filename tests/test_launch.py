"""The launch scripts: what they call, what they refuse, and how the installer finds and repairs damage.

Nothing is installed here: the programs that the scripts call are stand-ins that write down how they were called.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), *sorted(LAUNCH.glob("slurm/*")), ROOT / ".ci" / "run"]


def run(script: Path, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "DVPO_", "PYTHON"))}
    return subprocess.run(
        ["bash", str(script), *arguments], capture_output=True, text=True, cwd=cwd, env=clean | environment, stdin=subprocess.DEVNULL, check=False
    )


def is_one_line(text: str) -> bool:
    return len(text.strip().splitlines()) == 1


def executable(path: Path, source: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + source + "\n")
    path.chmod(0o755)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr
    assert script.name == "train.sbatch" or os.access(script, os.X_OK)


@pytest.mark.parametrize("argument", ["--help", "-h"])
@pytest.mark.parametrize("script", sorted(path for path in SCRIPTS if path.parent != ROOT / ".ci"), ids=lambda path: path.name)
def test_help_says_how_a_script_is_called_and_does_nothing(script, argument, checkout, tmp_path):
    """Wherever it stands. The stand-ins of the checkout fail; gpu_check.sh leaves its help to Python."""
    copy = checkout / script.relative_to(ROOT)
    if script.name == "install.sh":
        shutil.copy(script, copy)
    before = sorted(tmp_path.rglob("*"))
    environment = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)} if script.name == "gpu_check.sh" else {}
    for arguments in ([argument], ["config.yaml", argument]):
        done = run(copy, *arguments, TMPDIR=str(tmp_path), DVPO_VENV=str(tmp_path / "new" / "venv"), **environment)
        assert done.returncode == 0 and not done.stderr
        assert script.name in done.stdout and "#" not in done.stdout and "SBATCH -" not in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


# ------------------------------------------------------------------------------------- install, quickstart, test, CI


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["gpus"], {}, "unknown argument gpus"),
        (["cpu"], {"PYTHON": "/no/such/python"}, "PYTHON=/no/such/python is not a Python 3.11 or 3.12"),
    ],
)
def test_install_refuses_in_one_line(tmp_path, arguments, environment, said):
    done = run(LAUNCH / "install.sh", *arguments, DVPO_VENV=str(tmp_path / "venv"), **environment)
    assert done.returncode == 2 and said in done.stderr and is_one_line(done.stderr)
    assert not (tmp_path / "venv").exists()


def test_install_says_when_there_is_no_python(tmp_path):
    for tool in ("bash", "dirname", "basename", "mkdir", "mktemp", "uname", "flock", "cat", "sha256sum", "cut", "grep"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    done = run(LAUNCH / "install.sh", "cpu", DVPO_VENV=str(tmp_path / "venv"), PATH=str(tmp_path))
    assert done.returncode == 2 and "no Python 3.11 or 3.12" in done.stderr and is_one_line(done.stderr)


@pytest.mark.parametrize("is_used", [True, False])
def test_install_warns_of_a_process_that_uses_what_is_going_to_change(tmp_path, is_used):
    """The stand-in for Python passes every check and makes no environment, so nothing is installed."""
    venv = tmp_path / "venv"
    executable(tmp_path / "python", "[[ $1 == -c ]] || exit 9\n[[ $2 != *version()* ]] || echo 3.12.1")
    library = (venv if is_used else tmp_path) / "library.so"
    library.parent.mkdir(exist_ok=True)
    venv.mkdir(exist_ok=True)
    library.write_bytes(b"x")
    program = "import mmap, sys; f = open(sys.argv[1]); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program, str(library)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as user:
        user.stdout.readline()
        done = run(LAUNCH / "install.sh", "cpu", DVPO_VENV=str(venv), PYTHON=str(tmp_path / "python"))
        user.stdin.close()
    assert "an empty environment ... failed" in done.stdout
    warning = f"install.sh: warning: process {user.pid} runs from {venv}, and what it imports is going to change under it"
    assert (done.stderr.splitlines()[0] == warning) == is_used and done.stderr.count("warning") == is_used


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the launch scripts whose install.sh and environment are stand-ins that print how they are called."""
    root = tmp_path / "checkout"
    shutil.copytree(LAUNCH, root / "launch")
    shutil.copytree(ROOT / ".ci", root / ".ci")
    executable(root / "launch" / "install.sh", 'echo "install.sh $*"')
    for program in ("dvpo", "python"):
        executable(root / ".venv" / "bin" / program, f'echo "{program} $*"; exit 7')
    return root


def test_quickstart_installs_and_passes_its_arguments_on(checkout):
    done = run(checkout / "launch" / "quickstart.sh", "--out", "here")
    assert done.stdout.splitlines() == ["install.sh ", "dvpo quickstart --out here"] and done.returncode == 7


def test_tests_are_run_with_what_they_need_and_their_arguments(checkout, tmp_path):
    done = run(checkout / "launch" / "test.sh", "-k", "batch", cwd=tmp_path)
    assert done.stdout.splitlines() == ["install.sh dev", "python -m pytest -k batch"] and done.returncode == 7


def test_ci_runs_the_tests(checkout, tmp_path):
    done = run(checkout / ".ci" / "run", cwd=tmp_path)
    assert done.stdout.splitlines() == ["install.sh dev", "python -m pytest"] and done.returncode == 7


def test_a_failed_install_ends_there(checkout):
    executable(checkout / "launch" / "install.sh", "exit 3")
    done = run(checkout / "launch" / "quickstart.sh")
    assert done.returncode == 3 and not done.stdout


# ------------------------------------------------------------------------------------------ state of the environment


@pytest.fixture
def state(tmp_path, monkeypatch):
    """venv_state over an environment with two packages, recorded as complete for the CPU with the extra `dev`."""
    spec = importlib.util.spec_from_file_location("venv_state", LAUNCH / "venv_state.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    site = tmp_path / "site-packages"
    monkeypatch.setattr(module, "SITE_PACKAGES", site)
    monkeypatch.setattr(module, "STAMP", tmp_path / "stamp.json")
    for name in ("alpha", "beta"):
        add_package(site, name)
    module.record("key", "cpu", ["dev"])
    assert module.is_ready("key", ["dev"])
    return module


def add_package(site: Path, name: str, version: str = "1.0") -> None:
    source, info = site / name / "__init__.py", site / f"{name}-{version}.dist-info"
    source.parent.mkdir(parents=True)
    info.mkdir()
    source.write_text("x = 1\n")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text(f"{name}/__init__.py,sha256=abc,6\n{info.name}/METADATA,,\n{info.name}/RECORD,,\n")


def test_a_complete_environment_serves_fewer_extras_but_no_others(state):
    assert state.is_ready("key", [])
    assert not state.is_ready("key", ["wandb"])
    assert not state.is_ready("another key", [])


def test_no_or_a_broken_stamp_is_not_ready(state):
    state.STAMP.write_text('{"key": "key", "mo')
    assert not state.is_ready("key", []) and state.read_stamp() == {}
    state.STAMP.unlink()
    assert not state.is_ready("key", [])


@pytest.mark.parametrize(
    "damage",
    [
        lambda site: shutil.rmtree(site / "alpha"),
        lambda site: (site / "alpha" / "__init__.py").write_text(""),
        lambda site: (site / "alpha-1.0.dist-info" / "RECORD").unlink(),
        lambda site: (site / "alpha-1.0.dist-info" / "METADATA").unlink(),
    ],
    ids=["files deleted", "file cut short", "no RECORD", "no METADATA"],
)
def test_a_damaged_package_is_seen_and_made_to_look_absent(state, damage, capsys):
    damage(state.SITE_PACKAGES)
    assert not state.is_ready("key", [])
    assert state.main("sound", "cpu") == 1
    state.repair("cpu")
    assert state.main("sound", "cpu") == 0
    assert not (state.SITE_PACKAGES / "alpha-1.0.dist-info").exists() and "alpha-1.0" in capsys.readouterr().out
    assert (state.SITE_PACKAGES / "beta-1.0.dist-info").exists()
    shutil.rmtree(state.SITE_PACKAGES / "alpha", ignore_errors=True)
    add_package(state.SITE_PACKAGES, "alpha")
    assert state.is_ready("key", [])


def test_a_package_that_vanished_or_changed_its_version_is_seen(state):
    shutil.rmtree(state.SITE_PACKAGES / "alpha")
    shutil.rmtree(state.SITE_PACKAGES / "alpha-1.0.dist-info")
    assert not state.is_ready("key", [])
    add_package(state.SITE_PACKAGES, "alpha", "2.0")
    assert not state.is_ready("key", [])


def test_packages_that_the_user_added_are_welcome(state):
    add_package(state.SITE_PACKAGES, "mine")
    assert state.is_ready("key", [])


def test_a_stray_torchvision_is_removed_on_cpu_only(state):
    add_package(state.SITE_PACKAGES, "torchvision")
    assert not state.is_ready("key", [])
    state.repair("gpu")
    assert (state.SITE_PACKAGES / "torchvision").exists()
    state.repair("cpu")
    assert not (state.SITE_PACKAGES / "torchvision").exists() and state.is_ready("key", [])


def test_leftovers_of_an_interrupted_install_are_removed(state):
    (state.SITE_PACKAGES / "~lpha").mkdir()
    state.repair("cpu")
    assert not (state.SITE_PACKAGES / "~lpha").exists()


# ------------------------------------------------------------------------------------------------------------ submit


class Head:
    """A stand-in for the dashboard of a Ray head: it wants `token`, or none, or answers with a status of its own.

    It knows any job, in a state and with the exit status of its driver. With a state of None it is gone after its first answer.
    """

    def __init__(self, token: str | None = None, status: int | None = None, state: str | None = "SUCCEEDED", code: int | None = 0) -> None:
        head = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(head.answer(self.headers.get("Authorization"), token, status))
                self.end_headers()
                if not self.path.endswith("/jobs/"):
                    self.wfile.write(json.dumps({"status": state, "driver_exit_code": code}).encode())
                if state is None:
                    head.server.socket.close()

            def log_message(self, *_) -> None:
                """Nothing: the tests read what the script prints."""

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @staticmethod
    def answer(authorization: str | None, token: str | None, status: int | None) -> int:
        if status is not None:
            return status
        if token is None or authorization == f"Bearer {token}":
            return 200
        return 403 if authorization else 401


@pytest.fixture
def submit(tmp_path):
    """Run submit.sh in an environment whose `dvpo` and `ray` print how they are called, as a user without a token file."""
    binaries = tmp_path / "venv" / "bin"
    executable(binaries / "dvpo", '[[ $* != *wrong=* ]] || { echo "dvpo: unknown key wrong" >&2; exit 2; }')
    executable(binaries / "ray", 'printf "<%s> " "$@"; echo; echo "to $RAY_API_SERVER_ADDRESS mode ${RAY_AUTH_MODE:-unset}"')
    (binaries / "python").symlink_to(sys.executable)
    (tmp_path / "a folder").mkdir()

    def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        defaults = {"DVPO_VENV": str(tmp_path / "venv"), "HOME": str(tmp_path)}
        return run(LAUNCH / "submit.sh", *arguments, cwd=tmp_path / "a folder", **defaults | environment)

    return call


@pytest.mark.parametrize(
    ("head", "environment", "said"),
    [
        (None, {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}, "no Ray head answers at http://127.0.0.1:9"),
        (None, {"RAY_API_SERVER_ADDRESS": "127.0.0.1:9"}, "no Ray head answers at http://127.0.0.1:9"),
        (Head(token="secret"), {}, "wants a token"),
        (Head(token="secret"), {"RAY_AUTH_TOKEN": "guess"}, "refuses this token"),
        (Head(status=404), {}, "HTTP status 404"),
    ],
    ids=["no head", "no scheme", "no token", "wrong token", "another server"],
)
def test_submit_refuses_in_one_line(submit, head, environment, said):
    done = submit("config.yaml", **({"RAY_API_SERVER_ADDRESS": head.address} if head else {}) | environment)
    assert done.returncode == 2 and said in done.stderr and is_one_line(done.stderr) and not done.stdout


def test_submit_wants_a_config(submit):
    done = submit()
    assert done.returncode == 2 and "which config?" in done.stderr and is_one_line(done.stderr)


def test_submit_lets_dvpo_refuse_a_wrong_config_before_anything_else(submit):
    done = submit("config.yaml", "wrong=1", RAY_API_SERVER_ADDRESS="http://127.0.0.1:9")
    assert done.returncode == 2 and done.stderr == "dvpo: unknown key wrong\n"


def test_submit_without_an_environment_says_what_to_run(submit, tmp_path):
    done = submit("config.yaml", DVPO_VENV=str(tmp_path / "nothing"))
    assert done.returncode == 2 and "launch/install.sh" in done.stderr and is_one_line(done.stderr)


def test_submit_to_a_head_without_authentication(submit, tmp_path):
    head = Head()
    done = submit("config.yaml", "name=two words", RAY_API_SERVER_ADDRESS=head.address)
    call, target = done.stdout.splitlines()
    assert done.returncode == 0 and target == f"to {head.address} mode unset"
    patience = r"<--runtime-env-json> <\{\"env_vars\": \{\"RAY_JOB_STOP_WAIT_TIME_S\": \"30\"\}\}>"
    assert re.match(rf"<job> <submit> <--submission-id> <dvpo-[-0-9]+> {patience} <--> <bash> <-c> ", call)
    assert call.endswith(f"<{tmp_path}/a folder> <{tmp_path}/venv/bin> <config.yaml> <name=two words> ")


@pytest.mark.parametrize("place", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "home"])
def test_submit_finds_the_token_and_turns_authentication_on(submit, tmp_path, place):
    file = tmp_path / ("token" if place == "RAY_AUTH_TOKEN_PATH" else ".ray/auth_token")
    file.parent.mkdir(exist_ok=True)
    environment = {"RAY_AUTH_TOKEN": {"RAY_AUTH_TOKEN": "secret"}, "RAY_AUTH_TOKEN_PATH": {"RAY_AUTH_TOKEN_PATH": str(file)}}.get(place, {})
    if place != "RAY_AUTH_TOKEN":
        file.write_text("secret\n")
    head = Head(token="secret")
    done = submit("config.yaml", RAY_API_SERVER_ADDRESS=head.address.removeprefix("http://"), **environment)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == f"to {head.address} mode token"


def test_the_submitted_command_runs_dvpo_train_where_it_was_submitted(submit, tmp_path):
    executable(tmp_path / "venv" / "bin" / "ray", 'while [[ $1 != -- ]]; do shift; done; shift; cd /; exec "$@"')
    executable(tmp_path / "venv" / "bin" / "dvpo", '[[ $* == *--dry-run ]] || { pwd; printf "<%s>" dvpo "$@"; }')
    done = submit("config.yaml", "name=two words", "--resume", RAY_API_SERVER_ADDRESS=Head().address)
    assert done.stdout.splitlines() == [str(tmp_path / "a folder"), "<dvpo><train><config.yaml><name=two words><--resume>"]


@pytest.mark.parametrize(
    ("state", "code", "status", "said"),
    [
        ("SUCCEEDED", 0, 0, ""),
        ("FAILED", 2, 2, ""),
        ("FAILED", -9, 137, ""),
        ("FAILED", None, 1, ""),
        ("STOPPED", None, 143, ""),
        ("RUNNING", None, 2, "the output ended, but the job goes on; its output: ray job logs dvpo-"),
    ],
)
def test_submit_ends_with_the_status_of_the_job(submit, tmp_path, state, code, status, said):
    executable(tmp_path / "venv" / "bin" / "ray", f"exit {int(state == 'FAILED')}")  # as `ray job submit` ends
    done = submit("config.yaml", RAY_API_SERVER_ADDRESS=Head(state=state, code=code).address)
    assert done.returncode == status and said in done.stderr and bool(done.stderr) == bool(said)


def test_submit_says_when_the_head_is_gone(submit, tmp_path):
    executable(tmp_path / "venv" / "bin" / "ray", "exit 1")
    done = submit("config.yaml", RAY_API_SERVER_ADDRESS=Head(state=None).address)
    assert done.returncode == 2 and "does not answer any more" in done.stderr and is_one_line(done.stderr)


def test_the_dry_run_of_submit_leaves_the_size_of_the_cluster_to_the_cluster(submit, tmp_path):
    (tmp_path / "venv" / "bin" / "dvpo").unlink()
    (tmp_path / "venv" / "bin" / "dvpo").symlink_to(Path(sys.executable).with_name("dvpo"))
    config = ROOT / "cluster_configs" / "stories-cpu.yaml"
    done = submit(str(config), "ray.num_cpus=1", PYTHONPATH=str(ROOT), RAY_API_SERVER_ADDRESS=Head().address)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------------- slurm


@pytest.fixture
def slurm(tmp_path):
    """Run train.sbatch as Slurm would on three nodes, with stand-ins that write down their calls."""
    binaries, calls = tmp_path / ".venv" / "bin", tmp_path / "calls"
    executable(binaries / "dvpo", f'echo "dvpo $* at ${{RAY_ADDRESS:-}} mode ${{RAY_AUTH_MODE:-}} ${{#RAY_AUTH_TOKEN}}" >>{calls}; exit 5')
    executable(binaries / "ray", f'echo "ray $*" >>{calls}; [[ $1 != start ]] || exec sleep 60')
    executable(binaries / "srun", f'echo "srun $*" >>{calls}')
    executable(binaries / "scontrol", "printf 'n1\\nn2\\nn3\\n'")
    (binaries / "python").symlink_to(sys.executable)
    dry_run_passes = (binaries / "dvpo").read_text().replace("#!/usr/bin/env bash\n", "#!/usr/bin/env bash\n[[ $* != *--dry-run ]] || exit 0\n")
    (binaries / "dvpo").write_text(dry_run_passes)

    def call(*arguments: str) -> tuple[int, list[str]]:
        environment = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "n[1-3]"}
        done = run(LAUNCH / "slurm" / "train.sbatch", *arguments, **environment)
        return done.returncode, calls.read_text().splitlines()

    return call


def test_slurm_starts_a_head_and_workers_and_ends_with_the_status_of_the_training(slurm):
    status, calls = slurm("config.yaml", "train.steps=3")
    assert status == 5
    assert any(line.startswith("ray start") and line.endswith("--head --port 22345") for line in calls)
    assert any(line.startswith("srun --nodes=2") and "--exclude=n1" in line and line.endswith("--address n1:22345") for line in calls)
    assert "dvpo train config.yaml train.steps=3 --out runs/slurm-12345 at n1:22345 mode token 64" in calls


def test_a_requeued_slurm_job_resumes(slurm, tmp_path):
    (tmp_path / "runs" / "slurm-12345" / "checkpoints").mkdir(parents=True)
    _, calls = slurm("config.yaml")
    assert any(line.startswith("dvpo train config.yaml --out runs/slurm-12345 --resume") for line in calls)


# --------------------------------------------------------------------------------------------------------- bench_trl


def test_bench_trl_makes_its_environment_once_and_calls_dvpo(tmp_path):
    """Stand-ins: dvpo's Python names the versions and makes an environment whose pip writes down its arguments."""
    pip = tmp_path / "pip.txt"
    executable(tmp_path / "pip", f'echo "$@" >>{pip}')
    python = f"[[ $1 != -c ]] || exec echo torch==2.13.0+cpu transformers==5.19.0\nmkdir -p $3/bin && cp {tmp_path}/pip $3/bin/python"
    executable(tmp_path / "venv" / "bin" / "python", python)
    executable(tmp_path / "venv" / "bin" / "dvpo", 'echo "$@"')
    places = {"DVPO_VENV": str(tmp_path / "venv"), "DVPO_TRL_VENV": str(tmp_path / "trl")}
    for attempt in range(2):
        done = run(LAUNCH / "bench_trl.sh", "x.yaml", "seed=1", "--repeats", "2", **places)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"bench trl x.yaml seed=1 --repeats 2 --trl-python {tmp_path}/trl/bin/python"
        assert (f"making {tmp_path}/trl with trl==1.12.0" in done.stdout) == (attempt == 0)
    calls = pip.read_text().splitlines()
    assert [call.split()[:3] for call in calls] == [["-m", "pip", "install"]] * 2
    assert calls[-1].endswith("torch==2.13.0+cpu transformers==5.19.0 trl==1.12.0")


def test_bench_trl_refuses_in_one_line(tmp_path):
    for arguments, said in (([], "which config?"), (["x.yaml"], "run launch/install.sh first")):
        done = run(LAUNCH / "bench_trl.sh", *arguments, DVPO_VENV=str(tmp_path / "none"))
        assert done.returncode == 2 and said in done.stderr and is_one_line(done.stderr)
