"""`dvpo doctor`: what this machine has of what a run needs, and what to do about what is missing.

The libraries are imported in processes of their own, so that one that crashes or hangs is a finding like any other. This
module needs nothing but the standard library.
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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Status = Literal["ok", "warn", "fail"]

IMPORT_TIMEOUT_SECONDS = 600.0
GIB = 2**30
SHARED_MEMORY_GIB = 2.0
DISK_GIB, LEAST_DISK_GIB = 10.0, 1.0
MEMORY_GIB, LEAST_MEMORY_GIB = 10.0, 4.0
OPEN_FILES = 4096
RAY_DISK_LIMIT = 0.95
"""Ray creates no more objects once the disk of its temporary folder is fuller than this."""

REPAIR = "run launch/install.sh; it repairs what is broken"


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        found: what is there, or what went wrong.
        advice: what to do about it; empty when all is well.
    """

    name: str
    status: Status
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Library:
    """A library that a run needs.

    Attributes:
        probe: Python statements that import it and put what they learn into the dict `facts`.
        advice: what to do when they fail.
    """

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
        "run launch/install.sh; beside PyTorch for CPU it also removes torchvision, whose CUDA build breaks this import",
    ),
    Library(
        "vLLM",
        "import vllm\nfrom vllm import LLM\nfrom vllm.platforms import current_platform\n"
        "facts['version'] = vllm.__version__\nfacts['device'] = current_platform.device_type\n"
        "if facts['device'] == 'cpu':\n"  # vLLM only warns when its kernels don't load, and fails when they are first used
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


def run_checks() -> list[Check]:
    """Examine the machine and the Python environment; takes about as long as importing the libraries."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        results = list(pool.map(import_library, LIBRARIES))
    torch_facts = results[0][1]
    return [
        check_python(),
        *(check for check, _ in results),
        check_gpus(torch_facts.get("gpus", []), listed_gpus()),
        check_cpus(),
        check_threads(os.environ.get("OMP_NUM_THREADS"), os.environ.get("OMP_WAIT_POLICY")),
        check_memory(available_memory_bytes()),
        check_shared_memory(Path("/dev/shm")),
        check_disk("disk, this folder", Path.cwd()),
        check_disk("disk, Ray's", ray_temporary_folder()),
        check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
    ]


def print_report(checks: Sequence[Check], say: Callable[[str], None] = print) -> int:
    """Print the checks as a table.

    Returns:
        The exit status: 2 when a check failed, else 0.
    """
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = check.status if check.status == "ok" else check.status.upper()
        say(f"{mark:<5} {check.name:<{width}}  {check.found}")
        if check.advice:
            say(f"{'':<5} {'':<{width}}  -> {check.advice}")
    failed, warned = (sum(check.status == status for check in checks) for status in ("fail", "warn"))
    say(f"\n{failed} failed, {warned} with a warning, {len(checks) - failed - warned} ok")
    return 2 if failed else 0


# ------------------------------------------------------------------------------------------------------- libraries


def import_library(library: Library, timeout_seconds: float = IMPORT_TIMEOUT_SECONDS) -> tuple[Check, dict]:
    """Import a library in a process of its own.

    Returns:
        The check, and the facts that the probe found (empty when it failed).
    """
    marker = "dvpo-doctor-facts:"
    code = f"import json\nfacts = {{}}\n{library.probe}\nprint('\\n{marker}' + json.dumps(facts), flush=True)\n"
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, errors="replace", timeout=timeout_seconds, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return Check(library.name, "fail", f"still importing after {timeout_seconds:g} seconds", library.advice), {}
    facts = [line.removeprefix(marker) for line in done.stdout.splitlines() if line.startswith(marker)]
    if not facts:  # a crash while the process ends, after the facts, is no concern of a run
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
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"ended with exit status {returncode} and said nothing"


def check_python() -> Check:
    """The interpreter and where it lives."""
    found = f"{platform.python_version()} in {sys.prefix}"
    if (3, 11) <= sys.version_info[:2] <= (3, 12):
        return Check("Python", "ok", found)
    return Check("Python", "fail", found, "use Python 3.11 or 3.12: PYTHON=/path/to/python3.12 launch/install.sh")


# --------------------------------------------------------------------------------------------------------- devices


def listed_gpus() -> list[str]:
    """GPUs by the driver's own account; empty where there is no driver."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
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
        found = ", ".join(f"{name} ({memory / GIB:.0f} GiB)" for name, memory in usable)
        return Check("GPUs", "ok", f"{len(usable)}: {found}")
    if listed:
        advice = "run launch/install.sh gpu if PyTorch above is a +cpu build; else update the NVIDIA driver, or unset CUDA_VISIBLE_DEVICES"
        return Check("GPUs", "fail", f"nvidia-smi lists {len(listed)}, PyTorch can use none", advice)
    return Check("GPUs", "ok", "none; runs use the CPU (cluster_configs/local-cpu.yaml)")


def check_cpus() -> Check:
    """CPU cores that this process may use."""
    cores = usable_cores()
    if cores >= 2:
        return Check("CPU cores", "ok", f"{cores:g}")
    return Check("CPU cores", "warn", f"{cores:g}", "give the machine or the container at least 2 cores; with fewer, roles wait for each other")


def usable_cores() -> float:
    """Cores in this process's affinity mask, or the container's quota where that is less."""
    cores = float(len(os.sched_getaffinity(0)))
    quota, _, period = read_cgroup("cpu.max").partition(" ")
    return min(cores, int(quota) / int(period)) if quota.isdigit() and period.isdigit() else cores


def check_threads(omp_threads: str | None, wait_policy: str | None) -> Check:
    """OpenMP's variables in the environment. The actors set their own; these act on everything else."""
    found = f"OMP_NUM_THREADS {omp_threads or 'not set'}, OMP_WAIT_POLICY {wait_policy or 'not set'}"
    if omp_threads and omp_threads.isdigit() and int(omp_threads) > usable_cores():
        return Check("threads", "warn", found, f"unset OMP_NUM_THREADS, or set it to {usable_cores():.0f} at most")
    if wait_policy and wait_policy.upper() == "ACTIVE":
        return Check("threads", "warn", found, "set OMP_WAIT_POLICY=PASSIVE: threads that spin slow the other processes down")
    return Check("threads", "ok", found)


# ------------------------------------------------------------------------------------------------ memory and disk


def available_memory_bytes() -> int:
    """Memory that can be had without swapping, or what is left of the container's limit where that is less."""
    kib = {line.split(":")[0]: int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines()}
    available = kib["MemAvailable"] * 1024
    limit, used = read_cgroup("memory.max"), read_cgroup("memory.current")
    if not (limit.isdigit() and used.isdigit()):
        return available
    statistics = dict(line.split() for line in read_cgroup("memory.stat").splitlines())
    cached = int(statistics.get("inactive_file", 0))  # counted as used, given up when needed
    return min(available, int(limit) - int(used) + cached)


def read_cgroup(name: str) -> str:
    """A file of the container's control group (version 2); empty where there is none."""
    try:
        return (Path("/sys/fs/cgroup") / name).read_text().strip()
    except OSError:
        return ""


def check_memory(available_bytes: int) -> Check:
    """Memory for the models: the quickstart takes up to `MEMORY_GIB`."""
    gib = available_bytes / GIB
    if gib >= MEMORY_GIB:
        return Check("memory", "ok", f"{gib:.1f} GiB available")
    advice = f"end other programs or use a larger machine; the quickstart takes up to {MEMORY_GIB:.0f} GiB"
    return Check("memory", "warn" if gib >= LEAST_MEMORY_GIB else "fail", f"{gib:.1f} GiB available", advice)


def check_shared_memory(folder: Path) -> Check:
    """Shared memory, in which Ray keeps the objects that actors exchange."""
    advice = "in Docker: docker run --shm-size=8g; elsewhere: mount -o remount,size=8G /dev/shm. Without it Ray uses the disk"
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Check("shared memory", "warn", f"{folder} can't be written", advice)
    gib = shutil.disk_usage(folder).free / GIB
    found = f"{gib:.1f} GiB free in {folder}"
    return Check("shared memory", "ok", found) if gib >= SHARED_MEMORY_GIB else Check("shared memory", "warn", found, advice)


def ray_temporary_folder() -> Path:
    """The folder under which Ray keeps its sessions, logs and spilled objects."""
    return Path(os.environ.get("RAY_TMPDIR", "/tmp"))


def check_disk(name: str, folder: Path) -> Check:
    """Free space for checkpoints and logs."""
    usage = shutil.disk_usage(folder)
    gib, share = usage.free / GIB, usage.used / (usage.used + usage.free)
    found = f"{gib:.0f} GiB free in {folder}"
    if gib < LEAST_DISK_GIB:
        return Check(name, "fail", found, "free some space; a run's checkpoints and Ray's logs don't fit")
    if share > RAY_DISK_LIMIT and folder == ray_temporary_folder():
        return Check(
            name, "warn", f"{found}, {share:.0%} full", "Ray stops making objects at 95 %: free some space, or set RAY_TMPDIR to another disk"
        )
    if gib < DISK_GIB:
        return Check(name, "warn", found, f"free some space; {DISK_GIB:.0f} GiB take a small run's checkpoints")
    return Check(name, "ok", found)


def check_open_files(limit: int) -> Check:
    """The limit of open files; every Ray process opens some hundred."""
    found = "no limit" if limit == resource.RLIM_INFINITY else f"{limit} at most"
    if limit == resource.RLIM_INFINITY or limit >= OPEN_FILES:
        return Check("open files", "ok", found)
    return Check("open files", "warn", found, "ulimit -n 65535 before the start; with many actors Ray needs more than this")
