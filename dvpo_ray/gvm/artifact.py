"""The saved Global Value Model: a Hugging Face folder with `gvm.json`, which says what the values mean and is checked on loading."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dvpo_ray.config.inputs import MANIFEST, no_artifact
from dvpo_ray.config.schema import ModelConfig
from dvpo_ray.errors import InputError
from dvpo_ray.files import file_sha256, whole_folder
from dvpo_ray.gvm.model import head_weight_name, load_value_model, value_head
from dvpo_ray.gvm.views import wilson_interval
from dvpo_ray.models.loading import check_vocabulary, default_device, first_line, load_model_config, torch_dtype

FORMAT_VERSION = 1
CONFIG = "config.json"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class HeadSpec(_Part):
    """The linear layer that turns a hidden state into a value."""

    name: str = Field(description="Parameter name of its weight.")
    shape: list[int] = Field(description="[1, hidden size].")
    dtype: str = Field(description="Dtype of the saved weight.")


class ObjectiveSpec(_Part):
    """The training objective."""

    name: Literal["td0", "td_lambda", "monte_carlo", "bradley_terry"] = Field(
        description="bradley_terry: a reward model; only its last value counts."
    )
    td_lambda: float = Field(description="Trace decay; only td_lambda uses it.")
    bradley_terry_weight: float
    bradley_terry_value: Literal["last", "mean"]


class OutcomeSpec(_Part):
    """The unit of the values."""

    kind: Literal["binary", "score"] = Field(description="binary: +1 chosen, -1 rejected; score: the data's score per response.")
    scale: float = Field(description="Scores were multiplied by this.")


class ContextSpec(_Part):
    """Trajectory conditioning: examples of a policy's answers before each prompt, see `dvpo_ray.gvm.context`."""

    examples: int = Field(0, ge=0, description="Examples before each prompt. With 0 the values are not those of a particular policy.")
    max_tokens: int = Field(0, ge=0, description="Longest example, prompt and response together.")


class TrainingDataSpec(_Part):
    """The training pairs."""

    path: str
    fingerprint: str = Field(description="SHA-256 of the content of the pairs; their order does not matter.")
    pairs: int
    heldout_pairs: int


class GVMManifest(_Part):
    """The content of gvm.json."""

    format_version: Literal[1] = FORMAT_VERSION
    base_model: str = Field(description="Checkpoint that the trunk started from.")
    num_layers: int = Field(description="Number of decoder layers.")
    tokenizer_sha256: str = Field(description="Over vocabulary, merges, special and added tokens.")
    chat_template_sha256: str | None
    chat_template: Literal["auto", "plain"] = Field(description="How messages were turned into text in training.")
    head: HeadSpec
    objective: ObjectiveSpec
    outcome: OutcomeSpec
    value_position: Literal["after_token"] = Field("after_token", description="The logit at a token is the value of the state after it.")
    end_of_response: Literal["appended_once_unless_truncated"] = Field(
        "appended_once_unless_truncated", description="A finished response ends with one end-of-turn token; the value at this token is supervised."
    )
    context: ContextSpec = ContextSpec()
    training_data: TrainingDataSpec
    heldout_accuracy: dict[str, float] = Field(description="Pairwise accuracy on held-out prompts, by view of the values.")
    heldout_regression: dict[str, float | None] = Field(description="Mean squared error and explained variance on held-out prompts.")
    heldout_warnings: list[str] = Field([], description="What training said against these numbers, one line each; older artifacts have none.")
    weights_sha256: dict[str, str] = Field(default_factory=dict, description="Hash of each weight file; set by `save_gvm`.")
    config_sha256: str | None = Field(None, description="Hash of config.json; set by `save_gvm`, missing in older artifacts.")

    @property
    def measured(self) -> dict[str, Any]:
        """Its entry in summary.json: `heldout_accuracy` by view, the number of `pairs`, and `accuracy_ci95` of the mean and the last value."""
        accuracy, pairs = self.heldout_accuracy, self.training_data.heldout_pairs
        known = [view for view in ("mean", "last") if view in accuracy]
        return {"heldout_accuracy": accuracy, "pairs": pairs, "accuracy_ci95": {view: list(wilson_interval(accuracy[view], pairs)) for view in known}}


# ---------------------------------------------------------------------------------------------------------- saving


def save_gvm(folder: Path, model: PreTrainedModel, state: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase, manifest: GVMManifest) -> Path:
    """Write an artifact in one move: the folder is complete or not there.

    Args:
        model: gives the architecture and its config.
        state: every weight under its checkpoint name.

    Raises:
        ResourceError: the disk is full; the folder is left as it was.
    """
    with whole_folder(folder) as draft:
        save_value_model(model, {name: tensor.contiguous() for name, tensor in state.items()}, tokenizer, draft)
        hashes = {file.name: file_sha256(file) for file in sorted(draft.glob("*.safetensors"))}
        whole = manifest.model_copy(update={"weights_sha256": hashes, "config_sha256": file_sha256(draft / CONFIG)})
        (draft / MANIFEST).write_text(whole.model_dump_json(indent=2) + "\n")
    return folder


def save_value_model(model: PreTrainedModel, state: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write an artifact's model and tokenizer, without its manifest."""
    model.save_pretrained(folder, state_dict=state, save_original_format=False)
    tokenizer.save_pretrained(folder)


def head_spec(model: PreTrainedModel) -> HeadSpec:
    """The head's entry in the manifest."""
    name = head_weight_name(model)
    weight = model.get_parameter(name)
    return HeadSpec(name=name, shape=list(weight.shape), dtype=str(weight.dtype).removeprefix("torch."))


# --------------------------------------------------------------------------------------------------------- loading


def load_gvm(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    chat_template: Literal["auto", "plain"] | None = None,
) -> tuple[PreTrainedModel, GVMManifest]:
    """Load an artifact for scoring: in evaluation mode, without gradients, with the head in float32.

    Args:
        dtype: of the trunk. The head computes in float32 (see `ValueHead`).
        tokenizer: the tokenizer of the run; must be the one that the GVM was trained with.
        chat_template: `model.chat_template` of the run; must be the same as in training.

    Raises:
        InputError: no artifact, an unknown format version, another tokenizer or chat template, damaged weights, or a head
            that is missing or has another shape.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if tokenizer is not None:
        check_tokenizer(folder, manifest, tokenizer, chat_template)
    check_files(folder, manifest)
    if tokenizer is not None:
        check_vocabulary(tokenizer, str(folder), trust_remote_code)
    config = load_model_config(str(folder), trust_remote_code)
    model, report = load_value_model(str(folder), config, dtype, attention, trust_remote_code, device)
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(f"{folder}: weights are missing and would be newly initialised: {', '.join(missing[:3])}; train the GVM again")
    model.requires_grad_(False).eval()
    value_head(model).float()
    return model, manifest


def load_gvm_of_run(model: ModelConfig, path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> tuple[PreTrainedModel, GVMManifest]:
    """`load_gvm` with the dtype and the attention of a run's model, on the device of this process.

    Args:
        tokenizer: the tokenizer of the run; None if the inputs of the run are already checked.
    """
    return load_gvm(path, torch_dtype(model.dtype), model.attention, tokenizer, default_device(), model.trust_remote_code, model.chat_template)


def read_manifest(folder: Path, kind: Literal["gvm", "reward_model"] = "gvm") -> GVMManifest:
    """Read and check gvm.json.

    Args:
        kind: what the folder should hold, for the error.

    Raises:
        InputError: the file is missing, unreadable or of another format version.
    """
    if (problem := no_artifact(folder, kind)) is not None:
        raise InputError(problem)
    file = folder / MANIFEST
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: not readable as JSON: {first_line(error)}; train the GVM again") from error
    if content.get("format_version") != FORMAT_VERSION:
        version = json.dumps(content.get("format_version"))
        raise InputError(f"{file}: format_version is {version}, but this program reads version {FORMAT_VERSION}; train the GVM again")
    try:
        return GVMManifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{file}: {key}: {first['msg']}; train the GVM again") from error


def check_tokenizer(
    folder: Path, manifest: GVMManifest, tokenizer: PreTrainedTokenizerBase, chat_template: Literal["auto", "plain"] | None = None
) -> None:
    """Refuse a GVM that was trained with other token ids for the same text.

    Args:
        chat_template: `model.chat_template` of the run; not compared if None.

    Raises:
        InputError: the vocabulary, merges, special tokens or chat template differ.
    """
    name = tokenizer.name_or_path
    if tokenizer_hash(tokenizer) != manifest.tokenizer_sha256:
        raise InputError(
            f"{folder}: this GVM was trained with another tokenizer than that of {name}; "
            f"use a GVM and a policy with the same tokenizer (this GVM started from {manifest.base_model})"
        )
    if tokenizer.chat_template and chat_template not in (None, manifest.chat_template):
        raise InputError(f"{folder}: this GVM was trained with model.chat_template {manifest.chat_template}, not {chat_template}; set the same")
    if manifest.chat_template == "auto" and chat_template_hash(tokenizer) != manifest.chat_template_sha256:
        raise InputError(
            f"{folder}: this GVM was trained with another chat template than that of {name}; "
            f"use the template of {manifest.base_model} or train the GVM again"
        )


def refuse_as_policy(path: str, key: str) -> None:
    """Refuse a value or reward model in the place of a policy: transformers would load it with a random output layer.

    Args:
        path: checkpoint folder or hub name.
        key: config key of the path, for the error.

    Raises:
        InputError: the folder holds gvm.json.
    """
    if (Path(path) / MANIFEST).is_file():
        raise InputError(f"{key}: {path} is a value or reward model (it holds {MANIFEST}), not a policy; give a causal language model")


def check_files(folder: Path, manifest: GVMManifest) -> None:
    """Refuse an artifact with missing, truncated or changed files, or without the head in its weights.

    Raises:
        InputError: names the file or the head.
    """
    config = folder / CONFIG
    if not config.is_file():
        raise InputError(f"{folder}: {CONFIG} is missing; copy the whole artifact or train the GVM again")
    if manifest.config_sha256 not in (None, file_sha256(config)):
        raise InputError(f"{config}: not the saved model config (its SHA-256 is not that in {MANIFEST}); copy the artifact again")
    files = sorted(folder.glob("*.safetensors"))
    lost = sorted(set(manifest.weights_sha256) - {file.name for file in files})
    if lost:
        raise InputError(f"{folder}: weight file {lost[0]} is missing; copy the whole artifact or train the GVM again")
    shapes = _tensor_shapes(files)
    head = manifest.head
    if head.name not in shapes:
        raise InputError(f"{folder}: the value head {head.name} is not in the weights and would be newly initialised; train the GVM again")
    if shapes[head.name] != head.shape:
        raise InputError(f"{folder}: the value head {head.name} has shape {shapes[head.name]}, {MANIFEST} says {head.shape}; train the GVM again")
    for file in files:
        if file_sha256(file) != manifest.weights_sha256.get(file.name):
            raise InputError(f"{file}: not the saved weights (their SHA-256 is not that in {MANIFEST}); copy the artifact again")


def _tensor_shapes(files: list[Path]) -> dict[str, list[int]]:
    """Shape of every tensor by name, from the headers of the files; reading a header also finds a truncated file."""
    shapes: dict[str, list[int]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                shapes |= {name: list(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: damaged or truncated weights ({first_line(error)}); copy the artifact again") from error
    return shapes


# ---------------------------------------------------------------------------------------------------- fingerprints

# The padding token is left out: padding is never read, and users set it as they like.
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token")


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over vocabulary, merges, special tokens and added tokens; it does not depend on how the files are written."""
    content = {
        "vocabulary": tokenizer.get_vocab(),
        "merges": _merges(tokenizer),
        "special": {name: getattr(tokenizer, name) for name in _SPECIAL_TOKENS},
        "added": {str(i): [token.content, token.special] for i, token in sorted(tokenizer.added_tokens_decoder.items())},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def chat_template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """SHA-256 of the chat template; None if there is none."""
    template = tokenizer.chat_template
    if template is None:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _merges(tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    """The merges of a BPE tokenizer in order, as pairs; empty for other tokenizers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return []
    merges = json.loads(backend.to_str())["model"].get("merges") or []
    return [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in merges]
