"""Room for actors: a placement group, the actors started in its bundles, and waiting for them by name."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dvpo_ray.config.arithmetic import counted
from dvpo_ray.config.schema import RayConfig
from dvpo_ray.errors import HeadGone, ResourceError
from dvpo_ray.planning.placement import Seat, total_resources
from dvpo_ray.runtime.fork_server import runtime_env
from dvpo_ray.runtime.process import Actor, driver_folders
from dvpo_ray.runtime.waiting import HEAD_PERIOD_SECONDS, check_head, get, head_answers, introduce, known, wait

STOP_SECONDS = 10.0
"""How long `stop` waits for a process that does not end."""

_processes: dict[ActorHandle, psutil.Process] = {}
"""Of actors on this node that are ready."""


@dataclass(frozen=True)
class Card:
    """The GPU of a slot.

    Attributes:
        address: of its node.
        node: Ray's id of the node.
        gpu: as CUDA_VISIBLE_DEVICES names it there.
        memory_gib: of the whole card; None where NVIDIA's library does not tell it.
        bundle: that holds it, by its number in the placement group.
    """

    address: str
    node: str
    gpu: str
    memory_gib: float | None
    bundle: int

    @property
    def order(self) -> tuple:
        """By node, and on a node by number."""
        return [part.zfill(3) for part in self.address.split(".")], self.node, self.gpu.zfill(3)


@dataclass(frozen=True)
class Room:
    """Reserved resources that actors can be started in.

    Attributes:
        group: the placement group: a bundle for each GPU, then one for each actor that has CPUs alone.
        seats: of all actors that it was made for.
        free: those of them that new actors may take.
        cards: the GPU of each slot.
    """

    group: PlacementGroup
    seats: list[Seat]
    free: list[Seat]
    cards: Mapping[int, Card]

    def of_role(self, role: str) -> Room:
        """The same room with the seats of one role free, because its actors are gone."""
        return replace(self, free=[seat for seat in self.seats if seat.role == role])

    def bundle_of(self, seat: Seat) -> int | None:
        """The bundle that an actor is started in, that of its first GPU if it has one; None for an actor that takes nothing."""
        if seat.slots:
            return self.cards[seat.slots[0]].bundle
        return len(self.cards) + _on_cpus(self.seats).index(seat) if seat.cpus else None


@contextmanager
def reserved(seats: list[Seat], settings: RayConfig) -> Iterator[Room]:
    """Room for the actors of some seats, for the time of a `with` block.

    Raises:
        ResourceError: the cluster didn't have the room within `ray.placement_timeout_seconds`, or the GPUs of an actor are on two nodes.
    """
    slots = sorted({slot for seat in seats for slot in seat.slots})
    cpus_of = [math.fsum(seat.cpus for seat in seats if seat.slots[:1] == (slot,)) for slot in slots]
    bundles = [{"GPU": 1} | ({"CPU": cpus} if cpus else {}) for cpus in cpus_of] + [{"CPU": seat.cpus} for seat in _on_cpus(seats)]
    group = placement_group(bundles, strategy=settings.placement_strategy)
    try:
        patience = _patience(seats, settings)
        try:
            wait([group.ready()], what="room in the cluster", timeout_seconds=patience)
        except HeadGone:
            raise
        except ResourceError:
            cpus, gpus = total_resources(seats)
            have = ray.cluster_resources()
            raise ResourceError(
                f"the run needs {counted(cpus, 'CPU')} and {counted(gpus, 'GPU')}, but the Ray cluster has {counted(have.get('CPU', 0), 'CPU')} "
                f"and {counted(have.get('GPU', 0), 'GPU')} in all; lower cpus_per_actor, gpus_per_actor or num_actors of a role, or free resources "
                f"(waited {patience:g} s, ray.placement_timeout_seconds)"
            ) from None
        cards = dict(zip(slots, _cards(group, len(slots)), strict=True))
        _check_nodes(seats, cards)
        yield Room(group, seats, seats, cards)
    finally:
        if not isinstance(sys.exc_info()[1], HeadGone) and head_answers():  # else Ray would wait for the head, and then end this process
            remove_placement_group(group)


def _on_cpus(seats: list[Seat]) -> list[Seat]:
    """Those that have a bundle of their own."""
    return [seat for seat in seats if seat.cpus and not seat.slots]


def _patience(seats: list[Seat], settings: RayConfig) -> float:
    """Seconds to wait for room: 1 when the whole cluster, empty, would not have it and can't grow by itself."""
    cpus, gpus = total_resources(seats)
    have = ray.cluster_resources()
    fits = have.get("CPU", 0) >= cpus and have.get("GPU", 0) >= gpus
    return settings.placement_timeout_seconds if fits or settings.autoscaling else 1.0


def _cards(group: PlacementGroup, number: int) -> list[Card]:
    """The GPUs of the first bundles of a group, by node and number: Ray itself gives them to bundles in any order."""
    probes = [
        ray.remote(_gpu_here).options(num_cpus=0, num_gpus=1, scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundle)).remote()
        for bundle in range(number)
    ]
    found = [Card(*facts, bundle) for bundle, facts in enumerate(get(probes, what="the numbers of the GPUs"))]
    return sorted(found, key=lambda card: card.order)


def _gpu_here() -> tuple[str, str, str, float | None]:
    """Address and id of the node, and number and memory in GiB of the one GPU that Ray gave this process."""
    import ray._private.thirdparty.pynvml as nvml

    context = ray.get_runtime_context()
    (gpu,) = context.get_accelerator_ids()["GPU"]
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(int(gpu)) if gpu.isdigit() else nvml.nvmlDeviceGetHandleByUUID(gpu)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30
    except nvml.NVMLError:
        memory = None
    return ray.util.get_node_ip_address(), context.get_node_id(), gpu, memory


def _check_nodes(seats: list[Seat], cards: Mapping[int, Card]) -> None:
    """Refuse an actor whose GPUs are on several nodes: it is one process."""
    for seat in seats:
        nodes = Counter(cards[slot].address for slot in seat.slots)
        if len({cards[slot].node for slot in seat.slots}) > 1:
            where = ", ".join(f"{number} on {address}" for address, number in nodes.items())
            raise ResourceError(
                f"{seat.name} needs {len(seat.slots)} GPUs of one node, but Ray gave {where}; lower rollout.tensor_parallel_size or "
                "gpus_per_actor to a divisor of the GPUs that each node has free, or free more on one node"
            )


def spawn(cls: type[Actor], seat: Seat, room: Room, environment: dict[str, str], *args, run_folder: str, role: str | None = None) -> ActorHandle:
    """Create one named actor in its seat. It works in this process's folder, so that relative paths mean the same to both.

    It sees the GPUs of its slots and no others. Its bundle holds the GPU for all actors on it, so the actor itself asks Ray for none.

    Args:
        environment: variables of its process.
        args: of its constructor.
        run_folder: where its log goes.
        role: for the actor's name, where it is not the seat's own.
    """
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(room.cards[slot].gpu for slot in seat.slots), "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
    name = f"{role or seat.role}-{seat.index}"
    cpus = 0 if seat.slots else seat.cpus
    options: dict = {"name": name, "num_cpus": cpus, "num_gpus": 0, "runtime_env": runtime_env(environment | driver_folders() | visible)}
    bundle = room.bundle_of(seat)
    if bundle is not None:
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(room.group, placement_group_bundle_index=bundle)
    handle = ray.remote(cls).options(**options).remote(*args)
    introduce(handle, name, Path(run_folder).resolve() / "logs" / f"{cls.role}-{seat.index}.log")
    return handle


def wait_until_ready(
    actors: dict[str, list[ActorHandle]],
    timeout_seconds: float,
    show: Callable[[Mapping[str, str]], None] = lambda states: None,
    loaded: Sequence[ObjectRef] = (),
) -> dict[str, list[int]]:
    """Wait for the constructors of all actors and return, by role, the process ids of those on this node.

    Args:
        show: is told every second what each actor does, by its name: `importing`, `loading` or `ready`.
        loaded: answers to calls that the actors got before. An actor is ready after them, and an error of one ends the wait.

    Raises:
        RoleDied, ResourceError: one of them failed, the time limit passed, or Ray's head is gone.
    """
    started = looked = time.time()
    pending = {role: [handle.ready.remote() for handle in handles] for role, handles in actors.items()}
    late = {ref: handle for role, refs in pending.items() for ref, handle in zip(refs, actors[role], strict=True)}
    handles = dict(late)
    while late:
        done, _ = ray.wait(list(late), num_returns=len(late), timeout=1.0)
        others, _ = ray.wait(loaded, num_returns=len(loaded), timeout=0) if loaded else ([], [])
        get([*done, *others], what="the start of the actors")  # raises what went wrong
        if late and time.time() - looked > HEAD_PERIOD_SECONDS:
            check_head("the start of the actors")
            looked = time.time()
        late = {ref: handle for ref, handle in late.items() if ref not in done}
        show({known(handle)[0]: "ready" if ref not in late else _state_at_start(known(handle)[1], started) for ref, handle in handles.items()})
        if late and time.time() - started > timeout_seconds:
            name, log = known(next(iter(late.values())))
            raise ResourceError(f"{name} did not start within {counted(timeout_seconds, 'second')} (rollout.start_timeout_seconds); its log is {log}")
    get(list(loaded), what="the start of the actors")
    here = ray.get_runtime_context().get_node_id()
    found = {role: get(refs, what=f"the start of {role}") for role, refs in pending.items()}
    for role, places in found.items():
        for handle, (node, pid) in zip(actors[role], places, strict=True):
            if node == here and psutil.pid_exists(pid):
                _processes[handle] = psutil.Process(pid)
    return {role: [pid for node, pid in places if node == here] for role, places in found.items()}


def _state_at_start(log: Path, started: float) -> str:
    """An actor's log begins when its libraries are imported."""
    return "loading" if log.exists() and log.stat().st_mtime >= started else "importing"


def stop(handles: list[ActorHandle]) -> None:
    """Stop actors and wait until they are gone: only then are their names, their resources and their memory free."""
    processes = [process for handle in handles for process in _family(handle)]
    for handle in handles:
        ray.kill(handle)
    if isinstance(sys.exc_info()[1], HeadGone) or not head_answers():  # nobody would say that they are gone
        return
    for handle in handles:
        while _answers(handle):
            time.sleep(0.05)
    psutil.wait_procs(processes, timeout=STOP_SECONDS)


def _family(handle: ActorHandle) -> list[psutil.Process]:
    """An actor's process and its children, such as the shards of an engine, which hold memory too and end after it."""
    process = _processes.pop(handle, None)
    with suppress(psutil.NoSuchProcess):
        return [process, *process.children(recursive=True)] if process is not None else []
    return []


def _answers(handle: ActorHandle) -> bool:
    try:
        ray.get(handle.ready.remote(), timeout=STOP_SECONDS)
        return True
    except (RayActorError, GetTimeoutError):
        return False
