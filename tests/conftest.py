"""Models that the tests make themselves, and the real ones they use where those are present."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

settings.register_profile("no-deadline", deadline=None)  # how long an example takes says more of the machine than of the code
settings.load_profile("no-deadline")

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["DVPO_CACHE"] = str(Path(__file__).parent / "no-cache")  # configs name the same model whether or not the quickstart has run here
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
# Ray's workers import the classes that tests define; they find them through this variable only.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first, then those that start a Ray of their own or none, then those that share one."""
    items.sort(key=lambda item: (item.get_closest_marker("slow") is not None, "ray_session" in item.fixturenames))


CORPUS = [
    "Once upon a time there was a little girl who was very happy and kind.",
    "The big dog was sad and bad, so he went home to cry in the rain.",
    "Tell me a story about a good day in the park with a great friend.",
    "I love this wonderful sunny day! I hate the terrible awful storm.",
    "user assistant system : What is the best thing to do today?",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_model(folder: Path, *, chat: bool = False, seed: int = 0) -> Path:
    """A two-layer Llama with random weights and a byte-level BPE tokenizer, small enough to learn in seconds."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainer)
    if not chat:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>" if chat else "</s>", pad_token="<pad>", model_max_length=256
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(fast),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=fast.eos_token_id,
            pad_token_id=0,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Folder of a tiny plain-text model with random weights."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_chat_model(tmp_path_factory) -> Path:
    """Folder of a tiny chat model with random weights and a ChatML template."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny-chat"), chat=True)


@pytest.fixture(scope="session")
def stories() -> Path:
    """Folder of the 260K-parameter TinyStories model, where the checkout has it beside it."""
    folder = SHARED / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no stories260K model at {folder}")
    return folder


@pytest.fixture(scope="session")
def hh_pairs() -> Path:
    """Folder of the hh-rlhf preference pairs, where the checkout has it beside it."""
    folder = SHARED / "data" / "hh"
    if not folder.is_dir():
        pytest.skip(f"no hh preference pairs at {folder}")
    return folder


@pytest.fixture(scope="session")
def ray_session():
    """A local Ray with room for every role of a small run, one for all tests that need no Ray of their own. It has a GPU by its word alone."""
    import ray

    from dvpo_ray.runtime import fork_server

    ray.init(num_cpus=6, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=200 * 2**20)
    with fork_server.in_use():
        yield
    ray.shutdown()


@pytest.fixture(scope="module")
def loop_settings(tiny_model, tmp_path_factory, ray_session) -> dict:
    """A config of the real loop on a tiny model, with a judge and checkpoints; every run takes seconds."""
    from gvm_artifacts import make_gvm

    folder = tmp_path_factory.mktemp("loop")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Tell me story {i}"}) + "\n" for i in range(40)))
    return {
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "data": {"prompts": {"path": str(prompts), "heldout_fraction": 0.3}, "max_prompt_tokens": 24},
        "gvm": {"path": str(make_gvm(folder / "gvm", tiny_model))},
        "rollout": {"backend": "transformers", "max_response_tokens": 12, "rollouts_per_chunk": 8, "kv_cache_gib": 1},
        "policy": {"learning_rate": 3e-3, "schedule": "linear"},
        "advantage": {"mode": "gae"},
        "batch": {"prompts_per_step": 16, "minibatches_per_epoch": 2, "micro_batch_tokens": 128},
        "evaluation": {"judge": "vader", "prompts": 8},
        "checkpoint": {"every_steps": 2, "keep": 10},
        "train": {"steps": 4, "trackers": ["tensorboard"]},
        "weight_sync": {"bucket_mib": 0.05, "checksum": True},  # several buckets even for a tiny model
    }


@pytest.fixture
def faked(monkeypatch):
    """Puts a function of the run in the place of every stage of an experiment, and lists the runs that were started. What they read is
    taken to be there, and Ray is left alone."""
    from contextlib import nullcontext

    from dvpo_ray.experiments import runner
    from dvpo_ray.runtime import cluster

    def faked(leave) -> list:
        started: list = []

        def do(run, console):
            started.append(run)
            leave(run)

        monkeypatch.setattr(runner, "STAGES", dict.fromkeys(runner.STAGES, do))
        return started

    monkeypatch.setattr(cluster, "connect", lambda config, say: nullcontext())
    monkeypatch.setattr(runner, "study_problems", lambda *_, **__: [])
    return faked


@pytest.fixture
def in_empty_folder(tmp_path, monkeypatch):
    """Default run folders are relative to the working directory; libraries stay as the other tests have them."""
    from dvpo_ray import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "quiet_libraries", lambda: None)


@pytest.fixture
def backend(monkeypatch):
    """Puts a recording function in the place of a module that does a command's work."""

    monkeypatch.setattr("dvpo_ray.data.hub.refuse_unreachable", lambda *_: None)  # the tests run with the hub switched off
    for command in ("train", "results"):  # and name files that are not there
        monkeypatch.setattr(f"dvpo_ray.commands.{command}.problems", lambda _: [])
    monkeypatch.setattr("dvpo_ray.commands.results.no_artifact", lambda _: None)

    def backend(module: str, function: str, result=None) -> list:
        calls = []

        def record(*args, **kwargs):
            calls.append((args, kwargs))
            return result

        fake = ModuleType(module)
        setattr(fake, function, record)
        monkeypatch.setitem(sys.modules, module, fake)
        return calls

    return backend
