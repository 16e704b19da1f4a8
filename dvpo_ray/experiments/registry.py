"""All experiments by the name that `dvpo experiment` knows them by. A new one is a `Study` and its line here."""

from __future__ import annotations

from dvpo_ray.experiments.advantage_modes import AdvantageModes
from dvpo_ray.experiments.study import Study

STUDIES: dict[str, type[Study]] = {study.name: study for study in (AdvantageModes,)}
