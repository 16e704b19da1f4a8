"""The actor that turns a step's scored rollouts into the learner's batch, so that the driver never holds a token."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import ray
from ray import ObjectRef

from dvpo_ray.actors.update_plan import Update, plan_update
from dvpo_ray.batch import RaggedBatch
from dvpo_ray.config.algorithms import ALGORITHMS
from dvpo_ray.config.schema import Config
from dvpo_ray.data.encoding import Encoder
from dvpo_ray.data.prompts import Prompt, ids_key
from dvpo_ray.data.rows import Content, content_text
from dvpo_ray.evaluation.judges import make_judge
from dvpo_ray.health.diagnostics import confidence, health_statistics
from dvpo_ray.models.loading import context_tokens, load_tokenizer, packs_rows
from dvpo_ray.policy.advantages import compute_advantages, value_targets
from dvpo_ray.policy.mismatch import check_same_weights
from dvpo_ray.policy.statistics import batch_statistics, sequence_kl
from dvpo_ray.refresh.samples import usable_samples, write_samples
from dvpo_ray.runtime.process import Actor

LEARNER_FIELDS = ("advantages", "loss_mask", "log_probs", "reference_log_probs")
CRITIC_FIELDS = ("values", "returns", "loss_mask")
"""Token fields that the ranks of a role read."""


@dataclass(frozen=True)
class ScoredChunk:
    """Some rollouts and their scores, as references into the object store.

    Attributes:
        rollouts: reference to a `RaggedBatch`.
        scores: reference to the `Fields` of each role that scored them, by the role's name.
    """

    rollouts: ObjectRef
    scores: dict[str, ObjectRef] = field(default_factory=dict)


class ExperienceBuilder(Actor):
    """Advantages over the whole batch, the plan of the update, and the files that people read."""

    role = "experience"

    def __init__(self, config: Config, index: int, run_folder: str) -> None:
        super().__init__(index, run_folder)
        self.config = config
        self.mode = config.advantage.mode if config.algorithm == "dvpo" else config.algorithm
        self.tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
        self.judge = make_judge(config.evaluation.judge)
        critic_starts_from = config.reward_model.path if config.critic.init == "reward_model" else config.model.path
        trained = {"policy": config.model.path} | ({"critic": critic_starts_from} if ALGORITHMS[config.algorithm].has_critic else {})
        self.packed = {
            section: packs_rows(config.model, path, on_gpu=getattr(config, section).gpus_per_actor > 0) for section, path in trained.items()
        }
        self.batch: RaggedBatch | None = None
        self.contents: dict[bytes, Content] = {}

    def know_prompts(self, prompts: dict[bytes, Content]) -> None:
        """The run's prompts as the data has them, by their `ids_key`: for the judge, and for the files that people read."""
        self.contents |= prompts

    # ------------------------------------------------------------------------------------------------ experience

    def build(
        self,
        chunks: list[ScoredChunk],
        step: int,
        policy_version: int,
        kl_reward_coefficient: float,
        greedy_chunks: list[ScoredChunk] | None = None,
    ) -> tuple:
        """Advantages of a step's rollouts, and the plan of the update on them.

        Args:
            chunks: references to rollouts and their scores, in any order.
            step: its number; with the seed it decides which rows an optimizer step has.
            policy_version: the version that must have sampled every token.
            kl_reward_coefficient: weight of the KL penalty inside the advantage; 0 when KL is in the loss or off.
            greedy_chunks: references to the greedy response to each prompt and its reward, if the algorithm has such a baseline.

        Returns:
            Metrics, the `Update` of the learner, and that of the critic, if there is one. Call it with as many `num_returns`.
        """
        with self.clock.busy():
            batch = self._judged(_gather(chunks))
            _check_rows(batch, policy_version)
            settings, samples = self.config.advantage, self.config.batch.samples_per_prompt
            if greedy_chunks:
                batch = batch.with_row_fields(greedy_rewards=_greedy_rewards(batch, _gather(greedy_chunks), samples))
            result = compute_advantages(
                batch,
                mode=self.mode,
                gae_lambda=settings.gae_lambda,
                kl_coefficient=kl_reward_coefficient,
                whiten=settings.whiten,
                value_whitening=settings.value_whitening,
                truncated=settings.truncated,
                truncation_penalty=settings.truncation_penalty,
                samples_per_prompt=samples,
            )
            trusted = self._trusted(batch, result.advantages)
            self.batch = batch.with_token_fields(advantages=trusted, loss_mask=result.loss_mask.astype(np.float32))
            policy, critic = self.config.policy, self.config.critic
            updates = [self._update(step, policy.num_actors, self.config.batch.micro_batch_tokens, self.packed["policy"], LEARNER_FIELDS)]
            if ALGORITHMS[self.config.algorithm].has_critic:
                self.batch = self.batch.with_token_fields(returns=value_targets(batch, result.unwhitened))
                updates.append(self._update(step, critic.num_actors, critic.micro_batch_tokens, self.packed["critic"], CRITIC_FIELDS))
            return (batch_statistics(self.batch) | health_statistics(self.batch) | updates[0].metrics(), *updates)

    def _trusted(self, batch: RaggedBatch, advantages: np.ndarray) -> np.ndarray:
        """The whitened advantages, smaller where the value models of an ensemble disagree, float32 [N]."""
        coefficient = self.config.advantage.disagreement_coefficient
        return advantages if coefficient == 0 else (advantages * confidence(batch, coefficient)).astype(np.float32)

    def _update(self, step: int, ranks: int, max_tokens: int, packed: bool, fields: tuple[str, ...]) -> Update:
        """The batch, with what its reader needs, and the plan of a role's ranks."""
        return plan_update(self.batch.only(*fields), self.config.batch, ranks, max_tokens, packed=packed, seed=self.config.seed, step=step)

    def check_start(self, chunks: list[ScoredChunk]) -> None:
        """Check that engine and reference agree on the first rollouts of a run; see `check_same_weights`."""
        with self.clock.busy():
            batch = _gather(chunks)
            mask = batch.response_mask
            engine, reference = (batch.by_token[name][mask] for name in ("log_probs", "reference_log_probs"))
            check_same_weights(engine, reference, self.config.model.dtype)

    def gather(self, chunks: list[ScoredChunk]) -> RaggedBatch:
        """The rows of some chunks as one batch, in the order of their ids."""
        with self.clock.busy():
            return _gather(chunks)

    def write_samples(self, chunks: list[ScoredChunk], prompts: list[Prompt], path: str) -> tuple[int, list[str]]:
        """Write the usable responses of some rollouts for a refresh of the value model, with gold scores if the judge is its source.

        Args:
            chunks: references to `gvm.refresh.samples_per_prompt` rollouts of each prompt.
            prompts: as the data has them.

        Returns:
            Usable responses, and one line for each reason why others are left out.
        """
        with self.clock.busy():
            config, settings = self.config, self.config.gvm.refresh
            # A text that encodes to more tokens than were sampled is left out, like every text that does not encode to its tokens.
            data = config.data.model_copy(update={"long_response": "drop"})
            context = context_tokens(config.model.path, config.model.trust_remote_code)
            encoder = Encoder(self.tokenizer, data, config.model.chat_template, context)
            judge = self.judge if settings.source == "judge" else None
            samples, notes = usable_samples(_gather(chunks), prompts, settings.samples_per_prompt, encoder, judge)
            write_samples(Path(path), prompts, samples)
            return sum(map(len, samples)), notes

    def write_rollouts(self, step: int) -> None:
        """Write the last batch to rollouts/step_*.jsonl, one row per rollout."""
        with self.clock.busy():
            path = self.run_folder / "rollouts" / f"step_{step:06d}.jsonl"
            _write_jsonl(path, [self._record(r) for r in range(self.batch.num_rows)])

    def _record(self, r: int) -> dict:
        batch, response = self.batch, self.batch.response(r)
        response_ids = batch.tokens[response].tolist()
        return {
            "row_id": int(batch.row_ids[r]),
            "prompt": self._prompt(batch, r),
            "response": self._text(response_ids),
            "prompt_ids": _prompt_ids(batch, r),
            "response_ids": response_ids,
            "tokens": [self.tokenizer.decode([token]) for token in response_ids],
            **({"values": _rounded(batch.by_token["values"][batch.states(r)])} if "values" in batch.by_token else {}),
            **({"reward": round(float(batch.by_row["rewards"][r]), 6)} if "rewards" in batch.by_row else {}),
            "advantages": _rounded(batch.by_token["advantages"][response]),
            "log_probs": _rounded(batch.by_token["log_probs"][response]),
            "reference_log_probs": _rounded(batch.by_token["reference_log_probs"][response]),
            "gold": round(float(batch.by_row["gold"][r]), 6) if "gold" in batch.by_row else None,
            "policy_version": int(batch.policy_versions[response].min()),
            "truncated": bool(batch.truncated[r]),
        }

    # ------------------------------------------------------------------------------------------------ evaluation

    def evaluate(self, step: int, chunks: list[ScoredChunk]) -> dict[str, float]:
        """Judge held-out rollouts and write them to evaluation/step_*.jsonl.

        Returns:
            `kl`, the mean sequence KL from the reference in nats, and with a judge `gold`, the mean score.
        """
        with self.clock.busy():
            batch = self._judged(_gather(chunks))
            gold, kl = batch.by_row.get("gold"), sequence_kl(batch)
            records = [
                {
                    "prompt": self._prompt(batch, r),
                    "response": self._text(batch.tokens[batch.response(r)]),
                    "gold": None if gold is None else round(float(gold[r]), 6),
                    "kl": round(float(kl[r]), 6),
                    "truncated": bool(batch.truncated[r]),
                }
                for r in range(batch.num_rows)
            ]
            _write_jsonl(self.run_folder / "evaluation" / f"step_{step:06d}.jsonl", records)
            return {"kl": float(kl.mean())} | ({} if gold is None else {"gold": float(gold.mean())})

    def _text(self, token_ids) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def _prompt(self, batch: RaggedBatch, r: int) -> Content:
        """The prompt of a row: as the data has it, else what its tokens say."""
        ids = _prompt_ids(batch, r)
        content = self.contents.get(ids_key(ids))
        return self._text(ids) if content is None else content

    def _judged(self, batch: RaggedBatch) -> RaggedBatch:
        """The batch with the row field `gold`, if there is a judge."""
        if self.judge is None:
            return batch
        rows = range(batch.num_rows)
        prompts = [content_text(self._prompt(batch, r)) for r in rows]
        return batch.with_row_fields(gold=self.judge.score(prompts, [self._text(batch.tokens[batch.response(r)]) for r in rows]))


def _gather(chunks: list[ScoredChunk]) -> RaggedBatch:
    """All rows of a step in the order of their ids, with their scores as fields."""
    whole = []
    for chunk in chunks:
        rollouts, *scores = ray.get([chunk.rollouts, *chunk.scores.values()])
        whole.append(rollouts.with_fields(*scores))
    return RaggedBatch.concatenate(whole).sorted_by_id()


def _prompt_ids(batch: RaggedBatch, r: int) -> list[int]:
    return batch.tokens[batch.offsets[r] : batch.response(r).start].tolist()


def _check_rows(batch: RaggedBatch, policy_version: int) -> None:
    """Check that a batch holds each row once, and that the current policy sampled every token."""
    if len(np.unique(np.stack([batch.steps, batch.row_ids]), axis=1).T) != batch.num_rows:
        raise RuntimeError("a rollout was delivered twice")
    versions = np.unique(batch.policy_versions[batch.response_mask])
    if (versions != policy_version).any():
        raise RuntimeError(f"rollouts of policy version {versions.tolist()}, expected {policy_version}")


def _greedy_rewards(batch: RaggedBatch, greedy: RaggedBatch, samples_per_prompt: int) -> np.ndarray:
    """For each row the reward of the greedy response to its prompt, float64 [R]; the row id of a greedy response is the prompt's number."""
    reward = dict(zip(zip(greedy.steps.tolist(), greedy.row_ids.tolist(), strict=True), greedy.by_row["rewards"], strict=True))
    prompts = zip(batch.steps.tolist(), (batch.row_ids // samples_per_prompt).tolist(), strict=True)
    return np.array([reward[prompt] for prompt in prompts])


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(v), 6) for v in values]


def _write_jsonl(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
