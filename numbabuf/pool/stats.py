"""Frozen snapshots that every `stats()` returns, and what watches a pool: scopes, the event ring, debug mode.

Values and small counters only: nothing here knows a pool, a lock or a device; the caller holds the lock. Sits above
`spec`, below `memory`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from .. import config
from ..checks import outside
from ..resource import Shown
from .spec import Tier

__all__ = [
    "EVENT_DTYPE",
    "EventRing",
    "Frozen",
    "OomSteps",
    "PoolStats",
    "Scope",
    "ScopeStats",
    "Watch",
    "caller",
]

_K = TypeVar("_K")
_V = TypeVar("_V")


class Frozen(Mapping[_K, _V]):
    """A mapping that cannot change; unlike `types.MappingProxyType` it can be copied and pickled.

    Examples
    --------
    >>> Frozen({"a": 1}) == {"a": 1}
    True
    """

    def __init__(self, items: Mapping[_K, _V] | Iterable[tuple[_K, _V]] = ()) -> None:
        self._items = dict(items)

    def __getitem__(self, key: _K) -> _V:
        return self._items[key]

    def __iter__(self) -> Iterator[_K]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return repr(self._items)


@dataclass(frozen=True)
class OomSteps:
    """How often each step of the out-of-memory ladder was taken."""

    reap: int = 0
    """Buffers whose queued work had finished were looked for."""
    trim: int = 0
    """Idle memory was freed."""
    demote: int = 0
    """Buffers of a hierarchical pool were sent to the tiers below."""
    collect: int = 0
    """Python's garbage collector was run."""
    flush: int = 0
    """The frees that Numba had put off were carried out."""
    callback: int = 0
    """`on_oom` was called."""
    failed: int = 0
    """Nothing helped, and TierFullError was raised."""


@dataclass(frozen=True)
class PoolStats(Shown):
    """What a pool holds and has done, at one moment.

    ``in_use + idle + pending == reserved`` holds in every snapshot, for bytes and for counts, and
    ``exact_hits + class_hits + misses == allocations``.
    """

    reserved_bytes: int
    """Memory taken from the driver and not yet given back."""
    in_use_bytes: int
    """Leased."""
    idle_bytes: int
    """Ready to be leased again, possibly after a stream's wait."""
    pending_bytes: int
    """Released, but queued work, an open capture or a live graph still uses it."""
    peak_bytes: int
    """Most `reserved_bytes` so far. What was most in use within some work, a scope of ``pool.statistics()`` tells."""
    peak_count: int
    """Most `reserved_count` so far."""
    reserved_count: int
    in_use_count: int
    idle_count: int
    pending_count: int
    waste_bytes: int
    """Part of `reserved_bytes` that rounding to size classes added."""
    allocations: int
    """Leases so far."""
    allocated_bytes: int
    """Bytes of all leases so far, capacity counted."""
    exact_hits: int
    """Leases served by an idle buffer of the same spec."""
    class_hits: int
    """Leases served by an idle buffer of another spec, of the same capacity or less than twice that."""
    misses: int
    """Leases that needed the driver."""
    stream_waits: int
    """Leases for which one stream was made to wait for another."""
    lost: int
    """Buffers dropped without release, and reclaimed."""
    freed: int
    """Buffers given back to the driver."""
    lost_streams: int
    """Releases whose stream could not be marked any more, so that the host waited for the device instead."""
    oom: OomSteps = field(default_factory=OomSteps)
    reserved_by_tier: Mapping[Tier, int] = field(default_factory=Frozen)

    @property
    def hit_rate(self) -> float:
        """Part of the leases that needed no driver call, 1.0 before the first."""
        return 1.0 - self.misses / self.allocations if self.allocations else 1.0


@dataclass(frozen=True)
class ScopeStats(Shown):
    """What happened within one ``with pool.statistics()``.

    `current` is net: buffers leased inside minus buffers released inside, so a scope that only releases goes below 0.
    """

    current_bytes: int
    peak_bytes: int
    total_bytes: int
    current_count: int
    peak_count: int
    total_count: int


class Scope:
    """Counts the leases of a pool while it is open; made by ``pool.statistics()``.

    Notes
    -----
    Threads: the pool calls `add` and `remove` under its lock, and they count the leases of every thread.
    """

    def __init__(self) -> None:
        self._bytes = self._count = 0
        self._peak_bytes = self._peak_count = 0
        self._total_bytes = self._total_count = 0

    def add(self, nbytes: int) -> None:
        """Count a lease."""
        self._bytes += nbytes
        self._count += 1
        self._total_bytes += nbytes
        self._total_count += 1
        self._peak_bytes = max(self._peak_bytes, self._bytes)
        self._peak_count = max(self._peak_count, self._count)

    def remove(self, nbytes: int) -> None:
        """Count the end of a lease."""
        self._bytes -= nbytes
        self._count -= 1

    def resize(self, nbytes: int) -> None:
        """Count the change in capacity of a leased buffer."""
        self._bytes += nbytes
        self._peak_bytes = max(self._peak_bytes, self._bytes)

    def stats(self) -> ScopeStats:
        """Return the counts so far; after the scope's end, its final ones."""
        return ScopeStats(
            self._bytes, self._peak_bytes, self._total_bytes, self._count, self._peak_count, self._total_count
        )

    def __repr__(self) -> str:
        return f"<Scope {self.stats()}>"


EVENT_KINDS = ("exact_hit", "class_hit", "miss", "release", "lost", "grow", "free")
EVENT_DTYPE = np.dtype(
    [
        ("time_ns", np.int64),
        ("kind", np.uint8),
        ("tier", np.uint8),
        ("address", np.uint64),
        ("nbytes", np.int64),
        ("generation", np.int64),
        ("thread", np.uint64),
    ]
)
"""One record of the ring: when (`time.perf_counter_ns`), what (index into `EventRing.KINDS`), index of the tier among
`Tier`, address, capacity, the block's generation, and the identifier of the calling thread."""


class EventRing:
    """The last `capacity` events of a pool, in one structured NumPy array.

    Parameters
    ----------
    capacity
        Number of records kept, >= 1.

    Notes
    -----
    Threads: the pool calls `add` under its lock. Memory: 49 bytes a record, taken once.
    """

    KINDS = EVENT_KINDS
    _KIND = {name: i for i, name in enumerate(EVENT_KINDS)}
    _TIER = {tier: i for i, tier in enumerate(Tier)}

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"an event ring of {capacity} records was asked for: give at least 1")
        self._records = np.zeros(capacity, EVENT_DTYPE)
        self.count = 0
        """Events so far; those beyond the capacity were overwritten."""

    def add(self, kind: str, tier: Tier, address: int, nbytes: int, generation: int) -> None:
        """Record one event."""
        self._records[self.count % len(self._records)] = (
            time.perf_counter_ns(), self._KIND[kind], self._TIER[tier], address, nbytes, generation,
            threading.get_ident(),
        )  # fmt: skip
        self.count += 1

    def snapshot(self) -> np.ndarray:
        """Return the kept records, oldest first: shape (min(count, capacity),), dtype `EVENT_DTYPE`."""
        size = len(self._records)
        if self.count <= size:
            return self._records[: self.count].copy()
        return np.roll(self._records, -(self.count % size))


class Watch:
    """All that watches one pool's memory: open scopes, the event ring, and in debug mode where each lease was made.

    Parameters
    ----------
    events
        Capacity of the ring; 0 for none.

    Attributes
    ----------
    debug : bool
        Whether NUMBABUF_DEBUG was on.
    ring : EventRing or None
    """

    def __init__(self, events: int = 0) -> None:
        self.debug = config.enabled("NUMBABUF_DEBUG")
        self.ring = EventRing(events) if events else None
        self._scopes: list[Scope] = []

    @property
    def active(self) -> bool:
        """Whether a scope, the ring or debug mode watches."""
        return bool(self._scopes) or self.ring is not None or self.debug

    def open(self, scope: Scope) -> None:
        """Have `scope` count from here on."""
        self._scopes.append(scope)

    def close(self, scope: Scope) -> None:
        """Have `scope` count no more; one that never began to is no error."""
        self._scopes = [each for each in self._scopes if each is not scope]

    def moved(self, source: Any, target: Any) -> None:
        """Note that a leased buffer went to another block: its capacity from here on. Holds the pool's lock."""
        for scope in self._scopes:
            scope.resize(target.nbytes - source.nbytes)

    def tell(self, kind: str, block: Any, *, lease: bool = True) -> None:
        """Note that something of `EVENT_KINDS` happened to a `memory.Block`. Holds the pool's lock.

        lease: whether it is a user's doing; a move takes memory and gives it back, and no scope counts that.
        """
        if not lease:
            pass
        elif kind in ("exact_hit", "class_hit", "miss"):
            for scope in self._scopes:
                scope.add(block.nbytes)
            if self.debug:
                block.site = caller()
        elif kind in ("release", "lost"):
            for scope in self._scopes:
                scope.remove(block.nbytes)
        if self.ring is not None:
            self.ring.add(kind, block.tier, block.address, block.nbytes, block.generation)


def caller() -> str:
    """Return the file and line of the first frame outside numbabuf."""
    frame, _ = outside()
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
