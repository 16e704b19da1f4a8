"""Whether the hub of models and data sets can be reached, found out in seconds.

Without a network, its libraries try for a minute for every file of every name, and a misspelt path of this machine looks like a name.
"""

from __future__ import annotations

import os
import socket
import tempfile
import urllib.request
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError
from urllib.parse import urlsplit

from dvpo_ray.config.inputs import NAMED_DATA, Needed, is_local, or_with_suffix
from dvpo_ray.errors import InputError

CONNECT_SECONDS = 3.0
ANSWER_SECONDS = 5.0
"""All that is done to reach the hub ends by then. To look up its address alone can take half a minute, and nothing else limits that."""
NEITHER_HERE_NOR_CACHED = "not on this machine, not in the cache of the hub, and the hub is switched off or cannot be reached"


def prepare_hub() -> bool:
    """Whether the hub can be asked. If it cannot be reached, its libraries use only their cache, here and in processes started later."""
    import datasets
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and not _is_reachable(constants.ENDPOINT):
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE


def names(*needed: Needed) -> list[Needed]:
    """Those that are named for the hub."""
    return [one for one in needed if one.kind in ("policy", "trunk", "data") and (one.path in NAMED_DATA or not is_local(one.path))]


def not_checked(needed: Iterable[Needed]) -> list[str]:
    """One line on the names that are taken for ones of the hub, but for those that are probably a file of this machine."""
    named = [f"{one.key} {one.path}" for one in names(*needed) if not or_with_suffix(one.path)]
    return [f"taken for names on the hub, which a dry run does not ask: {', '.join(named)}"] if named else []


def refuse_unreachable(*needed: Needed) -> None:
    """Refuse hub names that cannot be had here, in seconds: before the libraries are imported that would find it out.

    Raises:
        InputError: names the first of them and its key.
    """
    on_hub = names(*needed)
    if not on_hub:
        return
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and _is_reachable(constants.ENDPOINT):
        return
    for one in on_hub:
        if not _may_be_cached(one):
            advice = "; give a checkpoint folder with config.json"
            if one.kind == "data":
                advice = or_with_suffix(one.path) or "; give a file or folder of rows"
            raise InputError(f"{one.key} {one.path}: {NEITHER_HERE_NOR_CACHED}{advice}")


def _may_be_cached(one: Needed) -> bool:
    """Whether the caches have a model, or for data anything of its owner: `datasets` writes the rest of the name in its own spelling."""
    from huggingface_hub import constants

    name = NAMED_DATA.get(one.path, one.path)
    if one.kind != "data":
        return _in_hub_cache("models", name)
    owner = name.partition("/")[0]
    rows = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    return _in_hub_cache("datasets", name) or any(rows.glob(f"{owner}*"))


def _in_hub_cache(kind: str, name: str) -> bool:
    from huggingface_hub import constants

    return (Path(constants.HF_HUB_CACHE) / "--".join([kind, *name.split("/")])).is_dir()


def unwritable_cache() -> str | None:
    """Why the hub's libraries fail where their cache is in a home folder that cannot be written to, and what helps; None where it can be."""
    from huggingface_hub import constants

    try:
        os.makedirs(constants.HF_HOME, exist_ok=True)
        tempfile.TemporaryFile(dir=constants.HF_HOME).close()
    except OSError as error:
        return f"the cache {constants.HF_HOME} cannot be written to ({error.strerror}); set HF_HOME to a folder that you may write to"
    return None


@cache
def _is_reachable(endpoint: str) -> bool:
    answers: list[bool] = []
    thread = Thread(target=lambda: answers.append(_answers(endpoint)), daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return answers == [True]


def _answers(endpoint: str) -> bool:
    address = urlsplit(endpoint)
    try:
        if address.scheme in urllib.request.getproxies():  # only the proxy can tell
            request = urllib.request.Request(endpoint, method="HEAD")
            urllib.request.build_opener().open(request, timeout=CONNECT_SECONDS).close()
        else:
            socket.create_connection((address.hostname, address.port or (80 if address.scheme == "http" else 443)), CONNECT_SECONDS).close()
    except HTTPError as error:
        return error.code < 500  # a proxy that reaches nothing answers 502 to 504
    except OSError:
        return False
    return True
