"""The right to do something alone, which one thread at a time has: to capture, or to give the slots memory.

Whatever a signal handler or an interrupt does in between, and however a block is left, nothing stays taken. Knows no
slots. Sits above `_cuda`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from threading import get_ident
from typing import Any

from .. import _cuda
from ..errors import BusyError, CaptureError

__all__ = ["CaptureRight", "Right"]


class _Holder:
    __slots__ = ("lock", "thread")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.thread = get_ident()


class _Mine(threading.local):
    def __init__(self) -> None:
        self.holders: list[_Holder] = []

    def any(self) -> bool:
        """Return whether this thread holds a right."""
        self.holders = [holder for holder in self.holders if holder.lock.locked()]
        return bool(self.holders)


_mine = _Mine()


class Right:
    """What one thread at a time holds.

    Parameters
    ----------
    taken : str
        What is said to a thread that is refused.

    Notes
    -----
    Threads: a thread that holds any right waits for no other, so that two threads never wait for each other:
        1: gives its manager memory, and its pool calls `on_oom`, which captures with the manager of 2
        2: captures with its manager, whose pool calls `on_oom`, which steps the manager of 1.
    """

    def __init__(self, taken: str) -> None:
        self._taken = taken
        self._guard = threading.RLock()
        self._holder: _Holder | None = None

    @property
    def thread(self) -> int | None:
        """The identifier of the thread that holds the right, None where none does."""
        holder = self._holder
        return holder.thread if holder is not None and holder.lock.locked() else None

    @contextlib.contextmanager
    def held(self, *, wait: bool = True) -> Iterator[None]:
        """Hold the right; without `wait`, or in a thread that holds another, BusyError where it is taken."""
        # The right is taken while its holder's lock is, and a `with` on a lock has no gap: had it to be taken in one
        # statement and noted in another, an interrupt between the two would leave it taken for good.
        me = _Holder()
        with me.lock:
            while (other := self._first(me)) is not me:
                if not wait or _mine.any():
                    raise BusyError(self._taken)
                with other.lock:
                    pass
            _mine.holders.append(me)
            yield

    def _first(self, me: _Holder) -> _Holder:
        """Return the thread that holds the right: `me`, if none did."""
        with self._guard:  # a signal handler of this thread may come in between, and is done before this goes on
            holder = self._holder
            if holder is None or not holder.lock.locked():
                self._holder = holder = me
            return holder


class CaptureRight:
    """The right to capture, one thread at a time, and the stream that captures are made on.

    While it is held, the slots' memory stays where it is, and no graph is closed. It is taken before the lock.
    """

    def __init__(self) -> None:
        self._right = Right("another thread captures")
        self._stream: Any = None

    @property
    def thread(self) -> int | None:
        """The identifier of the thread that captures, None where none does."""
        return self._right.thread

    @contextlib.contextmanager
    def held(self, *, wait: bool = True) -> Iterator[None]:
        """Hold the right; without `wait`, BusyError while another thread does."""
        if wait and _cuda.capturing():
            raise CaptureError("this thread already has a capture open: end it before beginning another")
        if wait and self.thread == get_ident():
            raise CaptureError("this thread is capturing with this manager: a captured function cannot capture others")
        with self._right.held(wait=wait):
            yield

    def refuse(self, what: str) -> None:
        """Refuse what ends graphs or memory during a capture: this thread's own, or another's that holds the right."""
        if _cuda.capturing():
            raise CaptureError(f"{what} inside a captured function, which no graph can hold: do it before or after")
        if self.thread is not None:
            raise BusyError(f"{what} while one is being captured")

    def stream(self) -> _cuda.Stream:
        """Return the stream to capture on, made on the device that is current."""
        if self._stream is None or self._stream.closed:
            # Or a capture was given up in another thread than it was begun in, and its stream with it.
            self._stream = _cuda.as_stream(None)
        return self._stream

    def forget(self) -> None:
        """Let the stream go."""
        self._stream = None
