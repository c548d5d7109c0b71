"""Which captures are open, one a thread at most, and what one of them holds; for both backends alike.

`captures` is the hot paths' cheapest test: empty, and so false, nearly always. Knows no driver and no pool: what owns
memory registers a watcher, which is told each operand while the capture is open. Sits below both backends.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from threading import get_ident
from typing import TYPE_CHECKING, Any

from ..errors import CaptureError
from .thread import this_thread

if TYPE_CHECKING:
    from .backend import Stream

__all__ = [
    "ALLOCATION",
    "WAIT",
    "WRITE",
    "OpenCapture",
    "captures",
    "capturing",
    "open_capture",
    "refusal",
    "refusing",
    "watch_operands",
]  # fmt: skip

_watchers: list[Callable[[object], Iterable[object]]] = []


def watch_operands(watcher: Callable[[Any], Iterable[object]]) -> None:
    """Register a function that is called with each operand of a capture and returns what its graph shall keep alive.

    An operand is an array, or the tuple of a launch's arguments.
    """
    _watchers.append(watcher)


class OpenCapture(abc.ABC):
    """One open capture: whose it is, the stream it records, and what its graph must keep alive.

    Held by its thread's entry in `captures` and by the `Capture` that began it, and by nothing else: with the latter
    dropped, it ends. A backend says how to start, finish, drop and close it.
    """

    def __init__(self, stream: Stream, dry: bool) -> None:
        self.stream = stream
        self.dry = dry
        self.thread, self.token = get_ident(), this_thread.token
        self.operands: list[object] = []

    def keep(self, operand: object) -> None:
        """Keep `operand`, and what the watchers return for it, alive as long as the graph."""
        self.operands += [operand, *(pin for watcher in _watchers for pin in watcher(operand))]

    @property
    def here(self) -> bool:
        """Whether the calling thread is the one that began it."""
        return self.token is this_thread.token

    @abc.abstractmethod
    def start(self) -> None:
        """Begin to record."""

    @abc.abstractmethod
    def finish(self) -> object:
        """End the recording and return what the backend makes a graph of."""

    @abc.abstractmethod
    def drop(self) -> None:
        """Give the recording up, in whatever state it is; raises nothing."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of what the recording needed, after `finish` or `drop`."""


captures: dict[int, OpenCapture] = {}
"""Thread -> the capture it has open, always this one dictionary."""


def open_capture() -> OpenCapture | None:
    """Return the capture that this very thread has open, or None; an earlier thread with its number does not count."""
    if not captures:
        return None
    found = captures.get(get_ident())
    return found if found is not None and found.here else None


def capturing() -> bool:
    """Return whether this thread has a capture open that was begun through this package.

    A capture in mode thread_local restricts its own thread alone (CUDA driver API,
    cuThreadExchangeStreamCaptureMode), so that one of another thread is of no interest.
    """
    return open_capture() is not None


ALLOCATION = "memory was asked for", "allocate it before the capture, or reserve it in a pool"
WAIT = "a synchronisation was asked for", "wait after the replay, not in what is captured"
WRITE = "an array was written from the host", "write it before the capture, or give it to the step as an input"


def refusal(what: str, remedy: str) -> CaptureError:
    """The error for what no capture can hold, the same on both backends."""
    return CaptureError(f"{what} inside a captured function, which a graph cannot replay: {remedy}")


def refusing(original: Callable[..., Any], what: str, remedy: str) -> Callable[..., Any]:
    """Return `original`, refused while the calling thread captures."""

    def refuse(*args: Any, **options: Any) -> Any:
        if open_capture() is not None:
            raise refusal(what, remedy)
        return original(*args, **options)

    return refuse


def elsewhere(what: str) -> CaptureError:
    """The error for work on a stream that the capture does not see."""
    return CaptureError(
        f"{what} was queued on another stream while a graph is captured, so that no replay would run it: "
        "give it the step's stream"
    )
