"""Captures on the driver: a cuda.core graph builder, and hooks in Numba that tell it what the graph will use.

Neither the driver nor cuda.core refers to the Python objects behind a kernel's arguments, and Numba has no callback
that sees them, so the functions of Numba's that queue work are wrapped while a capture is open. What allocates or waits
is refused before the driver is asked: its own refusal would end the capture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from numba import cuda

from ..errors import CaptureError
from .open_captures import ALLOCATION, WAIT, WRITE, OpenCapture, elsewhere, open_capture, refusing

__all__ = ["Graph", "Recorder", "hook", "is_capture_error", "unhook"]


def is_capture_error(error: BaseException) -> bool:
    # numba-cuda and cuda.core have exception types of their own; both name the driver's error in their text
    return "STREAM_CAPTURE" in f"{getattr(error, 'code', '')!r} {error}"


class Graph:
    """See `backend.Graph`. cuda.core keeps no operand alive; `operands` does, until `close`."""

    __slots__ = ("_exec", "launch_on", "operands")

    def __init__(self, executable: Any, operands: list[Any]) -> None:
        self._exec = executable
        self.operands = operands
        self.launch_on: Any = executable.launch

    def close(self) -> None:
        if self._exec is not None:
            self.launch_on = None
            self._exec.close()
            self._exec = None
            self.operands = []


class Recorder(OpenCapture):
    """A graph builder on a stream. It is closed with the capture, not when it is collected: see `close`."""

    _builder: Any = None
    _deferral: Any = None

    def start(self) -> None:
        self._deferral = cuda.defer_cleanup()
        self._deferral.__enter__()
        self._build()

    def _build(self) -> None:
        self._builder = self.stream.core.create_graph_builder()
        # thread_local: another thread may go on allocating and synchronising, this one may not. relaxed: this one
        # may load code, too (CUDA driver API, cuThreadExchangeStreamCaptureMode).
        self._builder.begin_building("relaxed" if self.dry else "thread_local")

    def finish(self) -> Any:
        try:
            return self._builder.end_building().complete()
        except Exception as error:
            raise CaptureError(
                f"the driver refused the capture ({error}). Usual causes: a kernel compiled or loaded for the first "
                "time inside it (launch it once before), a synchronisation, or an allocation"
            ) from error

    def drop(self) -> None:
        with contextlib.suppress(Exception):  # an invalidated capture reports itself; the stream is usable either way
            if not self.here:
                self._give_stream_up()
            elif self._builder is not None:
                self._builder.end_building()

    def _give_stream_up(self) -> None:
        """Have the driver's stream destroyed when the builder goes: Numba's cache of launches shares it."""
        from numba.cuda.dispatcher import CUDADispatcher

        self.stream.core.close()
        forget = getattr(CUDADispatcher.configure, "cache_clear", None)
        if forget is not None:
            forget()

    def close(self) -> None:
        builder, self._builder = self._builder, None
        deferral, self._deferral = self._deferral, None
        try:
            # Closed here and now: a builder of an invalidated capture that is dropped later ends the next capture on
            # its stream.
            if builder is not None:
                builder.close()
        except Exception:  # an invalidated capture reports itself once more
            pass
        finally:
            if deferral is not None:
                deferral.__exit__(None, None, None)

    def load(self, compile: Callable[[], object]) -> None:
        """Have a kernel compiled and loaded outside: this driver loads nothing in a capture, a relaxed one included.

        What a throw-away capture has recorded so far is not wanted: it is left, and begun anew.
        """
        builder, self._builder = self._builder, None
        with contextlib.suppress(Exception):  # the refused load has invalidated the capture
            builder.end_building()
        builder.close()
        compile()
        self._build()

    def check(self, stream: Any, what: str) -> None:
        """Refuse work on a stream that the capture does not see."""
        handle = int(getattr(stream, "handle", stream) or 0)
        if handle == self.stream.handle:
            return
        from numba.cuda.cudadrv.driver import driver

        if not handle or int(driver.cuStreamIsCapturing(handle)) == 0:
            raise elsewhere(what)


# --------------------------------------------------------------------------------------------------------------- hooks

_originals: dict[tuple[Any, str], Any] = {}


def _here() -> Recorder | None:
    return open_capture()  # type: ignore[return-value]  # this backend begins no others


def _watching_launches(launch: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, args: Any, *configuration: Any, **options: Any) -> Any:
        capture = _here()
        if capture is None:
            return launch(self, args, *configuration, **options)
        # numba-cuda 0.30 gives one object, earlier ones give grid, block, stream and shared memory
        given = (*configuration, *options.values())
        capture.check(given[0].stream if hasattr(given[0], "stream") else given[2], f"kernel {self.py_func.__name__}")
        capture.keep(args)
        if capture.dry:
            try:
                return launch(self, args, *configuration, **options)
            except Exception as error:
                if not is_capture_error(error):
                    raise
            capture.load(lambda: self.compile(tuple(self.typeof_pyval(arg) for arg in args)))
        return launch(self, args, *configuration, **options)

    return call


def _watching_copies(original: Callable[..., Any], name: str, *, stream_at: int) -> Callable[..., Any]:
    """Return a copy or fill of Numba's that tells the capture its operands; so many arguments precede its stream."""

    def copy(target: Any, source: Any = None, *rest: Any, **options: Any) -> Any:
        capture = _here()
        if capture is not None:
            capture.check(options.get("stream", rest[-1] if len(rest) + 1 == stream_at else 0), name)
            if source is None:
                raise CaptureError(f"{name} without a target cannot be captured: give it a pinned array to write to")
            capture.keep((target, source))
        return original(target, source, *rest, **options)

    return copy


def hook() -> None:
    if _originals:
        return
    from numba.cuda.cudadrv import driver
    from numba.cuda.cudadrv.devicearray import DeviceNDArray, DeviceNDArrayBase
    from numba.cuda.dispatcher import CUDADispatcher

    _replace(CUDADispatcher, "call", _watching_launches)
    for name in ("copy_to_device", "copy_to_host"):
        _replace(DeviceNDArrayBase, name, _watching_copies, name, stream_at=2)
    for name in ("device_to_device", "device_memset"):
        _replace(driver, name, _watching_copies, name, stream_at=3)
    for name in ("memalloc", "memhostalloc", "memallocmanaged", "mempin"):
        _replace(driver.Context, name, refusing, *ALLOCATION)
    for name in ("__setitem__", "setitem"):
        _replace(DeviceNDArray, name, refusing, *WRITE)
    for owner in (driver.Context, driver.Stream, driver.Event):
        _replace(owner, "synchronize", refusing, *WAIT)


def _replace(owner: Any, name: str, wrap: Callable[..., Callable[..., Any]], *rest: Any, **options: Any) -> None:
    original = getattr(owner, name)
    _originals[owner, name] = original
    setattr(owner, name, wrap(original, *rest, **options))


def unhook() -> None:
    for (owner, name), original in _originals.items():
        setattr(owner, name, original)
    _originals.clear()
