"""Stands in for Python where Ray starts a worker: the worker becomes a fork of `fork_server`, or Python where no server answers.

It runs without site-packages, so it imports the standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from array import array

SOCKETS = "DVPO_FORK_SERVERS"
"""Environment variable with the paths of the servers' sockets, the best one first, separated by colons."""

PROCESS_WIDE = {
    # OpenMP threads that spin while another process computes make both more than ten times slower. GNU's threads, which torch uses, spin
    # for a moment before they sleep: the next operation often follows at once, and to wake them costs a sixth of an update.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "5000",  # a fraction of a millisecond
    # Otherwise glibc returns every larger tensor to the system and fetches new pages for the next: a quarter of a small model's pass.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
}
"""Variables that a process reads once, when it starts. All actors have them, so a fork has its server's."""

_LENGTH = 4


def send(server: socket.socket) -> None:
    """Send what this process was started with: arguments, environment, working folder, signal mask and standard streams."""
    blocked = [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])]
    request = {"arguments": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd(), "blocked_signals": blocked}
    text = json.dumps(request).encode()
    streams = array("i", [0, 1, 2])
    server.sendmsg([len(text).to_bytes(_LENGTH, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    server.sendall(text)


def receive(client: socket.socket) -> tuple[dict | None, array]:
    """What `send` sent, None if the client ended before it had, and the file descriptors of the client's standard streams."""
    descriptors, text = array("i"), b""
    try:
        head, ancillary, _, _ = client.recvmsg(_LENGTH, socket.CMSG_LEN(3 * descriptors.itemsize))
        for _, _, data in ancillary:
            descriptors.frombytes(data)
        length = int.from_bytes(head, "big")
        while len(text) < length and (part := client.recv(length - len(text))):
            text += part
    except ConnectionError:
        return None, descriptors
    return (json.loads(text) if text and len(text) == length else None), descriptors


def send_status(client: socket.socket, status: int) -> None:
    """Tell a client how its process ended; it may be gone."""
    with contextlib.suppress(OSError):
        client.sendall(status.to_bytes(_LENGTH, "big", signed=True))


def main() -> int:
    for path in os.environ.get(SOCKETS, "").split(":"):
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            server.connect(path)
        except OSError:
            continue
        send(server)
        status = server.recv(_LENGTH)
        return int.from_bytes(status, "big", signed=True) if status else 1
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
