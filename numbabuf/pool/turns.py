"""A pool's lock, which keeps out other threads, and what runs in the middle of its holder as well.

A reentrant lock by itself lets in a finaliser that the collector starts, a signal handler or a callback: code of the
same thread that finds a pool half way through a change. Sits above `errors`, below `store`.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import BusyError

__all__ = ["Turns"]

_T = TypeVar("_T")


class Turns:
    """One step at a time, in all threads and within each; the guard of every pool.

    Attributes
    ----------
    lock : threading.RLock
        Held in every step; the code of a step may take it again.
    mine
        Function that returns whether it is this thread's turn: the code that asks runs in the middle of a step.

    Notes
    -----
    Threads: `later` takes no lock, so that a finaliser may call it at any time.
    """

    __slots__ = ("_late", "lock", "mine")

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.mine: Callable[[], bool] = self.lock._is_owned  # type: ignore[attr-defined]  # as Condition asks it
        self._late: deque[Callable[[], Any]] = deque()

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
