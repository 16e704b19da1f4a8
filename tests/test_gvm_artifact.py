"""A GVM artifact loads as it was saved, or is refused in one line that says why."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gvm_artifacts import make_gvm, manifest_for
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForTokenClassification, AutoTokenizer, PreTrainedModel

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.errors import InputError, ResourceError
from dvpo_ray.gvm.artifact import chat_template_hash, load_gvm, read_manifest, save_gvm, tokenizer_hash
from dvpo_ray.gvm.model import new_value_model
from dvpo_ray.models.forward import batch_values

BATCH = RaggedBatch.from_rows([[1, 5, 6], [1, 7]], [[8, 9, 2], [30, 40, 5, 6, 7]])


@pytest.fixture(scope="module")
def artifact(tiny_model, tmp_path_factory) -> Path:
    return make_gvm(tmp_path_factory.mktemp("gvm") / "final", tiny_model)


@pytest.fixture
def copy(artifact, tmp_path) -> Path:
    """A copy of the artifact to damage."""
    return shutil.copytree(artifact, tmp_path / "gvm")


def edit_manifest(folder: Path, **changes) -> None:
    content = json.loads((folder / "gvm.json").read_text())
    (folder / "gvm.json").write_text(json.dumps(content | changes))


def refused(folder: Path, match: str, **options) -> None:
    with pytest.raises(InputError, match=match) as caught:
        load_gvm(folder, **options)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


# ---------------------------------------------------------------------------------------------------- round trip


def test_values_survive_saving(artifact):
    """The loaded model gives the same values as plain transformers from the same folder."""
    plain = AutoModelForTokenClassification.from_pretrained(artifact, dtype=torch.float32).eval()
    model, _ = load_gvm(artifact)
    np.testing.assert_allclose(batch_values(model, BATCH, 1000), batch_values(plain, BATCH, 1000), atol=1e-6)
    assert np.ptp(batch_values(model, BATCH, 1000)) > 0.01


def test_the_loaded_model_is_frozen(artifact):
    model, _ = load_gvm(artifact)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_a_bfloat16_trunk_keeps_a_float32_head(artifact):
    """A bfloat16 head would round values to multiples of 2**-8 near 1; these values are not rounded after the trunk."""
    model, _ = load_gvm(artifact, torch.bfloat16)
    values = batch_values(model, BATCH, 1000)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert (values != torch.from_numpy(values).bfloat16().float().numpy()).any()
    exact, _ = load_gvm(artifact)
    np.testing.assert_allclose(values, batch_values(exact, BATCH, 1000), atol=0.05)


def test_the_manifest_says_what_the_values_mean(artifact):
    manifest = read_manifest(artifact)
    assert manifest.format_version == 1
    assert manifest.head.model_dump() == {"name": "score.weight", "shape": [1, 64], "dtype": "float32"}
    assert manifest.value_position == "after_token"
    assert manifest.heldout_accuracy == {"mean": 0.7, "last": 0.75}
    assert set(manifest.weights_sha256) == {"model.safetensors"}


def test_a_manifest_of_an_older_version_is_read(copy):
    content = json.loads((copy / "gvm.json").read_text())
    for name in ("heldout_warnings", "config_sha256"):
        del content[name]
    (copy / "gvm.json").write_text(json.dumps(content))
    load_gvm(copy)
    assert read_manifest(copy).heldout_warnings == []


def test_the_artifact_brings_its_tokenizer(artifact, tiny_model):
    assert tokenizer_hash(AutoTokenizer.from_pretrained(artifact)) == tokenizer_hash(AutoTokenizer.from_pretrained(tiny_model))


# ------------------------------------------------------------------------------------------------------ refusals


def test_no_folder(tmp_path):
    refused(tmp_path / "nowhere", "no such folder; give a GVM artifact")


def test_no_manifest(tiny_model):
    refused(tiny_model, "no gvm.json, so this is not a GVM artifact")


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_unknown_version(copy, version):
    edit_manifest(copy, format_version=version)
    refused(copy, "format_version is .*, but this program reads version 1")


@pytest.mark.parametrize("content", [b"{", b"\xff"])
def test_unreadable_manifest(copy, content):
    (copy / "gvm.json").write_bytes(content)
    refused(copy, "not readable as JSON")


def test_manifest_of_another_shape(copy):
    edit_manifest(copy, outcome={"kind": "binary"})
    refused(copy, "outcome.scale: Field required")


def test_another_tokenizer(artifact, tiny_chat_model):
    refused(artifact, "another tokenizer", tokenizer=AutoTokenizer.from_pretrained(tiny_chat_model))


def test_another_chat_template(tiny_chat_model, tmp_path):
    folder = make_gvm(tmp_path / "gvm", tiny_chat_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_model)
    load_gvm(folder, tokenizer=tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "bot")
    refused(folder, "another chat template", tokenizer=tokenizer)


def test_the_chat_template_is_free_where_it_is_not_used(tiny_chat_model, tmp_path):
    folder = make_gvm(tmp_path / "gvm", tiny_chat_model, chat_template="plain")
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_model)
    tokenizer.chat_template = None
    load_gvm(folder, tokenizer=tokenizer)


def test_the_same_template_applied_in_the_run_and_not_in_training(tiny_chat_model, tmp_path):
    folder = make_gvm(tmp_path / "gvm", tiny_chat_model, chat_template="plain")
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_model)
    load_gvm(folder, tokenizer=tokenizer, chat_template="plain")
    refused(folder, "trained with model.chat_template plain, not auto", tokenizer=tokenizer, chat_template="auto")


def test_head_missing_in_the_weights(copy):
    weights = load_file(copy / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    refused(copy, "value head score.weight is not in the weights and would be newly initialised")


def test_head_of_another_shape(copy):
    weights = load_file(copy / "model.safetensors")
    weights["score.weight"] = torch.zeros(1, 32)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    refused(copy, r"score.weight has shape \[1, 32\], gvm.json says \[1, 64\]")


@pytest.mark.parametrize("size", [0, 4, 200, -100])
def test_truncated_weights(copy, size):
    file = copy / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:size])
    refused(copy, "model.safetensors: damaged or truncated weights")


def test_a_flipped_bit(copy):
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    refused(copy, "model.safetensors: not the saved weights")


def test_lost_weights(copy):
    (copy / "model.safetensors").unlink()
    refused(copy, "model.safetensors is missing")


# -------------------------------------------------------------------------------------------------- whole or absent


def save_over(folder: Path, tiny_model: Path) -> None:
    model, tokenizer = new_value_model(str(tiny_model)), AutoTokenizer.from_pretrained(tiny_model)
    save_gvm(folder, model, model.state_dict(), tokenizer, manifest_for(model, tokenizer))


@pytest.mark.parametrize(
    "full", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")]
)
def test_a_full_disk_leaves_the_old_artifact_and_nothing_else(copy, tiny_model, monkeypatch, full):
    before = (copy / "gvm.json").read_text()

    def fail(self, folder, **_options):
        Path(folder, "model.safetensors").write_bytes(b"half")
        raise full

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(ResourceError, match="gvm: no space left on the disk"):
        save_over(copy, tiny_model)
    assert [f.name for f in copy.parent.iterdir()] == [copy.name]
    assert (copy / "gvm.json").read_text() == before


def test_saving_replaces_an_older_artifact_whole(copy, tiny_model):
    (copy / "stray").write_text("of the older one")
    save_over(copy, tiny_model)
    assert not (copy / "stray").exists()
    assert [f.name for f in copy.parent.iterdir()] == [copy.name]
    assert (batch_values(load_gvm(copy)[0], BATCH, 1000) == 0).all()


# ------------------------------------------------------------------------------------------------------ fingerprints


def test_the_tokenizer_hash_is_of_content_not_of_files(tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer_config.json").read_bytes() != (tiny_model / "tokenizer_config.json").read_bytes()
    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_hash(AutoTokenizer.from_pretrained(tiny_model))


def spoil(tokenizer_json: dict, part: str) -> None:
    model = tokenizer_json["model"]
    if part == "vocabulary":
        names = [name for name, i in model["vocab"].items() if i in (300, 301)]
        model["vocab"][names[0]], model["vocab"][names[1]] = model["vocab"][names[1]], model["vocab"][names[0]]
    if part == "merges":
        model["merges"][0], model["merges"][1] = model["merges"][1], model["merges"][0]
    if part == "added":
        tokenizer_json["added_tokens"].append(tokenizer_json["added_tokens"][-1] | {"id": 400, "content": "<|extra|>"})


@pytest.mark.parametrize("part", ["vocabulary", "merges", "added", "special"])
def test_the_tokenizer_hash_sees_every_part(tiny_model, tmp_path, part):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text())
    spoil(content, part)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    if part == "special":
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<s>"}))
    assert tokenizer_hash(AutoTokenizer.from_pretrained(folder)) != tokenizer_hash(AutoTokenizer.from_pretrained(tiny_model))


def test_a_tokenizer_without_a_chat_template_has_no_template_hash(tiny_model, tiny_chat_model):
    assert chat_template_hash(AutoTokenizer.from_pretrained(tiny_model)) is None
    assert len(chat_template_hash(AutoTokenizer.from_pretrained(tiny_chat_model))) == 64
