"""A thread that does the same thing again and again until it is told to end.

Knows nothing of what it does. The threads end before the interpreter does. Sits above the door, below `prewarm`.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
import weakref
from collections.abc import Callable

from .. import _cuda
from ..errors import NumbabufError

__all__ = ["Background"]

_log = logging.getLogger("numbabuf")

_running: weakref.WeakSet[Background] = weakref.WeakSet()  # those that have started a thread


@atexit.register
def _stop_all() -> None:
    """End the threads before the interpreter does: it would unwind them inside a driver call, which aborts."""
    for background in list(_running):
        background.stop()


class Background:
    """Calls `work` in a thread of its own.

    Parameters
    ----------
    work : callable returning bool
        Called again and again while it returns True; what it raises is counted, and logged.
    device : int
        The device that is current in the thread.

    Attributes
    ----------
    failures : int
        Calls that raised.
    """

    def __init__(self, work: Callable[[], bool], device: int) -> None:
        self._work, self._device = work, device
        self._guard = threading.RLock()  # a signal handler may stop what is being started
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self.failures = 0

    def start(self, interval_s: float) -> None:
        """Begin, a call every `interval_s` seconds; nothing where the thread runs already."""
        if not 0 < interval_s <= threading.TIMEOUT_MAX:
            raise ValueError(f"interval_s is {interval_s!r}: give a positive number of seconds that a thread can wait")
        with self._guard:
            if self._thread is not None and self._thread.is_alive() and not self._stopping.is_set():
                return
            self._stopping = threading.Event()  # this thread's own: the end of an earlier one cannot end it
            self._thread = threading.Thread(
                target=self._run, args=(float(interval_s), self._stopping), name="numbabuf-prewarm", daemon=True
            )
            self._thread.start()
            _running.add(self)

    def _run(self, interval_s: float, stopping: threading.Event) -> None:
        with contextlib.suppress(NumbabufError):  # the work says so, if there is no device any more
            if self._device:  # a new thread begins on device 0
                _cuda.cuda.select_device(self._device)
            _cuda.require()  # before the collector runs here: Numba destroys what it finds in this thread's context
        going = True
        while going and not stopping.wait(interval_s):
            try:
                going = self._work()
            except Exception as error:  # closed under the thread, or a device that is gone: the next step says so
                self.failures += 1
                _log.warning("prewarming failed: %s", error)

    def stop(self, *, wait: bool = True) -> None:
        """Tell the thread to end and, with `wait`, wait until it has; in the thread itself, without waiting."""
        with self._guard:
            thread = self._thread
            self._stopping.set()
        if wait and thread is not None and thread is not threading.current_thread():
            thread.join()
