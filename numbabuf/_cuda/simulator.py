"""The simulator backend: what Numba's simulator lacks, so that the same numbabuf calls run without a GPU.

One of the two implementations of `backend.Backend`, where the docstrings are. The simulator runs each launch at once,
so streams and events have nothing to wait for; captures are `simulator_capture`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import cuda
from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

from .exchange import host_exporter
from .open_captures import WAIT, open_capture, refusal
from .simulator_capture import Graph, NumbaStream, Recorder, RecordingStream, install
from .thread import Lifetime, become_ready, once, this_thread

if TYPE_CHECKING:
    from . import backend
    from .backend import DeviceArray, StreamLike, SupportsDLPack

__all__ = [
    "PER_THREAD", "Event", "Graph", "Recorder", "Stream", "address", "configure", "current_device", "default_stream",
    "device_context", "device_id", "device_name", "device_view", "dlpack_exporter", "empty_device", "empty_managed",
    "empty_pinned", "flush_pending_frees", "from_dlpack", "hook", "is_capture_error", "is_capturing",
    "is_context_error", "is_out_of_memory", "lifetime", "memory_info", "new_stream", "require", "settle_on_host",
    "synchronize", "unhook", "wrap_stream", "zero",
]  # fmt: skip

PER_THREAD = False

# -------------------------------------------------------------------------------------------------------- the context

_life = [Lifetime()]


def require() -> None:
    if not this_thread.ready or this_thread.lifetime.ended:
        become_ready(_attach)


def _attach() -> Lifetime:
    install()
    _watch_closing()
    return _life[0]


@once
def _watch_closing() -> None:
    original = cuda.close

    def close() -> None:
        ended, _life[0] = _life[0], Lifetime()
        ended.end()
        original()

    cuda.close = close


def lifetime() -> Lifetime:
    require()
    return _life[0]


def current_device() -> int | None:
    return 0


def device_context(device: int) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def device_id() -> int:
    require()
    return 0


def device_name() -> str:
    require()
    return "simulator"


def synchronize() -> None:
    """All work is already done; refused in a capture, as on the driver."""
    if open_capture() is not None:
        raise refusal(*WAIT)


# -------------------------------------------------------------------------------------------------------------- memory


def empty_device(nbytes: int) -> DeviceArray:
    require()
    return cuda.device_array(nbytes, np.uint8)  # type: ignore[no-any-return]


def empty_pinned(nbytes: int) -> np.ndarray:
    require()
    return cuda.pinned_array(nbytes, np.uint8)  # type: ignore[no-any-return]


def empty_managed(nbytes: int) -> np.ndarray:
    require()
    return np.empty(nbytes, np.uint8)


def settle_on_host(array: np.ndarray, stream: backend.Stream) -> bool:
    return True


def _host(array: Any) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array._ary  # type: ignore[no-any-return]


def address(array: Any) -> int:
    return int(_host(array).ctypes.data)


def device_view(base: DeviceArray | np.ndarray, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> DeviceArray:
    if dtype.kind == "V" and dtype.name == "bfloat16":
        dtype = np.dtype(np.uint16)
    return FakeCUDAArray(np.ndarray(shape, dtype, buffer=_host(base), offset=offset))  # type: ignore[no-any-return]


def dlpack_exporter(array: DeviceArray | np.ndarray, start: int, owner: object) -> SupportsDLPack:
    return host_exporter(_host(array), owner)


def from_dlpack(tensor: SupportsDLPack, stream: backend.Stream | None) -> DeviceArray:
    require()
    kind = int(tensor.__dlpack_device__()[0])
    if kind not in (1, 3):
        raise BufferError(
            f"a tensor in memory of DLPack device type {kind} was given; the simulator's device is the CPU (1, 3): "
            "give a tensor of the CPU, or run without NUMBA_ENABLE_CUDASIM"
        )
    return FakeCUDAArray(np.from_dlpack(tensor))  # type: ignore[no-any-return, arg-type]


def zero(array: DeviceArray, stream: backend.Stream) -> None:
    _host(array)[...] = 0


def memory_info() -> tuple[int, int] | None:
    require()
    return None


def flush_pending_frees() -> None:
    """Nothing is put off here."""


# -------------------------------------------------------------------------------------------------------------- errors


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError)


def is_capture_error(error: BaseException) -> bool:
    return False


def is_context_error(error: BaseException) -> bool:
    return False


# -------------------------------------------------------------------------------------------------- streams and events


class Stream:
    """See `backend.Stream`; here all work on it is done at once."""

    __slots__ = ("__weakref__", "closed", "core", "handle", "numba", "owner", "thread")

    elsewhere = False
    device = 0
    raw = None

    def __init__(self, numba: RecordingStream) -> None:
        self.numba: Any = numba
        self.core = self
        self.handle = id(numba)
        self.closed = False
        self.owner: object | None = None
        self.thread: object | None = None

    def synchronize(self) -> None:
        synchronize()

    def query(self) -> bool:
        return True


def new_stream() -> Stream:
    return Stream(RecordingStream())


def default_stream() -> Stream:
    require()
    return wrap_stream(0)


def is_capturing(stream: backend.Stream) -> bool:
    return not stream.closed and getattr(stream.numba, "capture", None) is not None


def wrap_stream(stream: StreamLike) -> Stream:
    if isinstance(stream, RecordingStream):
        return Stream(stream)
    if hasattr(stream, "__cuda_stream__") and int(stream.__cuda_stream__()[0]) != 0:
        raise TypeError(
            f"{stream!r} speaks version {stream.__cuda_stream__()[0]} of __cuda_stream__; version 0 is known: give its "
            "handle as an int"
        )
    if isinstance(stream, NumbaStream) or hasattr(stream, "__cuda_stream__") or stream == 0:
        wrapped = new_stream()
        wrapped.owner = stream  # one user stream, wrapped twice, is still told to be one: same handle and owner
        wrapped.handle = 0 if stream == 0 else id(stream)
        return wrapped
    raise TypeError(f"{stream!r} is no stream: give a Numba or cuda.core stream, or an object with __cuda_stream__")


def configure(
    kernel: Any, grid: int | tuple[int, ...], block: int | tuple[int, ...], stream: backend.NumbaStream
) -> Callable[..., None]:
    return kernel[grid, block, stream]  # type: ignore[no-any-return]


class Event:
    """See `backend.Event`; recorded work is always done already."""

    __slots__ = ()

    def __init__(self, device: int | None = None) -> None:
        """There is one device."""

    def record(self, stream: backend.Stream) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        synchronize()

    def wait(self, stream: backend.Stream) -> None:
        pass


# ------------------------------------------------------------------------------------------------------------ captures


def hook() -> None:
    """What captures need is replaced for good, by `require`."""


def unhook() -> None:
    """See `hook`."""
