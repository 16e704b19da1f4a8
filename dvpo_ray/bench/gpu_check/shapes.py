"""The shapes that the check measures, their configs, and checkpoints of them with random weights."""

from __future__ import annotations

import fcntl
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from dvpo_ray.bench.gpu_check.figures import Report
from dvpo_ray.bench.random_weights import with_random_weights
from dvpo_ray.config import override_config
from dvpo_ray.config.schema import Config
from dvpo_ray.files import whole_file

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "initializer_range": 0.02,
    "attention_bias": False,
    "mlp_bias": False,
}


@dataclass(frozen=True)
class Shape:
    """A model and the rows that it works on.

    Attributes:
        layers, hidden, mlp, heads, kv_heads, head_size, vocabulary: of a Llama.
        tied: the output projection is the embedding.
        prompt_tokens, response_tokens: of every row.
        rows: in a batch. More of them make sampling a smaller part of a step.
        rows_alone: in the batch of a role that is measured alone.
        micro_batch_tokens: of the trained models; of the frozen ones it is twice as many.
    """

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    prompt_tokens: int
    response_tokens: int
    rows: int
    rows_alone: int
    micro_batch_tokens: int

    @property
    def cache_gib(self) -> float:
        """Keys and values of all rows in 16 bit, and room for what vLLM keeps beside them."""
        of_a_token = 2 * 2 * self.layers * self.kv_heads * self.head_size
        return 0.5 + 1.1 * self.rows * (self.prompt_tokens + self.response_tokens) * of_a_token / 2**30

    def as_json(self) -> dict:
        """The config.json."""
        return _LLAMA | {
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
        }


SHAPES = {
    # Llama 3.2 1B and 3B.
    "1b": Shape(16, 2048, 8192, 32, 8, 64, 128256, True, 512, 512, 256, 64, 8192),
    "3b": Shape(28, 3072, 8192, 24, 8, 128, 128256, True, 512, 512, 32, 32, 4096),
    "tiny": Shape(6, 512, 1536, 8, 4, 64, 2048, False, 64, 32, 16, 16, 1024),
    "cpu": Shape(2, 64, 128, 2, 2, 32, 320, True, 12, 8, 8, 8, 64),
}


def base_config(shape: Shape, device: str) -> Config:
    """A config of a shape on one device, with small optimizer steps and nothing that judges, so that every step is like the others."""
    settings = {
        "model": {"path": "made", "dtype": "bfloat16" if device == "cuda" else "float32", "chat_template": "plain"},
        "data": {
            "prompts": {"path": "made", "heldout_fraction": 0.1},
            "max_prompt_tokens": shape.prompt_tokens,
            "max_response_tokens": shape.response_tokens,
            "long_prompt": "truncate_left",
        },
        "rollout": {
            "max_response_tokens": shape.response_tokens,
            "min_response_tokens": shape.response_tokens,
            "max_concurrent_sequences": shape.rows,
            "rollouts_per_chunk": max(1, shape.rows // 4),
            "kv_cache_gib": shape.cache_gib if device == "cuda" else 1,
            "gpu_memory_utilization": 0.15,
        },
        "scorer": {"micro_batch_tokens": 2 * shape.micro_batch_tokens},
        "reference": {"micro_batch_tokens": 2 * shape.micro_batch_tokens},
        "policy": {"learning_rate": 1e-6, "schedule": "constant"},
        "critic": {"learning_rate": 1e-6, "schedule": "constant", "micro_batch_tokens": shape.micro_batch_tokens},
        "gvm": {"micro_batch_tokens": shape.micro_batch_tokens, "pairs_per_step": shape.rows_alone // 2},
        "advantage": {"truncated": "bootstrap"},
        "batch": {"prompts_per_step": shape.rows, "micro_batch_tokens": shape.micro_batch_tokens},
        "evaluation": {"judge": "none"},
        "train": {"steps": 10, "save_rollouts_every_steps": 0, "trackers": []},
        "health": {"max_cut_off_fraction": None},
        "ray": {"num_cpus": 8, "num_gpus": 0 if device == "cpu" else 1, "object_store_gib": 0.2 if device == "cpu" else 4},
    }
    for role in ("rollout", "scorer", "reference", "policy", "critic", "gvm", "reward_model"):
        settings.setdefault(role, {})
        settings[role] |= {"threads": 1} if device == "cpu" else {"gpus_per_actor": 1, "threads": 2}
    return Config.model_validate(settings)


def models_of(report: Report, name: str) -> tuple[Shape, Config]:
    """A shape and its config, with policy, value model, reward model and prompts, which the first step that needs them makes.

    Args:
        name: of a shape. On a CPU all have the one shape that it can take.
    """
    name = name if report.on_gpu else "cpu"
    shape, folder = SHAPES[name], report.models / name
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / "config.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.is_file():
            _make(base_config(shape, report.device), shape, folder, made)
    return shape, Config.model_validate_json(made.read_text(encoding="utf-8"))


def make_models(report: Report) -> None:
    """The checkpoints that are measured, made while nothing is: billions of weights take their time on the way to the disk."""
    for name in ("1b", "3b"):
        started = time.perf_counter()
        models_of(report, name)
        report.figure(f"models of {name}", time.perf_counter() - started, "s")


def _make(config: Config, shape: Shape, folder: Path, made: Path) -> None:
    architecture = folder / "architecture" / "config.json"
    architecture.parent.mkdir(exist_ok=True)  # a step that was ended may have left it
    architecture.write_text(json.dumps(shape.as_json()), encoding="utf-8")
    config = with_random_weights(config, architecture, folder)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the other processes on the card need it
    with whole_file(made) as file:
        file.write(config.model_dump_json())


def changed(config: Config, *overrides: str) -> Config:
    """A config with `key=value` overrides."""
    return override_config(config, list(overrides))


def config_file(config: Config, folder: Path) -> Path:
    """A config as a file that `dvpo` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "check.yaml"
    file.write_text(config.model_dump_json(), encoding="utf-8")  # JSON is YAML
    return file
