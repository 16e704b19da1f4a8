"""The actor that samples responses from the current policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dvpo_ray.actors.rollout_backend import Part, Response, RolloutBackend
from dvpo_ray.batch import RaggedBatch
from dvpo_ray.config.schema import Config
from dvpo_ray.errors import diverged
from dvpo_ray.runtime.process import Actor


class RolloutEngine(Actor):
    """One copy of the policy in a generation library. Its weights are replaced between steps, never within one.

    Args:
        stop_token_ids: tokens that end a response.
        transport: how new weights arrive: `object_store`, `nccl`, `ipc` or `adapters`.
        max_sequence_tokens: longest prompt and response together.
        loads_weights: take the weights of the checkpoint. Without it the first sync must bring all of them.
        sleeps: the engine shares its GPU, and frees it when `sleep` is called.
    """

    role = "rollout"

    def __init__(
        self,
        config: Config,
        index: int,
        run_folder: str,
        stop_token_ids: frozenset[int],
        transport: str,
        max_sequence_tokens: int,
        loads_weights: bool = True,
        sleeps: bool = False,
    ) -> None:
        super().__init__(index, run_folder)
        self.chunk_rows = config.rollout.rollouts_per_chunk
        self.backend = make_backend(config, stop_token_ids, transport, max_sequence_tokens, loads_weights, sleeps)
        self.policy_version = 0
        self._prompts: dict[int, Sequence[int]] = {}
        self._finished: list[Response] = []

    def generate(
        self, prompts: Sequence[Sequence[int]], step: int, row_ids: Sequence[int], seed: int | Sequence[int], greedy: bool = False, keep: int = 0
    ) -> Iterator[RaggedBatch]:
        """Sample one response to each prompt, or take the likeliest token each time.

        Args:
            step, row_ids: identity of each prompt's row.
            seed: of this engine's sampling; or one for each row, which then depends on no other row.
            keep: rows that may be left unfinished, so that the next call finds the engine at work. They come out of that call's stream.

        Yields:
            Finished rollouts with their `log_probs`, `rollout.rollouts_per_chunk` rows together, as they finish. Through Ray
            this is a stream of object references: a chunk can be scored while the next one is sampled.

        Raises:
            ResourceError: the policy's weights give log-probs that are not finite.
        """
        self._prompts |= zip(row_ids, prompts, strict=True)
        if prompts:
            self.backend.add(row_ids, prompts, seed, greedy)
        responses = self._responses(keep)
        while True:
            with self.clock.busy():
                response = next(responses, None)
            if response is not None:
                if not np.isfinite(response.log_probs).all():
                    raise diverged(f"the policy of version {self.policy_version} gives log-probs that are not finite", "policy")
                self._finished.append(response)
            if len(self._finished) == self.chunk_rows or (self._finished and response is None and not keep):
                yield self._chunk(step)
            if response is None:
                return

    def _responses(self, keep: int) -> Iterator[Response]:
        while self.backend.unfinished > keep:
            yield from self.backend.step()

    def _chunk(self, step: int) -> RaggedBatch:
        responses, self._finished = self._finished, []
        return RaggedBatch.from_rows(
            [self._prompts.pop(r.index) for r in responses],
            [r.token_ids for r in responses],
            step=step,
            row_ids=[r.index for r in responses],
            truncated=[r.truncated for r in responses],
            policy_version=self.policy_version,
            by_response_token={"log_probs": [r.log_probs for r in responses]},
        )

    # Sharing a GPU: the memory of an engine that sleeps is free for others.

    def sleep(self) -> bool:
        """Free the GPU of weights and cache.

        Returns:
            True if the weights are lost, so that the next sync must bring all of them. False if the engine has them: it was not started
            to sleep, then nothing has happened; or it takes adapters alone, then the weights are in host memory.
        """
        return self.backend.sleep()

    def wake(self, part: Part) -> None:
        """Take the memory of a part again. `weights` comes before the sync, and `cache` before the next `generate`."""
        self.backend.wake(part)

    # The phases of a weight sync, called by the learner.

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        self.backend.init_weight_transfer(init_info)

    def start_weight_update(self) -> None:
        self.backend.start_weight_update()

    def update_weights(self, update_info: dict) -> None:
        self.backend.update_weights(update_info)

    def finish_weight_update(self) -> None:
        self.backend.finish_weight_update()

    def set_policy_version(self, version: int) -> None:
        self.policy_version = version


def make_backend(
    config: Config, stop_token_ids: frozenset[int], transport: str, max_sequence_tokens: int, loads_weights: bool = True, sleeps: bool = False
) -> RolloutBackend:
    """The backend that `rollout.backend` names.

    Args:
        stop_token_ids: tokens that end a response.
        transport: how new weights will arrive: `object_store`, `nccl`, `ipc` or `adapters`.
        max_sequence_tokens: longest prompt and response together.
        loads_weights: take the weights of the checkpoint; transformers always does.
        sleeps: `sleep` is to free the GPU; transformers' never does.
    """
    if config.rollout.backend == "vllm":
        from dvpo_ray.actors.vllm_backend import VLLMBackend

        return VLLMBackend(config, stop_token_ids, transport, max_sequence_tokens, loads_weights, sleeps)
    from dvpo_ray.actors.transformers_backend import TransformersBackend

    return TransformersBackend(config, stop_token_ids)
