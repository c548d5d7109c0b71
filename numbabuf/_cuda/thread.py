"""What the door knows of a thread and of a context, and what a capture refuses, for both backends alike.

Knows no driver. Sits below both backends.
"""

from __future__ import annotations

import threading
import weakref
from threading import get_ident
from typing import Any

__all__ = ["ALLOCATION", "WAIT", "WRITE", "Lifetime", "capture_here", "refusal", "this_thread"]


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
        self.holders: weakref.WeakSet[Any] = weakref.WeakSet()

    def end(self) -> None:
        """Say that the context is closed."""
        self.ended = True
        for holder in list(self.holders):
            holder.context_ended()


class _Thread(threading.local):
    ready = False
    lifetime: Lifetime | None = None
    default: Any = None

    def __init__(self) -> None:
        self.token = object()


this_thread = _Thread()
"""Of the calling thread. `ready`: whether `require` has succeeded in it; a test that a hot path can afford. A CUDA
context is current per thread, and a thread's identifier will not do: a thread that ends leaves its own to the next.
`lifetime`: of the context that it was ready for. `token`: what tells it from every other thread, earlier ones too.
`default`: its per-thread default stream."""


def capture_here(captures: dict[int, Any]) -> Any:
    """Return the capture that this very thread has open, or None; an earlier thread with its number does not count."""
    if not captures:
        return None
    capture = captures.get(get_ident())
    return capture if capture is not None and capture.token is this_thread.token else None


ALLOCATION = "memory was asked for", "allocate it before the capture, or reserve it in a pool"
WAIT = "a synchronisation was asked for", "wait after the replay, not in what is captured"
WRITE = "an array was written from the host", "write it before the capture, or give it to the step as an input"


def refusal(what: str, remedy: str) -> str:
    """The text of the CaptureError for what no capture can hold, the same on both backends."""
    return f"{what} inside a captured function, which a graph cannot replay: {remedy}"
