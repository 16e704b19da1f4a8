"""Small real training runs, and what the tests read of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from dvpo_ray.config.schema import Config

ON_ONE_GPU = {role: {"gpus_per_actor": 1} for role in ("rollout", "scorer", "reference", "policy")}
"""Changes that bring all roles to the GPU of `ray_session`, where they take turns. There is none, so they compute on the CPU all the same."""
MEASURES_TIME = ("time", "time/", "throughput/", "memory/", "idle/")


def run(settings: dict, out: Path, resume: bool = False, **sections) -> list[dict]:
    """Train and return the metrics of all steps."""
    from dvpo_ray.training.policy import train

    merged = settings | {name: settings.get(name, {}) | changes for name, changes in sections.items()}
    train(Config.model_validate(merged | {"out": str(out)}), resume)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_times(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(MEASURES_TIME)} for row in rows]


def rollouts(folder: Path, step: int) -> list[dict]:
    return [json.loads(line) for line in (folder / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()]


def gae_by_hand(rows: list[dict]) -> np.ndarray:
    """Advantages of all rollouts of a step one after the other: GAE with lambda 1 and KL in the reward, whitened over the batch."""
    raw = []
    for row in rows:
        v, kl = np.array(row["values"]), np.array(row["log_probs"]) - np.array(row["reference_log_probs"])
        raw.append(v[-1] - v[:-1] - 0.05 * np.cumsum(kl[::-1])[::-1])
    flat = np.concatenate(raw)
    return (flat - flat.mean()) / flat.std(ddof=1)


def values_by_hand(gvm: str, row: dict) -> np.ndarray:
    """The T + 1 values of one rollout by a direct forward pass of that row alone."""
    from dvpo_ray.gvm.artifact import load_gvm

    model, _ = load_gvm(gvm)
    with torch.no_grad():
        logits = model(torch.tensor([row["prompt_ids"] + row["response_ids"]])).logits[0, :, 0]
    return logits[len(row["prompt_ids"]) - 1 :].numpy()
