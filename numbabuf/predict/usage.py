"""The sizes of steps that are not learned yet.

A step only notes its size here; `learning` takes what was noted. Knows a program by its name alone. Sits above the room
`step`, below `learning`.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..step.program import Program

__all__ = ["Usage"]


class Usage:
    """The newest steps in the order in which they came, and how many there were of each size before them.

    Parameters
    ----------
    program : str
        The steps of other programs are not noted.
    most : int
        Refused steps above this size are counted, and not noted.
    keep : int
        Steps that are kept in order, the newest; at times twice as many.

    Attributes
    ----------
    note : callable
        ``note(num_tokens, program=None)`` notes one step; the observer of a program.
    refused : int
        Steps that were refused for their size.
    refusal_observer : callable or None
        Called with the size of each of them that was noted.

    Notes
    -----
    Threads: any thread may note; one at a time may take.
    """

    def __init__(self, program: str, most: int, keep: int) -> None:
        self._keep, self._most = keep, most
        self._recent: deque[int] = deque()
        self._older: deque[Counter[int]] = deque()
        self._counting = threading.Lock()
        self.note = _noter(program, self._recent, self._older, self._counting, keep)
        self._program = program
        self.refused = 0
        self.refusal_observer: Callable[[int], None] | None = None

    def refuse(self, num_tokens: int, program: Program) -> None:
        """Count a step that is refused for its size; it is demand like any other. Called under the manager's lock."""
        if program.name != self._program:
            return
        self.refused += 1
        if num_tokens <= self._most:  # what no slot can hold, no graph will serve
            self.note(num_tokens)
            if self.refusal_observer is not None:
                self.refusal_observer(num_tokens)

    def take_older(self) -> Counter[int]:
        """Return how many steps of each size there were before the newest, and count no longer on them here."""
        _count_older(self._recent, self._older, self._counting, self._keep)
        with contextlib.suppress(IndexError):
            return self._older.popleft()
        return Counter()

    def take_recent(self) -> Iterator[int]:
        """Take the steps that are here now, one by one; those that come meanwhile may come faster than one learns."""
        recent = self._recent
        for _ in range(len(recent)):
            try:
                size = recent.popleft()
            except IndexError:
                return  # a step counts older ones meanwhile
            yield size


def _noter(
    name: str, recent: deque[int], older: deque[Counter[int]], counting: threading.Lock, keep: int
) -> Callable[..., None]:
    append, most = recent.append, 2 * keep

    # Hot path, guarded by benchmarks/step.py; a closure, as each attribute would cost as much as the append.
    def note(num_tokens: int, program: Program | None = None) -> None:
        if program is None or program.name == name:
            append(num_tokens)
            if len(recent) > most:
                _count_older(recent, older, counting, keep)

    return note


def _count_older(recent: deque[int], older: deque[Counter[int]], counting: threading.Lock, keep: int) -> None:
    """Count all but the newest `keep` steps by size instead of keeping them."""
    # Without waiting: another thread, or a step that this one was interrupted in, is doing it.
    if not counting.acquire(blocking=False):
        return
    try:
        sizes = []
        with contextlib.suppress(IndexError):  # `take_recent` takes them meanwhile
            for _ in range(len(recent) - keep):
                sizes.append(recent.popleft())
        if sizes:  # into one counter, however long nothing is learned; one that was taken meanwhile is not missed
            total: Counter[int] = Counter()
            with contextlib.suppress(IndexError):
                total = older.pop()
            total.update(sizes)
            older.append(total)
    finally:
        counting.release()
