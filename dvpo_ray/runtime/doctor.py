"""`dvpo doctor`: what this machine has of what a run needs, and what to do about what is missing.

Each library is imported in its own process, so a library that crashes or hangs is a finding like any other. This module
needs nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Literal, NamedTuple

Status = Literal["ok", "warn", "fail"]

IMPORT_TIMEOUT_SECONDS = 600.0
SILENCE_SECONDS = 8.0
GIB = 2**30
SHARED_MEMORY_GIB = 2.0
DISK_GIB, LEAST_DISK_GIB = 10.0, 1.0
MEMORY_GIB, LEAST_MEMORY_GIB = 10.0, 4.0
OPEN_FILES = 4096
RAY_DISK_LIMIT = 0.95
"""Ray creates no more objects once the disk of its temporary folder is fuller than this."""
SOCKET_PATH_BYTES = 107
"""The longest path of a Unix socket."""
NAME_WIDTH = 17
"""Of the column with the names of the checks."""

REPAIR = "run launch/install.sh; it repairs what is broken"


class Check(NamedTuple):
    """One line of the report: what was found, and what to do about it unless all is well."""

    name: str
    status: Status
    found: str
    advice: str = ""


class Library(NamedTuple):
    """A library that a run needs. Its probe imports it and puts what it learns into the dict `facts`."""

    name: str
    probe: str
    advice: str = REPAIR


LIBRARIES = (
    Library(
        "PyTorch",
        "import torch\n"
        "facts['version'] = torch.__version__\n"
        "facts['gpus'] = [[p.name, p.total_memory] for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))]",
    ),
    Library(
        "transformers",
        "import transformers\nfrom transformers import AutoModelForCausalLM\nfacts['version'] = transformers.__version__",
        "run launch/install.sh; beside PyTorch for CPU it removes torchvision, whose CUDA build breaks this import",
    ),
    Library(
        "vLLM",
        "import vllm\nfrom vllm import LLM\nfrom vllm.platforms import current_platform\n"
        "facts['version'] = vllm.__version__\nfacts['device'] = current_platform.device_type\n"
        "if facts['device'] == 'cpu':\n"  # when its kernels don't load, vLLM only warns, and fails at their first use
        "    import torch\n"
        "    current_platform.import_kernels()\n"
        "    kernels = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith('_C::')]\n"
        "    assert kernels, 'its compiled kernels do not load; is libnuma installed (Debian, Ubuntu: apt install libnuma1)?'",
        REPAIR + "; without vLLM, runs with rollout.backend=transformers work",
    ),
    Library("Ray", "import ray\nfacts['version'] = ray.__version__"),
    Library(
        "DeepSpeed",
        "import deepspeed\nfrom deepspeed.accelerator import get_accelerator\n"
        "facts['version'] = deepspeed.__version__\nfacts['device'] = get_accelerator()._name",
    ),
)


def run_checks(say: Callable[[str], None] = lambda line: None) -> Iterator[Check]:
    """Examine the machine and the Python environment. Each check comes when it is done, those of the libraries last.

    Args:
        say: gets a line on what goes on whenever no check is done for `SILENCE_SECONDS`.
    """
    yield Check("Python", "ok", f"{platform.python_version()} in {sys.prefix}")
    yield check_cpus(usable_cores())
    yield check_memory(available_memory_bytes())
    yield check_shared_memory(Path("/dev/shm"))
    yield check_disk("disk, this folder", Path.cwd())
    yield check_disk("disk, Ray's", ray_temporary_folder())
    yield check_ray_folder(ray_temporary_folder())
    yield check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    with ThreadPoolExecutor(max_workers=2) as pool:
        results = {pool.submit(import_library, library): library for library in LIBRARIES}
        pending, began = set(results), time.monotonic()
        while pending:
            finished, pending = wait(pending, SILENCE_SECONDS, return_when=FIRST_COMPLETED)
            for done in finished:
                check, facts = done.result()
                yield check
                if results[done].name == "PyTorch":
                    yield check_gpus(facts.get("gpus", []), listed_gpus())
            if not finished:
                names = " and ".join(results[one].name for one in pending if one.running())
                say(f"{'':<5} still importing {names}: {time.monotonic() - began:.0f} s so far")


def print_report(checks: Iterable[Check], say: Callable[[str], None] = print) -> int:
    """Print the checks as a table, each as it comes.

    Returns:
        The exit status: 2 when a check failed, else 0.
    """
    counts: Counter[Status] = Counter()
    for check in checks:
        counts[check.status] += 1
        mark = check.status if check.status == "ok" else check.status.upper()
        say(f"{mark:<5} {check.name:<{NAME_WIDTH}}  {check.found}")
        if check.status != "ok":
            say(f"{'':<5} {'':<{NAME_WIDTH}}  -> {check.advice}")
    say(f"\n{counts['fail']} failed, {counts['warn']} with a warning, {counts['ok']} ok")
    return 2 if counts["fail"] else 0


def import_library(library: Library, timeout_seconds: float = IMPORT_TIMEOUT_SECONDS) -> tuple[Check, dict]:
    """Import a library in its own process.

    Returns:
        The check, and the facts that the probe found (empty when it failed).
    """
    marker = "dvpo-doctor-facts:"
    code = f"import json\nfacts = {{}}\n{library.probe}\nprint('\\n{marker}' + json.dumps(facts), flush=True)\n"
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_seconds, env=environment)
    except subprocess.TimeoutExpired:
        return Check(library.name, "fail", f"still importing after {timeout_seconds:g} seconds", library.advice), {}
    facts = [line.removeprefix(marker) for line in done.stdout.splitlines() if line.startswith(marker)]
    if not facts:  # a crash while the process ends, after the facts, does not matter to a run
        return Check(library.name, "fail", describe_failure(done.returncode, done.stderr), library.advice), {}
    found = json.loads(facts[-1])
    device = f" for {found['device']}" if found.get("device") else ""
    return Check(library.name, "ok", f"{found['version']}{device}"), found


def describe_failure(returncode: int, stderr: str) -> str:
    """One line on why a process failed: the signal that ended it, or the last line it wrote."""
    if returncode == -signal.SIGILL:
        return "crashed (SIGILL): this build uses instructions that this CPU doesn't have"
    if returncode < 0:
        return f"crashed ({signal.Signals(-returncode).name})"
    lines = stderr.strip().splitlines()
    return lines[-1][:300] if lines else f"ended with exit status {returncode} and wrote nothing"


def graded(amount: float, enough: float, least: float = 0.0) -> Status:
    return "ok" if amount >= enough else "warn" if amount >= least else "fail"


# ----------------------------------------------------------------------------------------------------- GPUs and CPUs


def listed_gpus() -> list[str]:
    """The GPUs that the driver lists; empty when there is no driver."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in done.stdout.splitlines() if line.startswith("GPU ")]


def check_gpus(usable: Sequence[tuple[str, int]], listed: Sequence[str]) -> Check:
    """GPUs that PyTorch can use, against those that the driver lists.

    Args:
        usable: name and memory in bytes of each GPU that PyTorch sees.
        listed: lines of `nvidia-smi -L`.
    """
    if usable:
        return Check("GPUs", "ok", f"{len(usable)}: " + ", ".join(f"{name} ({memory / GIB:.0f} GiB)" for name, memory in usable))
    if listed:
        advice = "run launch/install.sh gpu if PyTorch above is a +cpu build; else update the NVIDIA driver, or unset CUDA_VISIBLE_DEVICES"
        return Check("GPUs", "fail", f"nvidia-smi lists {len(listed)}, PyTorch can use none", advice)
    return Check("GPUs", "ok", "none; runs use the CPU (cluster_configs/local-cpu.yaml)")


def check_cpus(cores: float) -> Check:
    advice = "give the machine or the container at least 2 cores; with fewer, roles wait for each other"
    return Check("CPU cores", graded(cores, 2), f"{cores:g}", advice)


def usable_cores() -> float:
    """Cores that this process may use, or the container's quota if that is less."""
    cores = float(len(os.sched_getaffinity(0)))
    quota, _, period = read_cgroup("cpu.max").partition(" ")
    return min(cores, int(quota) / int(period)) if quota.isdigit() and period.isdigit() else cores


def read_cgroup(name: str) -> str:
    """A file of the container's control group (version 2); empty when there is none."""
    try:
        return (Path("/sys/fs/cgroup") / name).read_text().strip()
    except OSError:
        return ""


# ------------------------------------------------------------------------------------------------ memory and disk


def available_memory_bytes() -> int:
    """Memory that is available without swapping, or what is left of the container's limit if that is less."""
    kib = {line.split(":")[0]: int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines()}
    available = kib["MemAvailable"] * 1024
    limit, used = read_cgroup("memory.max"), read_cgroup("memory.current")
    if not (limit.isdigit() and used.isdigit()):
        return available
    statistics = dict(line.split() for line in read_cgroup("memory.stat").splitlines())
    cached = int(statistics.get("inactive_file", 0))  # counted as used, given up when needed
    return min(available, int(limit) - int(used) + cached)


def check_memory(available_bytes: int) -> Check:
    """Memory for the models."""
    gib = available_bytes / GIB
    advice = f"end other programs or use a larger machine; the quickstart takes up to {MEMORY_GIB:.0f} GiB"
    return Check("memory", graded(gib, MEMORY_GIB, LEAST_MEMORY_GIB), f"{gib:.1f} GiB available", advice)


def check_shared_memory(folder: Path) -> Check:
    """Shared memory, in which Ray keeps the objects that actors exchange."""
    advice = "in Docker: docker run --shm-size=8g; elsewhere: mount -o remount,size=8G /dev/shm. Without it Ray uses the disk"
    if not os.access(folder, os.W_OK):
        return Check("shared memory", "warn", f"{folder} can't be written to", advice)
    gib = shutil.disk_usage(folder).free / GIB
    return Check("shared memory", graded(gib, SHARED_MEMORY_GIB), f"{gib:.1f} GiB free in {folder}", advice)


def ray_temporary_folder() -> Path:
    """The folder in which Ray keeps its sessions, sockets, logs and spilled objects."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")


def check_ray_folder(folder: Path) -> Check:
    """The length of Ray's temporary folder: its name stands before the names of Ray's sockets."""
    session = f"/ray/session_2000-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    limit, length = SOCKET_PATH_BYTES - len(session), len(os.fsencode(folder))
    found = f"{folder} has {length} bytes, Ray's sockets allow {limit}"
    return Check("Ray's folder", "ok" if length <= limit else "fail", found, "set RAY_TMPDIR to a folder with a shorter name, such as /tmp")


def check_disk(name: str, folder: Path) -> Check:
    """Free space for checkpoints and logs."""
    usage = shutil.disk_usage(folder)
    gib, share = usage.free / GIB, usage.used / (usage.used + usage.free)
    found = f"{gib:.0f} GiB free in {folder}"
    if gib >= LEAST_DISK_GIB and share > RAY_DISK_LIMIT and folder == ray_temporary_folder():
        advice = "Ray stops making objects at 95 %: free some space, or set RAY_TMPDIR to another disk"
        return Check(name, "warn", f"{found}, {share:.0%} full", advice)
    advice = f"free some space; the checkpoints and logs of a small run take up to {DISK_GIB:.0f} GiB"
    return Check(name, graded(gib, DISK_GIB, LEAST_DISK_GIB), found, advice)


def check_open_files(limit: int) -> Check:
    """The limit of open files; every Ray process opens some hundred."""
    unlimited = limit == resource.RLIM_INFINITY
    advice = "run ulimit -n 65535 before the start; with many actors Ray needs more than this"
    return Check("open files", graded(OPEN_FILES if unlimited else limit, OPEN_FILES), "no limit" if unlimited else f"{limit} at most", advice)
