"""Ranks of a training engine without Ray: processes that join a group, train, and compare. Run as a program by test_training_engine.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

import torch

IDS = torch.tensor([[1, 5, 9, 12, 7, 3, 2, 8]])


def engine_of(path: str, stage: int, kind: str, dtype: str):
    """A training engine of a policy, of one with adapters, or of a value model of one layer."""
    from dvpo_ray.config.schema import DeepSpeedConfig, LoraConfig, ModelConfig, PolicyConfig
    from dvpo_ray.gvm.model import new_value_model
    from dvpo_ray.models.deepspeed import TrainingEngine, loading
    from dvpo_ray.models.loading import load_policy
    from dvpo_ray.models.trainable import apply_lora

    deepspeed, kept = DeepSpeedConfig(zero_stage=stage), getattr(torch, dtype)
    with loading(deepspeed, kept, whole_below=1) as device:
        if kind == "value model":
            model = new_value_model(path, 1, dtype=kept, device=device)
        else:
            model = load_policy(ModelConfig(path=path, dtype=dtype), device)
    cut = [name for name, parameter in model.named_parameters() if hasattr(parameter, "ds_id")]
    torch.manual_seed(0)
    if kind == "adapters":
        model = apply_lora(model, LoraConfig(rank=4))
    engine = TrainingEngine(model, PolicyConfig(learning_rate=1e-3), deepspeed, kept, 10)
    engine.engine.train()
    return engine, cut


def train(engine, steps: int = 1, share: float = 1.0) -> list[float]:
    """Losses and gradient norms of steps over two micro-batches, the same on every number of ranks."""
    numbers: list[float] = []

    def loss() -> torch.Tensor:
        output = engine.engine(input_ids=IDS, use_cache=False).logits.float()
        numbers.append(float((output - 1).square().mean().detach()))
        return share * (output - 1).square().mean() / (2 * torch.distributed.get_world_size())

    for _ in range(steps):
        numbers.append(float(engine.step([loss, loss]).grad_norm))
    return numbers


def agreement(path: str, kind: str) -> dict:
    """What of ZeRO 3 differs from a model on one rank: nothing but rounding."""
    (whole, _), (sharded, cut) = engine_of(path, 0, kind, "float32"), engine_of(path, 3, kind, "float32")
    first, described = whole.weights_on_first_rank(), sharded.describe_weights()
    yielded = [(name, weight.dtype, tuple(weight.shape)) for name, weight in sharded.weights()]
    bucketed = [name for name, _ in sharded.weights(bucket_bytes=1)]
    same_start = all(torch.equal(weight, first[name]) for name, weight in sharded.weights_on_first_rank().items())
    numbers = train(whole, 2), train(sharded, 2)
    last = whole.weights_on_first_rank()
    moved = max((float((weight - last[name]).abs().max()) for name, weight in sharded.weights_on_first_rank().items()), default=0.0)
    return {
        "cut": len(cut),
        "same_start": same_start and [name for name, *_ in described] == [name for name, *_ in yielded] == bucketed,
        "described": described == yielded,
        "names": list(first),
        "numbers": numbers,
        "weights_differ": moved,
        "changes": max((float((weight - first[name]).abs().max()) for name, weight in last.items()), default=0.0),
    }


def round_trip(path: str, stage: int, dtype: str) -> dict:
    """Three steps, and three steps with the state away in between."""
    with mock.patch.object(torch.optim.AdamW, "step", autospec=True) as step:
        plain, moving = engine_of(path, stage, "policy", dtype)[0], engine_of(path, stage, "policy", dtype)[0]
    steps_at_start = step.call_count
    expected = train(plain, 3)
    got = train(moving)
    moving.offload()
    empty = sum(storage.nbytes() for storage, _ in moving._host._away.values())
    freed = sum(size for _, size in moving._host._away.values())
    moving.reload()
    got += train(moving)
    moving.offload(parameters=False)
    kept = sum(parameter.untyped_storage().nbytes() for parameter in moving.model.parameters())
    moving.offload()
    moving.reload()
    return {"steps_at_start": steps_at_start, "expected": expected, "got": got + train(moving), "empty": empty, "freed": freed, "kept": kept}


def small_gradients(path: str) -> dict:
    """Numbers of steps on a loss whose gradients float16 can't hold without a loss scale, in float16 and in float32."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True  # DeepSpeed refuses it on CPUs, which can compute it
    return {dtype: train(engine_of(path, 0, "policy", dtype)[0], 3, share=1e-5) for dtype in ("float16", "float32")}


def in_blocks(path: str, stage: int, dtype: str, _name: str) -> dict:
    """Numbers of three steps over two micro-batches with whole logits and with logits in blocks, and how often a block was projected."""
    from functools import partial

    import numpy as np

    from dvpo_ray.batch import RaggedBatch
    from dvpo_ray.models import forward, head
    from dvpo_ray.models.layouts import Passes, lay_out

    batch, projected, logits_of = RaggedBatch.from_rows([[1, 5]] * 2, [[4, 9, 7, 8, 3, 2], [6, 9, 4, 7, 5]]), [], head.logits_of
    head.BLOCK_LOGITS = 3 * 512
    head.logits_of = lambda model, hidden: projected.append(1) or logits_of(model, hidden)
    numbers, passes = [], []
    for blocks in (False, True):
        forward.keeps_logits = lambda model, tokens, blocks=blocks: not blocks
        engine, of_run, before = engine_of(path, stage, "policy", dtype)[0], [], len(projected)

        def loss(rows, engine=engine, of_run=of_run) -> torch.Tensor:
            share = forward.response_log_probs(engine.model, rows, run=engine.engine).log_probs.sum() / (20 * torch.distributed.get_world_size())
            of_run.append(float(share.detach()))
            return share

        for _ in range(3):
            rows = lay_out(engine.model, batch, Passes([np.array([0]), np.array([1])]), batch.response_mask, ahead=True)
            of_run.append(float(engine.step([partial(loss, part) for part in rows]).grad_norm))
        numbers.append(of_run)
        passes.append(len(projected) - before)
    return {"whole": numbers[0], "blocks": numbers[1], "passes": passes}


def main(rank: int, world_size: int, port: int, cases: list[list], out: str) -> None:
    torch.set_num_threads(1)
    from dvpo_ray.models import deepspeed

    deepspeed.init_process_group(rank, world_size, "127.0.0.1", port)
    deepspeed.REDUCE_BUCKET_ELEMENTS = 10**6
    results = [globals()[name](*arguments) for name, *arguments in cases]
    if rank == 0:
        Path(out).write_text(json.dumps(results, default=str))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), json.loads(sys.argv[4]), sys.argv[5])
