"""`dvpo eval`: gold scores of a checkpoint's responses to the held-out prompts, sampled by the rollout engines alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from dvpo_ray.actors.roles import started_roles
from dvpo_ray.batch import RaggedBatch
from dvpo_ray.config.schema import Config
from dvpo_ray.data.encoding import Encoder
from dvpo_ray.data.prompts import Prompt, load_prompts, sample_prompts
from dvpo_ray.errors import InputError
from dvpo_ray.evaluation.gain import mean_ci
from dvpo_ray.evaluation.judges import Judge, make_judge
from dvpo_ray.files import whole_file
from dvpo_ray.gvm.artifact import refuse_as_policy
from dvpo_ray.health.alarms import cut_off_note
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
    """Sample one response of a policy to each held-out prompt and judge it.

    Args:
        config: `data.prompts`, `evaluation`, `rollout`, `ray` and the settings of `model` beside its path are used.
        policy: checkpoint folder or hub name.
        out: folder that gets `evaluation.json` with what is returned, `evaluation.jsonl` with one row per prompt, and the engines' logs.

    Returns:
        `policy`, `judge`, `prompts` (their number), `gold.mean`, `gold.ci95`, `response_length.mean` in tokens,
        `response_length.truncated_fraction`, and `notes`, one line for each reason why prompts are left out or shortened,
        or most responses cut off.

    Raises:
        InputError: no judge, no prompts or no such checkpoint.
        ResourceError: the cluster has no room for the engines, or the disk is full.
    """
    judge = make_judge(config.evaluation.judge)
    if judge is None:
        raise InputError("evaluation.judge is none; set evaluation.judge=vader")
    refuse_as_policy(policy, "--policy" if policy != config.model.path else "model.path")
    check_gpus(wanted_gpus(config, [seat for seat in plan_placement(config) if seat.role in ENGINES]), config.ray)
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": policy})})
    with RunConsole() as console:
        return _evaluate(config, judge, out, console)


def _evaluate(config: Config, judge: Judge, out: Path, console: RunConsole) -> dict:
    policy = config.model.path
    with console.stage("reading the prompts", quiet=True):
        tokenizer = load_tokenizer(policy, config.model.trust_remote_code)
        encoder = Encoder(tokenizer, config.data, config.model.chat_template, context_tokens(policy, config.model.trust_remote_code))
        prompts, prompt_ids, notes = heldout_prompts(config, encoder)
    out.mkdir(parents=True, exist_ok=True)
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    sampler = policy_sampler(config, frozenset(encoder.stop_token_ids), longest, out.resolve(), console.starting)
    with console.entering("start of the engines", sampler) as sample, console.stage("responses", len(prompts), unit="prompts") as progress:
        batch = sample(prompt_ids)
        progress.advance(len(prompts))
    with console.stage("judging", quiet=True):
        responses = [encoder.decode(batch.tokens[batch.response(row)].tolist()) for row in range(batch.num_rows)]
        gold = judge.score([prompt.text for prompt in prompts], responses)
        mean, low, high = mean_ci(gold)
    _write_rows(out / "evaluation.jsonl", prompts, responses, gold.tolist(), batch)
    cut_off = float(batch.truncated.mean())
    result = {
        "policy": policy,
        "judge": judge.name,
        "prompts": len(prompts),
        "gold": {"mean": mean, "ci95": [low, high]},
        "response_length": {"mean": float(batch.response_lengths.mean()), "truncated_fraction": cut_off},
        "notes": [*notes, *cut_off_note(cut_off, config.health)],
    }
    with whole_file(out / "evaluation.json") as file:
        json.dump(result, file, indent=2)
    return result


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


def _write_rows(path: Path, prompts: list[Prompt], responses: list[str], gold: list[float], batch: RaggedBatch) -> None:
    with whole_file(path) as lines:
        for prompt, response, score, truncated in zip(prompts, responses, gold, batch.truncated.tolist(), strict=True):
            row = {"prompt": prompt.content, "response": response, "gold": round(score, 6), "truncated": truncated}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
