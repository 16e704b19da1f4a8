"""The command of `launch/gpu_check.sh`."""

from __future__ import annotations

import argparse
import difflib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from dvpo_ray.bench.gpu_check.runner import Step, run_steps
from dvpo_ray.bench.gpu_check.steps import STEPS
from dvpo_ray.config.paths import path_option
from dvpo_ray.runtime.doctor import listed_gpus

PROGRAM = "gpu_check.sh"
RESULTS = ("table.md", "results.json")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0: all steps worked, missed targets or not; 1: something failed; 2: bad arguments, in one line."""
    width = max(len(step.name) for step in STEPS)
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Check this package on this machine's GPU and measure its speed. Nothing is installed and no network is used.",
        epilog="steps, in their order:\n" + "\n".join(f"  {step.name:<{width}}  {step.about}, at most {step.seconds:g} s" for step in STEPS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", metavar="OUT", type=path_option, help="folder of table.md, results.json and the logs; new or without such results")
    parser.add_argument("steps", metavar="STEP", nargs="*", help="steps to run (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the same steps with tiny shapes (default: cuda)")
    parser.add_argument("--seconds", metavar="N", type=float, default=470.0, help="for all steps together (default: 470)")
    args = parser.parse_args(arguments)
    gpus = _gpus() if args.device == "cuda" else []
    problem = _problem(args.out, args.steps, args.device, gpus)
    if problem is not None:
        print(f"{PROGRAM}: {problem}", file=sys.stderr)
        return 2
    end_when_told()
    chosen = [step for step in STEPS if not args.steps or step.name in args.steps]
    ended = run_steps(chosen, args.out.resolve(), args.device, args.seconds, gpus)
    print((args.out / "table.md").resolve())
    return int(any(one.failed for one in ended))


def end_when_told() -> None:
    """SIGTERM ends this process as an exception does: what it has is written, and its steps are ended."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def _gpus() -> list[str]:
    """The GPUs of this machine; without `nvidia-smi`, as in some containers, their devices."""
    return listed_gpus() or [f"GPU: {device.name}" for device in sorted(Path("/dev").glob("nvidia[0-9]*"))]


def _problem(out: Path, names: Sequence[str], device: str, gpus: Sequence[str], steps: Sequence[Step] = STEPS) -> str | None:
    known = [step.name for step in steps]
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown, known, n=1)
        return f"unknown step {unknown}{f', did you mean {near[0]}?' if near else ';'} known: {', '.join(known)}"
    if out.exists() and not out.is_dir():
        return f"{out}: a file; give a folder"
    there = next((name for name in RESULTS if (out / name).exists()), None)
    if there is not None:
        return f"{out}: has the results of another check ({there}); give another folder"
    if device == "cuda" and not gpus:
        return "this machine has no NVIDIA GPU; --device cpu runs the same steps with tiny shapes"
    return None


if __name__ == "__main__":
    sys.exit(main())
