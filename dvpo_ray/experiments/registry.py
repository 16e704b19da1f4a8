"""All experiments by the name that `dvpo experiment` knows them by. A new one is a `Study` and its line here."""

from __future__ import annotations

from dvpo_ray.experiments.advantage_modes import AdvantageModes
from dvpo_ray.experiments.bound import Bound
from dvpo_ray.experiments.convergence import Convergence
from dvpo_ray.experiments.distribution_shift import DistributionShift
from dvpo_ray.experiments.gvm_quality import GVMQuality
from dvpo_ray.experiments.gvm_size import GVMSize
from dvpo_ray.experiments.refresh import Refresh
from dvpo_ray.experiments.study import Study
from dvpo_ray.experiments.transfer import Transfer

STUDIES: dict[str, type[Study]] = {
    study.name: study for study in (GVMQuality, Convergence, Transfer, DistributionShift, Bound, Refresh, GVMSize, AdvantageModes)
}
