"""One data-parallel rank of a model under DeepSpeed: the base of all actors that train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import ray
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dvpo_ray.config.schema import DeepSpeedConfig, OptimizerConfig
from dvpo_ray.models.deepspeed import StepResult, TrainingEngine, init_process_group
from dvpo_ray.models.forward import check_rows_apart
from dvpo_ray.models.loading import default_device
from dvpo_ray.runtime.process import Actor

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class DeepSpeedRank(Actor):
    """A rank. `_shard` gives it its model; every other method is a collective of all ranks.

    Attributes:
        training: the model under DeepSpeed.
    """

    training: TrainingEngine

    @property
    def model(self) -> nn.Module:
        """The model as transformers or peft made it."""
        return self.training.model

    @property
    def engine(self) -> DeepSpeedEngine:
        """DeepSpeed's engine around the model, in training mode."""
        return self.training.engine

    def rendezvous(self, *_first: object) -> tuple[str, int]:
        """Address and free port where the ranks can meet. Call it on rank 0; with references to what must happen first."""
        from ray._common.network_utils import find_free_port

        return ray.util.get_node_ip_address(), find_free_port()

    def _join(self, num_ranks: int, master_addr: str, master_port: int) -> None:
        init_process_group(self.index, num_ranks, master_addr, master_port)

    def _shard(self, model: nn.Module, optimizer: OptimizerConfig, deepspeed: DeepSpeedConfig, dtype: torch.dtype, total_steps: int) -> None:
        """Put a model that was loaded in `loading` under DeepSpeed, for `total_steps` optimizer steps in the whole run."""
        self.training = TrainingEngine(model, optimizer, deepspeed, dtype, total_steps)
        check_rows_apart(self.model, self.engine)
        self.engine.train()

    def _optimizer_step(self, losses: Sequence[Callable[[], Tensor]]) -> StepResult:
        """One optimizer step over the micro-batches of a minibatch; see `TrainingEngine.step`."""
        return self.training.step(losses)

    # ---------------------------------------------------------------------------------------------- off-load

    def offload(self, parameters: bool = True) -> None:
        """Give the device's memory back until `reload`; without `parameters` the model stays, for forward passes and for a sync."""
        self.training.offload(parameters=parameters)

    def reload(self) -> None:
        """Bring back what `offload` has moved away."""
        self.training.reload()

    # -------------------------------------------------------------------------------------------- checkpoints

    def save_checkpoint(self, folder: str) -> None:
        """Write the sharded model, optimizer and schedule."""
        self.training.save(folder, tag=self.role)

    def load_checkpoint(self, folder: str) -> None:
        """Continue from what `save_checkpoint` wrote."""
        self.training.load(folder, tag=self.role)


def over_ranks(values: Sequence[float], op: dist.ReduceOp) -> list[float]:
    """Each number summed over all ranks, or its maximum over them."""
    tensor = torch.tensor(values, dtype=torch.float64, device=default_device())
    dist.all_reduce(tensor, op)
    return tensor.tolist()
