"""The metrics of an update. They stay on the device until its end, and travel between ranks as sums."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


class Tally:
    """Shares of metrics by forward pass, combined over passes, optimizer steps and ranks at the end.

    A metric is the sum of the shares of an optimizer step, and then the mean over optimizer steps. A name that ends in `_max` is a
    maximum over all.
    """

    def __init__(self) -> None:
        self._shares: dict[str, list[Tensor]] = {}
        self._steps: dict[str, int] = {}
        self._norms: list[Tensor | float] = []

    def add(self, metrics: Mapping[str, Tensor], *, steps: int) -> None:
        """Take in the shares of a forward pass.

        Args:
            metrics: scalars.
            steps: how many optimizer steps of the update have these metrics.
        """
        for name, value in metrics.items():
            self._shares.setdefault(name, []).append(value)
            self._steps[name] = steps

    def end_step(self, grad_norm: Tensor | float) -> None:
        """Take in the gradient norm of an optimizer step; it is the same on all ranks."""
        self._norms.append(grad_norm)

    def of_all_ranks(self) -> tuple[dict[str, float], float]:
        """The metrics of the whole batch, and the mean gradient norm; a collective of all ranks."""
        summed = [name for name in self._shares if not name.endswith("_max")]
        largest = [name for name in self._shares if name.endswith("_max")]
        sums = self._reduced([torch.stack(self._shares[name]).double().sum() / self._steps[name] for name in summed], dist.ReduceOp.SUM)
        maxima = self._reduced([torch.stack(self._shares[name]).double().max() for name in largest], dist.ReduceOp.MAX)
        norm = sum(float(norm) for norm in self._norms) / len(self._norms)
        return dict(zip([*summed, *largest], [*sums, *maxima], strict=True)), norm

    @staticmethod
    def _reduced(values: list[Tensor], op: dist.ReduceOp) -> list[float]:
        if not values:
            return []
        stacked = torch.stack(values)
        dist.all_reduce(stacked, op)
        return stacked.tolist()
