"""Tensors that leave a device's memory for a while: their content waits in host memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

PINNED_BYTES = 2**28
"""Host memory is pinned in pieces of so many bytes, because torch takes the next power of two for each."""


class HostMemory:
    """Holds the content of tensors while others use the memory of their device.

    A tensor stays the object that it is, and so do all views of its memory: they are empty until `bring_back`, and then as before.
    Nothing may read them in between.

    Args:
        device: tensors elsewhere are left where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._hosts: dict[int, list[Tensor]] = {}
        self._away: dict[int, tuple[torch.UntypedStorage, int]] = {}

    def take(self, tensors: Iterable[Tensor], scratch: Iterable[Tensor] = ()) -> None:
        """Copy tensors to the host and give their memory back; those that are away already stay so.

        Args:
            scratch: tensors whose content is of no use later.
        """
        kept, lost = self._storages(tensors), self._storages(scratch)
        self._hosts = {key: host for key, host in self._hosts.items() if key in kept or key in self._away}
        for key, storage in kept.items():
            pieces = _bytes(storage).split(PINNED_BYTES)
            if key not in self._hosts or sum(map(len, self._hosts[key])) != storage.nbytes():
                self._hosts[key] = [torch.empty(len(piece), dtype=torch.uint8, pin_memory=self.device.type == "cuda") for piece in pieces]
            for host, piece in zip(self._hosts[key], pieces, strict=True):
                host.copy_(piece, non_blocking=True)
        self._wait()
        for key, storage in (lost | kept).items():
            self._away[key] = storage, storage.nbytes()
            storage.resize_(0)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def bring_back(self) -> None:
        """Give every tensor its memory and its content again. The memory on the host stays for the next time."""
        for key, (storage, size) in self._away.items():
            storage.resize_(size)
            for host, piece in zip(self._hosts.get(key, ()), _bytes(storage).split(PINNED_BYTES), strict=False):
                piece.copy_(host, non_blocking=True)
        self._wait()
        self._away = {}

    def _storages(self, tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
        """The memory behind tensors on the device, each once; a file that is mapped into memory is left out."""
        found = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
        return {key: s for key, s in found.items() if s.device.type == self.device.type and s.nbytes() and s.resizable()}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
