"""The contract of buffer pools, and ReusingPool: what the pools share that reuse the memory of one store.

A pool hands out leases over what its `store` holds and takes them back, and says what it did. What a request does that
no ready block serves is for the pools above it. Sits above `entry`, `store` and `oom`, below `pool` and `tiers`.
"""

from __future__ import annotations

import contextlib
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np

from .. import _cuda
from ..checks import whole_number
from ..errors import CaptureError, TierFullError
from ..resource import Resource
from .audit import audit
from .block import Handle
from .entry import BufferEntry, FixedEntry
from .oom import Ladder
from .spec import BufferSpec, Tier
from .stats import Frozen, OomSteps, PoolStats, Scope
from .store import Store, refuse_capture

__all__ = ["BufferPool", "Limits", "ReusingPool"]

_open_captures = _cuda.captures


class BufferPool(Resource):
    """What every pool offers. A pool is a context manager; leaving it closes it."""

    limits: MutableMapping[Tier, int | None]
    """Tier -> most bytes, None for no limit; assignable."""
    device: int | None = None
    """Ordinal of the device that the pool's memory is on; None before the first is allocated."""

    @abstractmethod
    def allocate(
        self, spec: BufferSpec, *, stream: _cuda.StreamLike | None = None, movable: bool = False
    ) -> BufferEntry:
        """Lease a buffer of `spec`; `stream` is where the work that uses it will be queued.

        `movable`: the pool may move its contents between uses; a pool that moves nothing ignores it.
        """

    def release(self, entry: BufferEntry, *, stream: _cuda.StreamLike | None = None) -> None:
        """End a lease; the same as ``entry.release(stream=stream)``."""
        entry.release(stream=stream)

    @abstractmethod
    def reserve(self, specs: Iterable[BufferSpec]) -> None:
        """Have idle buffers ready for `specs`, all of them or none."""

    @abstractmethod
    def trim(self, max_bytes: int) -> int:
        """Free idle memory until at most `max_bytes` are reserved, as far as that goes; return the bytes freed."""

    @abstractmethod
    def clear(self) -> None:
        """Free all idle memory; leased and graph-owned memory stays valid."""

    @abstractmethod
    def stats(self) -> PoolStats:
        """Return a frozen snapshot."""

    @abstractmethod
    def check(self) -> None:
        """Assert the pool's invariants; the message of a failure holds the pool's whole state."""

    @abstractmethod
    def close(self) -> None:
        """Free idle memory and refuse further leases; leased buffers stay valid until released. Idempotent."""


class Limits(MutableMapping[Tier, "int | None"]):
    """The limits of a pool in bytes, by tier; None for none. Assigning an item changes a limit."""

    __slots__ = ("_change", "_look")

    def __init__(self, look: Callable[[Tier], int | None], change: Callable[[Tier, int | None], None]) -> None:
        self._look, self._change = look, change

    def __getitem__(self, tier: Tier) -> int | None:
        return self._look(Tier(tier))

    def __setitem__(self, tier: Tier, nbytes: int | None) -> None:
        self._change(Tier(tier), nbytes)

    def __delitem__(self, tier: Tier) -> None:
        raise TypeError("a limit is not deleted: assign another, or None where the pool has no need of one")

    def __iter__(self) -> Iterator[Tier]:
        return iter(Tier)

    def __len__(self) -> int:
        return len(Tier)

    def __repr__(self) -> str:
        return f"<Limits {', '.join(f'{tier.value}: {nbytes}' for tier, nbytes in self.items())}>"


class ReusingPool(BufferPool):
    """A pool that reuses the memory of one store: all of it but what a request does that no ready block serves.

    Abstract: `SimpleBufferPool` asks the driver, `HierarchicalBufferPool` moves buffers out of the way.
    """

    def __init__(self, store: Store, on_oom: Callable[[int], Any] | None) -> None:
        if on_oom is not None and not callable(on_oom):
            raise TypeError(f"on_oom is {on_oom!r}: give a function of the number of bytes, or None")
        self._store = store
        self._ladder = Ladder(store, on_oom)
        self._hot = store.lists.hot
        pools.add(self)

    @property
    def device(self) -> int | None:  # type: ignore[override]
        """Ordinal of the device that the pool's memory is on; None before the first is allocated."""
        return self._store.turns.device

    @property
    def closed(self) -> bool:  # type: ignore[override]
        """Whether the pool was closed, or belongs to another process."""
        return bool(self._store.closed)

    # ------------------------------------------------------------------------------------------------------- leases

    def allocate(
        self, spec: BufferSpec, *, stream: _cuda.StreamLike | None = None, movable: bool = False
    ) -> BufferEntry:
        """Lease a buffer of `spec`.

        Parameters
        ----------
        spec
            Shape, type and tier. Zero-byte specs are legal.
        stream
            Where the work that uses the buffer will be queued; its release counts as on this stream, if not told
            otherwise. None: the default stream.
        movable
            Ignored by a pool that moves nothing.

        Returns
        -------
        entry : BufferEntry
            Its contents are undefined.

        Raises
        ------
        TypeError
            `spec` is no BufferSpec, or `stream` is no stream.
        ClosedError
            The pool is closed.
        TierFullError
            There is no room, and nothing made room; the text holds the whole account.
        CaptureError
            This thread captures and no idle buffer fits, or `stream` is captured by another thread or library.
        BackendError
            Another device is current than that of the memory and more is needed, or `stream` is another device's.

        Notes
        -----
        Cost: a hit takes a dictionary look-up and a pop, no lock and no driver call.
        """
        # Hot path, guarded by benchmarks/pool.py. The exceptions are the rare way out, and cost nothing otherwise.
        if stream is None and not _open_captures:
            try:
                handle = self._hot[spec.line].pop()
            except (KeyError, IndexError, AttributeError):
                return self._allocate_larger(spec)
            block = handle.block
            if block.spec is not spec and block.spec != spec:
                self._cast(handle, spec)
            else:
                block.generation += 1
            return FixedEntry(handle)
        return self._allocate_slowly(spec, stream)

    @abstractmethod
    def _allocate_larger(self, spec: BufferSpec) -> BufferEntry:
        """Lease a buffer where no ready block has its capacity; `spec` is not checked yet."""

    @abstractmethod
    def _allocate_slowly(self, spec: BufferSpec, stream: _cuda.StreamLike | None) -> BufferEntry:
        """Lease a buffer in the order of `stream`, or while a capture is open; `spec` is not checked yet."""

    @staticmethod
    def _cast(handle: Handle, spec: BufferSpec) -> None:
        """Begin the lease of a ready block, which may have been another spec's."""
        block = handle.block
        if block.spec != spec:
            try:
                block.become(spec)
            except BaseException:
                block.home(handle)
                raise
            block.recasts += 1
        block.generation += 1

    def release(self, entry: BufferEntry, *, stream: _cuda.StreamLike | None = None) -> None:
        """End a lease; the same as ``entry.release(stream=stream)``, for an entry of this pool.

        Raises
        ------
        TypeError
            `entry` is no BufferEntry.
        ValueError
            The entry is another pool's; its lease goes on.
        StaleBufferError
            The entry was released before.
        """
        if type(entry) is not FixedEntry and not isinstance(entry, BufferEntry):  # cheap first: an ABC costs a look-up
            raise TypeError(f"release was given {entry!r}: give the BufferEntry that allocate returned")
        if not entry.belongs_to(self):
            raise ValueError(f"{entry!r} belongs to another pool: release it there, or call entry.release()")
        entry.release(stream=stream)

    def _step(self, what: str) -> contextlib.AbstractContextManager[None]:
        """One step of the pool, a call from outside; BusyError where this thread is in the middle of one already."""
        return self._store.turns.step(what)

    # ------------------------------------------------------------------------------------------ memory, back and ahead

    def reserve(self, specs: Iterable[BufferSpec]) -> None:
        """Have idle buffers ready, so that leasing all of `specs` at once, on any stream, calls the driver for none.

        Waits for the default stream where it may still use one of them.

        Parameters
        ----------
        specs
            One item per buffer; the same spec twice means two buffers.

        Raises
        ------
        TierFullError
            Not all of them fit. Names those that did not; the buffers that this call made are freed again.
        CaptureError
            This thread captures.
        ClosedError
            The pool is closed.
        """
        wanted = list(specs)
        for spec in wanted:
            if not isinstance(spec, BufferSpec):
                raise TypeError(f"reserve was given {spec!r}: give BufferSpec(shape, dtype, tier)")
        with self._step("reserve"):
            self._store.refuse_closed()
            if _cuda.capturing():
                raise CaptureError("reserve cannot allocate while a graph is captured: call it before the capture")
            self._reserve(wanted)

    def _reserve(self, wanted: list[BufferSpec]) -> None:
        refused = self._store.reserve(wanted)
        if refused:
            self._store.turns.flush()
            raise TierFullError(
                f"{len(refused)} of {len(wanted)} buffers do not fit, and none was reserved: {_listed(refused)}. "
                f"Free memory, raise the limit or reserve less; {self!r}"
            )

    def trim(self, max_bytes: int) -> int:
        """Free idle memory, the largest blocks first, until at most `max_bytes` are reserved.

        Parameters
        ----------
        max_bytes
            Bytes of all tiers together that may stay; leased and pending memory stays in any case.

        Returns
        -------
        freed : int
            Bytes given back to the driver.

        Raises
        ------
        CaptureError
            This thread captures, which forbids freeing.

        Notes
        -----
        Streams: the host waits for the work on what it frees.
        """
        max_bytes = whole_number("max_bytes", max_bytes)
        store = self._store
        with self._step("trim"):
            refuse_capture("trim")
            store.reap()
            freed = 0
            for tier in Tier:
                excess = store.ledger.total - max_bytes
                if excess > 0:
                    freed += store.free_idle(excess, (tier,))
            if freed:
                store.turns.flush()
        return freed

    def clear(self) -> None:
        """Free all idle memory; leased memory, and what a live graph uses, stays valid.

        Raises
        ------
        CaptureError
            This thread captures, which forbids freeing.
        """
        self.trim(0)

    def close(self) -> None:
        """Wait for the work on released buffers, free them, and refuse further leases.

        Leased buffers stay valid; their memory goes when they are released. Idempotent.

        Raises
        ------
        CaptureError
            This thread captures, which forbids freeing.
        """
        with self._step("close"):
            refuse_capture("close")
            self._close()

    def _close(self) -> None:
        if self._store.close("the pool is closed: make a new one, or allocate before close()"):
            self._store.turns.flush()

    # --------------------------------------------------------------------------------------------------------- limits

    @property
    def limits(self) -> Limits:
        """Limit of each tier in bytes: ``pool.limits[Tier.DEVICE] = 2 << 30``, or a mapping for some of the tiers.

        In a `SimpleBufferPool` device and managed memory have one limit together. Below what is reserved, idle memory
        is freed first.

        Raises
        ------
        TierFullError
            What is in use or under graphs does not fit the new limit; the limit stays.
        CaptureError
            Memory would have to be freed, and this thread captures a graph.
        TypeError, ValueError
            The tier is unknown, or the limit no whole number >= 0.
        """
        return Limits(self._limit, self._set_limit)

    @limits.setter
    def limits(self, limits: Mapping[Tier, int | None]) -> None:
        if not isinstance(limits, Mapping):
            raise TypeError(f"limits is {limits!r}: give a mapping of tiers to bytes, or assign limits[Tier.DEVICE]")
        for tier, nbytes in limits.items():
            self._set_limit(Tier(tier), nbytes)

    def _limit(self, tier: Tier) -> int | None:
        self._store.refuse_closed()
        return self._store.ledger.limit(tier)

    def _set_limit(self, tier: Tier, nbytes: int | None) -> None:
        nbytes = None if nbytes is None else whole_number(f"limits[{tier}]", nbytes)
        store = self._store
        with self._step("limits"):
            store.refuse_closed()
            ledger = store.ledger
            if nbytes is not None and ledger.taken(tier) > nbytes:
                refuse_capture("a lower limit")
                store.reap()
                store.free_idle(ledger.taken(tier) - nbytes, ledger.sharing(tier))
                store.turns.flush()
                if ledger.taken(tier) > nbytes:
                    raise TierFullError(
                        f"{nbytes} bytes are too few for {tier.value} memory: {ledger.taken(tier)} are in use or under "
                        f"graphs; the limit stays at {ledger.limit(tier)}. Release buffers, or close graphs, first"
                    )
            ledger.set_limit(tier, nbytes)

    # ---------------------------------------------------------------------------------------------------- observation

    def stats(self) -> PoolStats:
        """Return one consistent snapshot: all its figures are of one moment.

        Notes
        -----
        Cost: about 15 us, and up to 1 us per buffer; leases do no counting for it.
        """
        with self._step("stats"):
            return self._stats()

    def _stats(self) -> PoolStats:
        store = self._store
        with contextlib.suppress(Exception):  # a faulted device: asked for work it says so, and this holds without it
            store.reap()
        idle = [handle.block.nbytes for handle in store.idle()]
        pending = [block.nbytes for block in store.deferred.all()]
        blocks = list(store.blocks)
        leases = [block.generation for block in blocks]
        reserved = store.ledger.total
        counts = store.counts
        allocations = store.past["leases"] + sum(leases)
        recasts = store.past["recasts"] + sum(block.recasts for block in blocks)
        return PoolStats(
            reserved_bytes=reserved,
            in_use_bytes=reserved - sum(idle) - sum(pending),
            idle_bytes=sum(idle),
            pending_bytes=sum(pending),
            peak_bytes=store.ledger.peak,
            peak_count=store.peak_count,
            reserved_count=len(blocks),
            in_use_count=len(blocks) - len(idle) - len(pending),
            idle_count=len(idle),
            pending_count=len(pending),
            waste_bytes=sum(block.nbytes - block.spec.size_bytes for block in blocks),
            allocations=allocations,
            allocated_bytes=store.past["bytes"] + sum(n * b.nbytes for n, b in zip(leases, blocks, strict=True)),
            exact_hits=allocations - recasts - counts["misses"],
            class_hits=recasts,
            stream_waits=store.fences.waits,
            lost_streams=store.fences.lost_streams,
            oom=OomSteps(**self._ladder.counts),
            reserved_by_tier=Frozen(store.ledger.reserved),
            **counts,
        )

    @contextlib.contextmanager
    def statistics(self) -> Iterator[Scope]:
        """Count the leases made within a ``with``: current, peak and total, in bytes and buffers. Scopes nest.

        Examples
        --------
        >>> from numbabuf.pool import SimpleBufferPool
        >>> pool = SimpleBufferPool()
        >>> with pool.statistics() as scope:
        ...     pool.allocate(BufferSpec(1024, "uint8", Tier.PINNED)).release()
        >>> scope.stats().peak_bytes, scope.stats().current_bytes
        (1024, 0)

        Notes
        -----
        Cost: while a scope is open, leases and releases take the pool's lock.
        """
        scope, store = Scope(), self._store
        try:
            with store.lock:
                store.watch.open(scope)
                store.set_hot()
            yield scope
        finally:
            with store.lock:
                store.watch.close(scope)
                store.set_hot()

    def events(self) -> np.ndarray:
        """Return the remembered events, oldest first, as a structured array (`stats.EVENT_DTYPE`).

        Raises
        ------
        ValueError
            The pool was made with ``events=0``.
        """
        store = self._store
        if store.watch.ring is None:
            raise ValueError("this pool remembers no events: make it with events=10_000")
        with store.lock:
            return store.watch.ring.snapshot()

    def check(self) -> None:
        """Assert the pool's invariants.

        Raises
        ------
        AssertionError
            One does not hold; the text names it and dumps the pool.
        ClosedError
            The context of the memory was closed or reset.

        Notes
        -----
        Threads: leases by other threads may go on meanwhile.
        """
        with self._step("check"):
            self._check()

    def _check(self) -> None:
        store = self._store
        if store.life is not None and store.life.ended:
            store.refuse_closed()
        audit(store, repr(self))

    def _disown(self) -> None:
        """In a forked child: be closed, and leave the memory to the parent."""
        self._store.disown("the pool belongs to another process, from which this one was forked: make a new one")

    def __repr__(self) -> str:
        store, state = self._store, "closed, " if self.closed else ""
        return f"<{type(self).__name__} {state}{len(store.blocks)} buffers, {store.ledger.total} bytes>"


def _listed(specs: list[BufferSpec]) -> str:
    names = [str(spec) for spec in specs[:8]]
    return ", ".join(names) + (f" and {len(specs) - 8} more" if len(specs) > 8 else "")


# ------------------------------------------------------------------------------------------------------------- fork

pools: weakref.WeakSet[ReusingPool] = weakref.WeakSet()
"""All pools of this process that are alive."""


def _after_fork_in_child() -> None:
    for pool in list(pools):
        pool._disown()  # noqa: SLF001 - the class above


_cuda.watch_forks(_after_fork_in_child)
