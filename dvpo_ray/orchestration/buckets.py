"""Weights as flat byte buckets that travel through the Ray object store."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch

_ALIGNMENT = 64  # bytes; every tensor of a bucket starts where any dtype may start


def pack(weights: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int, checksum: bool) -> Iterator[dict]:
    """Cut a stream of weights into buckets of about `bucket_bytes`; a larger tensor gets a bucket of its own.

    Yields:
        `names`, `dtypes`, `shapes` of the tensors, `data` uint8 with their bytes one after the other, each aligned, and
        `crc32` of `data` (None without `checksum`): the arguments of `unpack`.
    """
    names, dtypes, shapes, chunks, size = [], [], [], [], 0

    def bucket() -> dict:
        data = np.concatenate(chunks)
        return {"names": names, "dtypes": dtypes, "shapes": shapes, "data": data, "crc32": zlib.crc32(data) if checksum else None}

    for name, tensor in weights:
        raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        if names and size + len(raw) > bucket_bytes:
            yield bucket()
            names, dtypes, shapes, chunks, size = [], [], [], [], 0
        names.append(name)
        dtypes.append(str(tensor.dtype).removeprefix("torch."))
        shapes.append(tuple(tensor.shape))
        chunks += [raw, np.zeros(-len(raw) % _ALIGNMENT, np.uint8)]
        size += len(raw) + len(chunks[-1])
    if names:
        yield bucket()


def unpack(
    names: list[str], dtypes: list[str], shapes: list[tuple[int, ...]], data: np.ndarray, crc32: int | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a bucket, as read-only views of its bytes.

    Raises:
        ValueError: the bytes don't have the checksum they were sent with.
    """
    if crc32 is not None and zlib.crc32(data) != crc32:
        raise ValueError(f"weight bucket {names[0]} … {names[-1]} arrived damaged: CRC-32 differs")
    offset = 0
    for name, dtype_name, shape in zip(names, dtypes, shapes, strict=True):
        dtype = getattr(torch, dtype_name)
        size = dtype.itemsize * int(np.prod(shape))
        with warnings.catch_warnings():  # the object store's memory is read-only, and so are these views
            warnings.filterwarnings("ignore", message=".*not writable.*")
            view = torch.from_numpy(data[offset : offset + size])
        yield name, view.view(dtype).reshape(shape)
        offset += size + (-size % _ALIGNMENT)
