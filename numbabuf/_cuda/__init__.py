"""The only door to numba.cuda and cuda.core: memory, streams, events, capture and launches on one of two backends.

`SIM` tells the backends apart: the CUDA driver through numba-cuda, or Numba's simulator (NUMBA_ENABLE_CUDASIM=1).
Importing this never touches a device; the first call that needs one checks for it and, where there is none, says how
to choose the simulator. Sits below `errors` and `config`; everything else in numbabuf sits above nothing but this.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import numpy as np
from numba import cuda
from numba.core import config as _numba_config

from ..errors import BackendError
from . import operands
from .thread import Lifetime, capture_here, this_thread

SIM = bool(_numba_config.ENABLE_CUDASIM)
"""Whether Numba's simulator runs the kernels; fixed when numba is imported."""

if SIM:
    from . import simulator as _impl
else:
    from . import driver as _impl  # type: ignore[no-redef]

Stream, Event, Graph, Capture = _impl.Stream, _impl.Event, _impl.Graph, _impl.Capture

PER_THREAD = _impl.PER_THREAD
"""Whether the default stream is each thread's own."""

captures = _impl.captures
"""Thread -> the capture it has open, always this one dictionary: empty, and so false, nearly always; the cheapest test
that a hot path can make."""
watch_operands = operands.watchers.append
"""Register a function that is called with each operand of a capture and returns what its graph shall keep alive."""

__all__ = [
    "PER_THREAD",
    "SIM",
    "Capture",
    "Event",
    "Graph",
    "Lifetime",
    "Stream",
    "address",
    "as_stream",
    "backend",
    "captures",
    "capturing",
    "configure",
    "copy",
    "cuda",
    "default_stream",
    "device_bytes",
    "device_count",
    "device_id",
    "device_name",
    "device_view",
    "dlpack_exporter",
    "empty_device",
    "empty_managed",
    "empty_pinned",
    "flush_pending_frees",
    "from_dlpack",
    "host_view",
    "is_capture_error",
    "is_capturing",
    "is_context_error",
    "is_out_of_memory",
    "launch",
    "launch_shape",
    "lifetime",
    "memory_info",
    "on_device",
    "one_device",
    "open_capture",
    "refresh",
    "require",
    "settle_on_host",
    "synchronize",
    "this_thread",
    "watch_operands",
    "zero",
]

_HOW_TO = (
    "To run on a GPU: pip install numbabuf[cu13] (or [cu12]) on a machine with an NVIDIA driver. "
    "To run without one: set NUMBA_ENABLE_CUDASIM=1 in the environment before Python starts."
)


def require() -> None:
    """Make the device usable from this thread, once per thread.

    Raises
    ------
    BackendError
        There is no usable device and the simulator was not chosen.

    Notes
    -----
    Threads: the driver wants a current context in each thread that calls it; this sets the device's primary one.
    """
    if this_thread.ready and not this_thread.lifetime.ended:  # type: ignore[union-attr]
        return
    try:
        _impl.require()
        this_thread.lifetime = _impl.lifetime()
    except Exception as error:
        raise BackendError(f"no CUDA device can be used ({type(error).__name__}: {error}). {_HOW_TO}") from error
    this_thread.ready = True


def refresh() -> None:
    """Make a context current in this thread anew: it may have none after leaving ``with cuda.gpus[i]:``."""
    this_thread.ready = False
    require()


def lifetime() -> Lifetime:
    """Return the life of the context that is current in this thread; what holds memory of it looks at `ended`.

    Notes
    -----
    `ended` turns True when Numba closes or resets the context (``cuda.close()``), before its memory goes.
    """
    require()
    return _impl.lifetime()


def on_device(device: int | None) -> contextlib.AbstractContextManager[Any]:
    """Return a context manager inside which `device` is current; None: the one that is, device 0 where none is.

    Notes
    -----
    Cost: a driver call of less than a microsecond where the device is current already.
    """
    require()
    current = _impl.current_device()
    if current is None:
        refresh()
        current = _impl.current_device()
    if device is None or device == current:
        return _NOTHING
    return _impl.on_device(device)  # type: ignore[no-any-return]


_NOTHING: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


def backend() -> str:
    """Return "simulator" or "cuda"."""
    return "simulator" if SIM else "cuda"


def device_id() -> int:
    """Return the ordinal of this thread's device."""
    require()
    return _impl.device_id()


@functools.cache
def device_count() -> int:
    """Return the number of devices."""
    require()
    return len(cuda.gpus)


def device_name() -> str:
    """Return the name of this thread's device, "simulator" in the simulator."""
    require()
    return _impl.device_name()


def one_device(device: int | None, owner: Any) -> int:
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


# ---------------------------------------------------------------------------------------------------------- memory


def empty_device(nbytes: int) -> Any:
    """Allocate `nbytes` > 0 of device memory: a Numba device array of uint8. Contents are undefined."""
    require()
    return cuda.device_array(nbytes, np.uint8)


def empty_pinned(nbytes: int) -> np.ndarray:
    """Allocate `nbytes` > 0 of page-locked host memory: a NumPy array of uint8. Contents are undefined."""
    require()
    return cuda.pinned_array(nbytes, np.uint8)  # type: ignore[no-any-return]


def empty_managed(nbytes: int) -> np.ndarray:
    """Allocate `nbytes` > 0 of managed memory: a NumPy array of uint8 (plain memory in the simulator)."""
    require()
    return _impl.empty_managed(nbytes)


def settle_on_host(array: np.ndarray, stream: Any) -> bool:
    """Keep the pages of managed memory on the host, where kernels reach them over the bus, as far as the driver offers.

    Without this its pages move to the device at a kernel's first touch and stay there: no use as a place to make room.
    Prefers the host, maps the pages for the device, and prefetches them to the host on `stream` (CUDA driver API,
    cuMemAdvise and cuMemPrefetchAsync). Returns whether the driver took all of it; one that does not migrates pages by
    itself, which is slower and still right.
    """
    return _impl.settle_on_host(array, stream)


def address(array: Any) -> int:
    """Return the address of the first byte of a device, pinned or managed array, as a kernel sees it.

    Unified addressing gives page-locked memory one address on the host and on the device (CUDA C++ Programming
    Guide, "Unified Virtual Address Space"), so the host's pointer serves for both.
    """
    return _impl.address(array)


def device_bytes(array: Any) -> int:
    """Return the number of bytes an array of this backend spans."""
    return int(array.nbytes)


def device_view(base: Any, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Any:
    """Return a typed device array over `base` from byte `offset`, without a copy.

    The view keeps `base` alive and, made over pinned or managed memory, may be given to a kernel on any stream
    (Numba refuses the NumPy array itself there). bfloat16, which Numba cannot type, is viewed as uint16.
    Cost: about 30 us; cache it.
    """
    if dtype.kind == "V" and dtype.name == "bfloat16":
        dtype = np.dtype(np.uint16)
    return _impl.device_view(base, offset, shape, dtype)


def host_view(base: np.ndarray, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return a typed NumPy view over pinned or managed `base` from byte `offset`, keeping it alive."""
    return np.ndarray(shape, dtype, buffer=np.ndarray.view(base, np.ndarray), offset=offset)


def dlpack_exporter(array: Any, start: int, owner: Any) -> Any:
    """Return what offers `array` to other libraries: an object with ``__dlpack__`` and ``__dlpack_device__``.

    Parameters
    ----------
    array
        A contiguous array of this backend. NumPy arrays are offered as memory of the CPU, and so is all in the
        simulator; device arrays as memory of their device. bfloat16, which neither NumPy nor cuda.core exports,
        goes as uint16.
    start
        Address of its first byte, which an array without elements does not know itself.
    owner
        Kept alive by every tensor made of it.
    """
    return _impl.dlpack_exporter(array, start, owner)


def from_dlpack(tensor: Any, stream: Any) -> Any:
    """Return a device array over the memory of `tensor`, which it keeps alive; `stream` is a `Stream` or None.

    Raises
    ------
    BufferError
        The memory is none that kernels of this backend can reach.
    """
    require()
    return _impl.from_dlpack(tensor, stream)


def memory_info() -> tuple[int, int] | None:
    """Return (free, total) bytes of the device, or None where nobody knows.

    None in the simulator and under an external memory manager that does not implement the query.
    """
    require()
    if SIM:
        return None
    try:
        info = cuda.current_context().get_memory_info()
    except NotImplementedError:
        return None
    return int(info[0]), int(info[1])


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` is the driver's or the host's word for no memory left."""
    return isinstance(error, MemoryError) or _impl.is_out_of_memory(error)


def is_capture_error(error: BaseException) -> bool:
    """Return whether `error` is the driver's refusal of something that a capture forbids."""
    return _impl.is_capture_error(error)


def is_context_error(error: BaseException) -> bool:
    """Return whether `error` is the driver's word for no context in this thread, or one that is gone."""
    return _impl.is_context_error(error)


def flush_pending_frees() -> None:
    """Carry out the frees that Numba has put off. Not during a capture: it calls cuMemFree."""
    _impl.flush_pending_frees()


# ------------------------------------------------------------------------------------------- streams and launches


def as_stream(stream: Any) -> Any:
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
    if isinstance(stream, Stream):
        return stream
    require()
    return _impl.new_stream() if stream is None else _impl.wrap_stream(stream)


def default_stream() -> Any:
    """Return the stream that work without a named one is on: the legacy default stream, or this thread's own.

    The latter where the bindings are told so (CUDA_PYTHON_CUDA_PER_THREAD_DEFAULT_STREAM=1, `PER_THREAD`).
    """
    require()
    return _impl.default_stream()


def is_capturing(stream: Any) -> bool:
    """Return whether a `Stream` is being captured into a graph, by numbabuf or by anything else."""
    return bool(_impl.is_capturing(stream))


def launch(kernel: Any, grid: Any, block: Any, stream: Any, *args: Any) -> None:
    """Launch a `@cuda.jit` kernel on a `Stream`."""
    configure(kernel, grid, block, stream.numba)(*args)


def configure(kernel: Any, grid: Any, block: Any, stream: Any) -> Any:
    """Return `kernel[grid, block, stream]`, for a Numba stream, without Numba's warning about small grids."""
    return _impl.configure(kernel, grid, block, stream)


def launch_shape(work: int, *, threads: int = 256, max_blocks: int = 64) -> tuple[int, int]:
    """Return (blocks, threads) for `work` items handled by a grid-stride kernel.

    The simulator starts one thread of the operating system per CUDA thread, so there the answer is (1, 1).
    """
    if SIM:
        return 1, 1
    return max(1, min(max_blocks, -(-work // threads))), threads


def copy(dst: Any, src: Any, stream: Any) -> None:
    """Queue a copy between two device arrays of equal byte size on `stream`."""
    dst.copy_to_device(src, stream=stream.numba)


def zero(array: Any, stream: Any) -> None:
    """Queue zeroing a device array of uint8 on `stream`."""
    _impl.zero(array, stream)


def synchronize() -> None:
    """Block the host until all work on the device is done, that of destroyed streams included."""
    if SIM:
        _impl.synchronize()
    else:
        require()
        cuda.synchronize()


def capturing() -> bool:
    """Return whether this thread has a capture open that was begun through this module.

    A capture in mode thread_local restricts its own thread alone (CUDA driver API,
    cuThreadExchangeStreamCaptureMode), so that one of another thread is of no interest.
    """
    return capture_here(captures) is not None


def open_capture() -> Any:
    """Return the capture that this thread has open, or None."""
    return capture_here(captures)
