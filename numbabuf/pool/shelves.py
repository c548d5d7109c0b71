"""The idle buffers of a pool, by spec and by size class, and by whether queued work may still use them.

A place for tickets and nothing more: what may be handed to whom is `ordering`'s to say. Sits above `memory`, below
`ordering`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from .block import Ticket, size_class
from .spec import BufferSpec, Tier

__all__ = ["Shelf", "Shelves", "pop_fitting", "pop_oldest", "same_class"]


class Shelf:
    """The idle buffers of one spec.

    Attributes
    ----------
    spec : BufferSpec
    blocks : int
        Blocks that have this spec, idle or not.
    ready : deque of Ticket
        Those with no work queued on them but the default stream's, newest right. A hit pops here and a plain release
        appends, both without a lock: each is one step for all threads.
    ordered : dict to deque of Ticket
        Those that other streams may still use, by the stream that released them (`memory.line_of`), newest right.
    """

    __slots__ = ("blocks", "ordered", "ready", "spec")

    def __init__(self, spec: BufferSpec) -> None:
        self.spec = spec
        self.blocks = 0
        self.ready: deque[Ticket] = deque()
        self.ordered: dict[Any, deque[Ticket]] = {}

    def pop_idle(self) -> tuple[Ticket, deque[Ticket]] | None:
        """Take the buffer that has been idle longest, ready ones first; return it with the line that it was in."""
        for line in (self.ready, *self.ordered.values()):
            ticket = pop_oldest(line)
            if ticket is not None:
                return ticket, line
        return None


class Shelves:
    """All shelves of a pool.

    Attributes
    ----------
    by_spec : dict of BufferSpec to Shelf
        All of them.
    hot : dict of BufferSpec to deque of Ticket
        The `ready` lines, for hits that take no lock. Always this one dictionary, empty while `serve` is off: whoever
        looks here must then come by the locked way.

    Notes
    -----
    Threads: the caller holds the pool's lock, but for the ends of `ready` lines and for look-ups in `hot`.
    """

    def __init__(self) -> None:
        self.hot: dict[BufferSpec, deque[Ticket]] = {}
        self.by_spec: dict[BufferSpec, Shelf] = {}
        self._classes: dict[tuple[Tier, int], dict[BufferSpec, Shelf]] = {}
        self._serving = True

    def __iter__(self) -> Iterator[Shelf]:
        """All shelves there are now; later ones do not disturb."""
        return iter(list(self.by_spec.values()))

    def __len__(self) -> int:
        return len(self.by_spec)

    def of(self, spec: BufferSpec) -> Shelf:
        """Return the shelf of `spec`, made at need."""
        shelf = self.by_spec.get(spec)
        if shelf is None:
            shelf = self.by_spec[spec] = Shelf(spec)
            self._classes.setdefault(_class_key(spec), {})[spec] = shelf
            if self._serving:
                self.hot[spec] = shelf.ready
        return shelf

    def enter(self, spec: BufferSpec) -> Shelf:
        """Return the shelf of `spec`, of which there is a block more."""
        shelf = self.of(spec)
        shelf.blocks += 1
        return shelf

    def leave(self, spec: BufferSpec) -> None:
        """Count a block less of `spec`, and drop its shelf behind the last: sizes come and go by the thousand."""
        shelf = self.by_spec.get(spec)
        if shelf is None:
            return
        shelf.blocks -= 1
        if shelf.blocks <= 0:
            key = _class_key(spec)
            self.by_spec.pop(spec, None)
            kin = self._classes.get(key, {})
            kin.pop(spec, None)
            if not kin:
                self._classes.pop(key, None)
            self.hot.pop(spec, None)

    def kin(self, spec: BufferSpec) -> list[Shelf]:
        """Return the shelves of other specs of the same tier and size class."""
        own = self.by_spec.get(spec)
        return [shelf for shelf in list(self._classes.get(_class_key(spec), {}).values()) if shelf is not own]

    def serve(self, hot: bool) -> None:
        """Let hits be served from `hot`, or send them all by the locked way."""
        self._serving = hot
        if hot:
            self.hot.update({shelf.spec: shelf.ready for shelf in self})
        else:
            self.hot.clear()

    def idle(self) -> list[Ticket]:
        """Return all idle buffers, as of one moment: the lines are copied in one step, in which no hit can move."""
        shelves = list(self)
        lines: list[Any] = [shelf.ready for shelf in shelves]
        lines += [line for shelf in shelves for line in shelf.ordered.values()]
        return [ticket for line in list(map(list, lines)) for ticket in line]


def _class_key(spec: BufferSpec) -> tuple[Tier, int]:
    return spec.tier, size_class(max(1, spec.size_bytes))


def same_class(one: BufferSpec, other: BufferSpec) -> bool:
    """Return whether one block may serve both specs."""
    return _class_key(one) == _class_key(other)


def pop_fitting(line: deque[Ticket], nbytes: int) -> Ticket | None:
    """Pop the newest ticket if its block holds `nbytes`; capacity is compared with the request, whatever the class."""
    try:
        ticket = line.pop()
    except IndexError:
        return None
    if ticket.block.nbytes >= nbytes:
        return ticket
    line.append(ticket)
    return None


def pop_oldest(line: deque[Ticket]) -> Ticket | None:
    """Pop the ticket that was put there first, if any."""
    try:
        return line.popleft()
    except IndexError:
        return None
