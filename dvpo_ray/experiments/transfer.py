"""What a value model is worth in another domain: accuracy there, and the policies it makes there, beside the domain's own value model."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dvpo_ray.errors import InputError
from dvpo_ray.experiments.accuracy import MAIN_VIEWS, accuracy_columns, draw_bars
from dvpo_ray.experiments.curves import read_curve
from dvpo_ray.experiments.results import Result, Statistic, over_seeds
from dvpo_ray.experiments.study import Run, Study, override, variants

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Domain:
    """A preference set: pairs for a value model, and their prompts for a policy."""

    name: str
    train: str
    heldout: str

    @classmethod
    def parse(cls, text: str) -> Domain:
        """Read `NAME=TRAIN,HELDOUT`.

        Raises:
            InputError: it has another form.
        """
        name, _, paths = text.partition("=")
        train, _, heldout = paths.partition(",")
        if not name.isidentifier() or not train or not heldout:
            raise InputError(f"--domain {text}: expected NAME=TRAIN,HELDOUT, for example helpful=helpful.train.jsonl,helpful.dev.jsonl")
        if train == heldout:
            raise InputError(f"--domain {text}: the held-out pairs are the training pairs; give others")
        return cls(name, train, heldout)

    def overrides(self, section: str) -> list[str]:
        """This domain as `data.preferences` or `data.prompts`."""
        settings = {"path": self.train, "split": "train", "heldout_path": self.heldout, "heldout_split": None}
        return [override(f"data.{section}.{key}", value) for key, value in settings.items()]


class Transfer(Study):
    name = "transfer"
    help = "value models trained in one domain, judged and used in another"
    example = (
        "dvpo experiment transfer cluster_configs/local-cpu.yaml --domain helpful=helpful.train.jsonl,helpful.dev.jsonl "
        "--domain harmless=harmless.train.jsonl,harmless.dev.jsonl"
    )

    @classmethod
    def add_options(cls, parser: ArgumentParser) -> None:
        help = "two preference sets with their held-out pairs; give it twice"
        parser.add_argument("--domain", action="append", required=True, metavar="NAME=TRAIN,HELDOUT", help=help)
        parser.add_argument("--accuracy-only", action="store_true", help="optimise no policies")

    def runs(self) -> list[Run]:
        domains = [Domain.parse(text) for text in self.options.domain]
        if len({domain.name for domain in domains}) != 2 or len(domains) != 2:
            raise InputError(f"--domain: transfer is between two domains of different names, got {', '.join(domain.name for domain in domains)}")
        first, second = domains
        for mine, other in ((first.train, second.train), (first.heldout, second.heldout)):
            if mine == other:
                raise InputError(f"--domain: {mine} is in both domains, {first.name} and {second.name}; transfer is between two different ones")
        if not self.options.accuracy_only:
            self.require_judge()
        return [run for seed in self.seeds for run in self._of_seed(domains, seed)]

    def _of_seed(self, domains: Sequence[Domain], seed: int) -> list[Run]:
        value_models = {domain: self.run("gvm", f"gvm-{domain.name}", seed, *domain.overrides("preferences")) for domain in domains}
        pairs = [(source, target) for source in domains for target in domains]
        path = {domain: override("gvm.path", str(run.folder / "final")) for domain, run in value_models.items()}
        abroad = [
            self.run("gvm-eval", _on("eval", source, target), seed, path[source], *target.overrides("preferences"))
            for source, target in pairs
            if source != target
        ]
        policies = [self.run("policy", _on("policy", source, target), seed, path[source], *target.overrides("prompts")) for source, target in pairs]
        return [*value_models.values(), *abroad, *([] if self.options.accuracy_only else policies)]

    def result(self, runs: Sequence[Run]) -> Result:
        by_variant = variants(runs)
        names = [Domain.parse(text).name for text in self.options.domain]
        table = []
        for source in names:
            for target in names:
                judged = by_variant[f"gvm-{source}" if source == target else f"eval-{source}-on-{target}"]
                row = {"value model of → judged on": f"{source} → {target}"} | accuracy_columns(judged)
                table.append(row | _policy_columns(by_variant.get(f"policy-{source}-on-{target}", [])))
        shown = (*MAIN_VIEWS, "longer_wins", "gold before", "final gold", "gold gain", "final KL")
        return Result(table, lambda figure: draw(figure, table), columns=shown)


def _on(what: str, source: Domain, target: Domain) -> str:
    return f"{what}-{source.name}-on-{target.name}"


def _policy_columns(runs: Sequence[Run]) -> dict[str, Statistic]:
    if not runs:
        return {}
    curves = [read_curve(run) for run in runs]
    return {
        "gold before": over_seeds([curve.gold[0] for curve in curves]),
        "final gold": over_seeds([curve.gold[-1] for curve in curves]),
        "gold gain": over_seeds([curve.gold[-1] - curve.gold[0] for curve in curves]),
        "final KL": over_seeds([curve.kl[-1] for curve in curves]),
    }


def draw(figure: Figure, table: Sequence[dict]) -> None:
    """Accuracy of each value model in both domains, and what the policies gained there with it."""
    label = next(iter(table[0]))
    gained = "gold gain" in table[0]
    panels = figure.subplots(1, 1 + gained, squeeze=False)[0]
    draw_bars(panels[0], table, ("last", "mean"), label)
    panels[0].set_ylabel("held-out accuracy")
    panels[0].axhline(0.5, color="grey", linewidth=0.8)
    if gained:
        draw_bars(panels[1], table, ("gold gain",), label)
        panels[1].set_ylabel("gain in gold, held-out prompts")
