"""The object-store transport: weights as buckets of arrays, and the learner's end. The engine's end is its backend's `update_weights`."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import ray
import torch

from dvpo_ray.config.schema import WeightSyncConfig
from dvpo_ray.sync.client import EngineClient, WeightStream


class ObjectStoreSender:
    """Buckets through the Ray object store: one copy per node, whatever the number of engines on it."""

    def __init__(self, client: EngineClient, weights: WeightStream, is_sender: bool, sync: WeightSyncConfig) -> None:
        self.client, self.weights, self.is_sender = client, weights, is_sender
        self.bucket_bytes = int(sync.bucket_mib * 2**20)
        self.checksum = sync.checksum
        if is_sender:
            client.init_weight_transfer_engine({})

    def send(self, version: int, *, changing_only: bool) -> None:
        if not self.is_sender:
            for _ in self.weights(changing_only):  # gathering sharded weights is a collective of all ranks
                pass
            return
        self.client.begin()
        self.client.start_weight_update()
        loaded: Callable[[], None] = lambda: None  # noqa: E731
        for bucket in pack(self.weights(changing_only), self.bucket_bytes, self.checksum):
            stored = ray.put(bucket)  # while the engines load the bucket before it
            loaded()
            loaded = self.client.start_bucket(stored)
        loaded()
        self.client.finish_weight_update()
        self.client.set_policy_version(version)


def pack(weights: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int, checksum: bool) -> Iterator[dict]:
    """Cut a stream of weights into buckets of at most `bucket_bytes`. A larger tensor gets a bucket of its own.

    A tensor that is contiguous and on the CPU is not copied here. The object store copies each array once, into shared memory.
    Tensors on a GPU come through one page-locked buffer, so the data of a bucket are lost when the next one is asked for.

    Yields:
        `names`, `dtypes`, `shapes` of the tensors, `data` uint8 arrays with their bytes, and `crc32` of all bytes (None without
        `checksum`): the arguments of `unpack`.
    """
    names, dtypes, shapes, data, size = [], [], [], [], 0
    staging = torch.empty(0, dtype=torch.uint8)

    def bucket() -> dict:
        if staging.numel():
            torch.cuda.synchronize()
        return {"names": names, "dtypes": dtypes, "shapes": shapes, "data": data, "crc32": _crc32(data) if checksum else None}

    for name, tensor in weights:
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        if names and size + len(raw) > bucket_bytes:
            yield bucket()
            names, dtypes, shapes, data, size = [], [], [], [], 0
        names.append(name)
        dtypes.append(str(tensor.dtype).removeprefix("torch."))
        shapes.append(tuple(tensor.shape))
        if raw.is_cuda:
            if size + len(raw) > staging.numel():  # the first weight of a bucket, so the buffer holds nothing
                staging = torch.empty(max(bucket_bytes, len(raw)), dtype=torch.uint8, pin_memory=True)
            raw = staging[size : size + len(raw)].copy_(raw, non_blocking=True)
        data.append(raw.numpy())
        size += len(raw)
    if names:
        yield bucket()


def unpack(
    names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[tuple[int, ...]], data: Sequence[np.ndarray], crc32: int | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a bucket, as views of its bytes; bytes of the object store are read-only.

    Raises:
        ValueError: the checksum of the bytes differs.
    """
    if crc32 is not None and _crc32(data) != crc32:
        raise ValueError(f"weight bucket {names[0]} … {names[-1]} arrived damaged: CRC-32 differs")
    for name, dtype, shape, raw in zip(names, dtypes, shapes, data, strict=True):
        with warnings.catch_warnings():  # the object store's memory is read-only, and so are these views
            warnings.filterwarnings("ignore", message=".*not writable.*")
            view = torch.from_numpy(raw)
        yield name, view.view(getattr(torch, dtype)).reshape(shape)


def _crc32(data: Iterable[np.ndarray]) -> int:
    total = 0
    for raw in data:
        total = zlib.crc32(raw, total)
    return total
