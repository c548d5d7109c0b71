"""The one interface that both backends implement, declared once: mypy holds `driver` and `simulator` against it.

A backend is a module. What it offers under these names is what `numbabuf._cuda` shows; the docstrings are here and
nowhere else. Sits below both backends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from .open_captures import OpenCapture
from .thread import Lifetime

__all__ = [
    "Backend",
    "DeviceArray",
    "Devices",
    "Event",
    "Graph",
    "Memory",
    "NumbaStream",
    "Stream",
    "StreamLike",
    "SupportsCudaArray",
    "SupportsCudaStream",
    "SupportsDLPack",
]


class SupportsCudaStream(Protocol):
    """A stream of another library: torch, CuPy, cuda.core and whatever else speaks the protocol's version 0."""

    def __cuda_stream__(self) -> tuple[int, int]:
        """(version of the protocol, handle)."""


class NumbaStream(Protocol):
    """What ``numba.cuda.stream()`` returns; what kernels are launched on."""

    def synchronize(self) -> None:
        """Block until all work queued so far is done."""


StreamLike = SupportsCudaStream | NumbaStream | int
"""What users may give as a stream; see `numbabuf._cuda.as_stream`."""


class SupportsCudaArray(Protocol):
    """An array on a GPU, whatever library made it."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Address, shape and type of its memory."""


class SupportsDLPack(Protocol):
    """A tensor of another library."""

    def __dlpack_device__(self) -> tuple[int, int]:
        """(kind of memory, device)."""

    def __dlpack__(self, *, stream: int | None = ...) -> object:
        """The capsule."""


class DeviceArray(Protocol):
    """A device array of Numba's, in the simulator its stand-in."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As in NumPy."""

    @property
    def dtype(self) -> np.dtype:
        """As in NumPy."""

    @property
    def size(self) -> int:
        """As in NumPy."""

    @property
    def nbytes(self) -> int:
        """As in NumPy."""

    def copy_to_device(self, ary: Any, stream: NumbaStream | int = ...) -> None:
        """Write the contents of `ary` to this array, in the order of the stream."""

    def copy_to_host(self, ary: Any = ..., stream: NumbaStream | int = ...) -> Any:
        """Read this array, into `ary` where one is given, in the order of the stream."""


class Stream(Protocol):
    """A stream in the three forms its users want: for Numba, for graphs and as a bare handle.

    Attributes
    ----------
    core
        What graphs are launched on: a cuda.core stream.
    handle : int
        The driver's handle; 0 for the legacy default stream however it was named.
    owner
        What keeps the driver's stream alive: the user's own object, where there is one.
    raw
        The handle as the driver's calls take it fastest.
    thread
        None, or for a per-thread default stream the token of the thread whose stream it is: the same handle means
        another stream in every thread.
    """

    core: Any
    handle: int
    owner: object | None
    raw: Any
    thread: object | None

    @property
    def numba(self) -> Any:
        """The Numba stream; what kernels are launched on (``kernel[grid, block, stream.numba]``)."""

    @property
    def device(self) -> int:
        """The ordinal of the device that runs the stream's work; of a default stream, the current one."""

    @property
    def closed(self) -> bool:
        """Whether the stream was closed through cuda.core; the driver may have given its handle to another by now."""

    @property
    def elsewhere(self) -> bool:
        """Whether this is another thread's per-thread default stream, on which this thread can queue nothing."""

    def synchronize(self) -> None:
        """Block until all work queued so far is done; raises what that work raised."""

    def query(self) -> bool:
        """Return whether all work queued so far is done; raises what that work raised."""


class Event(Protocol):
    """A timing-free event, made once and recorded again and again, on streams of the device that it was made on."""

    def record(self, stream: Stream) -> None:
        """Mark the work queued on `stream` so far; refused for another thread's per-thread default stream."""

    def query(self) -> bool:
        """Return whether the marked work is done."""

    def synchronize(self) -> None:
        """Block the host until the marked work is done."""

    def wait(self, stream: Stream) -> None:
        """Make later work on `stream` wait for the marked work; the host does not wait."""


class Graph(Protocol):
    """An instantiated graph and everything that its nodes read or write: `operands` keeps that alive until `close`.

    Attributes
    ----------
    launch_on
        ``launch_on(stream.core)`` queues one replay: the hot path's only driver call. None once it is closed.
    operands : list
    """

    launch_on: Any
    operands: list[Any]

    def close(self) -> None:
        """Destroy the graph; the caller has waited for its replays."""


# by names that the members of `Backend` do not hide
_Stream = Stream
_Event = Event
_Graph = Graph


class Devices(Protocol):
    """What a backend knows of devices and contexts, and of the errors of both."""

    def require(self) -> None:
        """Make the device usable from this thread, once per thread.

        Raises
        ------
        BackendError
            There is no usable device and the simulator was not chosen.

        Notes
        -----
        Threads: the driver wants a current context in each thread that calls it; this sets the device's primary one.
        """

    def lifetime(self) -> Lifetime:
        """Return the life of the context that is current in this thread; what holds memory of it looks at `ended`.

        Notes
        -----
        `ended` turns True when Numba closes or resets the context (``cuda.close()``), before its memory goes.
        """

    def current_device(self) -> int | None:
        """Return the ordinal of the device whose context is current in this thread, None without one."""

    def device_context(self, device: int) -> contextlib.AbstractContextManager[None]:
        """Return a context manager inside which the context of `device` is current."""

    def device_id(self) -> int:
        """Return the ordinal of this thread's device."""

    def device_name(self) -> str:
        """Return the name of this thread's device, "simulator" in the simulator."""

    def synchronize(self) -> None:
        """Block the host until all work on the device is done, that of destroyed streams included."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Return whether `error` is the driver's or the host's word for no memory left."""

    def is_capture_error(self, error: BaseException) -> bool:
        """Return whether `error` is the driver's refusal of something that a capture forbids."""

    def is_context_error(self, error: BaseException) -> bool:
        """Return whether `error` is the driver's word for no context in this thread, or one that is gone."""


class Memory(Protocol):
    """How a backend makes memory, and shows it to kernels and to other libraries."""

    def empty_device(self, nbytes: int) -> DeviceArray:
        """Allocate `nbytes` > 0 of device memory: a Numba device array of uint8. Contents are undefined."""

    def empty_pinned(self, nbytes: int) -> np.ndarray:
        """Allocate `nbytes` > 0 of page-locked host memory: a NumPy array of uint8. Contents are undefined."""

    def empty_managed(self, nbytes: int) -> np.ndarray:
        """Allocate `nbytes` > 0 of managed memory: a NumPy array of uint8 (plain memory in the simulator)."""

    def settle_on_host(self, array: np.ndarray, stream: _Stream) -> bool:
        """Keep the pages of managed memory on the host, where kernels reach them over the bus.

        Without this its pages move to the device at a kernel's first touch and stay there: no use as a place to make
        room. Prefers the host, maps the pages for the device, and prefetches them to the host on `stream` (CUDA driver
        API, cuMemAdvise and cuMemPrefetchAsync). Returns whether the driver took all of it; one that does not migrates
        pages by itself, which is slower and still right.
        """

    def address(self, array: Any) -> int:
        """Return the address of the first byte of a device, pinned or managed array, as a kernel sees it.

        Unified addressing gives page-locked memory one address on the host and on the device (CUDA C++ Programming
        Guide, "Unified Virtual Address Space"), so the host's pointer serves for both.
        """

    def device_view(
        self, base: DeviceArray | np.ndarray, offset: int, shape: tuple[int, ...], dtype: np.dtype
    ) -> DeviceArray:
        """Return a typed device array over `base` from byte `offset`, without a copy.

        The view keeps `base` alive and, made over pinned or managed memory, may be given to a kernel on any stream
        (Numba refuses the NumPy array itself there). bfloat16, which Numba cannot type, is viewed as uint16.
        Cost: about 30 us; cache it.
        """

    def dlpack_exporter(self, array: DeviceArray | np.ndarray, start: int, owner: object) -> SupportsDLPack:
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

    def from_dlpack(self, tensor: SupportsDLPack, stream: _Stream | None) -> DeviceArray:
        """Return a device array over the memory of `tensor`, which it keeps alive; `stream` is a `Stream` or None.

        Raises
        ------
        BufferError
            The memory is none that kernels of this backend can reach.
        """

    def zero(self, array: DeviceArray, stream: _Stream) -> None:
        """Queue zeroing a device array of uint8 on `stream`."""

    def memory_info(self) -> tuple[int, int] | None:
        """Return (free, total) bytes of the device, or None where they are not known.

        None in the simulator and under an external memory manager that does not implement the query.
        """

    def flush_pending_frees(self) -> None:
        """Carry out the frees that Numba has put off. Not during a capture: it calls cuMemFree."""


class Backend(Devices, Memory, Protocol):
    """What a backend offers."""

    @property
    def PER_THREAD(self) -> bool:
        """Whether the default stream is each thread's own (CUDA_PYTHON_CUDA_PER_THREAD_DEFAULT_STREAM=1)."""

    @property
    def Stream(self) -> type[_Stream]:
        """The backend's stream."""

    @property
    def Event(self) -> Callable[..., _Event]:
        """The backend's event; made on that device, None for the current one."""

    @property
    def Graph(self) -> Callable[..., _Graph]:
        """The backend's graph, of what `OpenCapture.finish` returned and of the operands."""

    @property
    def Recorder(self) -> Callable[..., OpenCapture]:
        """The backend's open capture, of a stream, and dry or not; see `numbabuf._cuda.Capture`."""

    def new_stream(self) -> _Stream:
        """Return a new non-blocking stream."""

    def wrap_stream(self, stream: StreamLike) -> _Stream:
        """Return the `Stream` of what a user calls a stream; TypeError where it is none."""

    def default_stream(self) -> _Stream:
        """Return the stream that work without a named one is on: the legacy default stream, or this thread's own.

        The latter where the bindings are told so, see `PER_THREAD`.
        """

    def is_capturing(self, stream: _Stream) -> bool:
        """Return whether a `Stream` is being captured into a graph, by numbabuf or by anything else.

        A closed stream is not. Cost: 0.3 us, as the driver is asked: what another library captures is not known
        otherwise.
        """

    def configure(
        self, kernel: Any, grid: int | tuple[int, ...], block: int | tuple[int, ...], stream: NumbaStream
    ) -> Callable[..., None]:
        """Return `kernel[grid, block, stream]`, for a Numba stream, without Numba's warning about small grids."""

    def hook(self) -> None:
        """Have Numba's launches and copies tell the open captures of their operands; idempotent."""

    def unhook(self) -> None:
        """Undo `hook`: no capture is open."""
