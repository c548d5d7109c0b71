"""HierarchicalBufferPool: buffers that move between device, managed and pinned memory, each tier within its budget.

Decides what moves and when, and keeps the books of it; `policies` says what is worth keeping, `moves` does the copying,
the `store` holds all memory. Every step happens under the pool's one lock. Sits above `tiered`, below `manager`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from .. import _cuda
from ..checks import whole_number
from ..errors import BusyError, CaptureError, TierFullError
from ..pool.block import Ledger, Ticket
from ..pool.pool import SimpleBufferPool
from ..pool.spec import BufferSpec, BufferState, Tier, size_class
from ..pool.stats import Frozen, PoolStats, caller
from ..pool.store import Store
from ..pool.turns import Turns
from . import calibration
from .entry import Record, TieredEntry, refuse_ended
from .mover import Mark, Move, Mover
from .policies import Policy, make_policy
from .stats import HierarchyStats

__all__ = ["HierarchicalBufferPool"]

ORDER = (Tier.DEVICE, Tier.MANAGED, Tier.PINNED)
"""The tiers from the top down."""


def _below(tier: Tier) -> tuple[Tier, ...]:
    return ORDER[ORDER.index(tier) + 1 :]


@functools.lru_cache(maxsize=4096)
def _placed(spec: BufferSpec, tier: Tier) -> BufferSpec:
    """`spec` in another tier."""
    return BufferSpec(spec.shape, spec.dtype, tier)


def _stream_of(stream: _cuda.StreamLike | None) -> _cuda.Stream:
    """Wrap what a user calls a stream; None is the default stream, on which launches without a stream go."""
    return _cuda.default_stream() if stream is None else _cuda.as_stream(stream)


def _refuse_captured(stream: _cuda.Stream) -> None:
    """Raise CaptureError for a stream that is being captured, but not by this thread through numbabuf."""
    if not _cuda.capturing() and _cuda.is_capturing(stream):
        raise CaptureError(
            f"the stream {stream.handle:#x} is being captured into a graph that this thread did not begin with "
            "numbabuf, and no event can order moves round it: take the addresses before that capture, which fixes "
            "the buffers, and keep them, unreleased, as long as the graph lives"
        )


class _TierLedger(Ledger):
    """A budget for each tier by itself."""

    def __init__(self, budgets: dict[Tier, int]) -> None:
        super().__init__(None, None)
        self._budgets = budgets

    def limit(self, tier: Tier) -> int | None:
        return self._budgets[tier]

    def set_limit(self, tier: Tier, nbytes: int | None) -> None:
        """Change the budget of a tier; what is reserved fits it already."""
        self._budgets[tier] = nbytes or 0

    def sharing(self, tier: Tier) -> tuple[Tier, ...]:
        return (tier,)


class _TierStore(Store):
    """The memory of a hierarchical pool: a budget for each tier, and no more managed memory than the card has free."""

    def __init__(self, budgets: dict[Tier, int], owner: Callable[[], Any], events: int) -> None:
        super().__init__(_TierLedger(budgets), owner, events=events)
        self.ledger: _TierLedger
        self.settled = 0
        """Managed allocations whose pages the driver keeps on the host."""
        self.life: _cuda.Lifetime | None = None
        """That of the context that the memory was made in; None before the first is."""
        self.trims = 0
        """Times that idle memory was freed to grow."""
        self.moves = self.moves_bytes = 0
        """Times that memory was taken for a move, and its capacity in bytes: no leases of a user's."""

    def take(self, ticket: Ticket, kind: str, stream: _cuda.Stream | None) -> None:
        """Begin to use a buffer in hand, found as `kind`, as a move's target on `stream`. Lock held."""
        block = ticket.block
        block.generation += 1
        block.users, block.plain = (stream,), False
        self.moves += 1
        self.moves_bytes += block.nbytes
        if self.watch.active:
            self.watch.tell(kind, block, lease=False)

    def grow_or_free(self, spec: BufferSpec) -> Ticket:
        """Grow; where there is no room, free idle memory, which is worth less than what is asked for, and try again."""
        try:
            return self.grow(spec)
        except Exception as error:  # it ends here: kept, its traceback would keep what the frames below it hold
            if not _cuda.is_out_of_memory(error):
                raise
        self.trims += self.make_room(spec.tier, max(1, spec.size_bytes)) > 0
        _cuda.flush_pending_frees()
        return self.grow(spec)

    def grow(self, spec: BufferSpec) -> Ticket:
        if self.life is None:
            self.life = _cuda.lifetime()
        with self.lock:  # from the look at what is free to the promise, nobody else may ask for managed memory
            managed = self.ledger.reserved[Tier.MANAGED]
            if spec.tier is Tier.MANAGED or (managed and spec.tier is Tier.DEVICE):
                info = _cuda.memory_info()
                if info is not None and info[0] < managed + spec.size_bytes:
                    raise TierFullError(
                        f"{spec} asks for {spec.size_bytes} bytes of {spec.tier.value} memory; the card has {info[0]} "
                        f"bytes free and {managed} of managed memory may need them"
                    )
                ticket = super().grow(spec)
                if spec.tier is Tier.MANAGED:
                    try:
                        self.settled += _cuda.settle_on_host(ticket.block.base, self.fences.default)
                    except BaseException:
                        self.free(ticket)
                        raise
                return ticket
        return super().grow(spec)

    def room_in(self, tier: Tier, *, pending: bool = False) -> int:
        """Return the bytes that can be had in a tier without moving anything, or by waiting for what is `pending`."""
        blocks = [ticket.block for ticket in self.idle()]
        if pending:
            blocks += self.pending()
        room = self.ledger.room(tier)
        assert room is not None
        return room + sum(block.nbytes for block in blocks if block.tier is tier)


class _Lease:
    """What a `use` holds until its end.

    Attributes
    ----------
    captured : bool
        Whether its work goes into a graph, so that no event can be put behind it.
    seen : list of Mark or None
        Of each entry the mark that it had when the use began; empty before that, and after the end.
    """

    __slots__ = ("captured", "claims", "entries", "seen", "stream")

    def __init__(self, entries: list[TieredEntry], stream: _cuda.Stream, captured: bool) -> None:
        self.entries, self.stream, self.captured = entries, stream, captured
        self.claims = contextlib.ExitStack()
        self.seen: list[Mark | None] = []


class HierarchicalBufferPool(SimpleBufferPool):
    """A pool whose buffers move to where they are needed, and make room for each other.

    Parameters
    ----------
    device_bytes, managed_bytes, pinned_bytes
        Budget of each tier in bytes, never exceeded; `limits` changes it. Device memory is for what is in use, the
        others for the rest: give pinned memory at least what all buffers need together.
    policy : {"frequency", "lru"} or Policy
        What goes first under pressure, and what is worth letting in. "frequency" is decayed uses x cost of a move /
        bytes, guarded by recency (`policies.Guarded`). A Policy serves one pool.
    on_oom, events
        As in `SimpleBufferPool`.

    Raises
    ------
    TypeError
        A budget is no whole number, or `policy` neither a name nor a Policy.
    ValueError
        A budget is negative, or the policy unknown or another pool's.

    Notes
    -----
    Threads: every method may be called from any thread; moves are made one batch at a time.
    Streams: moves are queued on the pool's own stream, behind the work that uses what they move; the streams of later
    uses wait for them. The host waits only for released memory that is still being read, when there is no other; for
    memory that goes back to the driver; after four batches that the device has not begun; and when a buffer's address
    is taken outside a use.
    Devices: all of it is on one device, the one that was current when the first buffer was made, and what the pool does
    by itself runs there, whichever device is current. `use`, in which the caller launches, wants that device current
    (BackendError).
    Capture: a thread that captures a graph moves nothing, other threads go on; what the open capture or a live graph
    reads or writes is not chosen to make room. A buffer under a live graph keeps its memory: its
    demotion saves the contents, and every later use first brings them back to the same address.
    Managed memory is never more than the card has free when it is asked for, however much of it is resident already:
    oversubscribed, it can hang a GPU. Where nobody knows what is free (in the simulator, under some external memory
    managers), the budget alone holds.

    Examples
    --------
    >>> pool = HierarchicalBufferPool(device_bytes=4096, pinned_bytes=16384)
    >>> a, b = (pool.allocate(BufferSpec(4096, "uint8")) for _ in "ab")
    >>> a.tier.value, b.tier.value
    ('pinned', 'device')
    >>> with pool.use([a], in_place=False) as (array,):
    ...     print(a.tier.value, b.tier.value, array.shape)
    device pinned (4096,)
    >>> a.release(); b.release(); pool.close()
    """

    _store: _TierStore

    def __init__(
        self,
        *,
        device_bytes: int,
        pinned_bytes: int,
        managed_bytes: int = 0,
        policy: str | Policy = "frequency",
        on_oom: Callable[[int], Any] | None = None,
        events: int = 0,
    ) -> None:
        budgets = {Tier.DEVICE: device_bytes, Tier.MANAGED: managed_bytes, Tier.PINNED: pinned_bytes}
        budgets = {tier: whole_number(f"{tier.value}_bytes", budget) for tier, budget in budgets.items()}
        self._begin(_TierStore(budgets, weakref.ref(self), events), on_oom)
        self._keys = itertools.count(1)
        self._records: dict[int, Record] = {}
        self._gone: deque[int] = deque()  # keys of entries that died
        self._reserved: set[BufferSpec] = set()  # of earlier calls, as far as there are blocks of them
        self._places: dict[Tier, set[int]] = {tier: set() for tier in Tier}  # keys by where the contents are
        self._homes: set[int] = set()  # keys of those with a home
        self._moved = dict.fromkeys(("promotions", "demotions", "clean_demotions", "in_place", "refused"), 0)
        self._made_mover: Mover | None = None
        self.policy = make_policy(policy, device_bytes)  # last: it takes the policy, and nothing fails from here on

    @property
    def _turns(self) -> Turns:
        return self._store.turns

    @property
    def _lock(self) -> threading.RLock:
        """Held in every step of the pool, for its books and those of the store."""
        return self._store.lock

    @contextlib.contextmanager
    def _step(self, what: str) -> Iterator[None]:
        """One step of the pool: the lock held, and the pool's device current, whichever the caller has.

        BusyError where this thread is in the middle of one already, ClosedError after the end of the context.
        """
        self._refuse_ended()
        with self._store.step(what):
            yield

    def _take_back(self, ticket: Ticket, stream: _cuda.StreamLike | None) -> str:
        """As in `SimpleBufferPool`, but within the step of the entry's release."""
        self._store.release(ticket, None if stream is None else self._stream(stream))
        return caller() if self._store.watch.debug else ""

    @property
    def _ended(self) -> bool:
        """Whether the pool's context is gone, and its memory, the pinned part too, with it."""
        life = self._store.life
        return life is not None and life.ended

    def _refuse_ended(self) -> None:
        refuse_ended(self._store.life)

    @property
    def _mover(self) -> Mover:
        """What moves, made at the first need."""
        if self._made_mover is None:
            with self._lock, _cuda.on_device(self._store.device):
                if self._made_mover is None:
                    tuning = calibration.recorded()
                    self._made_mover = Mover(blocks=tuning.blocks, engine_bytes=tuning.engine_bytes)
        return self._made_mover

    # -------------------------------------------------------------------------------------------------------- limits

    def _set_limit(self, tier: Tier, nbytes: int | None) -> None:
        """As in `SimpleBufferPool`; once idle memory is freed, the coldest buffers are demoted too."""
        tier = Tier(tier)
        nbytes = whole_number(f"limits[{tier}]", nbytes)
        store = self._store
        with self._step("limits"):
            store.refuse_closed()
            if store.ledger.reserved[tier] > nbytes:
                store.refuse_capture("a lower limit")
                self._shrink(tier, nbytes)
            store.ledger.set_limit(tier, nbytes)
            if tier is Tier.DEVICE:
                self.policy.resize(nbytes)

    def _shrink(self, tier: Tier, nbytes: int) -> None:
        """Bring what is reserved in a tier down to `nbytes`; TierFullError where it cannot come so low."""
        store = self._store
        self._sweep()
        store.settle()
        idle = sum(ticket.block.nbytes for ticket in store.idle() if ticket.block.tier is tier)
        pending = sum(block.nbytes for block in store.pending() if block.tier is tier)
        missing = store.ledger.reserved[tier] - nbytes - idle - pending
        if missing > 0:
            if tier is Tier.PINNED:
                self._drop_copies(missing)
            else:
                self._evict(self._victims(tier, missing))
        if pending or missing > 0:
            store.finish_pending()
        store.free_idle(store.ledger.reserved[tier] - nbytes, (tier,))
        _cuda.flush_pending_frees()
        if store.ledger.reserved[tier] > nbytes:
            raise TierFullError(
                f"{nbytes} bytes are too few for {tier.value} memory: {store.ledger.reserved[tier]} are in use, fixed "
                f"or under graphs, or have no room below; the limit stays at {store.ledger.limit(tier)}. Release or "
                "unfix() buffers, or raise the limit of a tier below, first"
            )

    # ---------------------------------------------------------------------------------------------------- allocation

    def allocate(self, spec: BufferSpec, *, stream: _cuda.StreamLike | None = None) -> TieredEntry:
        """Lease a buffer: in the tier of its spec where room can be made, else in the next one below that has room.

        Room is made by demoting what the policy finds coldest; no lease is waited for. Parameters and errors are those
        of `SimpleBufferPool.allocate`; TierFullError means that no tier from the spec's downwards has room.
        """
        # Hot path: a hit without a stream asks the driver for nothing.
        if stream is None and not _cuda.PER_THREAD:
            self._turns.refuse_mine(self, "allocate")
            self._refuse_ended()
            try:
                ticket = self._hot[spec.line].pop()
            except (KeyError, IndexError, AttributeError):
                pass
            else:
                self._cast(ticket, spec)
                return self._turns.run(self._enlist, ticket, spec)
        if not isinstance(spec, BufferSpec):
            raise TypeError(f"allocate was given {spec!r}: give a BufferSpec(shape, dtype, tier)")
        if stream is not None:
            wrapped: _cuda.Stream | None = _cuda.as_stream(stream)
            _refuse_captured(wrapped)  # type: ignore[arg-type]
        else:  # the default stream, which goes without saying where all threads have one
            wrapped = _cuda.default_stream() if _cuda.PER_THREAD and spec.tier is Tier.DEVICE else None
        try:
            return self._serve(spec, wrapped)
        except Exception as error:  # it ends here, as in `_TierStore.grow_or_free`
            if not _cuda.is_out_of_memory(error):
                raise
        return self._ladder.climb(spec, functools.partial(self._serve, spec, wrapped), self._demote)

    def _serve(self, spec: BufferSpec, stream: _cuda.Stream | None) -> TieredEntry:
        """Lease a buffer in the first tier, from the spec's downwards, where there is room or room can be made.

        The memory error that it raises says of each tier why not.
        """
        store = self._store
        with self._step("allocate"):
            store.refuse_closed()
            if self._gone:
                self._sweep()
            reasons = []
            for tier in (spec.tier,) if _cuda.capturing() else (spec.tier, *_below(spec.tier)):
                placed = _placed(spec, tier)
                for again in (False, True):
                    try:
                        ticket, kind = self._find_room(placed, stream)
                    except Exception as error:
                        if not _cuda.is_out_of_memory(error):
                            raise
                        reasons.append(str(error))
                    else:
                        store.lease(ticket, kind, stream)
                        return self._enlist(ticket, spec)
                    if again or not self._relieve(tier, spec.size_bytes):
                        break
                    self._ladder.counts["demote"] += 1
            raise TierFullError("; ".join(reasons))

    def _find_room(self, spec: BufferSpec, stream: _cuda.Stream | None) -> tuple[Ticket, str]:
        """Take memory in the tier of `spec`, for work on `stream`, and say how it was found.

        Pressure here may move what is not claimed.
        """
        store = self._store
        ticket, kind = store.find(spec, stream, 1)
        if ticket is None:
            if _cuda.capturing():
                raise CaptureError(
                    f"{spec} has no idle buffer, and none can be allocated while a graph is captured: call "
                    f"reserve([{spec}]) before the capture"
                )
            if not self._make_room(spec.tier, spec.size_bytes):
                raise TierFullError(
                    f"no room for {spec}: {store.room_in(spec.tier)} of {store.ledger.limit(spec.tier)} bytes are "
                    f"free, and not enough of the rest can move. Release buffers, or raise limits[{spec.tier}]"
                )
            ticket, kind = store.find(spec, stream, 1)
        if ticket is None:
            return store.grow_or_free(spec), "miss"
        return ticket, kind

    def _enlist(self, ticket: Ticket, spec: BufferSpec) -> TieredEntry:
        entry = TieredEntry(ticket, spec)
        entry._record = record = Record(next(self._keys), entry, self._gone, self._store.life)
        self._records[record.key] = record
        self._places[entry.tier].add(record.key)
        return entry

    def _relieve(self, tier: Tier, nbytes: int) -> int:
        """Demote buffers where the driver has less than the budget; return how many."""
        victims = [] if _cuda.capturing() else self._victims(tier, nbytes)
        if not victims or not self._evict(victims):
            return 0
        self._store.make_room(tier, nbytes)
        return len(victims)

    def _demote(self, tier: Tier, nbytes: int) -> str | None:
        """The ladder's rung that is this pool's own."""
        with self._step("allocate"):
            count = self._relieve(tier, nbytes)
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
        for ticket in self._store.idle():
            if ticket.block.spec in self._reserved.difference(wanted):
                kept[ticket.block.tier] += ticket.block.nbytes
        for tier, nbytes in needed.items():
            # Idle buffers that serve already are part of the room there is. Those of earlier calls are not,
            # as long as others can go instead: what was reserved shall be there when it is leased.
            if nbytes and not self._make_room(tier, nbytes + kept[tier]):
                self._make_room(tier, nbytes)
        super()._reserve(wanted)
        self._reserved = {block.spec for block in self._store.blocks} & self._reserved.union(wanted)

    # -------------------------------------------------------------------------------------------------------- use

    @contextlib.contextmanager
    def use(
        self,
        entries: Iterable[TieredEntry],
        *,
        stream: _cuda.StreamLike | None = None,
        write: bool = True,
        in_place: bool = True,
    ) -> Iterator[list[Any]]:
        """Lease buffers for work on one stream: promoted where that pays, and unmovable until that work is done.

        Parameters
        ----------
        entries
            Buffers of this pool, each once.
        stream
            Where the work that uses them is queued, within the ``with``. It waits for the moves, and for earlier uses
            on other streams. None: the default stream, as in `allocate`.
        write
            Whether that work writes any of them. Of buffers that are only read, what was promoted keeps its copy below
            as long as there is room for it, so that demoting it costs nothing.
        in_place
            Whether a buffer may stay in managed or pinned memory, where kernels reach it over the bus: because there
            is no room, or because it is worth less than what would have to go. False: all must come to device memory.

        Yields
        ------
        arrays : list
            The buffers as kernel arguments, in the order of `entries`, valid until the end of the ``with``.

        Raises
        ------
        TierFullError
            `in_place` is False and there is no room.
        BusyError
            `in_place` is False, and a buffer is fixed, or in another use, outside device memory.
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
        _cuda.one_device(self._store.device, self)  # the caller's work is for the device that is current
        wrapped = _stream_of(stream)
        _refuse_captured(wrapped)
        lease = _Lease(chosen, wrapped, _cuda.capturing())
        try:
            with self._store.step("use"):
                self._store.refuse_closed()
                self._begin_use(lease, write=write, in_place=in_place)
            yield [entry._held[0].block.device_view() for entry in chosen]
        finally:
            if self._ended:
                lease.claims.close()
            elif self._turns.mine():  # by a finaliser, or refused
                self._turns.later(functools.partial(self._end_use, lease))
            else:
                with self._step("the end of a use"):
                    self._end_use(lease)

    def _begin_use(self, lease: _Lease, *, write: bool, in_place: bool) -> None:
        chosen = lease.entries
        lease.claims.enter_context(self._claimed(chosen, leased=True))
        for entry in chosen:
            if not entry._record.fixed:
                self.policy.touch(entry._record.key, entry.nbytes, write=write)
        refused = self._bring_up(chosen, insist=not in_place, judge=in_place)
        if not lease.captured:
            for entry in chosen:
                self._order_after(entry, lease.stream)
        self._moved["refused"] += refused
        for entry in chosen:
            if write:
                self._drop_copy(entry._record)
            if entry.tier is not Tier.DEVICE:
                self._moved["in_place"] += 1
            entry._state = BufferState.IN_USE
            entry.last_used = time.monotonic()
            entry.use_count += 1
        lease.seen = [entry._record.mark for entry in chosen]

    def _end_use(self, lease: _Lease) -> None:
        """End what `use` began, once; without fail, but for interrupts."""
        with lease.claims:
            if lease.seen and (not lease.captured or not _cuda.capturing()):
                seen, lease.seen = lease.seen, []
                self._mark_use(lease.entries, seen, lease.stream)

    def _mark_use(self, entries: Sequence[TieredEntry], seen: Sequence[Mark | None], stream: _cuda.Stream) -> None:
        """Put one mark behind a lease's work, and behind that of leases on other streams that ended meanwhile."""
        after = None
        try:
            for entry in entries:  # what holds if an interrupt comes before the mark
                entry._held[0].block.add_user(stream)
            if not _cuda.capturing():  # one begun within the lease takes the event
                for entry, mark in zip(entries, seen, strict=True):
                    if entry._record.mark is not mark:
                        self._order_after(entry, stream)
                after = Mark(stream, self._mover.spare)
        except Exception:  # without a mark, who comes next asks the block for its users, and orders itself after them
            pass
        finally:
            for entry in entries:  # more may be queued on a fixed one at any time, by who has its address: no mark
                entry._record.mark = None if entry._record.fixed else after
                if entry._record.mark is not None:
                    entry._held[0].block.users = (stream,)

    def _order_after(self, entry: TieredEntry, stream: _cuda.Stream) -> None:
        """Put later work on `stream` behind all queued work on the buffer."""
        _cuda.require()  # this thread may never have called the driver before
        mark, block, fences = entry._record.mark, entry._held[0].block, self._store.fences
        if mark is not None:
            mark.wait(stream)
            return
        users = block.users or ((fences.default,) if block.tier is Tier.DEVICE else ())
        try:
            fences.wait_for(users, stream)
        except Exception:  # a stream that takes no mark any more: wait for everything, as a release does
            _cuda.synchronize()

    # ----------------------------------------------------------------------------------------------- moves by hand

    def promote(self, entries: Iterable[TieredEntry]) -> None:
        """Bring buffers to device memory, all of them or none; colder ones make room.

        Raises
        ------
        TierFullError
            There is no room and none can be made.
        BusyError
            One of them is fixed, or in a use, outside device memory.
        CaptureError
            A graph is being captured.

        Notes
        -----
        Streams: queued on the pool's own stream; returns at once.
        """
        chosen = self._mine(entries)
        with self._step("promote"), self._claimed(chosen):
            self._store.refuse_closed()
            self._bring_up(chosen, insist=True, judge=False)

    def prefetch(self, entries: Iterable[TieredEntry], *, stream: _cuda.StreamLike | None = None) -> None:
        """Begin to bring buffers to device memory ahead of their use, as far as there is room; a hint, never an error.

        Parameters
        ----------
        entries
            Buffers of this pool; those that are fixed or in use are left alone.
        stream
            The stream of the use to come, which waits for the moves. None: the default stream. Work that shall run
            beside the moves is queued on another one.
        """
        chosen = self._mine(entries)
        wrapped = _stream_of(stream)
        _refuse_captured(wrapped)
        with self._step("prefetch"), self._claimed(chosen):
            self._store.refuse_closed()
            if not _cuda.capturing():
                self._bring_up(chosen, insist=False, judge=False)
                for entry in chosen:
                    self._order_after(entry, wrapped)

    def demote(self, entries: Iterable[TieredEntry], *, tier: Tier | None = None) -> None:
        """Send buffers down, all of them or none: to `tier`, or to the next one below with room.

        Buffers that are at or below `tier` already stay. Under a live graph, a buffer's memory stays the graph's.
        Raises and notes as for `promote`.
        """
        chosen = self._mine(entries)
        tier = None if tier is None else Tier(tier)
        with self._step("demote"), self._claimed(chosen):
            self._store.refuse_closed()
            lower = [e for e in chosen if (tier in _below(e.tier) if tier else _below(e.tier))]
            for entry in lower:
                self._refuse_busy(entry)
            self._transfer([(entry, tier) for entry in lower])

    def tier_of(self, entry: TieredEntry) -> Tier:
        """Return the tier that a buffer's contents are in, or on their way to; after its release, that of its spec.

        Raises
        ------
        TypeError, ValueError
            `entry` was not returned by a hierarchical pool's `allocate`, or by another pool's.
        """
        if not isinstance(entry, TieredEntry) or entry._held:
            self._mine([entry])
        return entry.tier

    def unfix(self, entries: Iterable[TieredEntry]) -> None:
        """Let buffers move again: no address of them that was taken outside a `use` will be used any more.

        Work that is queued already counts if it is on a stream that was named to the entry (`mark_in_use`,
        `record_stream`, `allocate`), or, for device memory with no stream named, on the default stream.
        """
        chosen = self._mine(entries)
        with self._step("unfix"):
            for entry in chosen:
                entry._record.fixed, entry._record.mark = False, None

    def _fix(self, entry: TieredEntry) -> None:
        """Bring a buffer to the tier of its spec, for good: its address is about to be taken outside a lease."""
        record = entry._record
        with self._step("the address of a buffer"):
            if record.fixed or threading.get_ident() in record.threads:  # another thread was faster; or in a lease
                return
            with self._claimed([entry]):
                if record.mark is not None and _cuda.capturing():
                    raise CaptureError(f"{entry!r} may be moving: take its address, or use() it, before the capture")
                if entry.tier is not entry.spec.tier:
                    self._store.refuse_closed()
                    self._refuse_busy(entry)
                    self._refuse_bound(entry)
                    self._transfer([(entry, entry.spec.tier)])
                _cuda.require()
                if record.mark is not None:
                    record.mark.synchronize()
                elif entry.use_count and not _cuda.capturing():  # a use that could not be marked
                    for user in entry._held[0].block.users:
                        user.synchronize()
                self._drop_copy(record)
                record.fixed = True

    def _mine(self, entries: Iterable[TieredEntry]) -> list[TieredEntry]:
        chosen = list(entries)
        self._refuse_ended()
        for entry in chosen:
            if not isinstance(entry, TieredEntry):
                raise TypeError(f"{entry!r} is no entry of a hierarchical pool: give what its allocate returned")
            if entry._block("used").pool() is not self:
                raise ValueError(f"{entry!r} belongs to another pool")
        if len({id(entry) for entry in chosen}) < len(chosen):
            raise ValueError("an entry was given twice: give each once")
        return chosen

    @contextlib.contextmanager
    def _claimed(self, entries: Iterable[TieredEntry], *, leased: bool = False) -> Iterator[None]:
        """Keep buffers from being moved or released by anybody else, for a step or (`leased`) a use. Holds the lock.

        The lock alone does not: pressure that arises inside a move picks its victims on the same thread.
        """
        self._sweep()  # it leaves alone what is claimed
        claimed, thread = [], threading.get_ident()
        try:
            for entry in entries:
                entry._block("used")
                entry._record.threads.append(thread)
                claimed.append(entry)
                entry._record.leases += leased
            yield
        finally:
            for entry in claimed:
                entry._record.threads.remove(thread)
                entry._record.leases -= leased

    def _refuse_busy(self, entry: TieredEntry) -> None:
        if entry._record.fixed:
            raise BusyError(f"{entry!r} cannot move: its address was taken outside a use; unfix() it when that is over")
        if entry._record.uses > 1:
            raise BusyError(f"{entry!r} cannot move: a use of it is open; leave its with block first")

    def _refuse_bound(self, entry: TieredEntry) -> None:
        """Refuse to bring up what a graph reads in place: it would go on reading where the contents were."""
        if entry._held[0].block.pinned_by_graph:
            raise BusyError(
                f"{entry!r} cannot come up: a live graph, or a capture that is open, uses it where it is; close the "
                "graph first"
            )

    # ------------------------------------------------------------------------------------------------------- pressure

    def _bring_up(self, entries: Sequence[TieredEntry], *, insist: bool, judge: bool) -> int:
        """Promote claimed buffers: all of them, or (not `insist`) those that there is room for.

        Returns how many the policy kept out for which there would have been room.
        `judge`: they will be used; ask the policy whether a buffer is worth its victims. One under a live graph has a
        place to go to, and cannot be read in place: the graph knows one address only.
        """
        wanted = []
        for entry in entries:
            must = insist or (judge and entry._record.home is not None)
            if entry.tier is not Tier.DEVICE:
                bound = entry._held[0].block.pinned_by_graph
                if must:
                    self._refuse_busy(entry)
                    self._refuse_bound(entry)
                    if _cuda.capturing():
                        raise CaptureError(f"{entry!r} must move to device memory: promote() it before the capture")
                if not entry._record.fixed and entry._record.uses == 1 and not bound and not _cuda.capturing():
                    wanted.append(entry)
        refused = 0
        if not wanted:
            return refused
        room = self._store.room_in(Tier.DEVICE)
        cold = self._cold(Tier.DEVICE)
        victims: list[TieredEntry] = []
        coming = []
        for entry in wanted:
            need = 0 if entry._record.home is not None else max(1, entry.nbytes)
            going = []
            while room < need and (victim := next(cold, None)) is not None:
                going.append(victim)
                room += victim._held[0].block.nbytes
            fits = room >= need
            asked = judge and bool(going)
            if fits and (not asked or self.policy.admits(entry._record.key, [v._record.key for v in going])):
                victims += going
                coming.append(entry)
                room -= need
                continue
            if insist:
                raise TierFullError(
                    f"{entry!r} does not fit device memory: its {need} bytes, the budget of "
                    f"{self._store.ledger.limit(Tier.DEVICE)} and what cannot be moved leave {room}. Leave other uses "
                    "first, ask for fewer buffers at once, or raise limits[Tier.DEVICE]"
                )
            refused += fits
            room -= sum(victim._held[0].block.nbytes for victim in going)
            cold = itertools.chain(going, cold)
        try:
            self._transfer([(victim, None) for victim in victims])
            self._transfer([(entry, Tier.DEVICE) for entry in coming])
        except Exception as error:
            homes = judge and any(entry._record.home is not None for entry in coming)
            if insist or homes or not _cuda.is_out_of_memory(error):
                raise
        return refused

    def _make_room(self, tier: Tier, nbytes: int) -> bool:
        """Demote until `nbytes` more fit the budget of a tier; whether they do. Holds the lock; no capture is open."""
        need = max(1, nbytes)
        room = self._store.ledger.room(tier)
        if room is not None and room >= need:
            return True
        self._sweep()
        self._store.settle()
        missing = need - self._store.room_in(tier)
        if missing <= 0:
            return True
        victims = self._victims(tier, missing)
        if tier is Tier.PINNED:
            self._drop_copies(missing)
        elif victims:
            self._evict(victims)
        if self._store.room_in(tier) < need and self._store.room_in(tier, pending=True) >= need:
            self._store.finish_pending()
        return self._store.room_in(tier) >= need

    def _cold(self, tier: Tier) -> Iterator[TieredEntry]:
        """The movable buffers of a tier whose going would free memory, coldest first."""
        for key in self.policy.coldest(list(self._places[tier])):
            record = self._records.get(key)  # a finaliser may release an entry at any time, on this thread too
            entry = None if record is None else record.entry()
            if entry is not None and entry.movable and not entry._held[0].block.pinned_by_graph:
                yield entry

    def _victims(self, tier: Tier, missing: int) -> list[TieredEntry]:
        """The coldest buffers of a tier that have `missing` bytes together; none if all of them have not."""
        victims = []
        for entry in self._cold(tier) if _below(tier) else ():
            victims.append(entry)
            missing -= entry._held[0].block.nbytes
            if missing <= 0:
                return victims
        return []

    def _evict(self, victims: Sequence[TieredEntry]) -> bool:
        """Demote buffers; False, with nothing changed, where the tiers below have no room for them."""
        try:
            self._transfer([(victim, None) for victim in victims])
        except Exception as error:
            if not _cuda.is_out_of_memory(error):
                raise
            return False
        return True

    def _drop_copies(self, nbytes: int) -> None:
        """Give up clean copies until `nbytes` of pinned memory are on their way back."""
        for key in list(self._places[Tier.DEVICE]):
            record = self._records.get(key)
            if nbytes <= 0 or record is None:
                continue
            if record.copy is not None and record.copy.block.tier is Tier.PINNED and not record.uses:
                nbytes -= record.copy.block.nbytes
                self._drop_copy(record)

    def _drop_copy(self, record: Record) -> None:
        copy, record.copy = record.copy, None  # first: an interrupt may come when the store has it already
        if copy is not None:
            self._store.retire(copy)

    def _sweep(self) -> None:
        """See to the buffers that were lost, and to memory that was under graphs which are closed by now."""
        while self._gone:
            record = self._records.get(self._gone.popleft())
            if record is not None:
                self._forget(record)
        for key in list(self._homes):
            record = self._records.get(key)
            if record is None or record.home is None or record.uses:  # in use: it may be on its way there
                continue
            if not record.home.block.pinned_by_graph:
                self._leave_home(record)

    def _forget(self, record: Record) -> None:
        """A buffer was released or lost: let go of what the pool holds for it."""
        if self._records.pop(record.key, None) is None:
            return
        self.policy.forget(record.key)
        for keys in self._places.values():
            keys.discard(record.key)
        self._drop_copy(record)
        self._leave_home(record)
        if self.closed and self._made_mover is not None:
            record.mark = None
            self._made_mover.spare.clear()  # as in `Mover.close`

    def _leave_home(self, record: Record) -> None:
        home, record.home = record.home, None
        if home is not None:
            self._homes.discard(record.key)
            self._store.retire(home)

    # ------------------------------------------------------------------------------------------------- one transaction

    def _transfer(self, wanted: Sequence[tuple[TieredEntry, Tier | None]]) -> None:
        """Move buffers, each to a tier or (None) to the next one below with room: all of them or none.

        Reserve, launch, mark, swap, release. What fails before the swap leaves every buffer where it was: the targets
        go back, and the mover has waited for whatever it had queued into them. From the swap on nothing fails.
        """
        if not wanted:
            return
        if _cuda.capturing():
            raise CaptureError("buffers cannot move while a graph is captured: promote() or demote() them before it")
        plan: list[tuple[TieredEntry, Ticket, bool]] = []  # entry, its next ticket, whether that was made for it
        with self._claimed([entry for entry, _ in wanted]):
            try:
                for entry, tier in wanted:
                    plan.append((entry, *self._target(entry, tier)))
                copied = [(entry, new) for entry, new, _ in plan if new is not entry._record.copy]
                for entry, _ in copied:
                    self._order_after(entry, self._mover.stream)
                moves = [Move(entry._held[0].block, new.block, entry.nbytes) for entry, new in copied]
                mark = self._mover.run(moves) if moves else None
            except BaseException:
                for _, new, made in plan:
                    if made:
                        self._store.retire(new)
                raise
            for entry, new, _ in plan:
                self._swap(entry, new, mark)

    def _target(self, entry: TieredEntry, tier: Tier | None) -> tuple[Ticket, bool]:
        """The memory that a buffer is to move to, and whether it was taken from the pool for that."""
        record = entry._record
        down = tier is None or tier in _below(entry.tier)
        if down and record.copy is not None and (tier is None or tier is record.copy.block.tier):
            return record.copy, False
        if not down and record.home is not None and tier is record.home.block.tier:
            return record.home, False
        *others, last = _below(entry.tier) if tier is None else (tier,)
        for other in others:
            if self._store.room_in(other) >= max(1, entry.nbytes):
                try:
                    return self._obtain(_placed(entry.spec, other)), True
                except Exception as error:  # its budget has room, and the card may have none
                    if not _cuda.is_out_of_memory(error):
                        raise
        return self._obtain(_placed(entry.spec, last)), True

    def _obtain(self, spec: BufferSpec) -> Ticket:
        """Take memory for a move, which is work on the mover's stream."""
        ticket, kind = self._find_room(spec, self._mover.stream)
        self._store.take(ticket, kind, self._mover.stream)
        return ticket

    def _swap(self, entry: TieredEntry, new: Ticket, mark: Mark | None) -> None:
        record, old = entry._record, entry._held[0]
        up = ORDER.index(new.block.tier) < ORDER.index(old.block.tier)
        clean = new is record.copy
        if not clean:  # before the swap: at no moment, an interrupt's included, is the new memory without its mark
            record.mark = mark
            new.block.users = old.block.users = (self._mover.stream,)
        new.block.plain = old.block.plain = False
        entry._held[0] = new
        self._store.watch.moved(old.block, new.block)
        self._places[old.block.tier].discard(record.key)
        self._places[new.block.tier].add(record.key)
        record.copy = None if clean else record.copy
        if new is record.home:
            record.home = None
            self._homes.discard(record.key)
        self._moved["promotions" if up else "demotions"] += 1
        self._moved["clean_demotions"] += clean
        if not up and old.block.pinned_by_graph:
            record.home = old
            self._homes.add(record.key)
        elif up and new.block.tier is Tier.DEVICE:
            record.copy = old
        else:
            self._drop_copy(record)
            self._store.retire(old)

    # ------------------------------------------------------------------------------------------------- observation, end

    def stats(self) -> HierarchyStats:
        """Return one consistent snapshot: all its figures are of one moment."""
        found: HierarchyStats = super().stats()  # type: ignore[assignment]  # as `_stats` has it
        return found

    def _stats(self) -> PoolStats:
        if not _cuda.capturing():
            self._sweep()
        base = super()._stats()
        tiers = {tier: len(keys) for tier, keys in self._places.items()}
        mover = self._made_mover
        shared: dict[str, Any] = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
        store = self._store
        shared["oom"] = dataclasses.replace(base.oom, trim=base.oom.trim + store.trims)
        shared["allocations"] -= store.moves
        shared["allocated_bytes"] -= store.moves_bytes
        shared["exact_hits"] -= store.moves
        return HierarchyStats(
            **shared | self._moved,
            settled=store.settled,
            launches=mover.launches if mover else 0,
            moved_bytes=mover.moved_bytes if mover else 0,
            buffers_by_tier=Frozen(tiers),
        )

    def _check(self) -> None:
        super()._check()
        seen: set[int] = set()
        for record in self._records.values():
            entry = record.entry()
            held = [ticket for ticket in (record.copy, record.home) if ticket is not None]
            if entry is not None and entry._held:
                assert entry._record is record, f"{entry!r} has another entry's record"
                held.append(entry._held[0])
                assert record.copy is None or entry.tier is Tier.DEVICE, f"{entry!r} has a copy below {entry.tier}"
                assert record.copy is None or not record.fixed, f"{entry!r} is fixed and has a copy"
                assert not record.fixed or entry.tier is entry.spec.tier, f"{entry!r} is fixed in {entry.tier}"
                assert record.home is None or entry.tier is not Tier.DEVICE, f"{entry!r} is at home twice"
                assert record.key in self._places[entry.tier], f"{entry!r} is noted in another tier"
            assert (record.home is not None) == (record.key in self._homes), f"{entry!r} is noted otherwise"
            assert record.uses >= 0, f"{entry!r} has {record.uses} uses"
            for ticket in held:
                assert ticket.block in self._store.blocks, f"{ticket.block} of {entry!r} is not the pool's"
                assert id(ticket.block) not in seen, f"{ticket.block} is held twice"
                seen.add(id(ticket.block))
        assert sum(map(len, self._places.values())) == len(self._records), f"{self._places} of {len(self._records)}"
        for block in (*(ticket.block for ticket in self._store.idle()), *self._store.waiting()):
            assert id(block) not in seen, f"{block} is idle and held"

    def close(self) -> None:
        """Give up clean copies and idle memory, and refuse further leases, uses and moves.

        Leased buffers stay valid where they are, until released. Idempotent. CaptureError while a capture is open.
        """
        if self._ended:  # nothing is left to free
            self._store.closed = self._store.closed or "the pool is closed: make a new one"
            return
        super().close()

    def _close(self) -> None:
        for record in list(self._records.values()):
            self._drop_copy(record)
        mover = None if self.closed else self._made_mover  # closed in a forked child, it is the parent's
        super()._close()
        if mover is not None:
            mover.close()

    def _disown(self) -> None:
        super()._disown()
        self._store.life = None
        self._records.clear()
        self._gone.clear()
        for keys in (self._homes, *self._places.values()):
            keys.clear()
