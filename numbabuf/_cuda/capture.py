"""Recording the work queued on one stream into a graph: `Capture`, the same for both backends.

Sits above the backends; they say how a stream is recorded, this says whose capture it is and when it ends.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from ..errors import CaptureError
from .chosen import backend
from .open_captures import OpenCapture, captures, open_capture
from .thread import watch_forks

if TYPE_CHECKING:
    from .backend import Graph, Stream

__all__ = ["Capture"]


class Capture:
    """Records the work queued on one stream into a graph, and what its operands are.

    `begin`, then launches on the stream, then `end` (a `Graph`) or `abort`; one that is dropped while it is open is
    given up. While it is open Numba's pending frees are put off (cuMemFree is forbidden in a capture), and launches by
    this thread on a stream that is not part of the capture are refused: they would run at once and be missing from
    every replay.

    Parameters
    ----------
    stream : Stream
    dry : bool
        A throw-away capture: code compiles and loads in it, and what it records is dropped by `abort`.

    Notes
    -----
    Threads: begin and end it in one thread; it restricts that one alone.
    """

    def __init__(self, stream: Stream, *, dry: bool = False) -> None:
        self.stream = stream
        self.dry = dry
        self._open: OpenCapture | None = None

    def begin(self) -> None:
        """Record from now on.

        Raises
        ------
        CaptureError
            This thread, or this capture, or in the simulator the stream, has one open already.
        """
        if open_capture() is not None or self._open is not None:
            raise CaptureError("this thread already has a capture open: end it before beginning another")
        self._open = opened = backend.Recorder(self.stream, self.dry)
        try:
            _enter(opened)
            opened.start()
        except BaseException:
            self.abort()
            raise

    def keep(self, operand: object) -> None:
        """Keep `operand` alive as long as the graph, as one whose bare address a kernel is given."""
        if self._open is not None:
            self._open.keep(operand)

    def end(self) -> Graph:
        """Return the graph of what was recorded; the stream is usable again, whatever happens.

        Raises
        ------
        CaptureError
            The driver refused the capture, or it was begun in another thread.
        """
        opened = self._open
        if opened is None:
            raise CaptureError("no capture is open here: begin() it first")
        if not opened.here:
            self.abort()
            raise CaptureError(
                "a capture was ended in another thread than it was begun in, which the driver refuses: leave its block "
                "in the thread that entered it. Nothing was captured"
            )
        operands = opened.operands
        try:
            recorded = opened.finish()
        finally:
            self._leave(opened)
        return backend.Graph(recorded, operands)

    def abort(self) -> None:
        """Give the capture up, if one is open; the stream is usable again, but for one given up in another thread.

        The driver ends a capture in its own thread alone, and that one may be gone. What ends it here is the end of its
        stream: that is `closed` then, and its owner takes another.
        """
        opened = self._open
        if opened is not None:
            try:
                opened.drop()
            finally:
                self._leave(opened)

    def _leave(self, opened: OpenCapture) -> None:
        opened.operands = []  # the graph's alone from here on: closing it lets them go
        _left.append(opened)
        _strike()
        opened.close()
        self._open = None  # last: an interrupt before this leaves it to the finaliser, and all of this may run twice

    def __del__(self) -> None:
        # Left open by a generator, a thread or an interrupt. Without this the table would keep it for good: no pool of
        # the process would grow in a later thread with the same number, and the stream would record for ever.
        try:
            self.abort()
        except Exception:  # at the interpreter's end what this needs may be gone
            pass


_table = threading.Lock()
_left: deque[OpenCapture] = deque()


def _enter(opened: OpenCapture) -> None:
    with _table:
        backend.hook()
        captures[opened.thread] = opened
    _strike()


def _strike() -> None:
    """Take what was left off the table; the last one out undoes the hooks in Numba.

    A finaliser comes here in the middle of anything, so it never waits for the lock: thread A holds it in `_enter`,
    the collector runs there and drops a capture, and waiting for A would be waiting for itself. What is left goes on a
    queue first; a thread that fails to get the lock leaves it to the holder, which looks again after letting go: B
    queues, A looks, B fails to get the lock, A lets go, A looks again.
    """
    while _left and _table.acquire(blocking=False):
        try:
            while _left:
                opened = _left.popleft()
                # By identity: a capture may be left in another thread, and a later thread may have its number.
                if captures.get(opened.thread) is opened:
                    del captures[opened.thread]
            if not captures:
                backend.unhook()
        finally:
            _table.release()


def _forget_all() -> None:
    """In a forked child: no thread of the parent goes on here, and none of its captures."""
    global _table
    _table = threading.Lock()
    captures.clear()
    backend.unhook()


watch_forks(_forget_all)
