"""The only door to numba.cuda and cuda.core: memory, streams, events, capture and launches on one of two backends.

`SIM` tells the backends apart: the CUDA driver through numba-cuda, or Numba's simulator (NUMBA_ENABLE_CUDASIM=1).
`backend.Backend` declares, and documents, what both of them do; here is what they have in common. Importing this never
touches a device; the first call that needs one checks for it and, where there is none, says how to choose the
simulator. Sits above `errors` and below everything else that needs a device.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import cuda

from ..errors import BackendError
from .backend import (
    DeviceArray,
    NumbaStream,
    StreamLike,
    SupportsCudaArray,
    SupportsCudaStream,
    SupportsDLPack,
)
from .capture import Capture
from .chosen import SIM
from .chosen import backend as _backend
from .open_captures import captures, capturing, open_capture, watch_operands
from .thread import Lifetime, this_thread, watch_forks

if TYPE_CHECKING:
    from .backend import Graph, Stream
    from .driver import Event
else:
    Event, Graph, Stream = _backend.Event, _backend.Graph, _backend.Stream

__all__ = [
    "PER_THREAD", "SIM", "Capture", "DeviceArray", "Event", "Graph", "Lifetime", "NumbaStream", "Stream", "StreamLike",
    "SupportsCudaArray", "SupportsCudaStream", "SupportsDLPack", "address", "as_stream", "backend", "captures",
    "capturing", "configure", "copy", "cuda", "current_device", "default_stream", "device_bytes", "device_count",
    "device_id", "device_name", "device_view", "dlpack_exporter", "empty_device", "empty_managed", "empty_pinned",
    "flush_pending_frees", "from_dlpack", "host_view", "is_capture_error", "is_capturing", "is_context_error",
    "is_out_of_memory", "launch", "launch_shape", "lifetime", "memory_info", "on_device", "one_device", "open_capture",
    "refresh", "require", "settle_on_host", "synchronize", "this_thread", "watch_forks", "watch_operands", "zero",
]  # fmt: skip

PER_THREAD = _backend.PER_THREAD
require, lifetime, synchronize = _backend.require, _backend.lifetime, _backend.synchronize
device_id, device_name, memory_info = _backend.device_id, _backend.device_name, _backend.memory_info
current_device = _backend.current_device
empty_device, empty_pinned, empty_managed = _backend.empty_device, _backend.empty_pinned, _backend.empty_managed
address, device_view, zero, settle_on_host = (
    _backend.address, _backend.device_view, _backend.zero, _backend.settle_on_host
)  # fmt: skip
dlpack_exporter, from_dlpack, flush_pending_frees = (
    _backend.dlpack_exporter, _backend.from_dlpack, _backend.flush_pending_frees
)  # fmt: skip
is_out_of_memory, is_capture_error, is_context_error = (
    _backend.is_out_of_memory, _backend.is_capture_error, _backend.is_context_error
)  # fmt: skip
default_stream, is_capturing, configure = _backend.default_stream, _backend.is_capturing, _backend.configure


def backend() -> str:
    """Return "simulator" or "cuda"."""
    return "simulator" if SIM else "cuda"


# ------------------------------------------------------------------------------------------------ devices and contexts


def refresh() -> None:
    """Make a context current in this thread anew: it may have none after leaving ``with cuda.gpus[i]:``."""
    this_thread.ready = False
    require()


def on_device(device: int | None) -> contextlib.AbstractContextManager[None]:
    """Return a context manager inside which `device` is current; None: the one that is, device 0 where none is.

    Notes
    -----
    Cost: a driver call of less than a microsecond where the device is current already.
    """
    require()
    current = _backend.current_device()
    if current is None:
        refresh()
        current = _backend.current_device()
    if device is None or device == current:
        return _NOTHING
    return _backend.device_context(device)


_NOTHING = contextlib.nullcontext()


@functools.cache
def device_count() -> int:
    """Return the number of devices."""
    require()
    return len(cuda.gpus)


def one_device(device: int | None, owner: object) -> int:
    """Return the ordinal of this thread's device, which must be `device`, that of `owner`, where one is given.

    Raises
    ------
    BackendError
        Another device is current: what `owner` would make now could not be used with what it has.

    Notes
    -----
    Cost: a driver call; not for a hot path.
    """
    current = device_id()
    if device is not None and current != device:
        raise BackendError(
            f"{owner!r} is on device {device}, and device {current} is current in this thread: enter "
            f"`with cuda.gpus[{device}]:` (numba.cuda) first, or make one for each device"
        )
    return current


# -------------------------------------------------------------------------------------------------------------- memory


def device_bytes(array: DeviceArray | np.ndarray) -> int:
    """Return the number of bytes an array of this backend spans."""
    return int(array.nbytes)


def host_view(base: np.ndarray, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return a typed NumPy view over pinned or managed `base` from byte `offset`, keeping it alive."""
    return np.ndarray(shape, dtype, buffer=np.ndarray.view(base, np.ndarray), offset=offset)


def copy(dst: DeviceArray, src: DeviceArray, stream: Stream) -> None:
    """Queue a copy between two device arrays of equal byte size on `stream`."""
    dst.copy_to_device(src, stream=stream.numba)


# ------------------------------------------------------------------------------------------------ streams and launches


def as_stream(stream: StreamLike | Stream | None) -> Stream:
    """Turn what a user calls a stream into a `Stream`.

    Parameters
    ----------
    stream
        A Numba stream, a cuda.core stream, anything with ``__cuda_stream__``, a `Stream`, or None for a new
        non-blocking one.

    Raises
    ------
    TypeError
        It is none of those, or speaks another version of ``__cuda_stream__`` than 0.

    Notes
    -----
    Threads: a per-thread default stream is one of the calling thread, see `Stream.thread`.
    """
    if isinstance(stream, _backend.Stream):
        return stream
    require()
    return _backend.new_stream() if stream is None else _backend.wrap_stream(stream)


def launch(kernel: Any, grid: int | tuple[int, ...], block: int | tuple[int, ...], stream: Stream, *args: Any) -> None:
    """Launch a `@cuda.jit` kernel on a `Stream`."""
    configure(kernel, grid, block, stream.numba)(*args)


def launch_shape(work: int, *, threads: int = 256, max_blocks: int = 64) -> tuple[int, int]:
    """Return (blocks, threads) for `work` items handled by a grid-stride kernel.

    The simulator starts one thread of the operating system per CUDA thread, so there the answer is (1, 1).
    """
    if SIM:
        return 1, 1
    return max(1, min(max_blocks, -(-work // threads))), threads
