"""Every exception that numbabuf raises by itself, and nothing else.

Bad arguments raise Python's own `TypeError`, `ValueError`, `OverflowError` and `KeyError`; the classes here are
for states a program can meet with good arguments: closed, busy, full, stale, no device. This module imports nothing.
"""


class NumbabufError(Exception):
    """Base of all exceptions that are numbabuf's own."""


class BackendError(NumbabufError, RuntimeError):
    """No CUDA device can be used and the simulator was not chosen, or another than the object's is current."""


class ClosedError(NumbabufError, RuntimeError):
    """The pool, manager, graph or lease was closed before this call."""


class BusyError(NumbabufError, RuntimeError):
    """The operation would pull memory from under a live graph or an open lease."""


class CaptureError(NumbabufError, RuntimeError):
    """A graph capture failed, or something was asked that a capture forbids."""


class GraphMissingError(NumbabufError, LookupError):
    """`replay` was called for a step that no captured graph can serve."""


class BucketOverflowError(NumbabufError, ValueError):
    """A step is larger than the largest bucket, and the overflow policy is "raise"."""


class StaleBufferError(NumbabufError, RuntimeError):
    """A buffer was released twice, or used after its release."""


class TierFullError(NumbabufError, MemoryError):
    """A memory tier has no room for the request; the text holds the whole account."""


class TraceError(NumbabufError, ValueError):
    """A request trace cannot be read; the text is ``path:line: reason``."""
