"""report.html: one self-contained page about a run, from whatever its folder holds."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from string import Template

from dvpo_ray import __version__
from dvpo_ray.files import whole_file
from dvpo_ray.monitoring.markup import escape, tag
from dvpo_ray.monitoring.report_charts import Curves
from dvpo_ray.monitoring.report_summary import attention, header, summary
from dvpo_ray.monitoring.report_texts import all_metrics, config, samples, token_credit
from dvpo_ray.monitoring.run_data import RunData, load_run


def write_report(run_folder: str | Path, warn: Callable[[str], None] | None = None) -> Path:
    """Write report.html of a run, finished or not.

    The page needs no network. Lines of the run's files that cannot be used are named on it, and left out.

    Args:
        warn: is told of them too, one line each.

    Returns:
        The path of report.html.

    Raises:
        InputError: the folder is not there, or holds nothing of a run.
    """
    run = load_run(run_folder)
    for note in run.notes if warn is not None else ():
        warn(note)
    template = resources.files("dvpo_ray.monitoring").joinpath("report_template.html").read_text(encoding="utf-8")
    path = run.folder / "report.html"
    page = Template(template).substitute(title=escape(f"{run.name} · DVPO report"), body=_body(run))
    with whole_file(path) as file:
        file.write(page)
    return path


def _body(run: RunData) -> str:
    learning, value_model, update, work = _curves(run)
    texts = samples(run) + token_credit(run)
    sections = [summary(run), attention(run), learning, texts, value_model, update, work, all_metrics(run), config(run)]
    footer = tag("footer", f"dvpo-ray {escape(__version__)} · {escape(run.folder.resolve().name)}")
    return header(run) + tag("main", *sections, footer)


def _curves(run: RunData) -> list[str]:
    """Four sections of charts; empty where there is nothing to draw."""
    if not run.metrics:
        notice = tag("div", "No training step has been logged: metrics.jsonl is missing or empty, so there are no curves.", class_="notice")
        return [notice, "", "", ""]
    curves = Curves(run)
    return [
        _section("Learning", "Is the policy better, and how far has it moved to get there?", list(curves.learning())),
        _section("Global Value Model", "How good is the value model that the advantages come from?", list(curves.value_model())),
        _section("Update", "Is each policy update sound?", list(curves.update())),
        _section("Resources", "Where do time and memory go?", list(curves.resources())),
    ]


def _section(title: str, question: str, charts: list[str]) -> str:
    if not charts:
        return ""
    return tag("section", tag("h2", title), tag("p", question, class_="lead"), tag("div", *charts, class_="charts"))
