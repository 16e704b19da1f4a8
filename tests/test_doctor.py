"""The doctor names what is wrong and what to do about it, and outlives libraries that crash."""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from dvpo_ray.runtime import doctor
from dvpo_ray.runtime.doctor import GIB, Check, Library

SOUND_MODULES = {
    "torch.py": """
        __version__ = "2.99"
        class cuda:
            device_count = staticmethod(lambda: 0)
            get_device_properties = None
        class _C:
            _dispatch_get_all_op_names = staticmethod(lambda: ["aten::add", "_C::rms_norm"])
    """,
    "transformers.py": "__version__ = '5.99'; AutoModelForCausalLM = None",
    "vllm/__init__.py": "__version__ = '0.99'; LLM = None",
    "vllm/platforms.py": "class current_platform: device_type = 'cpu'; import_kernels = staticmethod(lambda: None)",
    "ray.py": "__version__ = '2.98'",
    "deepspeed/__init__.py": "__version__ = '0.98'",
    "deepspeed/accelerator.py": "class _A: _name = 'cpu'\nget_accelerator = _A",
}


@pytest.fixture
def fake_libraries(tmp_path, monkeypatch):
    """Stand-ins for the heavy libraries, before the real ones on the path; returns a function that replaces one of them."""

    def write(file: str, source: str) -> None:
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        lines = source.strip("\n").splitlines()
        indent = len(lines[0]) - len(lines[0].lstrip())
        path.write_text("\n".join(line[indent:] for line in lines) + "\n")

    for file, source in SOUND_MODULES.items():
        write(file, source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return write


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def library(name: str) -> Library:
    return next(library for library in doctor.LIBRARIES if library.name == name)


def test_sound_libraries_pass_with_their_versions(fake_libraries):
    checks = by_name(doctor.run_checks())
    assert {checks[name].status for name in ("PyTorch", "transformers", "vLLM", "Ray", "DeepSpeed")} == {"ok"}
    assert checks["PyTorch"].found == "2.99"
    assert checks["vLLM"].found == "0.99 for cpu"
    assert all(check.advice for check in checks.values() if check.status != "ok")


def test_every_broken_library_is_a_finding_of_its_own(fake_libraries):
    fake_libraries("vllm/__init__.py", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    fake_libraries("deepspeed/__init__.py", "raise ImportError('libwhatever.so: cannot open shared object file')")
    fake_libraries("transformers.py", "__version__ = '5.99'")
    checks = by_name(doctor.run_checks())
    assert checks["vLLM"].status == checks["DeepSpeed"].status == checks["transformers"].status == "fail"
    assert "SIGSEGV" in checks["vLLM"].found and "rollout.backend=transformers" in checks["vLLM"].advice
    assert checks["DeepSpeed"].found == "ImportError: libwhatever.so: cannot open shared object file"
    assert "AutoModelForCausalLM" in checks["transformers"].found and "torchvision" in checks["transformers"].advice
    assert checks["Ray"].status == checks["PyTorch"].status == "ok"


def test_a_library_that_hangs_is_a_finding(fake_libraries):
    fake_libraries("ray.py", "import time; time.sleep(600)")
    check, facts = doctor.import_library(library("Ray"), timeout_seconds=0.5)
    assert check.status == "fail" and "0.5 seconds" in check.found and facts == {}


def test_what_a_library_prints_is_not_taken_for_facts(fake_libraries):
    fake_libraries("ray.py", "print('loading', end=''); __version__ = '2.98'")
    assert doctor.import_library(library("Ray"))[0] == Check("Ray", "ok", "2.98")


def test_a_crash_at_exit_does_not_matter(fake_libraries):
    fake_libraries("ray.py", "import atexit, os\n__version__ = '2.98'\natexit.register(os.abort)")
    assert doctor.import_library(library("Ray"))[0].status == "ok"


@pytest.mark.parametrize(
    ("returncode", "stderr", "expected"),
    [
        (-signal.SIGILL, "", "this CPU doesn't have"),
        (-signal.SIGKILL, "text", "SIGKILL"),
        (1, "Traceback:\n  line\nValueError: no\n\n", "ValueError: no"),
        (3, "", "exit status 3"),
    ],
)
def test_failures_are_one_line(returncode, stderr, expected):
    text = doctor.describe_failure(returncode, stderr)
    assert expected in text and "\n" not in text


def test_gpus_that_pytorch_cannot_use_are_a_failure():
    assert doctor.check_gpus([], []).status == "ok"
    assert doctor.check_gpus([], ["GPU 0: NVIDIA H200"]).status == "fail"
    usable = doctor.check_gpus([("NVIDIA H200", 140 * GIB)], ["GPU 0: NVIDIA H200"])
    assert usable.status == "ok" and "140 GiB" in usable.found


@pytest.mark.parametrize(("gib", "status"), [(32, "ok"), (6, "warn"), (1, "fail")])
def test_memory(gib, status):
    check = doctor.check_memory(gib * GIB)
    assert check.status == status


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("free_gib", "total_gib", "status", "said"),
    [(100, 200, "ok", ""), (5, 20, "warn", "free some space"), (0.5, 20, "fail", "free some space"), (20, 2000, "warn", "95 %")],
)
def test_disk_of_ray(monkeypatch, tmp_path, free_gib, total_gib, status, said):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: Usage(total_gib * GIB, int((total_gib - free_gib) * GIB), int(free_gib * GIB)))
    check = doctor.check_disk("disk", doctor.ray_temporary_folder())
    assert check.status == status and said in check.advice


def test_shared_memory_that_is_small_or_absent_is_a_warning(monkeypatch, tmp_path):
    assert doctor.check_shared_memory(tmp_path / "absent").status == "warn"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: Usage(64 * 2**20, 0, 64 * 2**20))
    assert "--shm-size" in doctor.check_shared_memory(tmp_path).advice


def test_open_files():
    assert doctor.check_open_files(1024).status == "warn"
    assert doctor.check_open_files(65535).status == "ok"
    assert doctor.check_open_files(resource.RLIM_INFINITY)[:3] == ("open files", "ok", "no limit")


def test_cores_respect_a_container_quota(monkeypatch):
    monkeypatch.setattr(doctor, "read_cgroup", lambda name: "50000 100000" if name == "cpu.max" else "")
    assert doctor.usable_cores() == 0.5 and doctor.check_cpus(0.5).status == "warn"
    monkeypatch.setattr(doctor, "read_cgroup", lambda name: "max 100000")
    assert doctor.usable_cores() == len(os.sched_getaffinity(0))


def test_memory_respects_a_container_limit(monkeypatch):
    limits = {"memory.max": str(GIB // 4), "memory.current": str(GIB // 8), "memory.stat": f"anon 7\ninactive_file {GIB // 16}"}
    monkeypatch.setattr(doctor, "read_cgroup", lambda name: limits.get(name, ""))
    assert doctor.available_memory_bytes() == GIB // 8 + GIB // 16


def test_report_counts_and_returns_the_exit_status():
    lines: list[str] = []
    sound, warning = Check("Python", "ok", "3.11", "use 3.11"), Check("memory", "warn", "6 GiB", "buy some")
    assert doctor.print_report([sound, warning], lines.append) == 0
    assert doctor.print_report([sound, Check("vLLM", "fail", "crashed", "repair it")], lines.append) == 2
    text = "\n".join(lines)
    assert "FAIL  vLLM               crashed" in text and "-> repair it" in text and "1 failed, 0 with a warning, 1 ok" in text
    assert "use 3.11" not in text  # advice is for what is not well


def test_a_library_that_takes_long_is_named_while_it_is_imported(fake_libraries, monkeypatch):
    fake_libraries("deepspeed/__init__.py", "import time; time.sleep(2); __version__ = '0.98'")
    monkeypatch.setattr(doctor, "SILENCE_SECONDS", 0.5)
    said = []
    assert by_name(doctor.run_checks(said.append))["DeepSpeed"].status == "ok"
    assert re.fullmatch(r" +still importing DeepSpeed: \d s so far", said[-1]), said


def test_a_line_comes_as_soon_as_its_check_is_done(fake_libraries, tmp_path):
    flag = tmp_path / "go"
    wait = f"import os, time\nfor _ in range(600):\n    os.path.exists('{flag}') or time.sleep(0.05)\n"
    fake_libraries("transformers.py", wait + SOUND_MODULES["transformers.py"])
    checks = doctor.run_checks()
    before = [next(checks).name for _ in range(13)]
    flag.touch()
    after = [check.name for check in checks]
    assert {"Python", "memory", "Ray's folder", "PyTorch", "GPUs", "vLLM", "Ray", "DeepSpeed"} <= set(before) and after == ["transformers"]


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_a_temporary_folder_too_long_for_rays_sockets(monkeypatch, variable):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    socket = f"/ray/session_2026-01-02_03-04-05_678901_{os.getpid()}/sockets/plasma_store"
    for extra, status in ((0, "ok"), (1, "fail")):
        folder = "/" + "t" * (107 - len(socket) - 1 + extra)
        monkeypatch.setenv(variable, folder)
        check = doctor.check_ray_folder(doctor.ray_temporary_folder())
        assert check.status == status and "RAY_TMPDIR" in check.advice
        assert check.found == f"{folder} has {len(folder)} bytes, Ray's sockets allow {107 - len(socket)}"


def test_doctor_itself_needs_only_the_standard_library():
    source = Path(doctor.__file__).read_text()
    imported = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imported <= set(sys.stdlib_module_names)


def test_vllm_without_its_compiled_kernels_is_a_failure(fake_libraries):
    fake_libraries("torch.py", SOUND_MODULES["torch.py"].replace('"_C::rms_norm"', '"aten::mul"'))
    check = by_name(doctor.run_checks())["vLLM"]
    assert check.status == "fail" and "its compiled kernels do not load" in check.found
