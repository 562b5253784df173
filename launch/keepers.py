"""States in memory on Ray: an actor on every node holds the parts of its ranks, and those of the node before it.

A part lies on two nodes, so that the loss of any one of them leaves every part of the newest state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from moe_dist.checkpoint.memory import KeeperGone, Kept, Key
from moe_dist.checkpoint.opened import Opened

_PUT_SECONDS, _FIND_SECONDS, _READ_SECONDS = 60.0, 5.0, 60.0


class Shelf:
    """Parts by rank and state, in the memory of one process; `ray.remote` makes an actor of it."""

    def __init__(self) -> None:
        self.parts: dict[tuple[int, Key], tuple[bytes, bytearray]] = {}

    def put(self, place: tuple[int, Key], text: bytes, content: Any, keep: Key | None) -> None:
        """Takes a part; of those of its rank and of ranks that are no more, only that of the state `keep` stays."""
        rank, key = place
        newest = max((held.generation for _, held in self.parts), default=0)
        if key.generation < newest:
            raise ValueError(f"generation {key.generation}; {newest} has begun")
        free: list[bytearray] = []
        for held_rank, held in list(self.parts):
            if held != keep and (held_rank == rank or held.generation < key.generation):
                free.append(self.parts.pop((held_rank, held))[1])
        memory = next((block for block in free if len(block) == len(content)), None)
        memory = bytearray(len(content)) if memory is None else memory
        memoryview(memory)[:] = memoryview(content)
        self.parts[rank, key] = (text, memory)

    def find(self) -> list[bytes]:
        """What is known of all parts."""
        return [text for text, _ in self.parts.values()]

    def read(self, place: tuple[int, Key], start: int, end: int) -> bytes:
        """Bytes of a part."""
        return bytes(memoryview(self.parts[place][1])[start:end])


class Keepers:
    """The actors of a run, as its driver sees them: they live as long as the driver does."""

    def __init__(self) -> None:
        self.actors: dict[str, Any] = {}

    def on(self, nodes: Sequence[str], living: Sequence[str]) -> dict[str, Any]:
        """The actors of all living nodes that have one, and new ones for those of `nodes` that have none."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.actors = {node: actor for node, actor in self.actors.items() if node in living}
        kind: Any = ray.remote(Shelf)
        for node in dict.fromkeys(nodes):
            if node not in self.actors:
                here = NodeAffinitySchedulingStrategy(node, soft=False)
                self.actors[node] = kind.options(num_cpus=0, max_restarts=0, scheduling_strategy=here).remote()
        return dict(self.actors)

    def end(self) -> None:
        """Gives all of the memory back."""
        import ray

        for actor in self.actors.values():
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(actor, no_restart=True)


class RayKeeper:
    """The keepers of a run as one rank sees them (checkpoint/memory.py).

    Args:
        actors: By node.
        nodes: The node of every rank, in order of rank.
        rank: This one.
    """

    def __init__(self, actors: Mapping[str, Any], nodes: Sequence[str], rank: int) -> None:
        self.actors, names = actors, list(dict.fromkeys(nodes))
        mine = names.index(nodes[rank])
        self.mine = [nodes[rank], *([names[(mine + 1) % len(names)]] if len(names) > 1 else [])]
        self._where: dict[tuple[int, Key], str] = {}

    def put(self, kept: Kept, content: memoryview, keep: Key | None) -> None:
        """As `Keeper.put`, on this node and the next.

        The next node's copy is the one that counts: a node whose raylet is gone lets its ranks live on for seconds, in
        which they could still give to themselves what is then lost with them.

        Raises:
            KeeperGone: The next node (this one, where there is no other) is gone, or does not answer.
        """
        import numpy as np
        import ray

        shared = ray.put(np.frombuffer(content, dtype=np.uint8))
        place, text = (kept.rank, kept.key), kept.to_bytes()
        *own, counts = [self.actors[node].put.remote(place, text, shared, keep) for node in self.mine]
        try:
            ray.get(counts, timeout=_PUT_SECONDS)
        except ray.exceptions.RayTaskError:
            raise  # it lives, and refused
        except ray.exceptions.RayError as error:
            raise KeeperGone(f"the keeper of node {self.mine[-1]}: {str(error).splitlines()[0]}") from None
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(own, timeout=_PUT_SECONDS)

    def find(self) -> list[Kept]:
        """As `Keeper.find`: what this node has first; a keeper that is gone or says nothing counts for nothing."""
        import ray

        order = sorted(self.actors, key=lambda node: node != self.mine[0])
        asked = {self.actors[node].find.remote(): node for node in order}
        ray.wait(list(asked), num_returns=len(asked), timeout=_FIND_SECONDS)
        found: list[Kept] = []
        for answer, node in asked.items():
            with contextlib.suppress(ray.exceptions.RayError):
                texts = ray.get(answer, timeout=0)
                for kept in filter(None, map(Kept.from_bytes, texts)):
                    if self._where.setdefault((kept.rank, kept.key), node) == node:
                        found.append(kept)
        return found

    def open(self, kept: Kept) -> Opened:
        """As `Keeper.open`."""
        place = (kept.rank, kept.key)
        return _RemotePart(self.actors[self._where[place]], place, kept.part["bytes"])


class _RemotePart:
    """A part in an actor's memory."""

    def __init__(self, actor: Any, place: tuple[int, Key], size: int) -> None:
        self.actor, self.place, self.size = actor, place, size

    def read(self, into: memoryview, at: int) -> int:
        """As `Opened.read`."""
        import ray

        try:
            content = ray.get(self.actor.read.remote(self.place, at, at + len(into)), timeout=_READ_SECONDS)
        except ray.exceptions.RayError as error:
            raise OSError(f"its keeper is gone: {str(error).splitlines()[0]}") from None
        into[: len(content)] = content
        return len(content)

    def ahead(self, start: int, end: int) -> None:
        """It is in memory already."""

    def close(self) -> None:
        """Nothing is held open."""
