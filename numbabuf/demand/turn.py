"""A lock that refuses its own thread instead of letting it in, or leaving it waiting for itself.

Knows nothing of what it guards. Sits above `errors`, below `model` and the models of `predict`.
"""

from __future__ import annotations

import os
import threading

from ..errors import BusyError

__all__ = ["Turn"]


class Turn:
    """One thread at a time: other threads wait, and a thread that is inside already is refused.

    A thread comes back so in a signal handler, or in a clock that is read in the middle of an update.

    Parameters
    ----------
    refusal : str
        What BusyError says to a thread that is inside already.

    Notes
    -----
    Processes: a child of a fork begins with a free lock, as the thread that held it does not go on there.
    """

    def __init__(self, refusal: str) -> None:
        self._refusal = refusal
        self._renew()

    def _renew(self) -> None:
        self._lock, self._inside, self._pid = threading.Lock(), 0, os.getpid()

    @property
    def inside(self) -> bool:
        """Whether this thread has the turn."""
        return self._inside == threading.get_ident() and self._pid == os.getpid()

    def __enter__(self) -> None:
        if self._pid != os.getpid():
            self._renew()
        if self._inside == threading.get_ident():
            raise BusyError(self._refusal)
        self._lock.acquire()
        self._inside = threading.get_ident()

    def __exit__(self, *exc: object) -> None:
        self._inside = 0
        self._lock.release()
