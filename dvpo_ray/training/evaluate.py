"""`dvpo eval`: a checkpoint's responses to the held-out prompts, sampled by the rollout engines alone, and judged or laid beside others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from dvpo_ray.actors.roles import started_roles
from dvpo_ray.batch import RaggedBatch
from dvpo_ray.config.inputs import is_made
from dvpo_ray.config.notes import foreign_judge
from dvpo_ray.config.schema import Config
from dvpo_ray.data.encoding import Encoder
from dvpo_ray.data.prompts import Prompt, load_prompts, sample_prompts
from dvpo_ray.errors import InputError
from dvpo_ray.evaluation.gain import gain_of, mean_ci
from dvpo_ray.evaluation.judges import make_judge
from dvpo_ray.files import whole_file
from dvpo_ray.gvm.artifact import check_tokenizer, load_gvm_of_run, read_manifest, refuse_as_policy
from dvpo_ray.health.alarms import cut_off_note
from dvpo_ray.models.forward import batch_values
from dvpo_ray.models.loading import context_tokens, load_tokenizer
from dvpo_ray.monitoring.console import RunConsole
from dvpo_ray.planning.placement import plan_placement, wanted_gpus
from dvpo_ray.rollouts.pool import RolloutPool
from dvpo_ray.runtime.cluster import check_gpus, connect
from dvpo_ray.runtime.fork_server import prepare
from dvpo_ray.runtime.waiting import get

ENGINES = ("rollout",)
"""The only role of an evaluation."""


def evaluate_policy(config: Config, policy: str, out: Path) -> dict:
    """Sample one response of a policy to each held-out prompt, and judge it.

    Without a judge, the responses of `model.path` are written beside those of the policy, for reading, and where `gvm.path` is a value
    model, both get its estimate.

    Args:
        config: `data.prompts`, `evaluation`, `rollout`, `ray` and the settings of `model` are used; without a judge `gvm.path` and `scorer` too.
        policy: checkpoint folder or hub name.
        out: folder that gets `evaluation.json` with what is returned, `evaluation.jsonl` with one row per prompt, and the engines' logs.

    Returns:
        `policy`, `judge`, `prompts` (their number), `response_length.mean` in tokens, `response_length.truncated_fraction`, and `notes`, one
        line for each reason why prompts are left out or shortened, or most responses cut off;
        the user sees them as soon as they are known. With a judge `gold.mean` and `gold.ci95`.
        Without one `beside`, the other policy, if there is one, and `estimate`: `gain_of` both, or `mean` and `ci95` of the policy alone.

    Raises:
        InputError: no prompts, no such checkpoint, a value model of another tokenizer, or two policies whose tokenizers keep other prompts.
        ResourceError: the cluster has no room for the engines, or the disk is full.
    """
    refuse_as_policy(policy, "--policy" if policy != config.model.path else "model.path")
    check_gpus(wanted_gpus(config, [seat for seat in plan_placement(config) if seat.role in ENGINES]), config.ray)
    judge = make_judge(config.evaluation.judge)
    with RunConsole() as console:
        tokenizer = load_tokenizer(policy, config.model.trust_remote_code)
        gvm = _estimator(config, tokenizer) if judge is None else None
        with console.stage("reading the prompts", quiet=True):
            asked = [_questions(config, one) for one in ([config.model.path] if judge is None and policy != config.model.path else []) + [policy]]
        of_judge = foreign_judge(config)
        for note in dict.fromkeys([*of_judge, *(note for questions in asked for note in questions.notes)]):
            console.say(f"note: {note}")
        _check_same_prompts(asked)
        *before, after = [_answers(config, one, out if one is asked[-1] else out / "before", console) for one in asked]
        prompts = asked[-1].prompts
        result = {"policy": policy, "judge": config.evaluation.judge, "prompts": len(prompts)} | ({"beside": config.model.path} if before else {})
        columns: dict[str, list] = {"prompt": [prompt.content for prompt in prompts]} | ({"before": before[0].responses} if before else {})
        columns |= {"response": after.responses, "truncated": after.batch.truncated.tolist()}
        columns |= {"truncated_before": before[0].batch.truncated.tolist()} if before else {}
        if judge is not None:
            with console.stage("judging", quiet=True):
                gold = judge.score([prompt.text for prompt in prompts], after.responses)
            columns["gold"], result["gold"] = _rounded(gold), _mean(gold)
        elif gvm is not None:
            with console.stage("values", quiet=True):
                *value_before, value = [_last_values(config, gvm, side.batch) for side in (*before, after)]
            columns |= {"value": _rounded(value)} | ({"value_before": _rounded(value_before[0])} if before else {})
            result["estimate"] = gain_of(*value_before, value) if before else _mean(value)
        cut_off = float(after.batch.truncated.mean())
        of_length = cut_off_note(cut_off, config.health)
        for note in of_length:
            console.say(f"note: {note}")
    result["response_length"] = {"mean": float(after.batch.response_lengths.mean()), "truncated_fraction": cut_off}
    result["notes"] = [*of_judge, *asked[-1].notes, *of_length]
    with whole_file(out / "evaluation.jsonl") as lines:
        rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with whole_file(out / "evaluation.json") as file:
        json.dump(result, file, indent=2)
    return result


def _rounded(numbers: np.ndarray) -> list[float]:
    return [round(float(number), 6) for number in numbers]


def _mean(scores: np.ndarray) -> dict:
    mean, *ends = mean_ci(scores)
    return {"mean": mean, "ci95": ends}


@dataclass(frozen=True)
class _Questions:
    """The held-out prompts that a policy answers, their token ids with its tokenizer, and notes on those left out."""

    policy: str
    encoder: Encoder
    prompts: list[Prompt]
    ids: list[list[int]]
    notes: list[str]


def _questions(config: Config, policy: str) -> _Questions:
    tokenizer = load_tokenizer(policy, config.model.trust_remote_code)
    encoder = Encoder(tokenizer, config.data, config.model.chat_template, context_tokens(policy, config.model.trust_remote_code))
    return _Questions(policy, encoder, *heldout_prompts(config, encoder))


def _check_same_prompts(asked: Sequence[_Questions]) -> None:
    """Refuse to compare policies that get other prompts: their tokenizers or chat templates leave out different ones."""
    first, last = asked[0], asked[-1]
    if first.prompts != last.prompts:
        raise InputError(
            f"{last.policy} and {first.policy} do not keep the same held-out prompts, so their responses cannot be compared; "
            "raise data.max_prompt_tokens, or set data.long_prompt=truncate_left"
        )


@dataclass(frozen=True)
class _Answers:
    """One response of a policy to each held-out prompt, in the order of the prompts; `batch` has their tokens."""

    responses: list[str]
    batch: RaggedBatch


def _answers(config: Config, asked: _Questions, out: Path, console: RunConsole) -> _Answers:
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": asked.policy})})
    out.mkdir(parents=True, exist_ok=True)
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    sampler = policy_sampler(config, frozenset(asked.encoder.stop_token_ids), longest, out.resolve(), console.starting)
    with (
        console.entering("start of the engines", sampler) as sample,
        console.stage(f"responses of {asked.policy}", len(asked.prompts), unit="prompts") as progress,
    ):
        batch = sample(asked.ids)
        progress.advance(len(asked.prompts))
    return _Answers([asked.encoder.decode(batch.tokens[batch.response(row)].tolist()) for row in range(batch.num_rows)], batch)


def _estimator(config: Config, tokenizer: PreTrainedTokenizerBase) -> Path | None:
    """The value model of the config, if it is there and can score a response by itself.

    Raises:
        InputError: it has another tokenizer than the policy.
    """
    if not is_made(config.gvm.path):
        return None
    path = Path(config.gvm.path)
    manifest = read_manifest(path)
    check_tokenizer(path, manifest, tokenizer, config.model.chat_template)
    return None if manifest.context.examples else path


def _last_values(config: Config, gvm: Path, batch: RaggedBatch) -> np.ndarray:
    """The value of each response after its last token, [R], also of one that is cut off. The engines are gone by now, so the device is free."""
    model, _ = load_gvm_of_run(config.model, gvm)
    return batch_values(model, batch, config.scorer.micro_batch_tokens)[batch.offsets[1:] - 1]


def heldout_prompts(config: Config, encoder: Encoder) -> tuple[list[Prompt], list[list[int]], list[str]]:
    """The held-out prompts that the settings keep, at most `evaluation.prompts` of them, their token ids, and notes on those left out.

    Raises:
        InputError: no prompt is left.
    """
    sets = load_prompts(config.data.prompts, config.data.on_bad_row)
    kept = [(prompt, ids) for prompt in sets.heldout if (ids := encoder.encode_prompt(prompt)) is not None]
    if not kept:
        raise InputError(f"{config.data.prompts.path}: no held-out prompt is left; {'; '.join(encoder.notes('prompts')) or 'give more prompts'}")
    chosen, notes = sample_prompts(kept, config.evaluation.prompts, config.seed)
    prompts, prompt_ids = zip(*chosen, strict=True)
    return list(prompts), list(prompt_ids), [*sets.notes, *encoder.notes("held-out prompts"), *notes]


class Sample(Protocol):
    """Samples one response to each prompt; the rows are in the order of the prompts and have `log_probs`."""

    def __call__(self, prompt_ids: Sequence[list[int]], stream: int = 0) -> RaggedBatch:
        """
        Args:
            stream: of random numbers; samples of two streams are independent.
        """


@contextmanager
def policy_sampler(
    config: Config, stop_token_ids: frozenset[int], longest: int, out: Path, show: Callable[[Mapping[str, str]], None] = lambda states: None
) -> Iterator[Sample]:
    """Rollout engines with the model of `model.path`, for the time of a `with` block.

    Args:
        longest: tokens of the longest prompt and response together.
        out: folder of the engines' logs.
        show: as in `wait_until_ready`.

    Raises:
        ResourceError: the cluster has no room for the engines.
    """
    # The weights never change here, so no channel between GPUs is opened.
    prepare(config)
    config = config.model_copy(update={"weight_sync": config.weight_sync.model_copy(update={"transport": "object_store"})})
    with connect(config.ray), started_roles(config, str(out), stop_token_ids, longest, ENGINES, show) as roles:
        pool = RolloutPool(roles.engines, config)

        def sample(prompt_ids: Sequence[list[int]], stream: int = 0) -> RaggedBatch:
            chunks = get(list(pool.sample(prompt_ids, 0, stream=stream)), what="rollouts")
            return RaggedBatch.concatenate(chunks).sorted_by_id()

        yield sample
