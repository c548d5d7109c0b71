"""The contract of buffer pools, and SimpleBufferPool: memory that is reused in stream order, under limits.

A pool hands out leases over blocks and takes them back; it moves nothing between tiers and predicts nothing. Sits
above `entry` and `memory`, below `hierarchy` and `manager`.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import MappingProxyType
from typing import Any

import numpy as np

from . import _cuda, config, html
from .entry import BufferEntry
from .errors import CaptureError, ClosedError, TierFullError
from .memory import Alarm, Block, Ledger, Ticket, byte_count, same_stream, size_class
from .spec import BufferSpec, Tier
from .stats import EventRing, OomSteps, PoolStats, Scope

__all__ = ["BufferPool", "SimpleBufferPool"]

_log = logging.getLogger("numbabuf")
_open_captures = _cuda.captures


class BufferPool(ABC):
    """What every pool offers. A pool is a context manager; leaving it closes it."""

    closed: bool

    @abstractmethod
    def allocate(self, spec: BufferSpec, *, stream: Any = None) -> BufferEntry:
        """Lease a buffer of `spec`; `stream` is where the work that uses it will be queued."""

    def release(self, entry: BufferEntry, *, stream: Any = None) -> None:
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
    def stats(self) -> Any:
        """Return a frozen snapshot."""

    @abstractmethod
    def check(self) -> None:
        """Assert the pool's invariants; the message of a failure holds the pool's whole state."""

    @abstractmethod
    def close(self) -> None:
        """Free idle memory and refuse further leases; leased buffers stay valid until released. Idempotent."""

    def __enter__(self) -> BufferPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Shelf:
    """The idle buffers of one spec that need no wait, newest right; and those used on other streams, by stream."""

    __slots__ = ("key", "ordered", "ready", "spec")

    def __init__(self, spec: BufferSpec) -> None:
        self.spec = spec
        self.key = _class_key(spec)
        self.ready: deque[Ticket] = deque()
        self.ordered: dict[int, deque[Ticket]] = {}


def _class_key(spec: BufferSpec) -> tuple[Tier, int]:
    return spec.tier, size_class(max(1, spec.size_bytes))


class SimpleBufferPool(BufferPool):
    """A pool that reuses memory of the same spec, then of the same size class, then asks the driver.

    Parameters
    ----------
    max_bytes
        Limit of device and managed memory together, in bytes; None for what the driver gives.
    max_pinned_bytes
        Limit of pinned memory, in bytes.
    reuse : {"wait", "done", "same"}
        Who may have device memory that was released on one stream. "wait": anybody; another stream is made to wait by
        an event, the host never waits. "done": another stream only once the work is done. "same": only the stream it
        was released on. Memory that the CPU reads (pinned, managed) is always "done", because the next to write it is
        the CPU.
    on_oom
        Called with the number of bytes asked for when nothing else has made room, at most once per request; it may
        release buffers, of this pool too. The request is tried once more after it.
    events
        Number of events (leases, releases, driver calls) to remember for `events`; 0 remembers none and costs nothing.

    Raises
    ------
    ValueError
        A limit is negative, or `reuse` is none of the three.

    Notes
    -----
    Threads: every method may be called from any thread. A hit and its release take no lock.
    Streams: the order of work is known from the streams that `allocate`, `release`, `BufferEntry.mark_in_use` and
    `record_stream` were given; None is the default stream for device memory, and the CPU alone for the other tiers.
    A `reuse` wait costs one driver call; a release with a stream one event.
    Capture: while a graph is captured on the device, nothing is freed, queried or allocated; releases are put aside
    until the end of it, and an allocation that no idle buffer can serve raises CaptureError. Memory that a live graph
    reads or writes is not handed out again before the graph is closed, even if it is released.
    Processes: after a fork the child's copy of the pool is closed, and neither frees nor reports anything.

    Examples
    --------
    >>> pool = SimpleBufferPool(max_pinned_bytes=1 << 20)
    >>> spec = BufferSpec((8, 16), "float32", Tier.PINNED)
    >>> entry = pool.allocate(spec)
    >>> entry.array.shape
    (8, 16)
    >>> entry.release()
    >>> again = pool.allocate(spec)
    >>> again.generation, pool.stats().exact_hits
    (2, 1)
    >>> again.release()
    >>> pool.close()
    """

    def __init__(
        self,
        *,
        max_bytes: int | None = None,
        max_pinned_bytes: int | None = None,
        reuse: str = "wait",
        on_oom: Callable[[int], Any] | None = None,
        events: int = 0,
    ) -> None:
        max_bytes = None if max_bytes is None else byte_count("max_bytes", max_bytes)
        max_pinned_bytes = None if max_pinned_bytes is None else byte_count("max_pinned_bytes", max_pinned_bytes)
        if reuse not in ("wait", "done", "same"):
            raise ValueError(f'reuse is {reuse!r}; use one of "wait", "done", "same"')
        if on_oom is not None and not callable(on_oom):
            raise TypeError(f"on_oom is {on_oom!r}: give a function of the number of bytes, or None")
        self.reuse = reuse
        self.closed = False
        self._pid = os.getpid()
        self._on_oom = on_oom
        self._in_on_oom = threading.local()
        self._debug = config.enabled("NUMBABUF_DEBUG")
        self._ring = EventRing(events) if events else None
        self._scopes: list[Scope] = []
        # The lock guards everything below but the ends of `ready` deques, which a hit and a plain release use without
        # it. It can be taken again by its holder: the collector may run a user's finaliser that releases an entry.
        self._lock = threading.RLock()
        self._shelves: dict[BufferSpec, _Shelf] = {}
        self._classes: dict[tuple[Tier, int], dict[BufferSpec, _Shelf]] = {}
        self._hot: dict[BufferSpec, deque[Ticket]] = {}  # the `ready` deques; empty while leases must be observed
        self._pending: dict[int, deque[Ticket]] = {}  # by stream, oldest left: released, and its events not yet done
        self._parked: list[Ticket] = []  # released in a capture, or under a live graph
        self._lost: deque[Alarm] = deque()  # those that went off
        self._spare_events: list[Any] = []
        self._blocks: dict[Block, Alarm] = {}
        self._ledger = Ledger(max_bytes, max_pinned_bytes)
        self._default: Any = None
        self._oom = dict.fromkeys(OomSteps.__dataclass_fields__, 0)
        self._counts = dict.fromkeys(("class_hits", "misses", "waits", "lost", "freed", "lost_streams"), 0)
        self._past_leases = self._past_bytes = 0  # of blocks that were freed
        self._peak_count = 0
        _pools.add(self)

    # ------------------------------------------------------------------------------------------------------- leases

    def allocate(self, spec: BufferSpec, *, stream: Any = None) -> BufferEntry:
        """Lease a buffer of `spec`.

        Parameters
        ----------
        spec
            Shape, type and tier. Zero-byte specs are legal.
        stream
            Where the work that uses the buffer will be queued; its release counts as on this stream, if not told
            otherwise. None: the default stream.

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
            A capture is open and no idle buffer fits.

        Notes
        -----
        Cost: a hit takes a dictionary look-up and a pop, no lock and no driver call.
        """
        # Hot path, guarded by benchmarks/pool.py. The exceptions are the rare way out, and cost nothing otherwise.
        if stream is None:
            try:
                ticket = self._hot[spec].pop()
            except (KeyError, IndexError, TypeError):
                return self._allocate_slowly(spec, None)
            ticket.block.generation += 1
            return BufferEntry(ticket)
        return self._allocate_slowly(spec, stream)

    def release(self, entry: BufferEntry, *, stream: Any = None) -> None:
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
        if not isinstance(entry, BufferEntry):
            raise TypeError(f"release was given {entry!r}: give the BufferEntry that allocate returned")
        if entry._block("released").pool() is not self:
            raise ValueError(f"{entry!r} belongs to another pool: release it there, or call entry.release()")
        entry.release(stream=stream)

    def _allocate_slowly(self, spec: BufferSpec, stream: Any) -> BufferEntry:
        if not isinstance(spec, BufferSpec):
            raise TypeError(f"allocate was given {spec!r}: give a BufferSpec(shape, dtype, tier)")
        wrapped = None if stream is None else _cuda.as_stream(stream)
        with self._lock:
            self._refuse_closed()
            ticket, kind = self._find(spec, wrapped)
            if ticket is not None:
                return self._hand_out(ticket, kind, wrapped)
        if _cuda.capturing():
            raise CaptureError(
                f"{spec} has no idle buffer, and none can be allocated while a graph is captured: call "
                f"reserve([{spec}]) before the capture"
            )
        ticket, kind = self._climb(spec, wrapped)
        with self._lock:
            return self._hand_out(ticket, kind, wrapped)

    def _hand_out(self, ticket: Ticket, kind: str, stream: Any) -> BufferEntry:
        """Begin the lease of a buffer that was found. Holds the lock."""
        block: Block = ticket.block
        block.generation += 1
        if stream is not None:
            block.users = (stream,)
            block.plain = False
        if self._observed:
            block.plain = False
            self._observe(kind, block)
        if kind == "miss":
            self._counts["misses"] += 1
        elif kind == "class_hit":
            self._counts["class_hits"] += 1
        return BufferEntry(ticket)

    def _find(self, spec: BufferSpec, stream: Any) -> tuple[Ticket | None, str]:
        """Return an idle buffer that serves `spec` on `stream`, and how it was found. Holds the lock."""
        for attempt in range(2):
            shelf = self._shelves.get(spec)
            ticket = None if shelf is None else self._take(shelf, spec.size_bytes, stream)
            if ticket is not None:
                return ticket, "exact_hit"
            if attempt == 0 and not self._settle():
                break
        for other in list(self._classes.get(_class_key(spec), {}).values()):
            if other is not shelf:
                ticket = self._take(other, spec.size_bytes, stream)
                if ticket is not None:
                    self._move(ticket, spec)
                    return ticket, "class_hit"
        return None, "miss"

    def _take(self, shelf: _Shelf, nbytes: int, stream: Any) -> Ticket | None:
        """Take a buffer of at least `nbytes` off a shelf and put it in order for `stream`."""
        host = shelf.spec.tier is not Tier.DEVICE
        if stream is not None and not host:
            ticket = self._take_ordered(shelf, stream, nbytes)
            if ticket is not None:
                return ticket
            ticket = self._take_ready(shelf, stream, nbytes)
        else:
            ticket = _pop(shelf.ready, nbytes)
        if ticket is not None:
            return ticket
        if not host and self.reuse == "wait" and not _open_captures:
            return self._take_from_others(shelf, stream, nbytes)
        return None

    def _take_ready(self, shelf: _Shelf, stream: Any, nbytes: int) -> Ticket | None:
        """Take a buffer without queued work, or, where that is allowed, one that the default stream may still use."""
        passable = self.reuse != "same" and not _open_captures
        aside: list[Ticket] = []
        try:
            while (ticket := _pop(shelf.ready, nbytes)) is not None:
                aside.append(ticket)
                if ticket.block.clean:
                    return aside.pop()
                if passable:
                    if self._order([(self._own(), None)], stream):
                        return aside.pop()
                    passable = False  # the default stream is busy, for every buffer alike
        finally:
            shelf.ready.extend(reversed(aside))
        return None

    def _take_ordered(self, shelf: _Shelf, stream: Any, nbytes: int) -> Ticket | None:
        """Take the newest buffer that was released on `stream` itself; only its further users need a wait."""
        line = shelf.ordered.get(stream.handle)
        aside: list[Ticket] = []
        try:
            while line:
                aside.append(line.pop())
                block: Block = aside[-1].block
                user, _ = block.events[-1]  # who released it
                if block.nbytes < nbytes or not same_stream(user, stream):
                    continue
                if len(block.events) > 1 and (_open_captures or not self._order(block.events, stream)):
                    continue
                self._done_with(block)
                return aside.pop()
        finally:
            if line is not None:
                line.extend(reversed(aside))
        return None

    def _take_from_others(self, shelf: _Shelf, stream: Any, nbytes: int) -> Ticket | None:
        """Take the oldest buffer of another stream's, the most likely to be done, and make `stream` wait for it."""
        for handle, line in list(shelf.ordered.items()):
            ticket = _popleft(line)
            if ticket is None:
                shelf.ordered.pop(handle, None)  # streams come and go
                continue
            if ticket.block.nbytes < nbytes:
                line.appendleft(ticket)
                continue
            try:
                self._order(ticket.block.events, stream or self._own())
            except BaseException:
                line.appendleft(ticket)
                raise
            self._done_with(ticket.block)
            return ticket
        return None

    def _order(self, marks: list[tuple[Any, Any]], stream: Any) -> bool:
        """Put later work on `stream` behind `marks`; False where the policy would have to wait for them."""
        _cuda.require()
        for user, event in marks:
            if same_stream(user, stream):
                continue
            if self.reuse != "wait":
                if not (user if event is None else event).query():
                    return False
                continue
            if event is None:  # the default stream, which needs no mark before somebody else comes
                event = self._mark(user)
                try:
                    event.wait(stream)
                finally:
                    self._spare_events.append(event)
            else:
                event.wait(stream)
            self._counts["waits"] += 1
        return True

    def _move(self, ticket: Ticket, spec: BufferSpec) -> None:
        """Make a buffer in hand one of `spec`'s."""
        block: Block = ticket.block
        block.become(spec)
        block.home = self._shelf(spec).ready.append

    def _shelf(self, spec: BufferSpec) -> _Shelf:
        shelf = self._shelves.get(spec)
        if shelf is None:
            shelf = self._shelves[spec] = _Shelf(spec)
            self._classes.setdefault(shelf.key, {})[spec] = shelf
            if not self._observed:
                self._hot[spec] = shelf.ready
        return shelf

    # ----------------------------------------------------------------------------------------------------- releases

    def _take_back(self, ticket: Ticket, block: Block, stream: Any) -> str:
        """End a lease that is not plain; returns where, in debug mode."""
        wrapped = None if stream is None else _cuda.as_stream(stream)
        with self._lock:
            users = block.users
            if wrapped is not None:
                block.add_user(wrapped)
            try:
                self._put_back(ticket, block)
            except BaseException:
                block.users = users
                raise
            if self._observed:
                self._observe("release", block)
        return _caller() if self._debug else ""

    def _put_back(self, ticket: Ticket, block: Block) -> None:
        """Put a released buffer where its users and the captures allow. Holds the lock."""
        if _open_captures or block.pinned_by_graph:
            self._parked.append(ticket)
            return
        host = block.tier is not Tier.DEVICE
        users = block.users
        if not host and all(user.handle == 0 for user in users):
            users = ()  # the default stream alone: marked when somebody else comes
        events = self._mark_all(users) if users else []
        block.users = ()
        block.plain = not self._observed and not self.closed
        if not events:
            if self.closed:
                self._free(ticket)
            else:
                block.home(ticket)
            return
        block.events = events
        handle = events[-1][0].handle
        if host or self.reuse == "done" or self.closed:
            self._pending.setdefault(handle, deque()).append(ticket)
        else:
            self._shelves[block.spec].ordered.setdefault(handle, deque()).append(ticket)

    def _mark_all(self, users: Iterable[Any]) -> list[tuple[Any, Any]]:
        """Record an event on each stream. A stream that takes none, as one that was destroyed, poisons nothing: the
        host waits for all work on the device instead, which covers it, and the buffer needs no mark any more."""
        events: list[tuple[Any, Any]] = []
        _cuda.require()  # this thread may never have called the driver before
        try:
            for user in users:
                events.append((user, self._mark(user)))
        except Exception:
            self._spare_events.extend(event for _, event in events)
            _cuda.synchronize()
            self._counts["lost_streams"] += 1
            return []
        return events

    def _mark(self, stream: Any) -> Any:
        """Return an event recorded on `stream`."""
        if stream.closed:
            raise RuntimeError(f"the stream {stream.handle:#x} was closed")
        event = self._spare_events.pop() if self._spare_events else _cuda.Event()
        try:
            event.record(stream)
        except BaseException:
            self._spare_events.append(event)
            raise
        return event

    def _done_with(self, block: Block) -> None:
        """Keep the events of a block for the next ones; a wait that was queued does not need them any more."""
        self._spare_events.extend(event for _, event in block.events)
        block.events = []

    def _settle(self) -> bool:
        """Bring home what was lost, parked or pending and is free by now; whether anything was. Holds the lock."""
        if _open_captures:
            return False
        if self._pending:
            _cuda.require()
        moved = self._reclaim()
        for ticket in list(self._parked):
            block: Block = ticket.block
            if not block.pinned_by_graph:
                self._put_back(ticket, block)
                self._parked.remove(ticket)
                moved = True
        for handle, line in list(self._pending.items()):
            while line:
                # Taken before it is asked about: a finaliser that runs meanwhile may call the pool, and settle, too.
                ticket = line.popleft()
                done = False
                try:
                    done = all(event.query() for _, event in ticket.block.events)
                finally:
                    if not done:
                        line.appendleft(ticket)
                if not done:
                    break
                moved = True
                ticket.block.clean_at = ticket.block.generation
                self._done_with(ticket.block)
                if self.closed:
                    self._free(ticket)
                else:
                    ticket.block.home(ticket)
            if not line:
                self._pending.pop(handle, None)
        return moved

    def _reclaim(self) -> bool:
        """Take back the blocks that finalisers left, and report each. Holds the lock; no capture is open."""
        found = False
        while self._lost:
            block = self._lost.popleft().block
            found = True
            self._counts["lost"] += 1
            _log.warning(
                "%s was dropped without release%s; it was reclaimed. Release each entry, or use it in a with statement",
                block.spec, f" (allocated at {block.site})" if block.site else "",
            )  # fmt: skip
            if self._observed:
                self._observe("lost", block)
            self._put_back(self._issue(block), block)
        return found

    # ------------------------------------------------------------------------------------------------------- growth

    def _climb(self, spec: BufferSpec, stream: Any) -> tuple[Ticket, str]:
        """Allocate from the driver; where there is no room, make some, step by step. Called without the lock."""
        nbytes = max(1, spec.size_bytes)
        report: list[str] = []
        steps = (
            ("reap", self._step_reap),
            ("trim", self._step_trim),
            ("collect", self._step_collect),
            ("flush", self._step_flush),
            ("callback", self._step_callback),
        )
        try:
            return self._grow(spec), "miss"
        except Exception as error:
            if not _cuda.is_out_of_memory(error):
                raise
            last = error
        for name, step in steps:
            note = step(spec.tier, nbytes)
            if note is None:
                continue
            with self._lock:
                self._oom[name] += 1
                ticket, kind = self._find(spec, stream)
            report.append(f"{name}: {note}")
            if ticket is not None:
                return ticket, kind
            try:
                return self._grow(spec), "miss"
            except Exception as error:
                if not _cuda.is_out_of_memory(error):
                    raise
                last = error
        with self._lock:
            self._oom["failed"] += 1
        raise TierFullError(self._account(spec, report, last)) from last

    def _step_reap(self, tier: Tier, nbytes: int) -> str | None:
        with self._lock:
            return "buffers came home" if self._settle() else "nothing had finished"

    def _step_trim(self, tier: Tier, nbytes: int) -> str | None:
        with self._lock:
            freed = self._trim_tier(tier, nbytes)
        if freed:
            _cuda.flush_pending_frees()
        return f"{freed} bytes freed"

    def _step_collect(self, tier: Tier, nbytes: int) -> str | None:
        gc.collect()
        with self._lock:
            found = self._settle()
            freed = self._trim_tier(tier, nbytes)
        return f"{'lost buffers found, ' if found else ''}{freed} bytes freed"

    def _step_flush(self, tier: Tier, nbytes: int) -> str | None:
        _cuda.flush_pending_frees()
        return "the frees that Numba had put off are carried out"

    def _step_callback(self, tier: Tier, nbytes: int) -> str | None:
        if self._on_oom is None or getattr(self._in_on_oom, "active", False):
            return None  # a request from within on_oom does not call it again
        self._in_on_oom.active = True
        try:
            self._on_oom(nbytes)
        finally:
            self._in_on_oom.active = False
        return "on_oom was called"

    def _grow(self, spec: BufferSpec) -> Ticket:
        """Allocate one block from the driver, reserved before the call and given back if it fails."""
        exact = max(1, spec.size_bytes)
        nbytes = size_class(exact)
        with self._lock:
            self._refuse_closed()
            room = self._ledger.room(spec.tier)
            if room is not None and exact <= room < nbytes:
                nbytes = exact  # rounding is not worth a refusal
            self._ledger.promise(spec.tier, nbytes)
        try:
            block = Block(spec, nbytes)
        except BaseException:
            with self._lock:
                self._ledger.withdraw(spec.tier, nbytes)
            raise
        with self._lock:
            self._ledger.keep(spec.tier, nbytes)
            self._peak_count = max(self._peak_count, len(self._blocks) + 1)
            block.pool = weakref.ref(self)
            block.home = self._shelf(spec).ready.append
            block.plain = not self._observed and not self.closed
            if self._debug:
                block.site = _caller()
            if self._observed:
                self._observe("grow", block)
            return self._issue(block)

    def _issue(self, block: Block) -> Ticket:
        """Make the one ticket of a block, and see to it that its loss is noticed."""
        ticket = Ticket(block)
        self._blocks[block] = Alarm.watch(ticket, self._lost.append)
        return ticket

    def _account(self, spec: BufferSpec, report: list[str], last: BaseException) -> str:
        with self._lock:
            tier = spec.tier
            mine = [block for block in self._blocks if block.tier is tier]
            idle = sum(t.block.nbytes for t in self._idle_tickets() if t.block.tier is tier)
            limit = self._ledger.limit(tier)
        try:
            info = _cuda.memory_info()
        except Exception:  # the account is for reading; an error here must not hide the one it explains
            info = None
        device = f"the device has {info[0]} of {info[1]} bytes free" if info else "the device does not say what is free"
        reserved = sum(block.nbytes for block in mine)
        return (
            f"{spec} asks for {spec.size_bytes} bytes of {tier.value} memory and there is no room. Reserved by this "
            f"pool in this tier: {reserved} bytes in {len(mine)} buffers, of which {idle} idle; limit: "
            f"{'none' if limit is None else f'{limit} bytes'}; {device}. Tried: {'; '.join(report)}. Last error: "
            f"{last}. Release buffers, ask for less, or raise the limit"
        )

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
            A capture is open.
        ClosedError
            The pool is closed.
        """
        wanted = list(specs)
        for spec in wanted:
            if not isinstance(spec, BufferSpec):
                raise TypeError(f"reserve was given {spec!r}: give BufferSpec(shape, dtype, tier)")
        with self._lock:
            self._refuse_closed()
            if _cuda.capturing():
                raise CaptureError("reserve cannot allocate while a graph is captured: call it before the capture")
            self._settle()
            held: list[Ticket] = []
            missing = []
            for spec in wanted:
                shelf = self._shelves.get(spec)
                ticket = _pop(shelf.ready, spec.size_bytes) if shelf is not None else None
                if ticket is None:
                    missing.append(spec)
                else:
                    held.append(ticket)
        made: list[Ticket] = []
        refused: list[BufferSpec] = []
        try:
            unsure = [ticket.block for ticket in held if ticket.block.tier is Tier.DEVICE and not ticket.block.clean]
            if unsure:
                _cuda.require()
                self._own().synchronize()
                for block in unsure:
                    block.clean_at = block.generation
            for spec in missing:
                try:
                    made.append(self._grow_or_trim(spec))
                except Exception as error:
                    if not _cuda.is_out_of_memory(error):
                        raise
                    refused.append(spec)
        except BaseException:
            refused = missing
            raise
        finally:
            with self._lock:
                for ticket in held:
                    ticket.block.home(ticket)
                for ticket in made:
                    if refused or self.closed:
                        self._free(ticket)
                    else:
                        ticket.block.home(ticket)
        if refused:
            _cuda.flush_pending_frees()
            raise TierFullError(
                f"{len(refused)} of {len(wanted)} buffers do not fit, and none was reserved: {_listed(refused)}. "
                f"Free memory, raise the limit or reserve less; {self!r}"
            )

    def _grow_or_trim(self, spec: BufferSpec) -> Ticket:
        """Grow; where there is no room, free idle memory, which is worth less than what is asked for, and try again."""
        try:
            return self._grow(spec)
        except Exception as error:
            if not _cuda.is_out_of_memory(error):
                raise
        self._step_trim(spec.tier, max(1, spec.size_bytes))
        self._step_flush(spec.tier, 0)
        return self._grow(spec)

    def trim(self, max_bytes: int) -> int:
        """Free idle memory, the longest idle of each spec first, until at most `max_bytes` are reserved.

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
            A capture is open on the device: freeing is forbidden.

        Notes
        -----
        Streams: the host waits for the work on what it frees.
        """
        max_bytes = byte_count("max_bytes", max_bytes)
        with self._lock:
            self._refuse_capture("trim")
            self._settle()
            freed = 0
            for tier in Tier:
                excess = self._ledger.total - max_bytes
                if excess > 0:
                    freed += self._free_idle(excess, (tier,))
        if freed:
            _cuda.flush_pending_frees()
        return freed

    def clear(self) -> None:
        """Free all idle memory; leased memory, and what a live graph uses, stays valid.

        Raises
        ------
        CaptureError
            A capture is open on the device: freeing is forbidden.
        """
        self.trim(0)

    def close(self) -> None:
        """Wait for the work on released buffers, free them, and refuse further leases.

        Leased buffers stay valid; their memory goes when they are released. Idempotent.

        Raises
        ------
        CaptureError
            A capture is open on the device: freeing is forbidden.
        """
        with self._lock:
            self._refuse_capture("close")
            self._settle()
            self.closed = True
            self._hot = {}
            for block in self._blocks:
                block.plain = False
            for line in list(self._pending.values()):
                for ticket in list(line):
                    for _, event in ticket.block.events:
                        event.synchronize()
            self._settle()
            freed = self._free_idle(self._ledger.total, tuple(Tier))
        if freed:
            _cuda.flush_pending_frees()

    def _trim_tier(self, tier: Tier, nbytes: int) -> int:
        """Free idle memory of the tiers that share a limit with `tier`: what is missing, all if the driver is full."""
        room = self._ledger.room(tier)
        excess = self._ledger.total if room is None or room >= nbytes else nbytes - room
        tiers = (Tier.PINNED,) if tier is Tier.PINNED else (Tier.DEVICE, Tier.MANAGED)
        return self._free_idle(excess, tiers)

    def _free_idle(self, nbytes: int, tiers: tuple[Tier, ...]) -> int:
        """Free idle blocks until `nbytes` are freed or none is left. Holds the lock; no capture is open."""
        freed = 0
        synchronised = False
        for shelf in list(self._shelves.values()):
            if shelf.spec.tier not in tiers:
                continue
            while freed < nbytes:
                line = shelf.ready
                ticket = _popleft(line)
                if ticket is None:
                    line = next((line for line in shelf.ordered.values() if line), line)
                    ticket = _popleft(line)
                    if ticket is None:
                        break
                block: Block = ticket.block
                try:
                    _cuda.require()
                    if shelf.spec.tier is Tier.DEVICE and not block.events and not synchronised:
                        self._own().synchronize()
                        synchronised = True
                    for _, event in block.events:
                        event.synchronize()
                except BaseException:
                    line.appendleft(ticket)
                    raise
                freed += block.nbytes
                self._free(ticket)
        used = {block.spec for block in self._blocks}
        for spec in [spec for spec in self._shelves if spec not in used]:
            shelf = self._shelves.pop(spec)
            del self._classes[shelf.key][spec]
            if not self._classes[shelf.key]:
                del self._classes[shelf.key]
            self._hot.pop(spec, None)
        return freed

    def _free(self, ticket: Ticket) -> None:
        """Give a block back to the driver. Holds the lock."""
        block: Block = ticket.block
        _cuda.require()  # Numba frees in the thread that drops the last reference
        self._done_with(block)
        del self._blocks[block]
        self._ledger.give_back(block.tier, block.nbytes)
        self._past_leases += block.generation
        self._past_bytes += block.generation * block.nbytes
        self._counts["freed"] += 1
        if self._observed:
            self._observe("free", block)

    # ---------------------------------------------------------------------------------------------------- observation

    def stats(self) -> PoolStats:
        """Return one consistent snapshot: all its figures are of one moment.

        Notes
        -----
        Cost: about 15 us, and up to 1 us per buffer; leases do no counting for it.
        """
        with self._lock:
            try:
                self._settle()
            except Exception:  # a faulted device; whoever asks it for work is told, and these figures hold without it
                pass
            idle = [ticket.block.nbytes for ticket in self._idle_tickets()]
            pending = [ticket.block.nbytes for line in self._pending.values() for ticket in line]
            pending += [ticket.block.nbytes for ticket in self._parked]
            pending += [alarm.block.nbytes for alarm in self._lost]
            blocks = list(self._blocks)
            leases = [block.generation for block in blocks]
            reserved = self._ledger.total
            counts = self._counts
            allocations = self._past_leases + sum(leases)
            return PoolStats(
                reserved_bytes=reserved,
                in_use_bytes=reserved - sum(idle) - sum(pending),
                idle_bytes=sum(idle),
                pending_bytes=sum(pending),
                peak_bytes=self._ledger.peak,
                peak_count=self._peak_count,
                reserved_count=len(blocks),
                in_use_count=len(blocks) - len(idle) - len(pending),
                idle_count=len(idle),
                pending_count=len(pending),
                waste_bytes=sum(block.nbytes - block.spec.size_bytes for block in blocks),
                allocations=allocations,
                allocated_bytes=self._past_bytes + sum(n * b.nbytes for n, b in zip(leases, blocks, strict=True)),
                exact_hits=allocations - counts["class_hits"] - counts["misses"],
                class_hits=counts["class_hits"],
                misses=counts["misses"],
                stream_waits=counts["waits"],
                lost=counts["lost"],
                freed=counts["freed"],
                lost_streams=counts["lost_streams"],
                oom=OomSteps(**self._oom),
                reserved_by_tier=MappingProxyType(dict(self._ledger.reserved)),
            )

    def _idle_tickets(self) -> list[Ticket]:
        """All idle buffers. Holds the lock; the copies are taken in one step, against which no hit can move."""
        lines = [shelf.ready for shelf in self._shelves.values()]
        lines += [line for shelf in self._shelves.values() for line in shelf.ordered.values()]
        return [ticket for line in list(map(list, lines)) for ticket in line]

    @contextlib.contextmanager
    def statistics(self) -> Iterator[Scope]:
        """Count the leases made within a ``with``: current, peak and total, in bytes and buffers. Scopes nest.

        Examples
        --------
        >>> pool = SimpleBufferPool()
        >>> with pool.statistics() as scope:
        ...     pool.allocate(BufferSpec(1024, "uint8", Tier.PINNED)).release()
        >>> scope.stats().peak_bytes, scope.stats().current_bytes
        (1024, 0)

        Notes
        -----
        Cost: while a scope is open, leases and releases take the pool's lock.
        """
        scope = Scope()
        with self._lock:
            self._scopes.append(scope)
            self._set_observed()
        try:
            yield scope
        finally:
            with self._lock:
                self._scopes.remove(scope)
                self._set_observed()

    def events(self) -> np.ndarray:
        """Return the remembered events, oldest first, as a structured array (`stats.EVENT_DTYPE`).

        Raises
        ------
        ValueError
            The pool was made with ``events=0``.
        """
        if self._ring is None:
            raise ValueError("this pool remembers no events: make it with SimpleBufferPool(events=10_000)")
        with self._lock:
            return self._ring.snapshot()

    @property
    def _observed(self) -> bool:
        return bool(self._scopes) or self._ring is not None or self._debug

    def _set_observed(self) -> None:
        """Send every lease through the slow path while somebody counts, and back to the hot one after. Locked."""
        observed = self._observed
        self._hot = {} if observed or self.closed else {spec: shelf.ready for spec, shelf in self._shelves.items()}
        for block in self._blocks:
            if observed:
                block.plain = False
            # else: the block becomes plain at its next release, which looks at its users and its graphs

    def _observe(self, kind: str, block: Block) -> None:
        if kind in ("exact_hit", "class_hit", "miss"):
            for scope in self._scopes:
                scope.add(block.nbytes)
            if self._debug:
                block.site = _caller()
        elif kind in ("release", "lost"):
            for scope in self._scopes:
                scope.remove(block.nbytes)
        if self._ring is not None:
            self._ring.add(kind, block.tier, block.address, block.nbytes, block.generation)

    def check(self) -> None:
        """Assert the pool's invariants.

        Raises
        ------
        AssertionError
            One does not hold; the text names it and dumps the pool.

        Notes
        -----
        Threads: leases by other threads may go on meanwhile.
        """
        with self._lock:
            seen: dict[Block, str] = {}

            def place(ticket: Ticket, where: str) -> None:
                block = ticket.block
                assert block in self._blocks, f"{block}, {where}, is not the pool's"
                assert block not in seen, f"{block} is {seen[block]} and {where}"
                seen[block] = where

            try:
                for spec, shelf in self._shelves.items():
                    for ticket in list(shelf.ready):
                        place(ticket, f"ready for {spec}")
                        assert ticket.block.spec == spec, f"{ticket.block} is on the shelf of {spec}"
                        assert not ticket.block.events, f"{ticket.block} waits on a ready shelf"
                        assert not ticket.block.users, f"{ticket.block} has users on a ready shelf"
                        assert not ticket.block.pinned_by_graph, f"{ticket.block} is idle under a live graph"
                    for line in shelf.ordered.values():
                        for ticket in line:
                            place(ticket, f"ordered for {spec}")
                            assert ticket.block.events, f"{ticket.block} has no mark to wait for"
                for line in self._pending.values():
                    for ticket in line:
                        place(ticket, "pending")
                for ticket in self._parked:
                    place(ticket, "parked")
                by_tier = dict.fromkeys(Tier, 0)
                end = 0
                for block in sorted(self._blocks, key=lambda block: block.address):
                    by_tier[block.tier] += block.nbytes
                    assert block.nbytes >= block.spec.size_bytes, f"{block} is smaller than its spec"
                    assert block.address >= end, f"{block} overlaps the block before it"
                    end = block.address + block.nbytes
                assert by_tier == self._ledger.reserved, f"counted {by_tier}, account {self._ledger.reserved}"
                assert self._ledger.total == sum(by_tier.values()), f"total {self._ledger.total} of {by_tier}"
                for tier in Tier:
                    room = self._ledger.room(tier)
                    assert room is None or room >= 0, f"{tier.value} is {-(room or 0)} bytes over its limit"
            except AssertionError as error:
                dump = "\n".join(f"  {block}: {seen.get(block, 'leased')}" for block in self._blocks)
                raise AssertionError(f"{error}\n{self!r}\n{dump}") from None

    # ---------------------------------------------------------------------------------------------------------- small

    def _own(self) -> Any:
        """The default stream, which work without a named stream is on."""
        if self._default is None:
            self._default = _cuda.as_stream(0)
        return self._default

    def _refuse_closed(self) -> None:
        if self.closed and self._pid != os.getpid():
            raise ClosedError("the pool belongs to another process, from which this one was forked: make a new one")
        if self.closed:
            raise ClosedError("the pool is closed: make a new one, or allocate before close()")

    def _refuse_capture(self, what: str) -> None:
        if _cuda.capturing():
            raise CaptureError(f"{what} frees memory, which a capture forbids: call it before or after the capture")

    def __repr__(self) -> str:
        state = "closed, " if self.closed else ""
        return f"<SimpleBufferPool {state}{len(self._blocks)} buffers, {self._ledger.total} bytes>"

    def _repr_html_(self) -> str:
        reserved = {tier: amount for tier, amount in self._ledger.reserved.items() if self._ledger.limit(tier)}
        bars = [
            html.bar({tier.value: amount}, total=self._ledger.limit(tier), unit="bytes")
            for tier, amount in reserved.items()
            if amount
        ]
        return html.card(repr(self), *bars, self.stats()._repr_html_())

    def __del__(self) -> None:
        # Takes no lock. The shelves refer to themselves through each block's `home`, which would keep the memory until
        # the collector's next run.
        for block in getattr(self, "_blocks", ()):
            block.plain, block.home = False, _discard


def _pop(line: deque[Ticket], nbytes: int) -> Ticket | None:
    """Pop the newest ticket if its block holds `nbytes`; capacity is compared with the request, whatever the class."""
    try:
        ticket = line.pop()
    except IndexError:
        return None
    if ticket.block.nbytes >= nbytes:
        return ticket
    line.append(ticket)
    return None


def _popleft(line: deque[Ticket]) -> Ticket | None:
    try:
        return line.popleft()
    except IndexError:
        return None


def _listed(specs: list[BufferSpec]) -> str:
    names = [str(spec) for spec in specs[:8]]
    return ", ".join(names) + (f" and {len(specs) - 8} more" if len(specs) > 8 else "")


def _caller() -> str:
    """The file and line of the first frame outside numbabuf."""
    here = os.path.dirname(__file__)
    frame = sys._getframe(1)
    while frame.f_back is not None and os.path.dirname(frame.f_code.co_filename) == here:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


# ------------------------------------------------------------------------------------------------------------- fork

_pools: weakref.WeakSet[SimpleBufferPool] = weakref.WeakSet()
_inherited: list[Any] = []  # the parent's memory, as a child sees it: kept to the child's end, so that nothing frees it


def _after_fork_in_child() -> None:
    for pool in list(_pools):
        pool._lock = threading.RLock()  # another thread of the parent may have held it
        pool.closed = True
        pool._hot = {}
        _inherited.append((list(pool._blocks), pool._shelves, pool._pending, pool._parked, pool._spare_events))
        for block in pool._blocks:
            block.plain, block.home, block.pool = False, _discard, _no_pool
        pool._shelves, pool._classes, pool._pending, pool._parked = {}, {}, {}, []
        pool._lost.clear()
        pool._blocks, pool._spare_events, pool._ledger = {}, [], Ledger(None, None)


def _no_pool() -> None:
    """Stand where a block's reference to its pool stood."""


def _discard(ticket: Ticket) -> None:
    """Stand where a block's way home stood: nobody will lease it again."""


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
