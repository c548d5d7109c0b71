"""A pool's lock, which keeps out other threads, and what runs in the middle of its holder as well.

A reentrant lock by itself lets in a finaliser that the collector starts, a signal handler or a callback: code of the
same thread that finds a pool half way through a change. Sits above `block`, below `store`.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from .. import _cuda
from ..errors import BusyError, CaptureError
from .block import refuse_foreign

__all__ = ["Turns", "refuse_foreign_capture"]

_T = TypeVar("_T")
_NOTHING = contextlib.nullcontext()


class Turns:
    """One step at a time, in all threads and within each; the guard of every pool.

    Parameters
    ----------
    owner
        Returns the pool, or None when that is gone; errors name it.

    Attributes
    ----------
    device : int or None
        What the pool's memory is on: the device that was current when the first of it was made.
    lock : threading.RLock
        Held in every step; the code of a step may take it again.
    mine
        Function that returns whether it is this thread's turn: the code that asks runs in the middle of a step.

    Notes
    -----
    Threads: `later` takes no lock, so that a finaliser may call it at any time.
    """

    __slots__ = ("_late", "_owner", "device", "lock", "mine")

    def __init__(self, owner: Callable[[], Any] = lambda: None) -> None:
        self._owner = owner
        self.device: int | None = None
        self.lock = threading.RLock()
        self.mine: Callable[[], bool] = self.lock._is_owned  # type: ignore[attr-defined]  # as Condition asks it
        self._late: deque[Callable[[], Any]] = deque()

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        """One step of the pool, a call from outside: the lock held, and the device of the memory current.

        Raises
        ------
        BusyError
            This thread is in the middle of a step already.
        CaptureError
            The driver refuses the step, as another library captures in this thread.
        """
        self.refuse_mine(self._owner(), what)
        with self.held():
            try:
                self.do_late()
                yield
            except Exception as error:
                refuse_foreign_capture(error, what)
                raise
            finally:
                self.do_late()

    def there(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context manager inside which the device of the memory is current: where the pool acts by itself."""
        if self.device is None or self.device == _cuda.current_device():
            return _NOTHING
        return _cuda.on_device(self.device)

    def held(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context manager inside which the lock is held, and the device of the memory is current."""
        # Hot, guarded by benchmarks/pool.py: where nothing is to be switched, the lock by itself is all that it takes.
        if self.device is None or self.device == _cuda.current_device():
            return self.lock
        return self._held_there()

    @contextlib.contextmanager
    def _held_there(self) -> Iterator[None]:
        with self.there(), self.lock:
            yield

    def refuse_elsewhere(self, stream: _cuda.Stream) -> None:
        """Raise BackendError for a stream of another device than that of the memory. Called inside `there`."""
        if _cuda.device_count() > 1:
            refuse_foreign(stream, _cuda.device_id() if self.device is None else self.device)

    def flush(self) -> None:
        """Carry out the frees that Numba has put off on the device of the memory."""
        with self.there():
            _cuda.flush_pending_frees()

    def refuse_mine(self, owner: Any, what: str) -> None:
        """Raise BusyError if this thread is in the middle of a step. Nothing has changed.

        Without it, one thread with a finaliser in the middle of its move:
          step: chooses block A as the target of buffer x
          collector: runs a finaliser, which demotes buffer y
          finaliser's step: finds block A idle still, and moves y into it
          step: copies x into block A as well; y has lost its contents.
        The lock does not see this, as it is one thread's.
        """
        if self.mine():
            raise BusyError(
                f"{what} was called in the middle of another call on {owner!r} in the same thread, by a finaliser, a "
                "signal handler or a callback: call it when that has returned; releases alone are taken at any time"
            )

    def later(self, work: Callable[[], Any]) -> None:
        """Have `work` done at the end of the step that this thread is in the middle of. Its errors are dropped."""
        self._late.append(work)

    def do_late(self) -> None:
        """Do what came late. The lock is held."""
        while self._late:
            with contextlib.suppress(Exception):
                self._late.popleft()()

    def run(self, work: Callable[..., _T], *arguments: Any) -> _T:
        """Do a step that is a single call, for which `refuse_mine` has passed."""
        with self.lock:
            try:
                return work(*arguments)
            finally:
                self.do_late()


def refuse_foreign_capture(error: BaseException, what: str) -> None:
    """Raise CaptureError if `error` is the driver's refusal of `what` in a thread that another library captures in."""
    if _cuda.is_capture_error(error):
        raise CaptureError(
            f"{what} needs the driver, which refuses it while another library captures a graph in this thread; that "
            "graph may have been ended by it: call it before or after that capture"
        ) from error
