"""Captures in the simulator: launches and copies are put on a tape instead of run, and a replay runs the tape.

The simulator keeps a launch's configuration on the kernel itself and runs one kernel at a time, so one lock goes round
every launch. What a capture refuses on a driver is refused here, in the same words.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda.simulator.cudadrv import driver
from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray
from numba.cuda.simulator.kernel import FakeCUDAKernel

from ..errors import CaptureError
from .open_captures import ALLOCATION, WAIT, WRITE, OpenCapture, elsewhere, open_capture, refusing
from .thread import once

__all__ = ["Graph", "NumbaStream", "Recorder", "RecordingStream", "install"]

_lock = threading.RLock()
NumbaStream = type(cuda.stream())


class RecordingStream(NumbaStream):  # type: ignore[misc, valid-type]
    """What kernels are launched on; knows the capture it is part of."""

    capture: Recorder | None = None

    def __bool__(self) -> bool:
        return True


class Graph:
    """See `backend.Graph`. The recorded launches, in order; their arguments stay alive with it."""

    __slots__ = ("_tape", "launch_on", "operands")

    def __init__(self, tape: list[Callable[[], object]], operands: list[Any]) -> None:
        self._tape = tape
        self.operands = operands
        self.launch_on: Any = self._replay

    def _replay(self, stream: object) -> None:
        with _lock:
            for run in self._tape:
                run()

    def close(self) -> None:
        self.launch_on = None
        self._tape, self.operands = [], []


class Recorder(OpenCapture):
    """A tape of what is queued on a stream."""

    def start(self) -> None:
        if self.stream.numba.capture is not None:
            raise CaptureError("a capture is already open on this stream")
        self._tape: list[Callable[[], object]] = []
        self.stream.numba.capture = self

    def record(self, run: Callable[[], object], operands: object) -> None:
        """Put `run` on the tape."""
        self._tape.append(run)
        self.keep(operands)

    def finish(self) -> object:
        return self._tape

    def drop(self) -> None:
        """The tape goes with the capture."""

    def close(self) -> None:
        if self.stream.numba.capture is self:  # it may be another's that was open before
            self.stream.numba.capture = None


def _recorder(stream: object, what: str) -> Recorder | None:
    """Return the capture that `stream` is part of; refuse work that this thread's capture would miss."""
    capture: Recorder | None = getattr(stream, "capture", None)
    if capture is None and open_capture() is not None:
        raise elsewhere(what)
    return capture


# ------------------------------------------------------------------------------------------------------------ launches


class _Launch:
    """`kernel[grid, block, stream]`, keeping to itself what the stock simulator puts on the kernel."""

    def __init__(self, kernel: FakeCUDAKernel, configuration: tuple[Any, ...]) -> None:
        self._kernel = kernel
        self._configuration = configuration

    def _run(self, args: tuple[Any, ...]) -> None:
        with _lock:
            _set_configuration(self._kernel, self._configuration)
            _call_kernel(self._kernel, *args)

    def __call__(self, *args: Any) -> None:
        stream = self._configuration[2] if len(self._configuration) > 2 else 0
        capture = _recorder(stream, f"kernel {self._kernel.fn.__name__}")
        given, args = args, tuple(map(_as_argument, args))
        if capture is None:
            self._run(args)
            return
        if any(type(arg) is np.ndarray for arg in args):
            raise CaptureError(
                f"kernel {self._kernel.fn.__name__} was given a NumPy array inside a capture: give it a device array"
            )
        capture.record(lambda: self._run(args), given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)


def _as_argument(value: Any) -> Any:
    """Return a kernel argument as the simulator knows it: what offers __cuda_array_interface__ is an array on a GPU."""
    if isinstance(value, tuple):
        parts = [_as_argument(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, (FakeCUDAArray, np.ndarray, np.generic)) or not hasattr(value, "__cuda_array_interface__"):
        return value
    return FakeCUDAArray(_over(value.__cuda_array_interface__))


def _over(found: dict[str, Any]) -> np.ndarray:
    """Return a NumPy array over the memory that a __cuda_array_interface__ describes."""
    dtype = np.dtype(found.get("descr") or found["typestr"])
    if dtype.itemsize != np.dtype(found["typestr"]).itemsize or dtype.names == ("f0",):
        dtype = np.dtype(found["typestr"])
    strides = found.get("strides")
    span = sum((n - 1) * abs(s) for n, s in zip(found["shape"], strides or ())) if strides else 0
    nbytes = dtype.itemsize * (1 if strides else int(np.prod(found["shape"], dtype=np.int64))) + span
    if not nbytes:
        return np.empty(found["shape"], dtype)
    memory = (ctypes.c_uint8 * nbytes).from_address(found["data"][0])
    return np.ndarray(found["shape"], dtype, buffer=memory, strides=strides)


_set_configuration = FakeCUDAKernel.__getitem__
_call_kernel = FakeCUDAKernel.__call__
_copy_to_device = FakeCUDAArray.copy_to_device
_copy_to_host = FakeCUDAArray.copy_to_host


def _recording_copy_to_device(self: FakeCUDAArray, ary: Any, stream: object = 0) -> None:
    capture = _recorder(stream, "copy_to_device")
    if capture is not None:
        capture.record(lambda: _copy_to_device(self, ary), (self, ary))
    elif self.size or np.size(getattr(ary, "_ary", ary)):  # NumPy cannot compare the strides of nothing
        _copy_to_device(self, ary)


def _recording_copy_to_host(self: FakeCUDAArray, ary: np.ndarray | None = None, stream: object = 0) -> np.ndarray:
    capture = _recorder(stream, "copy_to_host")
    if capture is None:
        return _copy_to_host(self, ary)  # type: ignore[no-any-return]
    if ary is None:
        raise CaptureError("copy_to_host without a target cannot be captured: give it a pinned array to write to")
    capture.record(lambda: _copy_to_host(self, ary), (self, ary))
    return ary


def _recording_move(original: Callable[..., Any], name: str, operands: int) -> Callable[..., None]:
    """Return a copy or fill of Numba's driver module, whose fourth argument is the stream."""

    def move(*args: Any, **options: Any) -> None:
        given = (*args, *(options[key] for key in ("dst", "src", "val", "size", "stream") if key in options))
        capture = _recorder(given[3] if len(given) > 3 else 0, name)
        if capture is None:
            original(*args, **options)
        else:
            capture.record(lambda: original(*args, **options), given[:operands])

    return move


_ALLOCATING = (
    "device_array", "device_array_like", "to_device", "pinned_array", "pinned_array_like", "mapped_array", "pinned"
)  # fmt: skip


@once
def install() -> None:
    """Replace what the simulator cannot do in a capture."""
    for name in _ALLOCATING:
        if hasattr(cuda, name):
            setattr(cuda, name, refusing(getattr(cuda, name), *ALLOCATION))
    cuda.synchronize = refusing(cuda.synchronize, *WAIT)
    for kind in (NumbaStream, cuda.event):
        kind.synchronize = refusing(kind.synchronize, *WAIT)
    FakeCUDAArray.__setitem__ = refusing(FakeCUDAArray.__setitem__, *WRITE)
    for name, operands in (("device_to_device", 2), ("device_memset", 1)):
        setattr(driver, name, _recording_move(getattr(driver, name), name, operands))
    FakeCUDAKernel.__getitem__ = lambda self, configuration: _Launch(self, configuration)
    FakeCUDAArray.copy_to_device = _recording_copy_to_device
    FakeCUDAArray.copy_to_host = _recording_copy_to_host
