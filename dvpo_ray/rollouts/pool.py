"""The pool of rollouts: prompts go out to the engines, finished rollouts come back as references, in any order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ray import ObjectRef
from ray.actor import ActorHandle

from dvpo_ray.rollouts.schedule import sampling_seed
from dvpo_ray.runtime.waiting import as_they_come


class RolloutPool:
    """The rollout engines of a run, as one.

    Args:
        engines: handles of `RolloutEngine`.
        seed: of the run.
    """

    def __init__(self, engines: list[ActorHandle], seed: int) -> None:
        self.engines = engines
        self.seed = seed

    def sample(self, prompts: Sequence[list[int]], step: int, *, stream: int = 0, greedy: bool = False) -> Iterator[ObjectRef]:
        """A response to each prompt, on all engines. The engines start at once, before the first reference is asked for.

        Args:
            prompts: token ids; the index of a prompt becomes the row id of its response.
            step: that the rows are begun for.
            stream: of random numbers; the samples of two streams of a step are independent.
            greedy: take the likeliest token each time.

        Returns:
            References to `RaggedBatch`es of finished rollouts, as they finish; together they hold each row once.
        """
        streams = []
        for i, engine in enumerate(self.engines):
            rows = range(i, len(prompts), len(self.engines))
            seed = sampling_seed(self.seed, step, i, stream)
            streams.append(engine.generate.remote([prompts[row] for row in rows], step, list(rows), seed, greedy))
        return as_they_come(streams, what="rollouts")
