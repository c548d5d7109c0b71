"""What the door knows of a thread, of a context and of a fork, for both backends alike.

Knows no driver. Sits below both backends.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from ..errors import BackendError

__all__ = ["Lifetime", "become_ready", "once", "this_thread", "watch_forks"]

_HOW_TO = (
    "To run on a GPU: pip install numbabuf[cu13] (or [cu12]) on a machine with an NVIDIA driver. "
    "To run without one: set NUMBA_ENABLE_CUDASIM=1 in the environment before Python starts."
)


class _Holder(Protocol):
    """What holds memory of a context and is told of its end."""

    def context_ended(self) -> None: ...


class Lifetime:
    """The life of one context: `ended` once it was closed or reset, and all its memory, streams and events with it.

    Attributes
    ----------
    ended : bool
    holders : WeakSet
        Objects whose `context_ended` is called when it ends, before its memory goes; it may take no lock.
    """

    __slots__ = ("ended", "holders")

    def __init__(self) -> None:
        self.ended = False
        self.holders: weakref.WeakSet[_Holder] = weakref.WeakSet()

    def end(self) -> None:
        """Say that the context is closed."""
        self.ended = True
        for holder in list(self.holders):
            holder.context_ended()


class _Thread(threading.local):
    ready = False
    lifetime = Lifetime()
    default: Any = None

    def __init__(self) -> None:
        self.token = object()


this_thread = _Thread()
"""Of the calling thread. `ready`: whether `require` has succeeded in it; a test that a hot path can afford. A CUDA
context is current per thread, and a thread's identifier will not do: a thread that ends leaves its own to the next.
`lifetime`: of the context that it was ready for. `token`: what tells it from every other thread, earlier ones too.
`default`: its per-thread default stream."""


def become_ready(attempt: Callable[[], Lifetime]) -> None:
    """Make this thread ready by `attempt`, which returns the life of its context; BackendError where it cannot."""
    try:
        this_thread.lifetime = attempt()
    except Exception as error:
        raise BackendError(f"no CUDA device can be used ({type(error).__name__}: {error}). {_HOW_TO}") from error
    this_thread.ready = True


def once(act: Callable[[], None]) -> Callable[[], None]:
    """Have `act` done once, and have every thread that comes meanwhile wait until it is.

    Not `functools.cache`: A finds nothing remembered and begins, B finds nothing either and does it again, and wraps
    the function of Numba's that A has wrapped already.
    """
    lock = threading.Lock()
    done: list[bool] = []

    @functools.wraps(act)
    def at_most_once() -> None:
        if not done:
            with lock:
                if not done:
                    act()
                    done.append(True)

    return at_most_once


# ---------------------------------------------------------------------------------------------------------------- fork

_in_child: list[Callable[[], None]] = []


def watch_forks(act: Callable[[], None]) -> None:
    """Call `act` in every process that is forked from this one, before anything else runs there.

    The driver does not serve a forked process, so what holds memory of it shall say that it is closed, free nothing
    and report nothing. Acts run in the order in which they were registered.
    """
    _in_child.append(act)


def _after_fork_in_child() -> None:
    for act in _in_child:
        act()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
