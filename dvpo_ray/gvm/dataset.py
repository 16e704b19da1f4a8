"""The preference pairs of a config, read, checked and encoded for the training of a value model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dvpo_ray.config import Config
from dvpo_ray.config.schema import GVMConfig, RewardModelConfig
from dvpo_ray.data.encoding import Encoder
from dvpo_ray.data.preferences import PreferencePair, dataset_fingerprint, load_preferences
from dvpo_ray.data.splitting import Sets
from dvpo_ray.errors import InputError
from dvpo_ray.gvm.artifact import ContextSpec, GVMManifest, ObjectiveSpec, OutcomeSpec, TrainingDataSpec, chat_template_hash, tokenizer_hash
from dvpo_ray.gvm.context import Origin, with_peer_examples
from dvpo_ray.gvm.pairs import PairBatch, build_pairs
from dvpo_ray.gvm.start import check_start
from dvpo_ray.models.loading import context_tokens, load_tokenizer

TrainingSettings = GVMConfig | RewardModelConfig
"""What a value model is trained by: the section of the config says all that its kind of model needs."""


@dataclass(frozen=True)
class GVMData:
    """Training and held-out pairs as token ids, and what the manifest says of them.

    Attributes:
        train, heldout: the pairs.
        tokenizer: of the policy and the GVM.
        description: the manifest's entry.
        notes: skipped, dropped and shortened rows, one line for each kind.
    """

    train: PairBatch
    heldout: PairBatch
    tokenizer: PreTrainedTokenizerBase
    description: TrainingDataSpec
    notes: list[str]


def load_gvm_data(config: Config, settings: TrainingSettings) -> GVMData:
    """Check what the training starts from, and read, check and encode the pairs to train on and to hold out.

    Raises:
        InputError: anything missing, unreadable or unfit, in one line.
    """
    check_start(config, settings)
    tokenizer = _shared_tokenizer(config, settings)
    encoder = make_encoder(config, settings, tokenizer)
    sets = _load_pairs(config)
    outcome, context = _outcome_spec(settings), _context_spec(settings)
    train = _encode(encoder, sets.train, "training", outcome, context, config.seed)
    heldout = _encode(encoder, sets.heldout, "held-out", outcome, context, config.seed)
    description = TrainingDataSpec(
        path=config.data.preferences.path, fingerprint=dataset_fingerprint(sets.train), pairs=train.num_pairs, heldout_pairs=heldout.num_pairs
    )
    return GVMData(train, heldout, tokenizer, description, [*sets.warnings, *sets.skipped, *encoding_notes(encoder)])


def load_heldout(config: Config, settings: TrainingSettings, manifest: GVMManifest, tokenizer: PreTrainedTokenizerBase) -> PairBatch:
    """Read, check and encode the held-out pairs, with outcomes and contexts of the kind that a value model was trained on.

    Args:
        settings: say which checkpoint's context the rows must fit.
        manifest: of the value model.

    Raises:
        InputError: anything missing, unreadable or unfit, in one line.
    """
    encoder = make_encoder(config, settings, tokenizer)
    return _encode(encoder, _load_pairs(config).heldout, "held-out", manifest.outcome, manifest.context, config.seed)


def manifest_entries(config: Config, settings: TrainingSettings, data: GVMData) -> dict:
    """The manifest's entries that config and data decide."""
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
    """The encoder of a value model's rows: the policy's tokenizer and template, and the context of the checkpoint that the model starts from."""
    path = settings.init_from or config.model.path
    return Encoder(tokenizer, config.data, config.model.chat_template, context_tokens(path, config.model.trust_remote_code))


def _shared_tokenizer(config: Config, settings: TrainingSettings) -> PreTrainedTokenizerBase:
    """The policy's tokenizer, after a check that `init_from` has the same."""
    tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
    other = settings.init_from
    if other is not None and tokenizer_hash(load_tokenizer(other, config.model.trust_remote_code)) != tokenizer_hash(tokenizer):
        raise InputError(f"{settings.section}.init_from: {other} has another tokenizer than {config.model.path}; it must share the policy's")
    return tokenizer


def _load_pairs(config: Config) -> Sets[PreferencePair]:
    if config.data.preferences is None:
        raise InputError("data.preferences.path is not set; give preference pairs")
    return load_preferences(config.data.preferences, config.data.on_bad_row)


def _encode(encoder: Encoder, pairs: Sequence[PreferencePair], which: str, outcome: OutcomeSpec, context: ContextSpec, seed: int) -> PairBatch:
    """The pairs as rows of ids; the examples of their contexts come from among the same pairs, so never from the other side of the split."""
    encoded = [(pair, ids) for pair in pairs if (ids := encoder.encode_pair(pair)) is not None]
    if not encoded:
        dropped = ", ".join(f"{len(rows)} for {reason}" for reason, rows in encoder.dropped.items() if rows)
        raise InputError(f"data.preferences: no {which} pair is left (dropped {dropped or 'none'}); raise data.max_prompt_tokens or give more pairs")
    rows = build_pairs([ids for _, ids in encoded], outcome.kind, outcome.scale)
    if not context.examples:
        return rows
    origins = [Origin(pair.where, i, pair.key, model) for i, (pair, _) in enumerate(encoded) for model in pair.response_models]
    return PairBatch(with_peer_examples(rows.batch, origins, context, seed, encoder.context_tokens))


def encoding_notes(encoder: Encoder) -> Iterator[str]:
    """One line for each reason that rows were dropped or shortened for."""
    for verb, reasons in (("dropped", encoder.dropped), ("shortened", encoder.truncated)):
        for reason, rows in reasons.items():
            if rows:
                yield f"{verb} {len(rows)} rows ({reason}), the first is {rows[0]}"
