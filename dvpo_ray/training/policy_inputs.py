"""Everything that policy optimisation reads, checked before any actor starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dvpo_ray.config.algorithms import ALGORITHMS
from dvpo_ray.config.arithmetic import counted
from dvpo_ray.config.inputs import biased_sampling, scoring_warnings, too_long_rows
from dvpo_ray.config.notes import training_notes
from dvpo_ray.config.schema import Config
from dvpo_ray.data.encoding import Encoder
from dvpo_ray.data.prompts import Prompt, ids_key, load_prompts, sample_prompts
from dvpo_ray.data.rows import Content
from dvpo_ray.errors import InputError
from dvpo_ray.gvm.artifact import ContextSpec, GVMManifest, check_files, check_tokenizer, read_manifest, refuse_as_policy
from dvpo_ray.gvm.model import check_trunk
from dvpo_ray.models.loading import check_vocabulary, context_tokens, load_tokenizer
from dvpo_ray.models.trainable import check_partial_training
from dvpo_ray.planning.placement import plan_placement, wanted_gpus
from dvpo_ray.refresh.pairs import pairs_of_data
from dvpo_ray.runtime.cluster import check_gpus


@dataclass(frozen=True)
class Inputs:
    """Prompts as token ids, and what the actors must know of the tokenizer and of the model that scores rollouts.

    Attributes:
        prompts: training prompts.
        texts: the same prompts as the data has them.
        heldout: held-out prompts for evaluations, `evaluation.prompts` of them at most.
        contents: all of these prompts as the data has them, by the `ids_key` of their token ids.
        stop_token_ids: tokens that end a response.
        manifest: of the GVM, or of a baseline's reward model.
        warnings: what its training said against its accuracy, one line each; `notes` begin with them.
        notes: settings that are probably a mistake, and rows that are left out or shortened, one line for each reason.
    """

    prompts: list[list[int]]
    texts: list[Prompt]
    heldout: list[list[int]]
    contents: dict[bytes, Content]
    stop_token_ids: frozenset[int]
    manifest: GVMManifest
    warnings: list[str]
    notes: list[str]


def load_inputs(config: Config) -> Inputs:
    """Check the resources, the models and which parts of them are trained, and read the prompts.

    Raises:
        InputError, ResourceError: anything missing, unreadable or unfit, in one line.
    """
    check_gpus(wanted_gpus(config, plan_placement(config)), config.ray)
    refuse_as_policy(config.model.path, "model.path")
    check_partial_training(config.model, config.policy, config.weight_sync.transport)
    tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
    context = context_tokens(config.model.path, config.model.trust_remote_code)
    for problem in (biased_sampling(config), too_long_rows(config, context)):
        if problem is not None:
            raise InputError(problem)
    manifest = _scoring_manifest(config, tokenizer)
    _check_examples(config, manifest.context, config.data.max_prompt_tokens + config.rollout.max_response_tokens)
    _check_ensemble(config, manifest, tokenizer)
    pair_notes: list[str] = []
    if config.gvm.refresh.source is not None:
        _, pair_notes = pairs_of_data(config.data)  # read again at each refresh; a mistake in them shows now
        check_trunk(config.gvm.path, None, config.gvm.lora, "gvm", config.model.trust_remote_code)
    sets = load_prompts(config.data.prompts, config.data.on_bad_row)
    encoder = Encoder(tokenizer, config.data, config.model.chat_template, context)
    train, heldout = _encode(encoder, sets.train), _encode(encoder, sets.heldout)
    if not train:
        raise InputError(f"{config.data.prompts.path}: no prompt is left; {'; '.join(encoder.notes('prompts')) or 'give more prompts'}")
    warnings = scoring_warnings(config)
    evaluated, evaluation_notes = sample_prompts(heldout, config.evaluation.prompts, config.seed)
    return Inputs(
        prompts=[ids for _, ids in train],
        texts=[prompt for prompt, _ in train],
        heldout=[ids for _, ids in evaluated],
        contents={ids_key(ids): prompt.content for prompt, ids in [*train, *evaluated]},
        stop_token_ids=frozenset(encoder.stop_token_ids),
        manifest=manifest,
        warnings=warnings,
        notes=[*warnings, *training_notes(config), *pair_notes, *sets.notes, *encoder.notes("prompts"), *evaluation_notes],
    )


def _scoring_manifest(config: Config, tokenizer: PreTrainedTokenizerBase) -> GVMManifest:
    """The manifest of the GVM or, for a baseline, of the reward model."""
    needs_values = ALGORITHMS[config.algorithm].scorer == "scorer"
    path = Path(config.gvm.path if needs_values else config.reward_model.path)
    manifest = read_manifest(path, "gvm" if needs_values else "reward_model")
    if needs_values:
        _check_is_value_model(path, manifest, "gvm.path")
    if not needs_values and manifest.context.examples:
        raise InputError(f"{path}: this value model takes examples before each prompt, and a reward model gets no examples; give one without")
    check_tokenizer(path, manifest, tokenizer, config.model.chat_template)
    check_files(path, manifest)
    check_vocabulary(tokenizer, str(path), config.model.trust_remote_code)
    return manifest


def _check_is_value_model(path: Path, manifest: GVMManifest, key: str) -> None:
    if manifest.objective.name == "bradley_terry":
        raise InputError(f"{path}: a reward model; only its last value is trained, so {key} needs a model made by `dvpo gvm train`")


def _check_ensemble(config: Config, manifest: GVMManifest, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse value models whose values cannot be compared with those of `gvm.path`, and copies of one model."""
    known = {config.gvm.path: manifest}
    for path in map(Path, config.scorer.ensemble):
        other = read_manifest(path)
        _check_is_value_model(path, other, "scorer.ensemble")
        check_tokenizer(path, other, tokenizer, config.model.chat_template)
        check_files(path, other)
        check_vocabulary(tokenizer, str(path), config.model.trust_remote_code)
        same = next((name for name, earlier in known.items() if earlier.weights_sha256 == other.weights_sha256), None)
        if same is not None:
            raise InputError(
                f"scorer.ensemble: {path} is the same model as {same}, so they never disagree; give models trained with other seeds or data"
            )
        known[str(path)] = other
        for name in ("outcome", "context"):
            if getattr(other, name) != getattr(manifest, name):
                raise InputError(f"scorer.ensemble: {path} was trained with another {name} than {config.gvm.path}; train both alike")


def _check_examples(config: Config, context: ContextSpec, longest: int) -> None:
    """Refuse a GVM whose examples do not fit before the longest row, and too few rollouts to draw them from."""
    if not context.examples:
        return
    if config.gvm.context.pool <= context.examples:
        raise InputError(
            f"gvm.context.pool is {config.gvm.context.pool}, but {config.gvm.path} takes {counted(context.examples, 'example')}, none of them of "
            f"the row's own prompt; set it to {context.examples + 1} or more"
        )
    room = context_tokens(config.gvm.path, config.model.trust_remote_code)
    needed = longest + context.examples * context.max_tokens
    if needed > room:
        raise InputError(
            f"{config.gvm.path}: {counted(context.examples, 'example')} of at most {context.max_tokens} tokens before rows of {longest} = "
            f"{needed} tokens, but the GVM has a context of {room}; lower data.max_prompt_tokens or rollout.max_response_tokens, or use a GVM with "
            "a shorter context"
        )
    refresh = config.gvm.refresh
    if refresh.source is not None and int(refresh.prompts * refresh.heldout_fraction) <= context.examples:
        raise InputError(
            f"gvm.refresh.prompts {refresh.prompts} x gvm.refresh.heldout_fraction {refresh.heldout_fraction:g} leaves too few held-out prompts to "
            f"draw {counted(context.examples, 'example')} from; raise one of them"
        )


def _encode(encoder: Encoder, prompts: list[Prompt]) -> list[tuple[Prompt, list[int]]]:
    encoded = ((prompt, encoder.encode_prompt(prompt)) for prompt in prompts)
    return [(prompt, ids) for prompt, ids in encoded if ids is not None]
