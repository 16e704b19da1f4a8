"""The inputs of a value model's training, checked; the preference pairs of a config, read and encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dvpo_ray.config import Config
from dvpo_ray.config.inputs import MANIFEST
from dvpo_ray.config.schema import GVMConfig, RewardModelConfig
from dvpo_ray.data.encoding import Encoder
from dvpo_ray.data.preferences import PreferencePair, dataset_fingerprint, load_preferences
from dvpo_ray.data.splitting import Sets
from dvpo_ray.errors import InputError
from dvpo_ray.gvm.artifact import (
    ContextSpec,
    GVMManifest,
    ObjectiveSpec,
    OutcomeSpec,
    TrainingDataSpec,
    chat_template_hash,
    check_files,
    read_manifest,
    refuse_as_policy,
    tokenizer_hash,
)
from dvpo_ray.gvm.context import Origin, with_peer_examples
from dvpo_ray.gvm.model import check_trunk
from dvpo_ray.gvm.pairs import PairBatch, build_pairs
from dvpo_ray.models.loading import context_tokens, load_tokenizer

TrainingSettings = GVMConfig | RewardModelConfig
"""The config section that a value model is trained by."""


@dataclass(frozen=True)
class GVMData:
    """Training and held-out pairs as token ids, and their entry in the manifest.

    Attributes:
        train, heldout: the pairs.
        tokenizer: of the policy and the GVM.
        description: the entry in the manifest.
        notes: rows that are left out, shortened or kept in a form that the user should know of, one line for each reason.
    """

    train: PairBatch
    heldout: PairBatch
    tokenizer: PreTrainedTokenizerBase
    description: TrainingDataSpec
    notes: list[str]


def load_gvm_data(config: Config, settings: TrainingSettings) -> GVMData:
    """Check the checkpoint that the training starts from, and read, check and encode the training and held-out pairs.

    Raises:
        InputError: anything missing, unreadable or unfit, in one line.
    """
    _check_start(config, settings)
    tokenizer = _shared_tokenizer(config, settings)
    encoder = make_encoder(config, settings, tokenizer)
    sets = _load_pairs(config)
    outcome, context = _outcome_spec(settings), _context_spec(settings)
    train = _encode(encoder, sets.train, "training", outcome, context, config.seed)
    heldout = _encode(encoder, sets.heldout, "held-out", outcome, context, config.seed)
    description = TrainingDataSpec(
        path=config.data.preferences.path, fingerprint=dataset_fingerprint(sets.train), pairs=train.num_pairs, heldout_pairs=heldout.num_pairs
    )
    return GVMData(train, heldout, tokenizer, description, [*sets.notes, *encoder.notes("pairs")])


def load_heldout(
    config: Config, settings: TrainingSettings, manifest: GVMManifest, tokenizer: PreTrainedTokenizerBase
) -> tuple[PairBatch, list[str]]:
    """Read, check and encode the held-out pairs, with outcomes and examples as in the training of a value model.

    Args:
        settings: name the checkpoint whose context the rows must fit.
        manifest: of the value model.

    Returns:
        The pairs, and notes as in `GVMData`.

    Raises:
        InputError: anything missing, unreadable or unfit, in one line.
    """
    encoder = make_encoder(config, settings, tokenizer)
    sets = _load_pairs(config)
    pairs = _encode(encoder, sets.heldout, "held-out", manifest.outcome, manifest.context, config.seed)
    return pairs, [*sets.notes, *encoder.notes("held-out pairs")]


def manifest_entries(config: Config, settings: TrainingSettings, data: GVMData) -> dict:
    """The entries of the manifest that follow from config and data."""
    return {
        "base_model": settings.init_from or config.model.path,
        "tokenizer_sha256": tokenizer_hash(data.tokenizer),
        "chat_template_sha256": chat_template_hash(data.tokenizer),
        "chat_template": config.model.chat_template,
        "objective": ObjectiveSpec(
            name=settings.objective,
            td_lambda=settings.td_lambda,
            bradley_terry_weight=settings.bradley_terry_weight,
            bradley_terry_value=settings.bradley_terry_value,
        ),
        "outcome": _outcome_spec(settings),
        "context": _context_spec(settings),
        "training_data": data.description,
    }


def _outcome_spec(settings: TrainingSettings) -> OutcomeSpec:
    return OutcomeSpec(kind=settings.outcome, scale=settings.outcome_scale)


def _context_spec(settings: TrainingSettings) -> ContextSpec:
    context = settings.context
    return ContextSpec(examples=context.examples, max_tokens=context.max_tokens) if context.examples else ContextSpec()


def make_encoder(config: Config, settings: TrainingSettings, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """The encoder of a value model's rows: the policy's tokenizer and template, and the context of the start checkpoint."""
    path = settings.init_from or config.model.path
    return Encoder(tokenizer, config.data, config.model.chat_template, context_tokens(path, config.model.trust_remote_code))


def _check_start(config: Config, settings: TrainingSettings) -> None:
    """Refuse a damaged artifact, a missing head, and layers or adapters that the model does not have.

    Raises:
        InputError: names the key or the file.
    """
    section = settings.section
    refuse_as_policy(config.model.path, "model.path")
    start = settings.init_from or config.model.path
    folder = Path(start)
    if (folder / MANIFEST).is_file():
        check_files(folder, read_manifest(folder))
    elif settings.keep_head:
        problem = f"{settings.init_from} is not one (it has no {MANIFEST})" if settings.init_from else "it is not set"
        raise InputError(
            f"{section}.keep_head continues from the head of the GVM in {section}.init_from, but {problem}; give a GVM, or keep_head=false"
        )
    check_trunk(start, settings.num_layers, settings.lora, section, config.model.trust_remote_code)


def _shared_tokenizer(config: Config, settings: TrainingSettings) -> PreTrainedTokenizerBase:
    """The policy's tokenizer, after a check that `init_from` has the same."""
    tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
    other = settings.init_from
    if other is not None and tokenizer_hash(load_tokenizer(other, config.model.trust_remote_code)) != tokenizer_hash(tokenizer):
        raise InputError(f"{settings.section}.init_from: {other} has another tokenizer than {config.model.path}; both must be the same")
    return tokenizer


def _load_pairs(config: Config) -> Sets[PreferencePair]:
    if config.data.preferences is None:
        raise InputError("data.preferences.path is not set; give preference pairs")
    return load_preferences(config.data.preferences, config.data.on_bad_row)


def _encode(encoder: Encoder, pairs: Sequence[PreferencePair], which: str, outcome: OutcomeSpec, context: ContextSpec, seed: int) -> PairBatch:
    """The pairs as rows of ids. Examples come from the same pairs, so never from the other side of the split."""
    encoded = [(pair, ids) for pair in pairs if (ids := encoder.encode_pair(pair)) is not None]
    if not encoded:
        raise InputError(f"data.preferences: no {which} pair is left; {'; '.join(encoder.notes('pairs')) or 'give more pairs'}")
    rows = build_pairs([ids for _, ids in encoded], outcome.kind, outcome.scale)
    if not context.examples:
        return rows
    origins = [Origin(pair.where, i, pair.key, model) for i, (pair, _) in enumerate(encoded) for model in pair.response_models]
    return PairBatch(with_peer_examples(rows.batch, origins, context, seed, encoder.context_tokens))
