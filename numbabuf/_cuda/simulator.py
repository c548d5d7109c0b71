"""The simulator backend: what Numba's simulator lacks, so that the same numbabuf calls run without a GPU.

One of the two implementations behind `numbabuf._cuda`. The simulator runs each launch at once, so streams and events
have nothing to wait for; a capture records launches and copies, and a replay runs them again. The simulator keeps a
launch's configuration on the kernel itself and runs one kernel at a time, so one lock goes round every launch.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda.simulator.cudadrv import driver
from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray
from numba.cuda.simulator.kernel import FakeCUDAKernel

from ..errors import CaptureError
from .exchange import host_exporter
from .operands import kept
from .thread import ALLOCATION, WAIT, WRITE, Lifetime, capture_here, refusal, this_thread

PER_THREAD = False

_lock = threading.RLock()
captures: dict[int, Capture] = {}  # thread -> the capture it has open
_NumbaStream = type(cuda.stream())


def require() -> None:
    """Install the recording launches, once."""
    _install()


def device_id() -> int:
    return 0


def current_device() -> int | None:
    return 0


def on_device(device: int) -> Any:
    return contextlib.nullcontext()


_life = Lifetime()


def lifetime() -> Lifetime:
    return _life


def device_name() -> str:
    return "simulator"


def empty_managed(nbytes: int) -> np.ndarray:
    return np.empty(nbytes, np.uint8)


def settle_on_host(array: np.ndarray, stream: Stream) -> bool:
    return True


def _host(array: Any) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array._ary  # type: ignore[no-any-return]


def address(array: Any) -> int:
    return int(_host(array).ctypes.data)


def device_view(base: Any, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Any:
    return FakeCUDAArray(np.ndarray(shape, dtype, buffer=_host(base), offset=offset))


def dlpack_exporter(array: Any, start: int, owner: Any) -> np.ndarray:
    return host_exporter(_host(array), owner)


def from_dlpack(tensor: Any, stream: Any) -> Any:
    kind = int(tensor.__dlpack_device__()[0])
    if kind not in (1, 3):
        raise BufferError(
            f"a tensor in memory of DLPack device type {kind} was given; the simulator's device is the CPU (1, 3): "
            "give a tensor of the CPU, or run without NUMBA_ENABLE_CUDASIM"
        )
    return FakeCUDAArray(np.from_dlpack(tensor))


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError)


def is_capture_error(error: BaseException) -> bool:
    return False


def is_context_error(error: BaseException) -> bool:
    return False


def flush_pending_frees() -> None:
    """Nothing is put off here."""


def synchronize() -> None:
    """Refuse a wait in a capture, as the driver does."""
    if capture_here(captures) is not None:
        raise CaptureError(refusal(*WAIT))


def zero(array: Any, stream: Stream) -> None:
    _host(array)[...] = 0


class _RecordingStream(_NumbaStream):  # type: ignore[misc, valid-type]
    """What kernels are launched on; knows the capture it is part of."""

    capture: Capture | None = None
    owner: Any = None

    def __bool__(self) -> bool:
        return True


class Stream:
    """A stream, in the same three forms as the driver's backend has; here all work on it is done at once."""

    __slots__ = ("__weakref__", "closed", "core", "handle", "numba", "thread")

    elsewhere = False

    def __init__(self, numba: Any) -> None:
        self.numba = numba
        self.core = self
        self.handle = id(numba)
        self.closed = False
        self.thread = None

    @property
    def device(self) -> int:
        """The simulator's only device."""
        return 0

    def synchronize(self) -> None:
        """All work is already done."""
        synchronize()

    def query(self) -> bool:
        """All work is already done."""
        return True


def new_stream() -> Stream:
    return Stream(_RecordingStream())


def default_stream() -> Stream:
    return wrap_stream(0)


def is_capturing(stream: Stream) -> bool:
    return getattr(stream.numba, "capture", None) is not None


def wrap_stream(stream: Any) -> Stream:
    if isinstance(stream, _RecordingStream):
        return Stream(stream)
    if hasattr(stream, "__cuda_stream__") and int(stream.__cuda_stream__()[0]) != 0:
        raise TypeError(
            f"{stream!r} speaks version {stream.__cuda_stream__()[0]} of __cuda_stream__; version 0 is known: give its "
            "handle as an int"
        )
    if isinstance(stream, _NumbaStream) or hasattr(stream, "__cuda_stream__") or stream == 0:
        wrapped = new_stream()
        wrapped.numba.owner = stream  # one user stream, wrapped twice, is still told to be one: same handle and owner
        wrapped.handle = 0 if stream == 0 else id(stream)
        return wrapped
    raise TypeError(f"{stream!r} is no stream: give a Numba or cuda.core stream, or an object with __cuda_stream__")


def configure(kernel: Any, grid: Any, block: Any, stream: Any) -> Any:
    """Return `kernel[grid, block, stream]`."""
    return kernel[grid, block, stream]


class Event:
    """An event; recorded work is always done already."""

    __slots__ = ()

    def __init__(self, device: int | None = None) -> None:
        """There is one device."""

    def record(self, stream: Stream) -> None:
        """Nothing to mark."""

    def query(self) -> bool:
        """Always done."""
        return True

    def synchronize(self) -> None:
        """Always done."""
        synchronize()

    def wait(self, stream: Stream) -> None:
        """Always done."""


class Graph:
    """The recorded launches, in order; their arguments stay alive with it."""

    __slots__ = ("_tape", "launch_on", "operands")

    def __init__(self, tape: list[Any], operands: list[Any]) -> None:
        self._tape = tape
        self.operands = operands
        self.launch_on: Any = self._replay

    def _replay(self, stream: Any) -> None:
        with _lock:
            for run in self._tape:
                run()

    def close(self) -> None:
        """Forget the recorded launches."""
        self.launch_on = None
        self._tape, self.operands = [], []


class Capture:
    """Records what is queued on one stream instead of running it: `begin`, launches, then `end` or `abort`."""

    def __init__(self, stream: Stream, *, dry: bool = False) -> None:
        self.stream = stream
        self.dry = dry
        self.token: Any = None
        self._thread = 0
        self._tape: list[Any] = []
        self._operands: list[Any] = []

    def begin(self) -> None:
        if capture_here(captures) is not None:
            raise CaptureError("this thread already has a capture open: end it before beginning another")
        if self.stream.numba.capture is not None:
            raise CaptureError("a capture is already open on this stream")
        self._thread, self.token = threading.get_ident(), this_thread.token
        captures[self._thread] = self
        self.stream.numba.capture = self

    def end(self) -> Graph:
        if self.token is not this_thread.token:
            self.abort()
            raise CaptureError(
                "a capture was ended in another thread than it was begun in, which the driver refuses: leave its block "
                "in the thread that entered it. Nothing was captured"
            )
        tape, operands = self._tape, self._operands
        self._leave()
        return Graph(tape, operands)

    def abort(self) -> None:
        """Give the capture up and leave the stream usable."""
        self._leave()

    def _leave(self) -> None:
        self._tape, self._operands = [], []  # the graph's alone from here on: closing it lets them go
        if captures.get(self._thread) is self:  # dropped in another thread, it is still that of the one that began it
            del captures[self._thread]
        self.stream.numba.capture = None

    def keep(self, operand: Any) -> None:
        """Keep `operand` alive as long as the graph."""
        self._operands.extend(kept(operand))

    def record(self, run: Any, operands: Any) -> None:
        """Put `run` on the tape."""
        self._tape.append(run)
        self._operands.extend(kept(operands))


def _recorder(stream: Any, what: str) -> Capture | None:
    """Return the capture that `stream` is part of; refuse work that this thread's capture would miss."""
    capture: Capture | None = getattr(stream, "capture", None)
    if capture is None and capture_here(captures) is not None:
        raise CaptureError(
            f"{what} was queued on another stream while a graph is captured, so that no replay would run it: "
            f"give it the step's stream"
        )
    return capture


class _Launch:
    """`kernel[grid, block, stream]`, keeping to itself what the stock simulator puts on the kernel."""

    def __init__(self, kernel: Any, configuration: Any) -> None:
        self._kernel = kernel
        self._configuration = configuration

    def _run(self, args: Any) -> None:
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
    found = value.__cuda_array_interface__
    dtype = np.dtype(found.get("descr") or found["typestr"])
    if dtype.itemsize != np.dtype(found["typestr"]).itemsize or dtype.names == ("f0",):
        dtype = np.dtype(found["typestr"])
    strides = found.get("strides")
    span = sum((n - 1) * abs(s) for n, s in zip(found["shape"], strides or ())) if strides else 0
    nbytes = dtype.itemsize * (1 if strides else int(np.prod(found["shape"], dtype=np.int64))) + span
    if not nbytes:
        return FakeCUDAArray(np.empty(found["shape"], dtype))
    memory = (ctypes.c_uint8 * nbytes).from_address(found["data"][0])
    return FakeCUDAArray(np.ndarray(found["shape"], dtype, buffer=memory, strides=strides))


_set_configuration = FakeCUDAKernel.__getitem__
_call_kernel = FakeCUDAKernel.__call__
_copy_to_device = FakeCUDAArray.copy_to_device
_copy_to_host = FakeCUDAArray.copy_to_host
_installed = False


def _install() -> None:
    global _installed
    with _lock:
        if _installed:
            return
        _installed = True

    def copy_to_device(self: Any, ary: Any, stream: Any = 0) -> None:
        capture = _recorder(stream, "copy_to_device")
        if capture is None:
            if self._ary.size or np.size(getattr(ary, "_ary", ary)):  # NumPy cannot compare the strides of nothing
                _copy_to_device(self, ary)
        else:
            capture.record(lambda: _copy_to_device(self, ary), (self, ary))

    def copy_to_host(self: Any, ary: Any = None, stream: Any = 0) -> Any:
        capture = _recorder(stream, "copy_to_host")
        if capture is None:
            return _copy_to_host(self, ary)
        if ary is None:
            raise CaptureError("copy_to_host without a target cannot be captured: give it a pinned array to write to")
        capture.record(lambda: _copy_to_host(self, ary), (self, ary))
        return ary

    def refusing(original: Any, what: str, remedy: str) -> Any:
        def refuse(*args: Any, **options: Any) -> Any:
            if capture_here(captures) is not None:
                raise CaptureError(refusal(what, remedy))
            return original(*args, **options)

        return refuse

    def moving(original: Any, name: str, operands: int) -> Any:
        def move(*args: Any, **options: Any) -> Any:
            given = (*args, *(options[key] for key in ("dst", "src", "val", "size", "stream") if key in options))
            capture = _recorder(given[3] if len(given) > 3 else 0, name)
            if capture is None:
                return original(*args, **options)
            return capture.record(lambda: original(*args, **options), given[:operands])

        return move

    def close() -> None:
        global _life
        ended, _life = _life, Lifetime()
        ended.end()
        _close()

    _close = cuda.close
    cuda.close = close
    for name in (
        "device_array",
        "device_array_like",
        "to_device",
        "pinned_array",
        "pinned_array_like",
        "mapped_array",
        "pinned",
    ):
        if hasattr(cuda, name):
            setattr(cuda, name, refusing(getattr(cuda, name), *ALLOCATION))
    cuda.synchronize = refusing(cuda.synchronize, *WAIT)
    for kind in (_NumbaStream, cuda.event):
        kind.synchronize = refusing(kind.synchronize, *WAIT)
    FakeCUDAArray.__setitem__ = refusing(FakeCUDAArray.__setitem__, *WRITE)
    for name, operands in (("device_to_device", 2), ("device_memset", 1)):
        setattr(driver, name, moving(getattr(driver, name), name, operands))
    FakeCUDAKernel.__getitem__ = lambda self, configuration: _Launch(self, configuration)
    FakeCUDAArray.copy_to_device = copy_to_device
    FakeCUDAArray.copy_to_host = copy_to_host
