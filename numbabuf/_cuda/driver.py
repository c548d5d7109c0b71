"""The CUDA backend: streams, events and graph capture over numba-cuda and cuda.core.

One of the two implementations behind `numbabuf._cuda`, and like it the only place that knows these packages. Imports
them when first needed, so that numbabuf can be imported where they, or a device, are missing.
"""

from __future__ import annotations

import functools
import os
import threading
from contextlib import contextmanager
from typing import Any

import numpy as np
from numba import cuda

from ..errors import BackendError, CaptureError
from .exchange import host_exporter
from .operands import kept
from .thread import ALLOCATION, WAIT, WRITE, Lifetime, capture_here, refusal, this_thread

PER_THREAD = os.environ.get("CUDA_PYTHON_CUDA_PER_THREAD_DEFAULT_STREAM", "0") not in ("", "0")
LEGACY, PER_THREAD_HANDLE = 1, 2  # CU_STREAM_LEGACY, CU_STREAM_PER_THREAD (cuda.h)


def require() -> None:
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


def current_device() -> int | None:
    """Return the ordinal of the device whose context is current in this thread, None without one."""
    from cuda.bindings import driver

    code, device = driver.cuCtxGetDevice()
    return int(device) if code == driver.CUresult.CUDA_SUCCESS else None


def _drop_dead_contexts() -> None:
    """Take contexts that were destroyed off this thread's stack: they answer every call, Numba's too, with an error."""
    from cuda.bindings import driver

    while current_device() is None:
        code, context = driver.cuCtxGetCurrent()
        if int(code) != 0 or int(context) == 0 or int(driver.cuCtxPopCurrent()[0]) != 0:
            return


def device_id() -> int:
    found = current_device()
    if found is None:  # as after leaving `with cuda.gpus[i]:`
        found = int(cuda.current_context().device.id)
    return found


@contextmanager
def on_device(device: int) -> Any:
    # Not `with cuda.gpus[device]`: Numba refuses to switch inside its own calls, where a finaliser may come here.
    context = cuda.gpus[device].get_primary_context()
    context.push()
    try:
        yield
    finally:
        context.pop()


def lifetime() -> Lifetime:
    extras = cuda.current_context().extras
    found = extras.get(_LIFETIME)
    if found is None:
        found = extras[_LIFETIME] = Lifetime()
    return found  # type: ignore[no-any-return]


_LIFETIME = "numbabuf.lifetime"


@functools.cache
def _watch_resets() -> None:
    """Have the objects of a context told when Numba resets it: their memory is gone then, the pinned part too.

    Numba has no callback for it. `Context.reset` is what `cuda.close` and `Device.reset` come to.
    """
    from numba.cuda.cudadrv.driver import Context

    original = Context.reset

    @functools.wraps(original)
    def reset(self: Any, *args: Any, **kwargs: Any) -> Any:
        ended = self.extras.pop(_LIFETIME, None)
        if ended is not None:
            ended.end()
        return original(self, *args, **kwargs)

    Context.reset = reset


def device_name() -> str:
    name = cuda.get_current_device().name
    return name.decode() if isinstance(name, bytes) else str(name)


def empty_managed(nbytes: int) -> np.ndarray:
    return cuda.managed_array(nbytes, np.uint8)  # type: ignore[no-any-return]


def settle_on_host(array: np.ndarray, stream: Stream) -> bool:
    from cuda.bindings import driver

    advise = getattr(driver, "cuMemAdvise_v2", driver.cuMemAdvise)  # the bindings of CUDA 13 have the new form alone
    prefetch = getattr(driver, "cuMemPrefetchAsync_v2", driver.cuMemPrefetchAsync)
    kinds, advice = driver.CUmemLocationType, driver.CUmem_advise
    host, device = driver.CUmemLocation(), driver.CUmemLocation()
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


def device_view(base: Any, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Any:
    interface = {
        "shape": shape,
        "strides": None,
        "data": (address(base) + offset, False),
        "typestr": dtype.str,
        "version": 3,
    }
    array = cuda.from_cuda_array_interface(interface, owner=base)
    # The typestr of a record is that of plain bytes, and Numba does not read the descriptor beside it.
    return array if dtype.names is None else array.view(dtype)


def dlpack_exporter(array: Any, start: int, owner: Any) -> Any:
    if isinstance(array, np.ndarray):
        return host_exporter(array, owner)
    from cuda.core import Buffer
    from cuda.core.utils import StridedMemoryView

    buffer = Buffer.from_handle(start, array.nbytes, owner=owner)
    return StridedMemoryView.from_buffer(buffer, tuple(array.shape), dtype=array.dtype)


REACHABLE = {2: "CUDA", 3: "CUDA pinned", 13: "CUDA managed"}
"""The memory that kernels reach, by DLPack's DLDeviceType."""


def from_dlpack(tensor: Any, stream: Any) -> Any:
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
    return cuda.from_cuda_array_interface(interface, owner=view)


def is_out_of_memory(error: BaseException) -> bool:
    code = getattr(error, "code", None)
    return getattr(code, "name", "") == "CUDA_ERROR_OUT_OF_MEMORY" or code == 2


def is_capture_error(error: BaseException) -> bool:
    # numba-cuda and cuda.core have exception types of their own; both name the driver's error in their text
    return "STREAM_CAPTURE" in f"{getattr(error, 'code', '')!r} {error}"


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


def zero(array: Any, stream: Stream) -> None:
    from numba.cuda.cudadrv.driver import device_memset

    device_memset(array, 0, array.nbytes, stream=stream.numba)


def _query(name: str, handle: Any) -> bool:
    """Return whether a stream's or an event's work is done.

    Asked of the driver itself, as Numba logs an error each time that the answer is "not yet".
    """
    from cuda.bindings import driver
    from numba.cuda.cudadrv.driver import CudaAPIError

    (code,) = getattr(driver, name)(handle)
    if code not in (driver.CUresult.CUDA_SUCCESS, driver.CUresult.CUDA_ERROR_NOT_READY):
        raise CudaAPIError(code, f"Call to {name} results in {code.name}")
    return bool(code == driver.CUresult.CUDA_SUCCESS)


class Stream:
    """A CUDA stream in the three forms its users want: for Numba, for cuda.core and as a bare handle.

    Attributes
    ----------
    numba
        The Numba stream; what kernels are launched on (``kernel[grid, block, stream.numba]``).
    core
        The cuda.core stream, which graphs are launched on.
    handle : int
        The driver's handle; 0 for the legacy default stream however it was named.
    thread
        None, or for a per-thread default stream the token of the thread whose stream it is: the same handle means
        another stream in every thread.
    """

    __slots__ = ("__weakref__", "core", "handle", "numba", "thread")

    def __init__(self, core: Any, thread: Any = None) -> None:
        self.core = core
        self.handle = int(core.handle)
        self.thread = thread
        self.numba = cuda.external_stream(self.handle)
        self.numba.owner = core  # whoever holds the Numba stream keeps the driver's stream alive

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle

    @property
    def device(self) -> int:
        """The ordinal of the device that runs the stream's work; of a default stream, the current one."""
        return device_id() if self.handle == 0 or self.thread is not None else int(self.core.device.device_id)

    @property
    def closed(self) -> bool:
        """Whether the stream was closed through cuda.core; the driver may have given its handle to another by now."""
        return int(self.core.handle) != self.handle

    @property
    def elsewhere(self) -> bool:
        """Whether this is another thread's per-thread default stream, on which this thread can queue nothing."""
        return self.thread is not None and self.thread is not this_thread.token

    def synchronize(self) -> None:
        """Block until all work queued so far is done; raises what that work raised."""
        if self.elsewhere:
            cuda.synchronize()
        else:
            self.core.sync()

    def query(self) -> bool:
        """Return whether all work queued so far is done; raises what that work raised."""
        if self.elsewhere:
            cuda.synchronize()
            return True
        return _query("cuStreamQuery", self.handle)


def new_stream() -> Stream:
    return Stream(_core_device().create_stream())  # non-blocking by cuda.core's default


def default_stream() -> Stream:
    if PER_THREAD:
        return _own_default()
    found = _legacy()
    return found


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


def wrap_stream(stream: Any) -> Stream:
    from cuda.core import Stream as CoreStream

    if isinstance(stream, int) and not isinstance(stream, bool):
        handle = stream
    elif isinstance(stream, CoreStream):
        handle = int(stream.handle)
    elif hasattr(stream, "__cuda_stream__"):
        version, handle = map(int, stream.__cuda_stream__()[:2])
        if version != 0:
            raise TypeError(
                f"{stream!r} speaks version {version} of __cuda_stream__; version 0 is known: give its handle as an int"
            )
    else:
        raise TypeError(f"{stream!r} is no stream: give a Numba or cuda.core stream, or an object with __cuda_stream__")
    if handle == 0:
        return default_stream()
    if handle == LEGACY:
        return _legacy()
    if handle == PER_THREAD_HANDLE:
        return _own_default()
    wrapped = Stream(stream if isinstance(stream, CoreStream) else CoreStream.from_handle(handle))
    if not isinstance(stream, (int, CoreStream)):
        wrapped.numba.owner = stream
    return wrapped


def is_capturing(stream: Stream) -> bool:
    from cuda.bindings import driver

    if stream.handle in (0, LEGACY) or stream.elsewhere:
        return False  # the legacy default stream cannot be captured, and asking it ends the captures of others
    code, status = driver.cuStreamIsCapturing(stream.handle)
    return code == driver.CUresult.CUDA_SUCCESS and status != driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE


def _core_device() -> Any:
    from cuda.core import Device

    device = Device(device_id())
    device.set_current()
    return device


_configuring = threading.Lock()


def configure(kernel: Any, grid: Any, block: Any, stream: Any) -> Any:
    """Return `kernel[grid, block, stream]` without Numba's warning about grids below 128 blocks.

    A small piece of work is a small grid on purpose. The switch is put back under a lock; what a launch of the user's
    in another thread could miss in between is that warning.
    """
    from numba.cuda.core import config

    with _configuring:
        before = config.CUDA_LOW_OCCUPANCY_WARNINGS
        config.CUDA_LOW_OCCUPANCY_WARNINGS = 0
        try:
            return kernel[grid, block, stream]
        finally:
            config.CUDA_LOW_OCCUPANCY_WARNINGS = before


class Event:
    """A timing-free event, made once and recorded again and again."""

    __slots__ = ("_event",)

    def __init__(self, device: int | None = None) -> None:
        if device is None or device == current_device():
            self._event = cuda.event(timing=False)
        else:  # the driver records an event only on streams of the context that it was made in
            with on_device(device):
                self._event = cuda.event(timing=False)

    def record(self, stream: Stream) -> None:
        """Mark the work queued on `stream` so far; refused for another thread's per-thread default stream."""
        if stream.elsewhere:
            raise RuntimeError("a per-thread default stream can be recorded by its own thread alone")
        self._event.record(stream.numba)

    def query(self) -> bool:
        """Return whether the marked work is done."""
        return _query("cuEventQuery", self._event.handle)

    def synchronize(self) -> None:
        """Block the host until the marked work is done."""
        self._event.synchronize()

    def wait(self, stream: Stream) -> None:
        """Make later work on `stream` wait for the marked work; the host does not wait."""
        if stream.elsewhere:
            raise RuntimeError("a per-thread default stream can be made to wait by its own thread alone")
        self._event.wait(stream.numba)


# --------------------------------------------------------------------------------------------------------- capture

_capture_lock = threading.Lock()
captures: dict[int, Capture] = {}  # thread -> the capture it has open
_originals: dict[tuple[Any, str], Any] = {}


class Graph:
    """An instantiated graph and everything its nodes read or write.

    cuda.core keeps no operand alive; `operands` does, until `close`.
    """

    __slots__ = ("_exec", "launch_on", "operands")

    def __init__(self, executable: Any, operands: list[Any]) -> None:
        self._exec = executable
        self.operands = operands
        self.launch_on = executable.launch
        """`launch_on(stream.core)` queues one replay: the hot path's only driver call."""

    def close(self) -> None:
        """Destroy the graph; the caller has waited for its replays."""
        if self._exec is not None:
            self.launch_on = None
            self._exec.close()
            self._exec = None
            self.operands = []


class Capture:
    """Records the work queued on one stream into a graph, and who its operands are.

    `begin`, then launches on the stream, then `end` (a `Graph`) or `abort`. While it is open Numba's pending frees are
    put off (cuMemFree is forbidden in a capture), and launches by this thread on a stream that is not part of the
    capture are refused: they would run at once and be missing from every replay.
    """

    def __init__(self, stream: Stream, *, dry: bool = False) -> None:
        self.stream = stream
        self.dry = dry
        self.token: Any = None
        self._thread = 0
        self._operands: list[Any] = []
        self._builder: Any = None
        self._deferral: Any = None

    def begin(self) -> None:
        thread = threading.get_ident()
        with _capture_lock:
            if capture_here(captures) is not None:
                raise CaptureError("this thread already has a capture open: end it before beginning another")
            _hook()
            self._thread, self.token = thread, this_thread.token
            captures[thread] = self
        try:
            self._deferral = cuda.defer_cleanup()
            self._deferral.__enter__()
            self._builder = self.stream.core.create_graph_builder()
            # thread_local: another thread may go on allocating and synchronising, this one may not. relaxed: this one
            # may load code, too (CUDA driver API, cuThreadExchangeStreamCaptureMode).
            self._builder.begin_building("relaxed" if self.dry else "thread_local")
        except BaseException:
            self._leave()
            raise

    def end(self) -> Graph:
        if self.token is not this_thread.token:
            self.abort()
            raise CaptureError(
                "a capture was ended in another thread than it was begun in, which the driver refuses: leave its block "
                "in the thread that entered it. Nothing was captured"
            )
        operands = self._operands
        try:
            executable = self._builder.end_building().complete()
        except Exception as error:
            raise CaptureError(
                f"the driver refused the capture ({error}). Usual causes: a kernel compiled or loaded for the first "
                "time inside it (launch it once before), a synchronisation, or an allocation"
            ) from error
        finally:
            self._leave()
        return Graph(executable, operands)

    def abort(self) -> None:
        """Give the capture up; the stream is usable again, but for one that is given up in another thread.

        The driver ends a capture in its own thread alone, and that one may be gone. What ends it here is the end of its
        stream: that is `closed` then, and its owner takes another.
        """
        try:
            if self.token is not this_thread.token:
                self._give_stream_up()
            elif self._builder is not None:
                self._builder.end_building()
        except Exception:  # an invalidated capture reports itself here; the stream has left capture mode either way
            pass
        finally:
            self._leave()

    def _give_stream_up(self) -> None:
        """Have the driver's stream destroyed when the builder goes: Numba's cache of launches shares it."""
        from numba.cuda.dispatcher import CUDADispatcher

        self.stream.core.close()
        forget = getattr(CUDADispatcher.configure, "cache_clear", None)
        if forget is not None:
            forget()

    def _leave(self) -> None:
        self._operands = []  # the graph's alone from here on: closing it lets them go
        with _capture_lock:
            # By the thread that began it: a capture may be dropped in another, and a later thread may have its number.
            if captures.get(self._thread) is self:
                del captures[self._thread]
            if not captures:
                _unhook()
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

    def load(self, compile: Any) -> None:
        """Have a kernel compiled and loaded outside: this driver loads nothing in a capture, a relaxed one included.

        What a throw-away capture has recorded so far is not wanted: it is left, and begun anew.
        """
        builder, self._builder = self._builder, None
        try:
            builder.end_building()
        except Exception:  # the refused load has invalidated the capture
            pass
        builder.close()
        compile()
        self._builder = self.stream.core.create_graph_builder()
        self._builder.begin_building("relaxed")

    def keep(self, operand: Any) -> None:
        """Keep `operand` alive as long as the graph."""
        self._operands.extend(kept(operand))

    def check(self, stream: Any, what: str) -> None:
        """Refuse work on a stream that the capture does not see."""
        handle = int(getattr(stream, "handle", stream) or 0)
        if handle == self.stream.handle:
            return
        from numba.cuda.cudadrv.driver import driver

        if not handle or int(driver.cuStreamIsCapturing(handle)) == 0:
            raise CaptureError(
                f"{what} was queued on another stream while a graph is captured, so that no replay would run it: "
                f"give it the step's stream"
            )


def _hook() -> None:
    """Make Numba's launches and copies tell the open captures about their operands, and refuse what none can hold.

    Neither the driver nor cuda.core refers to the Python objects behind a kernel's arguments, and Numba has no
    callback that sees them, so the functions that queue work are wrapped while a capture is open. What allocates or
    waits is refused before the driver is asked: its own refusal would end the capture.
    """
    if _originals:
        return
    from numba.cuda.cudadrv import driver as numba_driver
    from numba.cuda.cudadrv.devicearray import DeviceNDArray, DeviceNDArrayBase
    from numba.cuda.dispatcher import CUDADispatcher

    launch = CUDADispatcher.call

    def call(self: Any, args: Any, *configuration: Any, **options: Any) -> Any:
        capture = capture_here(captures)
        if capture is not None:
            # numba-cuda 0.30 gives one object, earlier ones give grid, block, stream and shared memory
            given = (*configuration, *options.values())
            stream = given[0].stream if hasattr(given[0], "stream") else given[2]
            capture.check(stream, f"kernel {self.py_func.__name__}")
            capture.keep(args)
            if capture.dry:
                try:
                    return launch(self, args, *configuration, **options)
                except Exception as error:
                    if not is_capture_error(error):
                        raise
                capture.load(lambda: self.compile(tuple(self.typeof_pyval(arg) for arg in args)))
        return launch(self, args, *configuration, **options)

    def wrap_copy(owner: Any, name: str, *, into_nothing: bool) -> Any:
        original = getattr(owner, name)

        def copy(target: Any, source: Any = None, *rest: Any, **options: Any) -> Any:
            capture = capture_here(captures)
            if capture is not None:
                stream = options.get("stream", rest[-1] if len(rest) == (1 if into_nothing else 2) else 0)
                capture.check(stream, name)
                if source is None:
                    raise CaptureError(
                        f"{name} without a target cannot be captured: give it a pinned array to write to"
                    )
                capture.keep((target, source))
            return original(target, source, *rest, **options)

        return copy

    def wrap_refusal(owner: Any, name: str, what: str, remedy: str) -> Any:
        original = getattr(owner, name)

        def refuse(*args: Any, **options: Any) -> Any:
            if capture_here(captures) is not None:
                raise CaptureError(refusal(what, remedy))
            return original(*args, **options)

        return refuse

    _replace(CUDADispatcher, "call", call)
    for name in ("copy_to_device", "copy_to_host"):
        _replace(DeviceNDArrayBase, name, wrap_copy(DeviceNDArrayBase, name, into_nothing=True))
    for name in ("device_to_device", "device_memset"):
        _replace(numba_driver, name, wrap_copy(numba_driver, name, into_nothing=False))
    for owner, name in (
        (numba_driver.Context, "memalloc"), (numba_driver.Context, "memhostalloc"),
        (numba_driver.Context, "memallocmanaged"), (numba_driver.Context, "mempin"),
    ):  # fmt: skip
        _replace(owner, name, wrap_refusal(owner, name, *ALLOCATION))
    for name in ("__setitem__", "setitem"):
        _replace(DeviceNDArray, name, wrap_refusal(DeviceNDArray, name, *WRITE))
    for owner in (numba_driver.Context, numba_driver.Stream, numba_driver.Event):
        _replace(owner, "synchronize", wrap_refusal(owner, "synchronize", *WAIT))


def _replace(owner: Any, name: str, function: Any) -> None:
    _originals[owner, name] = getattr(owner, name)
    setattr(owner, name, function)


def _unhook() -> None:
    for (owner, name), original in _originals.items():
        setattr(owner, name, original)
    _originals.clear()
