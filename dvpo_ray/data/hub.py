"""Whether the hub of models and data sets can be reached, found out in seconds.

Without a network, its libraries try for a minute for every file of every name, and a misspelt path of this machine looks like a name.
"""

from __future__ import annotations

import os
import socket
import urllib.request
from functools import cache
from urllib.parse import urlsplit

CONNECT_SECONDS = 3.0
NEITHER_HERE_NOR_CACHED = "not on this machine, not in the cache of the hub, and the hub is switched off or cannot be reached"


def prepare_hub() -> bool:
    """Whether the hub can be asked. If it cannot be reached, its libraries use only their cache, here and in processes started later."""
    import datasets
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and not _is_reachable(constants.ENDPOINT):
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE


@cache
def _is_reachable(endpoint: str) -> bool:
    address = urlsplit(endpoint)
    if address.scheme in urllib.request.getproxies():
        return True  # only the proxy can tell
    try:
        socket.create_connection((address.hostname, address.port or (80 if address.scheme == "http" else 443)), CONNECT_SECONDS).close()
    except OSError:
        return False
    return True
