"""What the programs of one manager share: the slots, their memory, and the lock round every step.

Memory is made before the lock is taken, never under it. Knows no function and no policy. Sits above `arena` and
`graphs`, below `fill` and `program`.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .. import _cuda
from ..errors import BackendError, BusyError, CaptureError, ClosedError
from ..pool.pool import BufferPool
from ..pool.turns import Turns
from .arena import Arena
from .graph import CapturedStep
from .graphs import Graphs
from .layout import SlotSet
from .lease import Lease
from .output import OutputSlot
from .right import CaptureRight, Right
from .slot import InputSlot

__all__ = ["Shared"]

GONE = (
    "the CUDA context of this manager was closed or reset (cuda.close()), and its memory and graphs went with it: make "
    "a new manager"
)


class _Building(threading.local):
    def __init__(self) -> None:
        self.of: list[Shared] = []


_building = _Building()
"""Whose memory this thread is allocating, with no lock held."""


class Shared:
    """The slots of a manager, their memory, and the lock that says which thread may use it.

    Parameters
    ----------
    pool : BufferPool
        Where the memory comes from.
    stream : _cuda.Stream
        Where steps are queued.
    slots : SlotSet
    depths : tuple of int
        Blocks of the staging ring and of the return ring.

    Attributes
    ----------
    lock : threading.RLock
        Round every step. Its own thread is refused, see `refuse_inside`.
    inside : callable returning bool
        Whether this thread holds it.
    arena : Arena or None
        The slots' memory, from the first step on.
    lease : Lease or None
        The one that was given out last.
    capturing : CaptureRight
        Taken before `lock`.
    closed : str
        Why no step runs any more; empty while they do.
    life : Lifetime
        Of the context that the stream, and later the memory, is in.
    fills : Graphs
        Of the fill alone.
    tables : list of Graphs
        All programs' graphs, and `fills`.
    past : Counter
        What earlier arenas counted: "waits" for a staging block, "late_reads" of outputs.
    """

    def __init__(self, pool: BufferPool, stream: _cuda.Stream, slots: SlotSet, depths: tuple[int, int]) -> None:
        self.pool, self.stream, self.slots, self.depths = pool, stream, slots, depths
        with _cuda.on_device(stream.device):
            self.life = _cuda.lifetime()
        turns = Turns()
        self.lock, self.inside = turns.lock, turns.mine
        self.capturing = CaptureRight()
        self._allocating = Right("another thread gives the slots memory")
        self.arena: Arena | None = None
        self._kept: Arena | None = None  # an arena whose contents the next one takes over
        self.lease: Lease | None = None
        self.fills = Graphs(stream)
        self.tables = [self.fills]
        self.past: Counter[str] = Counter()
        self.closed = ""
        _alive.add(self)

    # ----------------------------------------------------------------------------------------------- the entrance

    @contextlib.contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Hold the lock for a call that its own thread may not enter from within another; see `refuse_inside`."""
        self.refuse_inside(what)
        with self.lock:
            yield

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[Arena]:
        """As `alone`, with memory; gives it."""
        self.refuse_inside(what)
        while True:
            self.ready()
            with self.lock:
                if self.arena is not None:  # another thread may have given it back since
                    yield self.arena
                    return

    def refuse_inside(self, what: str) -> None:
        """Refuse a call from within another on this manager in the same thread, which the lock alone lets in.

        As by an input's ``__array__``, a signal handler or a finaliser in the middle of a step:
            step: takes block 0 of the ring and begins to write it
            within: another step takes block 0, too, writes and queues it
            step: writes over what that one has queued, and queues it a second time.
        """
        if self.inside() or self in _building.of:
            if _cuda.capturing():
                raise CaptureError(
                    f"{what} was called inside a captured function, which no graph can hold: call it before or after"
                )
            raise BusyError(
                f"{what} was called from within another call on {self!r} in the same thread, as by an input's "
                "__array__, a signal handler, a finaliser or on_oom; nothing has changed: call it when that has "
                "returned"
            )

    def refuse_capture(self) -> None:
        """Refuse a step in a thread that captures."""
        if _cuda.captures and _cuda.capturing():
            raise CaptureError(
                "host inputs cannot be staged inside a capture: the graph's own fill reads them at replay"
            )

    def begin_step(self, arena: Arena, num_tokens: Any, sizes: Mapping[str, Any]) -> tuple[int, ...]:
        """Check what every step checks first, and return its sizes in the order of the axes."""
        if self.lease is not None:
            self.check_no_lease()
        self.refuse_capture()
        return arena.layout.live(num_tokens, sizes)

    def check_open(self) -> None:
        """Refuse what a closed manager, one without its context or one without its pool cannot do."""
        if self.life.ended and not self.closed:
            self.bury()
        if self.closed:
            raise ClosedError(self.closed)
        if self.pool.closed:
            raise ClosedError("the manager's pool was closed under it: close the manager first, then its pool")

    def check_context(self) -> None:
        """Refuse what a closed manager allows and one whose context is gone cannot do."""
        if self.life.ended:
            self.check_open()

    def check_no_lease(self) -> None:
        """Refuse what an open lease forbids."""
        if self.lease is not None and self.lease.open:
            raise BusyError("a stage() lease is open: leave its with block first")

    def check_movable(self, what: str) -> None:
        """Refuse to move the slots' memory from under what counts on where it lies."""
        graphs = sum(len(table) for table in self.tables if table is not self.fills)
        if graphs:
            raise BusyError(
                f"{what} while {graphs} graph(s) read the slots where they lie: register every slot before capturing, "
                "or call close_graphs() first"
            )
        if self.capturing.thread is not None:
            raise BusyError(f"{what} while a graph is being captured")
        self.check_no_lease()

    # -------------------------------------------------------------------------------------------------------- memory

    def ready(self) -> None:
        """Make the memory, and this thread's context, ready; with no lock held."""
        with self.lock:
            self.check_open()
        _cuda.require()
        if self.arena is None:
            self._build()

    def prepare(self, what: str) -> None:
        """As `ready`, in a step that found nothing to run over; refused from within another call."""
        self.refuse_inside(what)
        self.ready()

    def _build(self) -> None:
        """Give the slots memory, and what an earlier arena held."""
        # The lock is free meanwhile. Were it held while the pool calls `on_oom`, two threads could wait for each other:
        #     1: the first step of manager A; its pool calls on_oom, which steps manager B and waits for its lock
        #     2: the first step of B, which holds it; its pool calls on_oom, which steps A and waits for the lock of 1.
        # What came in between is looked at again before the memory is put in its place.
        if _cuda.capturing():
            raise CaptureError("the slots have no memory yet and a capture is open: run one step before capturing")
        device = self.stream.device
        _cuda.one_device(device, self)
        if self.pool.device not in (None, device):
            raise BackendError(
                f"{self!r} is on device {device} and its pool's memory on device {self.pool.device}: give each "
                "device a pool of its own"
            )
        with self._one_allocation():
            with self.lock:
                self.check_open()
                if self.arena is not None:
                    return
                layout, kept = self.slots.layout, self._kept
            try:
                _building.of.append(self)
                depth, returns = self.depths
                arena = Arena(
                    self.pool,
                    layout,
                    depth,
                    self.stream,
                    kept,
                    returns=returns,
                    life=self.life,
                    why_closed=_why_closed(self),
                )
            finally:
                if self in _building.of:
                    _building.of.remove(self)
            with self.lock:
                same = self.slots.layout is layout and self._kept is kept
                if self.arena is None and not self.closed and same:
                    self.arena, self._kept = arena, None
                    if kept is not None:
                        kept.release()
                    return
            arena.release()

    @contextlib.contextmanager
    def _one_allocation(self) -> Iterator[None]:
        """Wait for another thread that allocates, so that memory is not asked for twice; see `Right` for when not."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(BusyError):  # then both allocate, and the later gives its memory back
                stack.enter_context(self._allocating.held())
            yield

    def array(self, slot: InputSlot | OutputSlot) -> Any:
        """Return the whole device array of a slot or an output."""
        while (arena := self.arena) is None or self.life.ended or self.pool.closed or not _cuda.this_thread.ready:
            self.prepare("the memory of a slot")
        return arena.whole[slot.name]

    def recording(
        self, arena: Arena, sizes: tuple[int, ...], *, dry: bool = False
    ) -> contextlib.AbstractContextManager[CapturedStep]:
        """Return a capture of the fill, and of what its ``with`` block queues, for a bucket; the right is held."""
        _cuda.one_device(self.stream.device, self)  # first: the stream below is made on the device that is current
        return arena.recording(sizes, self.capturing.stream(), dry=dry)

    def plain(self, arena: Arena, sizes: tuple[int, ...]) -> CapturedStep:
        """Return a step without a graph, for sizes that have none."""
        _cuda.one_device(self.stream.device, self)
        return arena.plain(sizes)

    def synchronize(self) -> None:
        """Wait for every step queued so far."""
        self.check_context()
        with _cuda.on_device(self.stream.device):  # this thread may never have called the driver, or lost its context
            self.stream.synchronize()

    def open_stream(self) -> _cuda.Stream:
        """Return the stream of the steps; ClosedError where none runs any more."""
        with self.lock:  # and no other: two managers may wait for each other in two threads
            self.check_open()
        return self.stream

    def check(self) -> None:
        """Assert the invariants of the memory and of all graphs; waits for all steps."""
        with self.alone("check"):
            self.check_context()
            for table in self.tables:
                table.check()
                assert all(graph.arena is self.arena for graph in table)
            if self.arena is not None:
                self.synchronize()
                self.arena.check()

    def dismantle(self, *, keep: bool = False) -> None:
        """Give the memory back to the pool; `keep` holds it until the next arena has its contents."""
        if self.arena is None:
            return
        self.synchronize()
        self.fills.close()
        arena, self.arena = self.arena, None  # before the rest, which may fail half-way
        if keep:
            self._kept = arena
        self.past["waits"] += arena.ring.waits
        if arena.returns is not None:
            arena.returns.retire()
            self.past["late_reads"] += arena.returns.late_reads
        if not keep:
            arena.release()

    def close_graphs(self) -> None:
        """Wait for all steps, then destroy every program's graphs."""
        tables = [table for table in self.tables if table is not self.fills]
        with _cuda.on_device(self.stream.device):
            if any(table or table.leaving for table in tables):
                self.synchronize()
            for table in tables:
                table.close()

    def release(self) -> None:
        """Close all graphs and give all memory back."""
        with _cuda.on_device(self.stream.device):
            self.close_graphs()
            self.dismantle()
            if self._kept is not None:
                self._kept.release()
                self._kept = None

    # ------------------------------------------------------------------------------------------------------- the end

    def close(self) -> None:
        """Release everything, and be closed. A lease that is open ends."""
        if self.life.ended:
            self.bury()
            return
        self.capturing.refuse("the manager cannot be closed")
        if self.lease is not None and self.lease.open:
            self.lease.expire()
            self.lease = None
        try:
            self.release()
        except Exception as error:
            if _cuda.is_capture_error(error):  # of another's capture in this thread; nothing has changed
                raise CaptureError(
                    f"the manager cannot be closed while this thread captures a stream ({error}): it is still "
                    "open, close it after the capture"
                ) from error
            self.closed, self.arena = _CLOSED, None  # the context is gone: no other attempt would end better
            raise
        self.closed = _CLOSED
        self.capturing.forget()

    def bury(self) -> None:
        """Be closed, as the context is gone, and with it all memory, graphs and streams: nothing of it is touched."""
        self.closed = GONE
        if self.lease is not None and self.lease.open:
            self.lease.expire()
        for table in self.tables:
            table.abandon()
        for arena in (self.arena, self._kept):
            with contextlib.suppress(Exception):  # the pool's context is gone too: it only counts them as given back
                if arena is not None:
                    arena.release()
        self.lease = self.arena = self._kept = None
        self.capturing.forget()

    def disown(self) -> None:
        """In a forked child: be closed, and leave the memory to the parent, as the driver serves no forked process."""
        turns = Turns()  # another thread may have held the lock
        self.lock, self.inside = turns.lock, turns.mine
        self.capturing, self._allocating = CaptureRight(), Right("another thread gives the slots memory")
        self.closed, arena, self.arena = _CLOSED, self.arena, None
        if arena is not None and arena.returns is not None:
            arena.returns.abandon()

    def __repr__(self) -> str:
        return f"the manager of {len(self.slots.by_name)} slots"


def _why_closed(shared: Shared) -> Callable[[], str]:
    """Return what says why nothing of a manager is read any more; it does not keep the manager alive."""
    me, life = weakref.ref(shared), shared.life

    def why() -> str:
        if life.ended:
            return GONE
        there = me()
        return "" if there is None else there.closed

    return why


_CLOSED = "the manager is closed: make a new one"

_alive: weakref.WeakSet[Shared] = weakref.WeakSet()


def _disown_all() -> None:
    for shared in list(_alive):
        shared.disown()


_cuda.watch_forks(_disown_all)
