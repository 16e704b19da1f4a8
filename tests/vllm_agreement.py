"""Whether vLLM computes an architecture as transformers does, before and after a weight sync. A script: one engine after the other.

    python tests/vllm_agreement.py FOLDER llama qwen3_moe llama:2 …
    python tests/vllm_agreement.py FOLDER

FOLDER holds a tokenizer; a number after an architecture is the engine's tensor-parallel size. For each architecture the script prints a
JSON line: the largest difference of a sampled token's log-prob in nats, with the checkpoint's weights and after a sync that changed all of
them, how far that sync moved the log-probs, and whether a row with its own seed has one sample whatever it is sampled with. Without
architectures FOLDER is a checkpoint, and each line has the mean and the largest difference in one dtype.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

PROMPTS = [[1, 5, 7, 11], [1, 13, 17], [1, 19, 23, 29, 31], [1, 37]]
STOP = 2


def checkpoint(architecture: str, tokenizer_folder: str, folder: str) -> None:
    """A tiny checkpoint with random weights that are not small, so that every part of the model counts."""
    from tiny_models import tiny_config, tiny_language_model
    from transformers import AutoTokenizer

    model = tiny_language_model(tiny_config(architecture))
    scatter(model, seed=0)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)


def scatter(model: torch.nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


def measure(named: str, tokenizer_folder: str) -> dict:
    from dvpo_ray.actors.vllm_backend import VLLMBackend
    from dvpo_ray.models.trainable import full_weights
    from dvpo_ray.sync.object_store import pack

    architecture, _, shards = named.partition(":")
    folder = tempfile.mkdtemp(prefix=f"{architecture}-")
    checkpoint(architecture, tokenizer_folder, folder)
    settings = config(folder, tensor_parallel_size=int(shards or 1))
    buckets = list(pack(full_weights(policy(settings, synced=True)), 2**22, False))
    engine = VLLMBackend(settings, frozenset({STOP}), "object_store", 64)

    def sample() -> list:
        return sorted(engine.generate(PROMPTS, seed=0), key=lambda response: response.index)

    before = sample()
    engine.init_weight_transfer({})
    engine.start_weight_update()
    for bucket in buckets:
        engine.update_weights(bucket)
    engine.finish_weight_update()
    after = sample()
    own = {"own_seeds": _with_own_seeds(engine, [0, 1, 2, 3]) == _with_own_seeds(engine, [3, 1]) | _with_own_seeds(engine, [2, 0])}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:  # vLLM alters some classes of transformers in its process
        return {"architecture": named} | own | other.submit(largest_differences, settings, before, after).result()


def _with_own_seeds(engine, rows: list[int]) -> dict[int, list[int]]:
    engine.add(rows, [PROMPTS[row] for row in rows], [7 + row for row in rows])
    sampled = {}
    while engine.unfinished:
        sampled |= {response.index: response.token_ids for response in engine.step()}
    return sampled


def config(folder: str, **rollout):
    from dvpo_ray.config.schema import Config

    rollout |= {"temperature": 0.7, "min_response_tokens": 4, "max_response_tokens": 16}
    return Config.model_validate({"model": {"path": folder, "dtype": "float32"}, "rollout": rollout})


def policy(settings, synced: bool):
    from dvpo_ray.models.loading import load_policy

    model = load_policy(settings.model)
    if synced:
        scatter(model, seed=1)
    return model


def largest_differences(settings, before: list, after: list) -> dict[str, float]:
    from dvpo_ray.batch import RaggedBatch
    from dvpo_ray.models.forward import MinLength, batch_log_probs

    def difference(responses: list, synced: bool) -> float:
        batch = RaggedBatch.from_rows(PROMPTS, [response.token_ids for response in responses])
        log_probs = batch_log_probs(policy(settings, synced), batch, 4096, temperature=0.7, min_length=MinLength(4, (STOP,)))
        sampled = torch.tensor([p for response in responses for p in response.log_probs])
        return float((torch.from_numpy(log_probs[batch.response_mask]) - sampled).abs().max())

    return {"checkpoint": difference(before, False), "synced": difference(after, True), "moved": difference(after, False)}


def compare(folder: str, dtype: str) -> dict:
    from dvpo_ray.actors.vllm_backend import VLLMBackend
    from dvpo_ray.batch import RaggedBatch
    from dvpo_ray.config.schema import Config
    from dvpo_ray.models.forward import batch_log_probs
    from dvpo_ray.models.loading import load_policy

    settings = Config.model_validate({"model": {"path": folder, "dtype": dtype}, "rollout": {"max_response_tokens": 64}})
    engine, prompts = VLLMBackend(settings, frozenset({STOP}), "object_store", 128), PROMPTS * 16
    responses = sorted(engine.generate(prompts, seed=0), key=lambda response: response.index)
    batch = RaggedBatch.from_rows(prompts, [response.token_ids for response in responses])
    log_probs = batch_log_probs(load_policy(settings.model), batch, 4096)[batch.response_mask]
    difference = torch.tensor([p for response in responses for p in response.log_probs]) - torch.from_numpy(log_probs)
    return {"dtype": dtype, "tokens": len(difference), "mean": float(difference.mean()), "largest": float(difference.abs().max())}


def main(folder: str, architectures: list[str]) -> None:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([*sys.path[:1], os.environ.get("PYTHONPATH", "")]),
    }
    for architecture in architectures:
        try:
            result = measure(architecture, folder)
        except Exception as error:  # the table says what vLLM refuses
            result = {"architecture": architecture, "error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(result), flush=True)
    for dtype in [] if architectures else ["float32", "bfloat16"]:
        print(json.dumps(compare(folder, dtype)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
