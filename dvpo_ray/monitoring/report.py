"""report.html: one self-contained page about a run, from whatever its folder holds."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path

from jinja2 import Environment

from dvpo_ray import __version__
from dvpo_ray.files import whole_file
from dvpo_ray.monitoring import report_summary, report_texts
from dvpo_ray.monitoring.ending import RESULTS, uses
from dvpo_ray.monitoring.report_charts import chart_sections
from dvpo_ray.monitoring.run_data import DIED, RunData, load_run
from dvpo_ray.monitoring.run_files import from_here

_BADGES = {"finished": "good", "failed": "bad", DIED: "bad", "stopped": "warn", "interrupted": "warn", "running": "warn"}
_KINDS = {"train": "policy", "gvm": "Global Value Model", "rm": "reward model", "sft": "SFT", "dpo": "DPO"}
_CONTROL = {code: "\ufffd" for code in [*range(0x20), 0x7F] if chr(code) not in "\n\t"}


def write_report(run_folder: str | Path, warn: Callable[[str], None] | None = None) -> Path:
    """Write report.html of a run, finished or not.

    The page loads nothing from the network. It names the lines of the run's files that it cannot use, and leaves them out.

    Args:
        warn: gets them too, one line each.

    Returns:
        The path of report.html.

    Raises:
        InputError: the folder is not there, or it is not a run folder.
    """
    run = load_run(run_folder)
    for note in run.notes if warn is not None else ():
        warn(note)
    template = resources.files("dvpo_ray.monitoring").joinpath("report_template.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(template).render(_content(run))
    # HTML cannot hold control characters and lone surrogates.
    page = page.encode("utf-16", "surrogatepass").decode("utf-16", "replace").translate(_CONTROL)
    path = run.folder / "report.html"
    with whole_file(path) as file:
        file.write(page)
    return path


def _content(run: RunData) -> dict:
    """What the template shows."""
    return {
        "run": run,
        "kind": _KINDS[run.stage],
        "result": RESULTS[run.stage],
        "badge": _BADGES.get(run.state, ""),
        "outcome": report_summary.outcome(run),
        "origin": report_summary.origin(run),
        "uses": uses(from_here(run.folder.resolve()), run.stage, run.settings) if (run.folder / "final").is_dir() else {},
        "facts": report_summary.facts(run),
        "headline": report_summary.headline(run),
        "tiles": report_summary.tiles(run),
        "alarms": report_summary.alarms(run),
        "findings": list(report_summary.findings(run)),
        "notes": [note for note in run.summary.get("notes") or () if note not in (run.summary.get("warnings") or ())],
        "sections": chart_sections(run) if run.metrics else {},
        "samples": report_texts.samples(run),
        "credit": report_texts.token_credit(run),
        "all_metrics": report_texts.all_metrics(run),
        "version": __version__,
    }
