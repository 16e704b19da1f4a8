"""What a value model is worth in another domain: accuracy there, and the policies it makes there, beside the domain's own value model."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from dvpo_ray.config.paths import name_or_path_option
from dvpo_ray.errors import InputError
from dvpo_ray.experiments.readings import MAIN_VIEWS, accuracies, draw_bars, read_curve
from dvpo_ray.experiments.results import Result, columns
from dvpo_ray.experiments.study import Run, Study, override, variants

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABEL = "value model of → judged on"


class Domain(NamedTuple):
    """A preference set: pairs for a value model, and their prompts for a policy."""

    name: str
    train: str
    heldout: str

    @classmethod
    def parse(cls, text: str) -> Domain:
        """Read `NAME=TRAIN,HELDOUT`."""
        name, _, paths = text.partition("=")
        train, _, heldout = paths.partition(",")
        if not name.isidentifier() or not train or not heldout:
            raise ArgumentTypeError(f"{text}: expected NAME=TRAIN,HELDOUT, for example helpful=helpful.train.jsonl,helpful.dev.jsonl")
        return cls(name, name_or_path_option(train), name_or_path_option(heldout))

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
        help = "a preference set and its held-out pairs; give the option twice, once for each domain"
        parser.add_argument("--domain", type=Domain.parse, action="append", required=True, metavar="NAME=TRAIN,HELDOUT", help=help)
        parser.add_argument("--accuracy-only", action="store_true", help="do not optimise policies")

    def runs(self) -> list[Run]:
        domains = self.options.domain
        if len({domain.name for domain in domains}) != 2 or len(domains) != 2:
            raise InputError(f"--domain: transfer is between two domains of different names, got {', '.join(domain.name for domain in domains)}")
        files = [file for domain in domains for file in (domain.train, domain.heldout)]
        twice = next((file for file in files if files.count(file) > 1), None)
        if twice is not None:
            raise InputError(f"--domain: {twice} is given twice; transfer needs four different files")
        self.require(judge=not self.options.accuracy_only)
        return [run for seed in self.seeds for run in self._of_seed(domains, seed)]

    def _of_seed(self, domains: Sequence[Domain], seed: int) -> list[Run]:
        value_models = {domain: self.run("gvm", f"gvm-{domain.name}", seed, *domain.overrides("preferences")) for domain in domains}
        path = {domain: override("gvm.path", run.final) for domain, run in value_models.items()}
        pairs = [(source, target, f"{source.name}-on-{target.name}") for source, target in product(domains, repeat=2)]
        abroad = [
            self.run("gvm-eval", f"eval-{name}", seed, path[source], *target.overrides("preferences"))
            for source, target, name in pairs
            if source != target
        ]
        policies = [
            self.run("policy", f"policy-{name}", seed, path[source], *target.overrides("prompts"))
            for source, target, name in pairs
            if not self.options.accuracy_only
        ]
        return [*value_models.values(), *abroad, *policies]

    def result(self, runs: Sequence[Run]) -> Result:
        by_variant = variants(runs)
        gold = ("gold before", "final gold", "gold gain", "final KL")
        table = []
        for source, target in product([domain.name for domain in self.options.domain], repeat=2):
            judged = by_variant[f"gvm-{source}" if source == target else f"eval-{source}-on-{target}"]
            row = {LABEL: f"{source} → {target}"} | columns([accuracies(run) for run in judged])
            curves = [read_curve(run) for run in by_variant.get(f"policy-{source}-on-{target}", [])]
            numbers = [(curve.gold[0], curve.gold[-1], curve.gold[-1] - curve.gold[0], curve.kl[-1]) for curve in curves]
            table.append(row | columns([dict(zip(gold, of_seed, strict=True)) for of_seed in numbers]))
        return Result(table, lambda figure: draw(figure, table), columns=(*MAIN_VIEWS, "longer_wins", *gold))


def draw(figure: Figure, table: Sequence[dict]) -> None:
    """Accuracy of each value model in both domains, and what the policies gained there with it."""
    gained = "gold gain" in table[0]
    panels = figure.subplots(1, 1 + gained, squeeze=False)[0]
    draw_bars(panels[0], table, ("last", "mean"), LABEL)
    panels[0].set_ylabel("held-out accuracy")
    panels[0].axhline(0.5, color="grey", linewidth=0.8)
    if gained:
        draw_bars(panels[1], table, ("gold gain",), LABEL)
        panels[1].set_ylabel("gain in gold, held-out prompts")
