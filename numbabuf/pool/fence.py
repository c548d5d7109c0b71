"""Fences: events on the streams that used something, behind which it may be used anew, freed or moved.

Memory goes from one stream to another only behind a fence, or once the work is done. Frees nothing and allocates
nothing but events, which are recorded again and again. Sits above `block`, below `freelists`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .. import _cuda
from .block import Block, same_stream
from .spec import Tier

__all__ = ["Fence", "Fences"]


class Fence:
    """One event on each stream that used something. Made by `Fences.behind`.

    A wait that was queued has taken note of its event already, so the events are recorded anew as soon as nothing
    refers to the fence.

    Attributes
    ----------
    events : sequence of (stream, event)
    """

    __slots__ = ("_spare", "events")

    def __init__(self, events: Sequence[tuple[Any, Any]], spare: list[Any]) -> None:
        self.events = events
        self._spare = spare

    @property
    def last(self) -> Any:
        """The stream that was named last: that of the release."""
        return self.events[-1][0]

    def done(self) -> bool:
        """Return whether all work before the fence is done. A capture forbids the question."""
        for _, event in self.events:  # hot, guarded by benchmarks/pool.py
            if not event.query():
                return False
        return True

    def wait(self, stream: Any) -> bool:
        """Put later work on `stream` behind the fence; return whether another stream's work is before it."""
        waits = False
        for user, event in self.events:
            if not same_stream(user, stream):
                event.wait(stream)
                waits = True
        return waits

    def synchronize(self) -> None:
        """Block the host until all work before the fence is done."""
        for _, event in self.events:
            event.synchronize()

    def __del__(self) -> None:
        for _, event in self.events:
            self._spare.append(event)  # takes no lock: the collector may come here at any time


class Fences:
    """The fences of one pool, and what they cost.

    Attributes
    ----------
    waits : int
        Times a stream was put behind others; several that used one buffer count once.
    lost_streams : int
        Times a stream took no event any more, so that the host waited for the device instead.
    spare : list
        Events to be recorded anew.

    Notes
    -----
    Threads: the caller holds the pool's lock.
    """

    def __init__(self) -> None:
        self.waits = self.lost_streams = 0
        self.spare: list[Any] = []

    @property
    def default(self) -> Any:
        """The default stream, which work without a named stream is on: that of the calling thread, if each has one."""
        return _cuda.as_stream(0)

    def behind(self, streams: Iterable[Any]) -> Fence | None:
        """Return a fence behind all that is queued on `streams`; None where the host has waited for it.

        A stream that takes no event, as one that was destroyed, poisons nothing: the host waits for all work on the
        device instead. The caller has made the device current.
        """
        events: list[tuple[Any, Any]] = []
        try:
            for stream in streams:
                events.append((stream, self._record(stream)))
        except Exception:
            self.spare.extend(event for _, event in events)
            _cuda.synchronize()
            self.lost_streams += 1
            return None
        return Fence(events, self.spare)

    def wait(self, fence: Fence, stream: Any) -> None:
        """Put later work on `stream` behind a fence."""
        self.waits += fence.wait(stream)

    def wait_for(self, users: Iterable[Any], stream: Any) -> None:
        """Put later work on `stream` behind all that is queued on `users` by now."""
        _cuda.require()
        waited = False
        for user in users:
            if same_stream(user, stream):
                continue
            if user.elsewhere:  # no other thread can put an event there
                _cuda.synchronize()
            else:
                event = self._record(user)
                try:
                    event.wait(stream)
                finally:
                    self.spare.append(event)
            waited = True
        self.waits += waited

    def clean(self, blocks: Iterable[Block]) -> None:
        """Wait for the default stream where it may still use one of `blocks`: any stream may have them then."""
        unsure = [block for block in blocks if block.tier is Tier.DEVICE and not block.clean]
        if unsure:
            self.default.synchronize()
        for block in unsure:
            block.clean_at = block.generation

    def _record(self, stream: Any) -> Any:
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
