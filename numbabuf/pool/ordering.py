"""Who may have a buffer that queued work still uses: marks on streams, and what waits for them.

Memory goes from one stream to another only behind an event, or once the work is done; that rule is here, and nowhere
else. Frees nothing and allocates nothing but events, which are reused. Sits above `shelves`, below `store`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from .. import _cuda
from .block import Block, Ticket, line_of, same_stream
from .shelves import Shelf, pop_fitting, pop_oldest
from .spec import Tier

__all__ = ["REUSE", "StreamOrder"]

REUSE = ("wait", "done", "same")
"""Who may have device memory that was released on a stream; `SimpleBufferPool` says what each means."""


class StreamOrder:
    """Keeps work on one buffer in order, across streams.

    Parameters
    ----------
    reuse : {"wait", "done", "same"}

    Attributes
    ----------
    waits : int
        Times a stream was put behind others; several that used one buffer count once.
    lost_streams : int
        Times a stream took no mark any more, so that the host waited for the device instead.
    spare : list
        Events to be recorded anew.

    Notes
    -----
    Threads: the caller holds the pool's lock, but the `ready` lines of shelves may lose tickets to hits meanwhile.
    Capture: in a thread that captures, no event is recorded, queried or waited for; `take` passes over what would need
    it. Other threads go on: a thread-local capture restricts its own alone.
    """

    def __init__(self, reuse: str = "wait") -> None:
        self.reuse = reuse
        self.waits = self.lost_streams = 0
        self.spare: list[Any] = []

    @property
    def default(self) -> _cuda.Stream:
        """The default stream, which work without a named stream is on: that of the calling thread, if each has one."""
        return _cuda.as_stream(0)

    # --------------------------------------------------------------------------------------------------------- taking

    def take(self, shelf: Shelf, nbytes: int, stream: _cuda.Stream | None) -> Ticket | None:
        """Take a buffer of at least `nbytes` off a shelf, in order for `stream` (None: the default one, or the CPU)."""
        host = shelf.spec.tier is not Tier.DEVICE
        if stream is None or host:
            ticket = pop_fitting(shelf.ready, nbytes)
        else:
            ticket = self._take_own(shelf, nbytes, stream) or self._take_ready(shelf, nbytes, stream)
        if ticket is None and not host and self.reuse == "wait" and not _cuda.capturing():
            return self._take_from_others(shelf, nbytes, stream)
        return ticket

    def _take_own(self, shelf: Shelf, nbytes: int, stream: _cuda.Stream) -> Ticket | None:
        """Take the newest buffer that was released on `stream` itself; only its further users need a wait."""
        line = shelf.ordered.get(line_of(stream))
        aside: list[Ticket] = []
        try:
            while line:
                aside.append(line.pop())
                block: Block = aside[-1].block
                user, _ = block.events[-1]  # who released it
                if block.nbytes < nbytes or not same_stream(user, stream):
                    continue
                if len(block.events) > 1 and (_cuda.capturing() or not self.put_behind(block.events, stream)):
                    continue
                self.forget_marks(block)
                return aside.pop()
        finally:
            if aside:  # the line, empty meanwhile, may have been dropped by a finaliser that called the pool
                shelf.ordered.setdefault(line_of(stream), deque()).extend(reversed(aside))
        return None

    def _take_ready(self, shelf: Shelf, nbytes: int, stream: _cuda.Stream) -> Ticket | None:
        """Take a buffer without queued work, or, where that is allowed, one that the default stream may still use."""
        passable = self.reuse != "same" and not _cuda.capturing()
        aside: list[Ticket] = []
        try:
            while (ticket := pop_fitting(shelf.ready, nbytes)) is not None:
                aside.append(ticket)
                if ticket.block.clean:
                    return aside.pop()
                if passable:
                    if self.put_behind([(self.default, None)], stream):
                        return aside.pop()
                    passable = False  # the default stream is busy, for every buffer alike
        finally:
            shelf.ready.extend(reversed(aside))
        return None

    def _take_from_others(self, shelf: Shelf, nbytes: int, stream: _cuda.Stream | None) -> Ticket | None:
        """Take the oldest buffer of another stream's, the most likely to be done, and make `stream` wait for it."""
        for handle, line in list(shelf.ordered.items()):
            ticket = pop_oldest(line)
            if ticket is None:
                shelf.ordered.pop(handle, None)  # streams come and go
                continue
            if ticket.block.nbytes < nbytes:
                line.appendleft(ticket)
                continue
            try:
                self.put_behind(ticket.block.events, stream or self.default)
            except BaseException:
                shelf.ordered.setdefault(handle, deque()).appendleft(ticket)  # as in `_take_own`
                raise
            self.forget_marks(ticket.block)
            return ticket
        return None

    def put_behind(self, marks: Sequence[tuple[Any, Any]], stream: _cuda.Stream) -> bool:
        """Put later work on `stream` behind `marks`; False where the policy would have to wait for them.

        Parameters
        ----------
        marks : sequence of (stream, event)
            Event None: all that is queued on that stream by now.
        """
        _cuda.require()
        waited = False
        for user, event in marks:
            if same_stream(user, stream):
                continue
            if self.reuse != "wait":
                if not (user if event is None else event).query():
                    return False
                continue
            if event is None and user.elsewhere:  # no other thread can mark it
                _cuda.synchronize()
            elif event is None:  # the default stream, which needs no mark before somebody else comes
                event = self._mark(user)
                try:
                    event.wait(stream)
                finally:
                    self.spare.append(event)
            else:
                event.wait(stream)
            waited = True
        self.waits += waited
        return True

    # ------------------------------------------------------------------------------------------------ marks of a block

    def mark_users(self, block: Block) -> bool:
        """Record an event on each stream that uses a released block; whether anybody has to wait for one.

        The default stream alone gets none: that work is marked when somebody else comes. A stream that takes no mark,
        as one that was destroyed, poisons nothing: the host waits for all work on the device instead.
        """
        events = block.events  # none, but where a release was interrupted after its marks
        users = block.users
        if users and (block.tier is not Tier.DEVICE or any(user.handle != 0 for user in users)):
            _cuda.require()  # this thread may never have called the driver before
            try:
                for user in users:
                    events = [*events, (user, self._mark(user))]
            except Exception:
                self.spare.extend(event for _, event in events)
                _cuda.synchronize()
                self.lost_streams += 1
                events = []
                block.clean_at = block.generation
        block.users, block.events = (), events
        return bool(events)

    def captured(self, streams: Sequence[Any]) -> bool:
        """Whether one of `streams` is being captured, so that a mark would become part of the graph."""
        return any(not stream.closed and _cuda.is_capturing(stream) for stream in streams)

    def _mark(self, stream: _cuda.Stream) -> _cuda.Event:
        """Return an event recorded on `stream`."""
        if stream.closed:
            raise RuntimeError(f"the stream {stream.handle:#x} was closed")
        event = self.spare.pop() if self.spare else _cuda.Event()
        try:
            event.record(stream)
        except BaseException:
            self.spare.append(event)
            raise
        return event

    def done(self, block: Block) -> bool:
        """Whether all work on a marked block is done. Not during a capture, which forbids the query."""
        return all(event.query() for _, event in block.events)

    def wait(self, block: Block) -> None:
        """Block the host until all work on a marked block is done."""
        for _, event in block.events:
            event.synchronize()

    def forget_marks(self, block: Block) -> None:
        """Keep the events of a block for the next ones; a wait that was queued does not need them any more."""
        self.spare.extend(event for _, event in block.events)
        block.events = []
