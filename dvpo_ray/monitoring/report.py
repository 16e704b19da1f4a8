"""report.html: one self-contained page about a run, from whatever its folder holds."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from string import Template

from dvpo_ray import __version__
from dvpo_ray.monitoring.markup import escape, tag
from dvpo_ray.monitoring.report_charts import Curves
from dvpo_ray.monitoring.report_summary import attention, header, summary
from dvpo_ray.monitoring.report_texts import all_metrics, config, samples, token_credit
from dvpo_ray.monitoring.run_data import RunData, load_run
from dvpo_ray.monitoring.run_files import write_atomically


def write_report(run_folder: str | Path) -> Path:
    """Write report.html of a run, finished or not.

    The page needs no network. Lines of the run's files that cannot be used are named on it, and left out.

    Returns:
        The path of report.html.

    Raises:
        InputError: the folder is not there, or holds nothing of a run.
    """
    run = load_run(run_folder)
    template = resources.files("dvpo_ray.monitoring").joinpath("report_template.html").read_text(encoding="utf-8")
    path = run.folder / "report.html"
    write_atomically(path, Template(template).substitute(title=escape(f"{run.name} · DVPO report"), body=_body(run)))
    return path


def _body(run: RunData) -> str:
    learning, update, resources_used = _curves(run)
    sections = [summary(run), attention(run), learning, samples(run), token_credit(run), update, resources_used, all_metrics(run), config(run)]
    footer = tag("footer", f"dvpo-ray {escape(__version__)} · {escape(run.folder.resolve().name)}")
    return header(run) + tag("main", *sections, footer)


def _curves(run: RunData) -> list[str]:
    """Three sections of charts; empty where there is nothing to draw."""
    if not run.metrics:
        return [tag("div", "No training step has been logged: metrics.jsonl is missing or empty, so there are no curves.", class_="notice"), "", ""]
    curves = Curves(run)
    return [
        _section("Learning", "Is the policy better, and how far has it moved to get there?", list(curves.learning())),
        _section("Update", "Is each policy update sound?", list(curves.update())),
        _section("Resources", "Where do time and memory go?", list(curves.resources())),
    ]


def _section(title: str, question: str, charts: list[str]) -> str:
    if not charts:
        return ""
    return tag("section", tag("h2", title), tag("p", question, class_="lead"), tag("div", *charts, class_="charts"))
