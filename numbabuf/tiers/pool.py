"""HierarchicalBufferPool: buffers that move between device, managed and pinned memory, each tier within its budget.

What users call; `residents` keeps the books, `traffic` makes room and moves, `policies` says what is worth keeping, the
`store` holds all memory. Every step happens under the pool's one lock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from .. import _cuda
from ..checks import whole_number
from ..errors import ClosedError, TierFullError
from ..pool.base import ReusingPool
from ..pool.block import refuse_captured
from ..pool.entry import BufferEntry, FixedEntry
from ..pool.oom import Ladder
from ..pool.spec import BufferSpec, Tier, size_class
from ..pool.stats import Frozen, OomSteps, PoolStats
from ..pool.store import known_stream, refuse_capture
from .entry import MovableEntry
from .policies import Policy, make_policy
from .residents import Residents, refuse_bound, refuse_used
from .stats import HierarchyStats
from .store import TierStore
from .traffic import Traffic, below, placed
from .use import Use

__all__ = ["HierarchicalBufferPool"]

_CAPTURED = "no event can order moves round it: allocate the buffers without movable=True, and keep them, unreleased"


def _stream_of(stream: _cuda.StreamLike | None) -> _cuda.Stream:
    """Wrap what a user calls a stream; None is the default stream, on which launches without a stream go."""
    wrapped: _cuda.Stream = _cuda.default_stream() if stream is None else _cuda.as_stream(stream)
    refuse_captured(wrapped, _CAPTURED)
    return wrapped


class HierarchicalBufferPool(ReusingPool):
    """A pool whose buffers can move to where they are needed, and make room for each other.

    ``allocate(spec)`` gives a buffer that never moves, as any pool does. ``allocate(spec, movable=True)`` gives one
    that the pool may move, and that has an address only inside `use`.

    Parameters
    ----------
    device_bytes, managed_bytes, pinned_bytes
        Budget of each tier in bytes, never exceeded; `limits` changes it. Device memory is for what is in use, the
        others for the rest: give pinned memory at least what all buffers need together.
    policy : {"frequency", "lru"} or Policy
        What goes first under pressure, and what is worth letting in. "frequency" is decayed uses x cost of a move /
        bytes, guarded by recency (`policies.Guarded`). A Policy serves one pool.
    move_blocks
        Most thread blocks of a batch of moves. None: by direction, enough bytes in flight for the bus.
    engine_bytes
        Least bytes of a move for the copy engine, one driver call each; smaller ones share a launch. None: 4 MiB.
    on_oom, events
        As in `SimpleBufferPool`.

    Raises
    ------
    TypeError
        A budget, `move_blocks` or `engine_bytes` is not a whole number, or `policy` neither a name nor a Policy.
    ValueError
        A budget is negative, `move_blocks` or `engine_bytes` below 1, or the policy unknown or another pool's.

    Notes
    -----
    Threads: every method may be called from any thread; moves are made one batch at a time.
    Streams: moves are queued on the pool's own stream, behind the work that uses what they move; the streams of later
    uses wait for them. The host waits only for released memory that is still being read, when there is no other; for
    memory that goes back to the driver; and after four batches that the device has not begun.
    Devices: all of it is on one device, the one that was current when the first buffer was made, and what the pool does
    by itself runs there, whichever device is current. `use`, in which the caller launches, wants that device current
    (BackendError).
    Capture: a thread that captures a graph moves nothing, other threads go on. A buffer that the open capture or a live
    graph reads or writes does not move: it is not chosen to make room, and `demote` of it raises BusyError.
    Managed memory is never more than the card has free when it is asked for, however much of it is resident already:
    oversubscribed, it can hang a GPU. Where the backend does not tell what is free (in the simulator, under some
    external memory managers), the budget alone holds.

    Examples
    --------
    >>> pool = HierarchicalBufferPool(device_bytes=4096, pinned_bytes=16384)
    >>> a, b = (pool.allocate(BufferSpec(4096, "uint8"), movable=True) for _ in "ab")
    >>> a.tier.value, b.tier.value
    ('pinned', 'device')
    >>> with pool.use([a], in_place=False) as (array,):
    ...     print(a.tier.value, b.tier.value, array.shape)
    device pinned (4096,)
    >>> a.release(); b.release(); pool.close()
    """

    _store: TierStore
    _ladder: Ladder

    def __init__(
        self,
        *,
        device_bytes: int,
        pinned_bytes: int,
        managed_bytes: int = 0,
        policy: str | Policy = "frequency",
        move_blocks: int | None = None,
        engine_bytes: int | None = None,
        on_oom: Callable[[int], Any] | None = None,
        events: int = 0,
    ) -> None:
        budgets = {Tier.DEVICE: device_bytes, Tier.MANAGED: managed_bytes, Tier.PINNED: pinned_bytes}
        budgets = {tier: whole_number(f"{tier.value}_bytes", budget) for tier, budget in budgets.items()}
        if move_blocks is not None:
            move_blocks = whole_number("move_blocks", move_blocks, least=1)
        if engine_bytes is not None:
            engine_bytes = whole_number("engine_bytes", engine_bytes, least=1)
        super().__init__(TierStore(budgets, weakref.ref(self), events), on_oom)
        self._reserved: set[BufferSpec] = set()  # of earlier calls, as far as there are blocks of them
        self._latest: tuple[Any, Any] = None, None  # the stream of the latest use, and wrapped: 10 us
        self.policy = make_policy(policy, device_bytes)  # it takes the policy, and nothing fails from here on
        self._residents = Residents(self._store, self.policy)
        self._traffic = Traffic(self._store, self._residents, blocks=move_blocks, engine_bytes=engine_bytes)

    @property
    def _ended(self) -> bool:
        """Whether the pool's context is gone, and its memory, the pinned part too, with it."""
        life = self._store.life
        return life is not None and life.ended

    def _refuse_ended(self) -> None:
        if self._ended:
            raise ClosedError(
                "this pool's memory went when its context was closed (cuda.close(), or a reset of the context or "
                "device), and its entries with it: make a new pool"
            )

    def _step(self, what: str) -> contextlib.AbstractContextManager[None]:
        """As in `SimpleBufferPool`; ClosedError after the end of the context."""
        self._refuse_ended()
        return self._store.turns.step(what)

    # -------------------------------------------------------------------------------------------------------- limits

    def _set_limit(self, tier: Tier, nbytes: int | None) -> None:
        """As in `SimpleBufferPool`; once idle memory is freed, the coldest buffers are demoted too."""
        tier = Tier(tier)
        nbytes = whole_number(f"limits[{tier}]", nbytes)
        store = self._store
        with self._step("limits"):
            store.refuse_closed()
            if store.ledger.reserved[tier] > nbytes:
                refuse_capture("a lower limit")
                self._traffic.shrink(tier, nbytes)
            store.ledger.set_limit(tier, nbytes)
            if tier is Tier.DEVICE:
                self.policy.resize(nbytes)

    # ---------------------------------------------------------------------------------------------------- allocation

    def allocate(
        self, spec: BufferSpec, *, stream: _cuda.StreamLike | None = None, movable: bool = False
    ) -> BufferEntry:
        """Lease a buffer; room for it is made by demoting what the policy finds coldest, and no use is waited for.

        Parameters
        ----------
        spec, stream
            As for `SimpleBufferPool.allocate`.
        movable
            False: in the tier of its spec, at one address until its release. True: there or, without room, in the next
            tier below that has some; the pool may move it, and it has an address only inside `use`.

        Returns
        -------
        entry : BufferEntry or MovableEntry

        Raises
        ------
        TierFullError
            There is no room, and none can be made; the text says of each tier why not.
        Exception
            The others of `SimpleBufferPool.allocate`.
        """
        if movable:
            return self._lease(spec, stream, True)
        return super().allocate(spec, stream=stream)

    def _allocate_larger(self, spec: BufferSpec) -> BufferEntry:
        """Not here: where budgets are tight, a larger block is worth more to a buffer of its size."""
        return self._lease(spec, None, False)

    def _allocate_slowly(self, spec: BufferSpec, stream: _cuda.StreamLike | None) -> BufferEntry:
        return self._lease(spec, stream, False)

    def _lease(self, spec: BufferSpec, stream: _cuda.StreamLike | None, movable: bool) -> BufferEntry:
        if not isinstance(spec, BufferSpec):
            raise TypeError(f"allocate was given {spec!r}: give a BufferSpec(shape, dtype, tier)")
        wrapped: _cuda.Stream | None = None
        if stream is not None:
            wrapped = known_stream(stream)
            refuse_captured(wrapped, _CAPTURED)
        elif _cuda.PER_THREAD and spec.tier is Tier.DEVICE:  # elsewhere all threads have one, which goes without saying
            wrapped = _cuda.default_stream()
        serve = functools.partial(self._serve, spec, wrapped, movable)
        try:
            return serve()
        except Exception as error:  # it ends here, as in `TierStore.grow_or_free`
            if not _cuda.is_out_of_memory(error):
                raise
        return self._ladder.climb(spec, serve, self._demote)

    def _serve(self, spec: BufferSpec, stream: _cuda.Stream | None, movable: bool) -> BufferEntry:
        """Lease a buffer in the first tier that it may be in where there is room or room can be made."""
        store = self._store
        with self._step("allocate"):
            store.refuse_closed()
            if stream is not None:
                store.turns.refuse_elsewhere(stream)
            self._residents.sweep()
            reasons: list[str] = []
            for tier in (spec.tier, *below(spec.tier)) if movable and not _cuda.capturing() else (spec.tier,):
                entry = self._serve_in(tier, spec, stream, movable, reasons)
                if entry is not None:
                    return entry
            raise TierFullError("; ".join(reasons))

    def _serve_in(
        self, tier: Tier, spec: BufferSpec, stream: _cuda.Stream | None, movable: bool, reasons: list[str]
    ) -> BufferEntry | None:
        """Lease a buffer in one tier; None where it has no room, with the reason added to `reasons`."""
        for again in (False, True):
            try:
                handle, kind = self._traffic.find_room(placed(spec, tier), stream)
            except Exception as error:
                if not _cuda.is_out_of_memory(error):
                    raise
                reasons.append(str(error))
            else:
                self._store.lease(handle, kind, stream)
                return self._residents.enlist(handle, spec) if movable else FixedEntry(handle)
            if again or not self._traffic.relieve(tier, spec.size_bytes):
                break
            self._ladder.counts["demote"] += 1
        return None

    def _demote(self, tier: Tier, nbytes: int) -> str | None:
        """The ladder's rung that is this pool's own."""
        with self._step("allocate"):
            count = self._traffic.relieve(tier, nbytes)
        return f"{count} buffers demoted" if count else None

    def reserve(self, specs: Iterable[BufferSpec]) -> None:
        """Have idle buffers ready, as in `SimpleBufferPool.reserve`; colder buffers are demoted to make room for them.

        They are ready in the tier of their spec: none goes to a tier below.
        """
        super().reserve(specs)

    def _reserve(self, wanted: list[BufferSpec]) -> None:
        needed, kept = dict.fromkeys(Tier, 0), dict.fromkeys(Tier, 0)
        for spec in wanted:
            needed[spec.tier] += size_class(max(1, spec.size_bytes))
        for handle in self._store.idle():
            if handle.block.spec in self._reserved.difference(wanted):
                kept[handle.block.tier] += handle.block.nbytes
        for tier, nbytes in needed.items():
            # Idle buffers that serve already are part of the room there is. Those of earlier calls are not,
            # as long as others can go instead: what was reserved shall be there when it is leased.
            if nbytes and not self._traffic.make_room(tier, nbytes + kept[tier]):
                self._traffic.make_room(tier, nbytes)
        super()._reserve(wanted)
        self._reserved = {block.spec for block in self._store.blocks} & self._reserved.union(wanted)

    # -------------------------------------------------------------------------------------------------------- use

    def use(
        self,
        entries: Iterable[MovableEntry],
        *,
        stream: _cuda.StreamLike | None = None,
        write: bool = True,
        in_place: bool = True,
    ) -> Use:
        """Keep buffers where they are for work on one stream: promoted first where that pays.

        Parameters
        ----------
        entries
            Movable buffers of this pool, each once.
        stream
            Where the work that uses them is queued, within the ``with``. It waits for the moves, and for earlier uses
            on other streams. None: the default stream, as in `allocate`.
        write
            Whether that work writes any of them. Of buffers that are only read, what was promoted keeps its copy below
            as long as there is room for it, so that demoting it costs nothing.
        in_place
            Whether a buffer may stay in managed or pinned memory, where kernels reach it over the bus: because there
            is no room, or because it is worth less than what would have to go. False: all must come to device memory.

        Returns
        -------
        use : context manager
            Entering it gives the list of the buffers as kernel arguments, in the order of `entries`, valid until the
            end of the ``with``.

        Raises
        ------
        TierFullError
            `in_place` is False and there is no room.
        BusyError
            `in_place` is False, and a buffer is in another use, or under a live graph, outside device memory.
        CaptureError
            A buffer would have to move, and this thread captures a graph; or another thread, or library, captures
            `stream`.

        Notes
        -----
        The host may read or write what is in pinned or managed memory after it has waited for the stream.
        Cost: one event, a wait for each buffer last used on another stream, and at most two launches: victims going
        down, buffers coming up.
        """
        chosen = self._mine(entries)
        _cuda.one_device(self._store.turns.device, self)  # the caller's work is for the device that is current
        given, wrapped = self._latest
        if stream is None or stream is not given or wrapped.closed:
            wrapped = _stream_of(stream)
            if not (isinstance(stream, int) or wrapped.handle == 0 or wrapped.thread):  # those name others another time
                self._latest = stream, wrapped
        else:
            refuse_captured(wrapped, _CAPTURED)
        return Use(self._traffic, self._residents, self._store, chosen, wrapped, write=write, in_place=in_place)

    # ----------------------------------------------------------------------------------------------- moves by hand

    def promote(self, entries: Iterable[MovableEntry]) -> None:
        """Bring buffers to device memory, all of them or none; colder ones make room.

        Raises
        ------
        TierFullError
            There is no room and none can be made.
        BusyError
            One of them is in a use, or under a live graph, outside device memory.
        CaptureError
            A graph is being captured.

        Notes
        -----
        Streams: queued on the pool's own stream; returns at once.
        """
        chosen = self._mine(entries)
        with self._step("promote"), self._residents.claimed(chosen):
            self._store.refuse_closed()
            self._traffic.bring_up(chosen, insist=True, judge=False)

    def prefetch(self, entries: Iterable[MovableEntry], *, stream: _cuda.StreamLike | None = None) -> None:
        """Begin to bring buffers to device memory ahead of their use, as far as there is room; a hint, never an error.

        Parameters
        ----------
        entries
            Buffers of this pool; those in use are left alone.
        stream
            The stream of the use to come, which waits for the moves. None: the default stream. Work that shall run
            beside the moves is queued on another one.
        """
        chosen = self._mine(entries)
        wrapped = _stream_of(stream)
        with self._step("prefetch"), self._residents.claimed(chosen):
            self._store.refuse_closed()
            if not _cuda.capturing():
                self._traffic.bring_up(chosen, insist=False, judge=False)
                for entry in chosen:
                    self._traffic.order_after(entry, wrapped)

    def demote(self, entries: Iterable[MovableEntry], *, tier: Tier | None = None) -> None:
        """Send buffers down, all of them or none: to `tier`, or to the next one below with room.

        Buffers that are at or below `tier` already stay. Raises and notes as for `promote`.
        """
        chosen = self._mine(entries)
        tier = None if tier is None else Tier(tier)
        with self._step("demote"), self._residents.claimed(chosen):
            self._store.refuse_closed()
            lower = [e for e in chosen if (tier in below(e.tier) if tier else below(e.tier))]
            for entry in lower:
                refuse_used(entry)
                refuse_bound(entry)
            self._traffic.transfer([(entry, tier) for entry in lower])

    def tier_of(self, entry: BufferEntry) -> Tier:
        """Return the tier that a buffer's contents are in, or on their way to; after its release, that of its spec.

        Raises
        ------
        TypeError, ValueError
            `entry` was not returned by a pool's `allocate`, or by another pool's.
        """
        if not isinstance(entry, BufferEntry):
            raise TypeError(f"{entry!r} is not an entry of a pool: give what allocate returned")
        if isinstance(entry, MovableEntry) and entry.alive:
            self._mine([entry])
        return entry.tier

    def _mine(self, entries: Iterable[MovableEntry]) -> list[MovableEntry]:
        chosen = list(entries)
        self._refuse_ended()
        for entry in chosen:
            if not isinstance(entry, MovableEntry):
                raise TypeError(f"{entry!r} does not move: give what allocate(spec, movable=True) returned")
            if entry.handle.block.store() is not self._store:
                raise ValueError(f"{entry!r} belongs to another pool")
        if len({id(entry) for entry in chosen}) < len(chosen):
            raise ValueError("an entry was given twice: give each once")
        return chosen

    # ------------------------------------------------------------------------------------------------- observation, end

    def stats(self) -> HierarchyStats:
        """Return one consistent snapshot: all its figures are of one moment."""
        found: HierarchyStats = super().stats()  # type: ignore[assignment]  # as `_stats` has it
        return found

    def _stats(self) -> PoolStats:
        if not _cuda.capturing():
            self._residents.sweep()
        base, store = super()._stats(), self._store
        shared: dict[str, Any] = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
        shared["oom"] = OomSteps(**self._ladder.counts | {"trim": self._ladder.counts["trim"] + store.trims})
        shared["allocations"] -= store.moves
        shared["allocated_bytes"] -= store.moves_bytes
        shared["exact_hits"] -= store.moves
        return HierarchyStats(
            **shared | self._traffic.counts,
            settled=store.settled,
            launches=self._traffic.launches,
            moved_bytes=self._traffic.moved_bytes,
            buffers_by_tier=Frozen(self._residents.counts()),
        )

    def _check(self) -> None:
        super()._check()
        self._residents.check()

    def close(self) -> None:
        """Give up clean copies and idle memory, and refuse further leases, uses and moves.

        Leased buffers stay valid where they are, until released. Idempotent. CaptureError while a capture is open.
        """
        if self._ended:  # nothing is left to free
            self._store.closed = self._store.closed or "the pool is closed: make a new one"
            return
        super().close()

    def _close(self) -> None:
        self._residents.close()
        traffic = None if self.closed else self._traffic  # closed in a forked child, it is the parent's
        super()._close()
        if traffic is not None:
            traffic.close()

    def _disown(self) -> None:
        super()._disown()
        self._store.life = None
        self._residents.clear()
        self._traffic.disown()
