"""The actor that samples responses from the current policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dvpo_ray.actors.rollout_backend import Response, RolloutBackend
from dvpo_ray.batch import RaggedBatch
from dvpo_ray.config.schema import Config
from dvpo_ray.errors import diverged
from dvpo_ray.runtime.process import Actor


class RolloutEngine(Actor):
    """One copy of the policy in a generation library. Its weights are replaced between steps, never within one.

    Args:
        stop_token_ids: tokens that end a response.
        transport: how new weights arrive: `object_store`, `nccl` or `ipc`.
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
        self.backend = make_backend(config, stop_token_ids, transport, max_sequence_tokens, loads_weights)
        self.policy_version = 0

    def generate(self, prompts: Sequence[Sequence[int]], step: int, row_ids: Sequence[int], seed: int, greedy: bool = False) -> Iterator[RaggedBatch]:
        """Sample one response to each prompt, or take the likeliest token each time.

        Args:
            step, row_ids: identity of each prompt's row.

        Yields:
            Finished rollouts with their `log_probs`, `rollout.rollouts_per_chunk` rows together, as they finish. Through Ray
            this is a stream of object references: a chunk can be scored while the next one is sampled.

        Raises:
            ResourceError: the policy's weights give log-probs that are not finite.
        """
        finished: list[Response] = []
        responses = self.backend.generate(prompts, seed, greedy)
        while True:
            with self.clock.busy():
                response = next(responses, None)
            if response is not None:
                if not np.isfinite(response.log_probs).all():
                    raise diverged(f"the policy of version {self.policy_version} gives log-probs that are not finite", "policy")
                finished.append(response)
            if finished and (response is None or len(finished) == self.chunk_rows):
                yield self._chunk(prompts, step, row_ids, finished)
                finished = []
            if response is None:
                return

    def _chunk(self, prompts: Sequence[Sequence[int]], step: int, row_ids: Sequence[int], responses: list[Response]) -> RaggedBatch:
        return RaggedBatch.from_rows(
            [prompts[r.index] for r in responses],
            [r.token_ids for r in responses],
            step=step,
            row_ids=[row_ids[r.index] for r in responses],
            truncated=[r.truncated for r in responses],
            policy_version=self.policy_version,
            by_response_token={"log_probs": [r.log_probs for r in responses]},
        )

    def sleep(self) -> bool:
        """Free the GPU of weights and cache; both are lost, so the next sync must bring all weights.

        Returns:
            False if the engine keeps its memory.
        """
        return False

    def wake(self, part: str) -> None:
        """Take the memory of a part again: `weights` before the sync, and `cache` before the next `generate`."""

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
    config: Config, stop_token_ids: frozenset[int], transport: str, max_sequence_tokens: int, loads_weights: bool = True
) -> RolloutBackend:
    """The backend that `rollout.backend` names.

    Args:
        stop_token_ids: tokens that end a response.
        transport: how new weights will arrive: `object_store`, `nccl` or `ipc`.
        max_sequence_tokens: longest prompt and response together.
        loads_weights: take the weights of the checkpoint; transformers always does.
    """
    if config.rollout.backend == "vllm":
        from dvpo_ray.actors.vllm_backend import VLLMBackend

        return VLLMBackend(config, stop_token_ids, transport, max_sequence_tokens, loads_weights)
    from dvpo_ray.actors.transformers_backend import TransformersBackend

    return TransformersBackend(config, stop_token_ids)
