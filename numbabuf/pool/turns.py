"""A lock that its own thread cannot enter a second time, and a queue for what must be done even so.

A reentrant lock keeps other threads out, and lets in what runs in the middle of its holder: a finaliser that the
collector starts, a signal handler, a user's callback. `Turns` refuses them. Sits above `errors`, below `hierarchy`.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ..errors import BusyError

__all__ = ["Turns"]


_T = TypeVar("_T")


class Turns:
    """One step at a time, in all threads and within each.

    Notes
    -----
    Threads: `later` takes no lock, so that a finaliser may call it at any time.
    """

    def __init__(self) -> None:
        self._holder = 0  # identifier of the thread whose turn it is
        self._late: deque[Callable[[], Any]] = deque()

    @property
    def mine(self) -> bool:
        """Whether it is this thread's turn: what asks runs in the middle of it."""
        return self._holder == threading.get_ident()

    @contextlib.contextmanager
    def take(self, lock: Any, owner: Any, what: str) -> Iterator[None]:
        """Hold `lock` for one step, and do what came late before and after it.

        Raises
        ------
        BusyError
            This thread is in the middle of a step already. Nothing has changed.
        """
        # One thread, a finaliser in the middle of its move:
        #   step: chooses block A as the target of buffer x
        #   collector: runs a finaliser, which demotes buffer y
        #   finaliser's step: finds block A idle still, and moves y into it
        #   step: copies x into block A as well; y has lost its contents.
        # The lock does not see this, as it is one thread's. The finaliser's step is refused here.
        self.refuse_mine(owner, what)
        with lock:
            try:
                self._holder = threading.get_ident()
                self._do_late()
                yield
            finally:
                try:
                    self._do_late()
                finally:
                    self._holder = 0

    def run(self, lock: Any, work: Callable[..., _T], *arguments: Any) -> _T:
        """Do one step that is a single call: as `take`, in a third of the time, once `refuse_mine` has passed."""
        with lock:
            try:
                self._holder = threading.get_ident()
                self._do_late()
                return work(*arguments)
            finally:
                try:
                    self._do_late()
                finally:
                    self._holder = 0

    def refuse_mine(self, owner: Any, what: str) -> None:
        """Raise BusyError if this thread is in the middle of a step."""
        if self.mine:
            raise BusyError(
                f"{what} was called in the middle of another call on {owner!r} in the same thread, by a finaliser, a "
                "signal handler or a callback: call it when that has returned; releases alone are taken at any time"
            )

    def later(self, work: Callable[[], Any]) -> None:
        """Have `work` done at the end of the step that this thread is in the middle of. It must not fail."""
        self._late.append(work)

    def _do_late(self) -> None:
        while self._late:
            self._late.popleft()()
