"""Which settings may change when a run is resumed. docs/training.md has the same list in words.

A resumed run takes the same steps as the run would have taken without the break. So every setting that a stage reads must stay as it
is, except those that decide where the run stops, what it keeps and shows, how long it waits, or what its actors occupy. The number of
workers that train must stay too: ZeRO checkpoints are cut for it, and shares of a batch follow it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dvpo_ray.config.schema import Config
from dvpo_ray.errors import InputError


@dataclass(frozen=True)
class Stage:
    """A command that makes run folders.

    Attributes:
        command: as a user types it.
        reads: sections and settings that decide what it does. Differences are listed in this order.
        leaves: parts of these that it does not read.
    """

    command: str
    reads: tuple[str, ...]
    leaves: tuple[str, ...] = ()


_OTHER_DATA = ("data.prompts", "data.sft")
_OTHER_VALUE_MODEL = ("gvm.path", "gvm.context.pool", "gvm.refresh", "gvm.refresh_every_steps", "reward_model.path")

STAGES: dict[str, Stage] = {
    "train": Stage("dvpo train", tuple(name for name in Config.model_fields if name not in ("sft", "dpo")), ("data.sft",)),
    "gvm": Stage("dvpo gvm train", ("seed", "model", "data", "gvm"), (*_OTHER_DATA, *_OTHER_VALUE_MODEL)),
    "rm": Stage("dvpo rm train", ("seed", "model", "data", "reward_model"), (*_OTHER_DATA, *_OTHER_VALUE_MODEL)),
    "sft": Stage("dvpo sft", ("seed", "model", "data", "sft"), ("data.preferences", "data.prompts")),
    "dpo": Stage("dvpo dpo", ("seed", "model", "data", "dpo"), _OTHER_DATA),
}
"""By the name in summary.json, `stage`."""

_TRAINED, _FROZEN = ("policy", "critic", "gvm", "reward_model"), ("scorer", "reference")

MAY_CHANGE: tuple[str, ...] = (
    # Where the run stops, what it keeps and where it shows it.
    *("name", "out", "train", "checkpoint", "evaluation.every_steps", "gvm.checkpoint_every_steps", "reward_model.checkpoint_every_steps"),
    # What stops it or warns on the way.
    *("health", "mismatch.max_token_mult_error"),
    # How weights travel, how long anything may take, and who is asked.
    *("weight_sync", "rollout.start_timeout_seconds", "termination"),
    *(f"gvm.refresh.{name}" for name in ("timeout_seconds", "url", "request_timeout_seconds", "pairs_per_request", "retries")),
    # What the actors occupy, up to the rounding of sums in another order.
    *("ray", "placement", "offload"),
    *(f"{role}.{name}" for role in ("rollout", *_FROZEN, *_TRAINED) for name in ("cpus_per_actor", "gpus_per_actor", "threads")),
    *(f"{role}.num_actors" for role in _FROZEN),
    *(f"{part}.micro_batch_tokens" for part in ("batch", *_FROZEN, "critic", "gvm", "reward_model")),
    *(f"{role}.deepspeed.{name}" for role in _TRAINED for name in ("gradient_checkpointing", "compile")),
    *(f"{role}.compile" for role in _FROZEN),
    *(f"rollout.{name}" for name in ("enforce_eager", "kv_cache_gib", "gpu_memory_utilization", "max_batched_tokens")),
)
"""Settings and whole sections that may change."""


def check_resumable(stage: str, kept: Config, new: Config, folder: object) -> None:
    """Refuse to continue a run with settings that would make it another run.

    Args:
        stage: key of `STAGES`.
        kept: the config in the run folder.
        new: the config that `--resume` was given.
        folder: the run folder, for the error.

    Raises:
        InputError: names the first three settings that differ, with both values.
    """
    changes = [f"{key} was {_shown(was)} and is {_shown(now)} now" for key, was, now in forbidden_changes(stage, kept, new)]
    if not changes:
        return
    more = f" (and {len(changes) - 3} more)" if len(changes) > 3 else ""
    raise InputError(
        f"{folder}: --resume continues the run of its config.yaml, but {', '.join(changes[:3])}{more}; set them as they were "
        f"(`{STAGES[stage].command} {folder}/config.yaml --out {folder} --resume` does), or give another --out; "
        "only train.*, checkpoint.*, health.*, ray.*, time limits and what actors occupy may change (docs/training.md)"
    )


def forbidden_changes(stage: str, kept: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """Dotted keys whose values must agree and do not, each with the kept and the new value; None for a key that is not there."""
    was, now = (flat_settings(config.model_dump(mode="json")) for config in (kept, new))
    reads, leaves = STAGES[stage].reads, STAGES[stage].leaves
    differing = [key for key in was | now if was.get(key) != now.get(key)]
    fixed = [key for key in differing if _within(key, reads) and not _within(key, (*leaves, *MAY_CHANGE))]
    fixed.sort(key=lambda key: reads.index(key.partition(".")[0]))
    return [(key, was.get(key), now.get(key)) for key in fixed]


def flat_settings(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """Dotted keys and their values."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flat_settings(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _within(key: str, parts: tuple[str, ...]) -> bool:
    return any(key == part or key.startswith(f"{part}.") for part in parts)


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)
