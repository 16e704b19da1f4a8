"""The pool of rollouts: prompts go out to the engines, finished rollouts come back as references, in any order."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence

from ray import ObjectRef
from ray.actor import ActorHandle

from dvpo_ray.config.schema import Config
from dvpo_ray.rollouts.schedule import sampling_seed
from dvpo_ray.runtime.waiting import as_they_come


class RolloutPool:
    """The rollout engines of a run, as one.

    Args:
        engines: handles of `RolloutEngine`.
    """

    def __init__(self, engines: list[ActorHandle], config: Config) -> None:
        self.engines, self.seed = engines, config.seed
        self.room = config.rollout.max_concurrent_sequences
        # vLLM takes new rows at any time; transformers decodes a batch to its end.
        self.ahead = math.ceil(self.room / 4) if config.rollout.backend == "vllm" else 0

    def sample(self, prompts: Sequence[list[int]], step: int, *, stream: int = 0, greedy: bool = False) -> Iterator[ObjectRef]:
        """A response to each prompt, on all engines. The engines start at once, before the first reference is asked for.

        An engine gets a lease of rows that fills it and a little more. When it has used the little more, it gets the next lease.

        Args:
            prompts: token ids; the index of a prompt becomes the row id of its response. Samples of one prompt follow each other.
            step: that the rows are begun for.
            stream: of random numbers; the samples of two streams of a step are independent.
            greedy: take the likeliest token each time.

        Returns:
            References to `RaggedBatch`es of finished rollouts, as they finish; together they hold each row once.
        """
        leases = deque(cut_leases(prompts, len(self.engines), self.room, self.ahead))
        working: dict[int, tuple[ActorHandle, int]] = {}  # engine and rows that it may keep, by the id of its stream

        def lease(engine: ActorHandle, more: bool) -> Iterator[ObjectRef]:
            rows = leases.popleft() if leases else range(0)
            alone = len(self.engines) == 1
            seed = sampling_seed(self.seed, step, 0, stream) if alone else [sampling_seed(self.seed, step, row, stream) for row in rows]
            keep = self.room if more and self.ahead else 0
            answer = engine.generate.remote([prompts[row] for row in rows], step, list(rows), seed, greedy, keep)
            working[id(answer)] = engine, keep
            return answer

        def next_lease(ended: Iterator[ObjectRef]) -> Iterator[ObjectRef] | None:
            engine, kept = working.pop(id(ended))
            return lease(engine, len(leases) > 1) if leases or kept else None

        more = len(leases) > len(self.engines)
        streams = [lease(engine, more) for engine in self.engines[: len(leases)]]
        return as_they_come(streams, what="rollouts", followed_by=next_lease)


def cut_leases(prompts: Sequence[list[int]], engines: int, room: int, ahead: int) -> list[range]:
    """Rows that go to an engine together: first a share for each engine, then what is left, to engines that have room.

    The cuts depend on nothing but the arguments. The samples of a prompt stay together, because an engine computes their prompt once,
    unless there are fewer prompts than engines.

    Args:
        room: rows that an engine works on at the same time.
        ahead: rows that an engine gets before it has room for them.
    """
    if engines == 1:
        return [range(len(prompts))] if prompts else []
    ends = [row for row in range(1, len(prompts)) if prompts[row] != prompts[row - 1]] + [len(prompts)]
    if len(ends) < engines:
        ends = list(range(1, len(prompts) + 1))
    leases: list[range] = []
    begin = 0
    for end in ends:
        is_first = len(leases) < engines
        share = min(math.ceil(len(prompts) / engines), room + ahead) if is_first else ahead or room
        if end - begin >= share or end == len(prompts) > begin:
            leases.append(range(begin, end))
            begin = end
    return leases
