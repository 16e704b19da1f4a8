"""Checkpoints that are not there, or not whole: one line that says what would be right, without waiting for the hub."""

from __future__ import annotations

import json
import os
import shutil
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import ClassVar

import datasets
import pytest
from huggingface_hub import constants
from transformers import AutoTokenizer

from dvpo_ray.config.inputs import Needed
from dvpo_ray.config.schema import ModelConfig
from dvpo_ray.data import hub
from dvpo_ray.errors import InputError
from dvpo_ray.models import loading
from dvpo_ray.models.loading import check_vocabulary, context_tokens, load_policy, load_tokenizer


def refusal(load, path) -> str:
    with pytest.raises(InputError) as error:
        load(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def policy(path):
    return load_policy(ModelConfig(path=path))


def test_a_checkpoint_without_a_tokenizer(tiny_model, tmp_path):
    shutil.copy(tiny_model / "config.json", tmp_path)
    assert (
        refusal(load_tokenizer, str(tmp_path))
        == f"{tmp_path}: no tokenizer there (tokenizer.json or tokenizer_config.json); save it beside the model"
    )


@pytest.mark.parametrize("load", [load_tokenizer, context_tokens, policy])
def test_a_run_folder_is_no_checkpoint_but_its_final_is(load, tiny_model, tmp_path):
    assert refusal(load, str(tmp_path)).startswith(f"{tmp_path}: no config.json, so this is not a checkpoint; give the folder")
    shutil.copytree(tiny_model, tmp_path / "final")
    assert refusal(load, str(tmp_path)) == f"{tmp_path}: no config.json, so this is not a checkpoint; did you mean {tmp_path}/final?"


@pytest.mark.parametrize("load", [load_tokenizer, context_tokens, policy])
def test_what_looks_like_a_folder_is_not_looked_for_on_the_hub(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    monkeypatch.setattr(loading, "prepare_hub", lambda: pytest.fail("asked the hub"))
    for path in ("./sft", "/nowhere/sft", "runs/sft", "runs/sft/final"):
        here = "" if path.startswith("/") else f" in {tmp_path}, where this command starts"
        assert refusal(load, path) == f"{path}: no such checkpoint folder{here}; give a folder with config.json or a hub name"


def test_without_a_network_a_name_is_looked_for_in_the_cache_alone(monkeypatch):
    monkeypatch.setattr(loading, "prepare_hub", lambda: False)
    line = refusal(load_tokenizer, "someone/model")  # the tests run with the hub switched off
    assert line.startswith("someone/model: not on this machine, not in the cache of the hub, and the hub is switched off or cannot be reached;")


def test_an_error_that_only_announces_the_rest_is_given_with_it():
    assert loading.first_line(OSError("No backend from one of:\n(1) a file,\n(2) a library")) == "No backend from one of: (1) a file, (2) a library"
    assert loading.first_line(OSError("Not valid.\nMore about it")) == "Not valid."


# ------------------------------------------------------------------------------------------- tokens and their rows


def with_rows(tiny_model, folder: Path, rows: int) -> str:
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": rows}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_every_token_needs_a_row(tiny_model, tmp_path):
    tokens = len(load_tokenizer(str(tiny_model)))
    load_tokenizer(with_rows(tiny_model, tmp_path / "padded", tokens + 500))
    line = refusal(load_tokenizer, with_rows(tiny_model, tmp_path / "small", tokens - 3))
    assert line.startswith(f"{tmp_path}/small: the tokenizer has {tokens} tokens, but the model's embedding has {tokens - 3} rows")
    assert f"resize_token_embeddings({tokens})" in line


def test_tokens_are_counted_up_to_the_largest_id(tiny_model, tmp_path):
    class WithGap:
        special_tokens_map: ClassVar[dict[str, str]] = {}

        def get_vocab(self):
            return {"a": 0, "far": 450, "b": 1, "farther": 460}

    with pytest.raises(InputError, match="the tokenizer has 461 tokens, but the model's embedding has 450 rows .*without a row is 'far'"):
        check_vocabulary(WithGap(), with_rows(tiny_model, tmp_path / "gap", 450))
    check_vocabulary(WithGap(), with_rows(tiny_model, tmp_path / "fits", 461))


def test_the_placeholder_of_an_image_needs_no_row(tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model, extra_special_tokens={"image_token": "<image_soft_token>"})
    rows = len(tokenizer) - 1
    check_vocabulary(tokenizer, with_rows(tiny_model, tmp_path / "text", rows))
    tokenizer.add_tokens("more")
    with pytest.raises(InputError, match=f"has {rows + 2} tokens, but the model's embedding has {rows} rows .*without a row is 'more'"):
        check_vocabulary(tokenizer, str(tmp_path / "text"))


def test_a_tokenizer_alone_is_not_compared(tiny_model, tmp_path):
    load_tokenizer(str(tiny_model))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, tmp_path)
    assert load_tokenizer(str(tmp_path)).eos_token


# ----------------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def online(monkeypatch):
    """The hub's libraries as they are without the tests' HF_HUB_OFFLINE; no proxy."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    hub._is_reachable.cache_clear()
    yield monkeypatch
    hub._is_reachable.cache_clear()


def test_a_hub_that_answers_is_asked(online):
    with socket.create_server(("127.0.0.1", 0)) as server:
        online.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub.prepare_hub()
    assert os.environ["HF_HUB_OFFLINE"] == "0" and not constants.HF_HUB_OFFLINE


def test_a_hub_that_does_not_answer_is_switched_off_here_and_in_later_processes(online):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    online.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    assert not hub.prepare_hub()
    assert os.environ["HF_HUB_OFFLINE"] == "1" and constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize(("status", "reachable"), [(200, True), (404, True), (502, False)])
def test_behind_a_proxy_its_answer_counts(online, status, reachable):
    class Proxy(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        online.setattr(hub.urllib.request, "getproxies", lambda: {"http": f"http://127.0.0.1:{server.server_port}"})
        online.setattr(hub.urllib.request, "proxy_bypass", lambda host: False)
        online.setattr(constants, "ENDPOINT", "http://hub.invalid")
        assert hub.prepare_hub() is reachable
        server.shutdown()


def test_a_lookup_of_the_address_that_hangs_is_not_waited_for(online):
    online.setattr(hub, "ANSWER_SECONDS", 0.05)
    over = Event()

    def hang(*_):
        over.wait(30)
        raise OSError

    online.setattr(hub.socket, "create_connection", hang)
    assert not hub.prepare_hub()
    over.set()


def test_a_name_that_cannot_be_had_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    """The tests run with the hub switched off."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    model, rows = Needed("model.path", "org/name", "policy"), Needed("data.prompts.path", "ultrafeedback", "data")
    with pytest.raises(InputError, match=r"^model\.path org/name: not on this machine, .*; give a checkpoint folder with config\.json$"):
        hub.refuse_unreachable(model)
    with pytest.raises(InputError, match=r"^data\.prompts\.path ultrafeedback: not on this machine, .*; give a file or folder of rows$"):
        hub.refuse_unreachable(rows)
    (tmp_path / "hub" / "models--org--name").mkdir(parents=True)
    (tmp_path / "datasets" / "openbmb___ultra_feedback").mkdir(parents=True)
    hub.refuse_unreachable(model, rows, Needed("gvm.path", "a/b", "gvm"), Needed("model.path", str(tmp_path), "policy"))


def test_a_model_of_any_length_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(InputError, match="its config.json has no max_position_embeddings"):
        context_tokens(str(tmp_path))
