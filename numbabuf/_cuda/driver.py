"""The CUDA backend over numba-cuda and cuda.core: devices, memory, streams and events; captures are `driver_capture`'s.

One of the two implementations of `backend.Backend`, where the docstrings are, and like it the only place that knows
these packages. Imports cuda.core when first needed, so that numbabuf can be imported where it, or a device, is missing.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import cuda

try:
    from cuda.bindings import driver as bindings
except ImportError:  # numba without numba-cuda: `require` refuses, with the remedy
    bindings = None

from ..errors import BackendError
from .driver_capture import Graph, Recorder, hook, is_capture_error, unhook
from .exchange import host_exporter
from .thread import Lifetime, become_ready, once, this_thread

if TYPE_CHECKING:
    from . import backend
    from .backend import DeviceArray, NumbaStream, StreamLike, SupportsDLPack

__all__ = [
    "PER_THREAD", "Event", "Graph", "Recorder", "Stream", "address", "configure", "current_device", "default_stream",
    "device_context", "device_id", "device_name", "device_view", "dlpack_exporter", "empty_device", "empty_managed",
    "empty_pinned", "flush_pending_frees", "from_dlpack", "hook", "is_capture_error", "is_capturing",
    "is_context_error", "is_out_of_memory", "lifetime", "memory_info", "new_stream", "require", "settle_on_host",
    "synchronize", "unhook", "wrap_stream", "zero",
]  # fmt: skip

PER_THREAD = os.environ.get("CUDA_PYTHON_CUDA_PER_THREAD_DEFAULT_STREAM", "0") not in ("", "0")
LEGACY, PER_THREAD_HANDLE = 1, 2  # CU_STREAM_LEGACY, CU_STREAM_PER_THREAD (cuda.h)


# -------------------------------------------------------------------------------------------------------- the context


def require() -> None:
    if not this_thread.ready or this_thread.lifetime.ended:
        become_ready(_attach)


def _attach() -> Lifetime:
    """Check for numba-cuda and a device, and make the device's primary context current in this thread."""
    try:
        from cuda.core import Device  # noqa: F401
    except ImportError:
        raise ImportError("the package numba-cuda (with cuda-core) is not installed") from None
    _watch_resets()
    if current_device() is None:
        _drop_dead_contexts()
        # Numba remembers no context outside its own calls, so this looks at the driver and pushes one.
        cuda.current_context()
    return _current_lifetime()


def current_device() -> int | None:
    code, device = bindings.cuCtxGetDevice()
    return int(device) if code is _SUCCESS else None


def _drop_dead_contexts() -> None:
    """Take contexts that were destroyed off this thread's stack: they answer every call, Numba's too, with an error."""
    while current_device() is None:
        code, context = bindings.cuCtxGetCurrent()
        if int(code) != 0 or int(context) == 0 or int(bindings.cuCtxPopCurrent()[0]) != 0:
            return


def device_id() -> int:
    require()
    found = current_device()
    if found is None:  # as after leaving `with cuda.gpus[i]:`
        found = int(cuda.current_context().device.id)
    return found


def device_context(device: int) -> AbstractContextManager[None]:
    # Not `with cuda.gpus[device]`: Numba refuses to switch inside its own calls, where a finaliser may come here.
    return _current(cuda.gpus[device].get_primary_context())


@contextmanager
def _current(context: Any) -> Iterator[None]:
    """A context of Numba's on top of the thread's stack, and off it again."""
    context.push()
    try:
        yield
    finally:
        context.pop()


def lifetime() -> Lifetime:
    require()
    return _current_lifetime()


def _current_lifetime() -> Lifetime:
    extras = cuda.current_context().extras
    found = extras.get(_LIFETIME)
    if found is None:
        found = extras[_LIFETIME] = Lifetime()
    return found  # type: ignore[no-any-return]


_LIFETIME = "numbabuf.lifetime"


@once
def _watch_resets() -> None:
    """Have the objects of a context told when Numba resets it: their memory is gone then, the pinned part too.

    Numba has no callback for it. `Context.reset` is what `cuda.close` and `Device.reset` come to.
    """
    from numba.cuda.cudadrv.driver import Context

    original = Context.reset

    @functools.wraps(original)
    def reset(self: Any, *args: Any, **kwargs: Any) -> None:
        ended = self.extras.pop(_LIFETIME, None)
        if ended is not None:
            ended.end()
        # Numba releases the primary context after this, a reference that it may not have: newer ones leave it to
        # cuda.core to retain it, once a process. The last one gone, every later call of every thread would find the
        # context destroyed.
        bindings.cuDevicePrimaryCtxRetain(self.device.id)
        _code.extend(self.modules.values())
        # cuda.close() has taken every context off the thread's stack by now, and an event that waits for its turn to be
        # destroyed wants one: without this the reset ends half way, and the devices behind this one are not reset.
        with _current(self):
            original(self, *args, **kwargs)

    Context.reset = reset


_code: list[Any] = []
"""Numba's modules of contexts that are gone, kept loaded.

Numba would unload them with their context, and go on launching their kernels by the old handles. A library belongs to
no context (CUDA driver API, "Library Management"), so what is loaded stays right in the next one.
"""


def device_name() -> str:
    require()
    name = cuda.get_current_device().name
    return name.decode() if isinstance(name, bytes) else str(name)


def synchronize() -> None:
    require()
    cuda.synchronize()


# -------------------------------------------------------------------------------------------------------------- memory


def empty_device(nbytes: int) -> DeviceArray:
    require()
    return cuda.device_array(nbytes, np.uint8)  # type: ignore[no-any-return]


def empty_pinned(nbytes: int) -> np.ndarray:
    require()
    return cuda.pinned_array(nbytes, np.uint8)  # type: ignore[no-any-return]


def empty_managed(nbytes: int) -> np.ndarray:
    require()
    return cuda.managed_array(nbytes, np.uint8)  # type: ignore[no-any-return]


def settle_on_host(array: np.ndarray, stream: backend.Stream) -> bool:
    # the bindings of CUDA 13 have the new form alone
    advise = getattr(bindings, "cuMemAdvise_v2", bindings.cuMemAdvise)
    prefetch = getattr(bindings, "cuMemPrefetchAsync_v2", bindings.cuMemPrefetchAsync)
    kinds, advice = bindings.CUmemLocationType, bindings.CUmem_advise
    host, device = bindings.CUmemLocation(), bindings.CUmemLocation()
    host.type, host.id = kinds.CU_MEM_LOCATION_TYPE_HOST, 0
    device.type, device.id = kinds.CU_MEM_LOCATION_TYPE_DEVICE, device_id()
    where = address(array), array.nbytes
    return all(
        int(result[0]) == 0
        for result in (
            advise(*where, advice.CU_MEM_ADVISE_SET_PREFERRED_LOCATION, host),
            advise(*where, advice.CU_MEM_ADVISE_SET_ACCESSED_BY, device),
            prefetch(*where, host, 0, stream.handle),
        )
    )


def address(array: Any) -> int:
    if isinstance(array, np.ndarray):
        return int(array.ctypes.data)
    return int(array.__cuda_array_interface__["data"][0])


def device_view(base: DeviceArray | np.ndarray, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> DeviceArray:
    if dtype.kind == "V" and dtype.name == "bfloat16":
        dtype = np.dtype(np.uint16)
    interface = {
        "shape": shape,
        "strides": None,
        "data": (address(base) + offset, False),
        "typestr": dtype.str,
        "version": 3,
    }
    array = cuda.from_cuda_array_interface(interface, owner=base)
    # The typestr of a record is that of plain bytes, and Numba does not read the descriptor beside it.
    return array if dtype.names is None else array.view(dtype)  # type: ignore[no-any-return]


def dlpack_exporter(array: DeviceArray | np.ndarray, start: int, owner: object) -> SupportsDLPack:
    if isinstance(array, np.ndarray):
        return host_exporter(array, owner)
    from cuda.core import Buffer
    from cuda.core.utils import StridedMemoryView

    buffer = Buffer.from_handle(start, array.nbytes, owner=owner)
    return StridedMemoryView.from_buffer(buffer, tuple(array.shape), dtype=array.dtype)  # type: ignore[no-any-return]


REACHABLE = {2: "CUDA", 3: "CUDA pinned", 13: "CUDA managed"}
"""The memory that kernels reach, by DLPack's DLDeviceType."""


def from_dlpack(tensor: SupportsDLPack, stream: backend.Stream | None) -> DeviceArray:
    require()
    from cuda.core.utils import StridedMemoryView

    kind = int(tensor.__dlpack_device__()[0])
    if kind not in REACHABLE:
        raise BufferError(
            f"a tensor in memory of DLPack device type {kind} was given; kernels reach {', '.join(REACHABLE.values())} "
            f"({', '.join(map(str, REACHABLE))}): copy it to the GPU first"
        )
    number = int(tensor.__dlpack_device__()[1])
    if kind == 2 and number != device_id():
        raise BackendError(
            f"a tensor of device {number} was given and device {device_id()} is current: kernels would fault on it. "
            f"Enter `with cuda.gpus[{number}]:` (numba.cuda) first, or copy the tensor"
        )
    # In DLPack -1 asks for no order, and the default stream's handle, 0, is written 1.
    view = StridedMemoryView.from_dlpack(tensor, -1 if stream is None else stream.handle or 1)
    dtype = np.dtype(view.dtype)
    interface = {
        "shape": tuple(view.shape),
        "strides": None if view.strides is None else tuple(n * dtype.itemsize for n in view.strides),
        "data": (int(view.ptr), bool(view.readonly)),
        "typestr": "<u2" if dtype.name == "bfloat16" else dtype.str,
        "version": 3,
    }
    return cuda.from_cuda_array_interface(interface, owner=view)  # type: ignore[no-any-return]


def is_out_of_memory(error: BaseException) -> bool:
    code = getattr(error, "code", None)
    return isinstance(error, MemoryError) or getattr(code, "name", "") == "CUDA_ERROR_OUT_OF_MEMORY" or code == 2


def is_context_error(error: BaseException) -> bool:
    text = f"{getattr(error, 'code', '')!r} {error}"
    return "CUDA_ERROR_INVALID_CONTEXT" in text or "CUDA_ERROR_CONTEXT_IS_DESTROYED" in text


def flush_pending_frees() -> None:
    manager = cuda.current_context().memory_manager
    pending = getattr(manager, "deallocations", None)  # an external memory manager need not keep such a queue
    while pending is not None:
        try:
            pending.clear()
            return
        except Exception as error:
            # Numba keeps its queue beyond a context that was closed with frees in it, whose addresses mean nothing in
            # the next one. What fails has left the queue, so this ends.
            if not is_context_error(error) and "CUDA_ERROR_INVALID_VALUE" not in f"{error}":
                raise


def memory_info() -> tuple[int, int] | None:
    require()
    try:
        info = cuda.current_context().get_memory_info()
    except NotImplementedError:
        return None
    return int(info[0]), int(info[1])


def zero(array: DeviceArray, stream: backend.Stream) -> None:
    from numba.cuda.cudadrv.driver import device_memset

    device_memset(array, 0, array.nbytes, stream=stream.numba)


def _is_done(name: str, code: Any) -> bool:
    """Return whether the answer to a query is yes; Numba's own logs an error each time that it is "not yet"."""
    if code is _SUCCESS:
        return True
    if code is bindings.CUresult.CUDA_ERROR_NOT_READY:
        return False
    raise _error(name, code)


def _error(name: str, code: Any) -> Exception:
    """The error for a call that the driver refused, in Numba's own words."""
    from numba.cuda.cudadrv.driver import CudaAPIError

    return CudaAPIError(code, f"Call to {name} results in {code.name}")  # type: ignore[no-any-return]


# -------------------------------------------------------------------------------------------------- streams and events


class Stream:
    """See `backend.Stream`."""

    __slots__ = ("__weakref__", "_numba", "core", "handle", "owner", "raw", "thread")

    def __init__(self, core: Any, thread: object | None = None) -> None:
        self.core = self.owner = core
        self.handle = int(core.handle)
        self.raw = bindings.CUstream(self.handle)
        self.thread = thread
        self._numba: Any = None

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle

    @property
    def numba(self) -> Any:
        if self._numba is None:  # made when it is first asked for: a lease never does, and it costs 5 us
            made = cuda.external_stream(self.handle)
            made.owner = self.owner  # the Numba stream keeps the driver's stream alive
            self._numba = made
        return self._numba

    @property
    def device(self) -> int:
        return device_id() if self.handle == 0 or self.thread is not None else int(self.core.device.device_id)

    @property
    def closed(self) -> bool:
        known = getattr(self.core, "is_closed", None)  # newer versions of cuda.core say so, ten times as fast
        return int(self.core.handle) != self.handle if known is None else bool(known)

    @property
    def elsewhere(self) -> bool:
        return self.thread is not None and self.thread is not this_thread.token

    def synchronize(self) -> None:
        if self.elsewhere:
            cuda.synchronize()
        else:
            self.core.sync()

    def query(self) -> bool:
        if self.elsewhere:
            cuda.synchronize()
            return True
        return _is_done("cuStreamQuery", bindings.cuStreamQuery(self.raw)[0])


def new_stream() -> Stream:
    return Stream(_core_device().create_stream())  # non-blocking by cuda.core's default


def default_stream() -> Stream:
    require()
    return _own_default() if PER_THREAD else _legacy()


@functools.cache
def _legacy() -> Stream:
    from cuda.core import Stream as CoreStream

    # Where the switch makes handle 0 each thread's own, the stream of all threads has another name.
    return Stream(CoreStream.from_handle(LEGACY if PER_THREAD else 0))


def _own_default() -> Stream:
    """The calling thread's per-thread default stream: one object per thread."""
    found = this_thread.default
    if found is None:
        from cuda.core import Stream as CoreStream

        found = this_thread.default = Stream(CoreStream.from_handle(PER_THREAD_HANDLE), this_thread.token)
    return found  # type: ignore[no-any-return]


def _handle(stream: object) -> int:
    """The driver's handle of what a user calls a stream."""
    if isinstance(stream, int) and not isinstance(stream, bool):
        return stream
    if not hasattr(stream, "__cuda_stream__"):
        raise TypeError(f"{stream!r} is no stream: give a Numba or cuda.core stream, or an object with __cuda_stream__")
    version, handle = map(int, stream.__cuda_stream__()[:2])
    if version != 0:
        raise TypeError(
            f"{stream!r} speaks version {version} of __cuda_stream__; version 0 is known: give its handle as an int"
        )
    return handle


def wrap_stream(stream: StreamLike) -> Stream:
    from cuda.core import Stream as CoreStream

    handle = int(stream.handle) if isinstance(stream, CoreStream) else _handle(stream)
    if handle == 0:
        return default_stream()
    if handle == LEGACY:
        return _legacy()
    if handle == PER_THREAD_HANDLE:
        return _own_default()
    wrapped = Stream(stream if isinstance(stream, CoreStream) else CoreStream.from_handle(handle))
    if not isinstance(stream, (int, CoreStream)):
        wrapped.owner = stream
    return wrapped


# --- hot: a pool asks this at each lease with a stream (`python -m benchmarks pool`)
if bindings is not None:
    _SUCCESS = bindings.CUresult.CUDA_SUCCESS
    _capture_status = bindings.cuStreamIsCapturing
    _NOT_CAPTURED = bindings.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE


def is_capturing(stream: backend.Stream) -> bool:
    # The legacy default stream cannot be captured, and asking it ends the captures of others.
    if stream.handle <= LEGACY or (stream.thread is not None and stream.elsewhere) or stream.closed:
        return False
    code, status = _capture_status(stream.raw)
    return status is not _NOT_CAPTURED and int(code) == 0


def _core_device() -> Any:
    from cuda.core import Device

    device = Device(device_id())
    device.set_current()
    return device


_configuring = threading.Lock()


def configure(
    kernel: Any, grid: int | tuple[int, ...], block: int | tuple[int, ...], stream: NumbaStream
) -> Callable[..., None]:
    """See `backend.Backend`.

    A small piece of work is a small grid on purpose. The switch is put back under a lock; what a launch of the user's
    in another thread could miss in between is that warning.
    """
    from numba.cuda.core import config

    with _configuring:
        before = config.CUDA_LOW_OCCUPANCY_WARNINGS
        config.CUDA_LOW_OCCUPANCY_WARNINGS = 0
        try:
            return kernel[grid, block, stream]  # type: ignore[no-any-return]
        finally:
            config.CUDA_LOW_OCCUPANCY_WARNINGS = before


class Event:
    """See `backend.Event`."""

    # Hot: a lease on another stream than the last one's records and waits (`python -m benchmarks pool`). The driver is
    # called directly, at a third of the cost of Numba's own methods.
    __slots__ = ("_event", "_handle")

    def __init__(self, device: int | None = None) -> None:
        if device is None or device == current_device():
            self._event = cuda.event(timing=False)
        else:  # the driver records an event only on streams of the context that it was made in
            with device_context(device):
                self._event = cuda.event(timing=False)
        self._handle = bindings.CUevent(int(self._event.handle))

    def record(self, stream: backend.Stream) -> None:
        if stream.thread is not None and stream.elsewhere:
            raise RuntimeError("a per-thread default stream can be recorded by its own thread alone")
        (code,) = bindings.cuEventRecord(self._handle, stream.raw)
        if code is not _SUCCESS:
            raise _error("cuEventRecord", code)

    def query(self) -> bool:
        return _is_done("cuEventQuery", bindings.cuEventQuery(self._handle)[0])

    def synchronize(self) -> None:
        self._event.synchronize()

    def wait(self, stream: backend.Stream) -> None:
        if stream.thread is not None and stream.elsewhere:
            raise RuntimeError("a per-thread default stream can be made to wait by its own thread alone")
        (code,) = bindings.cuStreamWaitEvent(stream.raw, self._handle, 0)
        if code is not _SUCCESS:
            raise _error("cuStreamWaitEvent", code)
