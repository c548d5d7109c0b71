"""What other libraries do with fixed arrays, copies and graphs, each behind the same few methods.

A benchmark writes its work once and runs it with every rival in the same process. `found` tells those that can run here
from those that cannot, for which there is a row that says why. Nobody but numbabuf guards the pinned arrays: a rival's
next step may overwrite what its last copy still reads, so its times are those of a program that waits elsewhere.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from numbabuf import _cuda
from numbabuf._cuda import cuda

Work = Callable[[], object]


@cuda.jit
def _copy(out: np.ndarray, values: np.ndarray) -> None:
    for i in range(cuda.grid(1), values.size, cuda.gridsize(1)):
        out[i] = values[i]


class Numba:
    """Numba's own arrays and copies; the graph is captured as numbabuf captures its own, without a fill in it."""

    name = "Numba"

    def __init__(self) -> None:
        self._stream = _cuda.as_stream(None)
        self.events = self._stream.numba
        """The Numba stream that events are recorded on, the same stream that the work is queued on."""

    def device(self, count: int) -> Any:
        """Return `count` int64 in device memory; contents undefined."""
        return cuda.device_array(count, np.int64)

    def pinned(self, count: int) -> Any:
        """Return `count` int64 in page-locked memory; contents undefined."""
        return cuda.pinned_array(count, np.int64)

    def host(self, pinned: Any) -> np.ndarray:
        """Return a NumPy array over what `pinned` returned."""
        return pinned  # type: ignore[no-any-return]

    def copy(self, target: Any, source: Any) -> None:
        """Queue a copy, either of them pinned or both on the device; inside `using()` or a graph."""
        if isinstance(target, np.ndarray):
            source.copy_to_host(target, stream=self.events)
        else:
            target.copy_to_device(source, stream=self.events)

    def consume(self, out: Any, values: Any) -> None:
        """Queue a kernel that reads `values` and writes `out`, both of device memory."""
        blocks, threads = _cuda.launch_shape(values.size)
        _cuda.configure(_copy, blocks, threads, self.events)(out, values)

    def using(self) -> contextlib.AbstractContextManager[Any]:
        """Make the rival's stream the current one, where it has such a notion."""
        return contextlib.nullcontext()

    def graph(self, work: Work) -> Work:
        """Capture `work`, which was run before, and return what launches the graph."""
        capture = _cuda.Capture(self._stream)
        capture.begin()
        try:
            work()
        except BaseException:
            capture.abort()
            raise
        graph = capture.end()
        return lambda: graph.launch_on(self._stream.core)

    def synchronize(self) -> None:
        """Wait for everything queued."""
        self._stream.synchronize()


class Torch:
    """PyTorch: pinned and device tensors, `copy_(non_blocking=True)`, `torch.cuda.CUDAGraph`."""

    name = "torch"

    def __init__(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError("torch finds no GPU")
        self._torch = torch
        self._stream = torch.cuda.Stream()
        self.events = cuda.external_stream(self._stream.cuda_stream)

    def device(self, count: int) -> Any:
        with self.using():  # torch hands memory on along the stream that it was made on
            return self._torch.empty(count, dtype=self._torch.int64, device="cuda")

    def pinned(self, count: int) -> Any:
        return self._torch.empty(count, dtype=self._torch.int64, pin_memory=True)

    def host(self, pinned: Any) -> np.ndarray:
        return pinned.numpy()  # type: ignore[no-any-return]

    def copy(self, target: Any, source: Any) -> None:
        target.copy_(source, non_blocking=True)

    def consume(self, out: Any, values: Any) -> None:
        self._torch.add(values, 0, out=out)

    def using(self) -> contextlib.AbstractContextManager[Any]:
        return self._torch.cuda.stream(self._stream)  # type: ignore[no-any-return]

    def graph(self, work: Work) -> Work:
        graph = self._torch.cuda.CUDAGraph()
        with self._torch.cuda.graph(graph, stream=self._stream):
            work()

        def launch() -> None:
            with self.using():
                graph.replay()

        return launch

    def synchronize(self) -> None:
        self._stream.synchronize()


class Cupy:
    """CuPy: arrays of its pools, asynchronous copies by pointer, `Stream.begin_capture` and `Graph.launch`."""

    name = "CuPy"

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns where there is no GPU
            import cupy
        if cupy.cuda.runtime.getDeviceCount() < 1:
            raise RuntimeError("CuPy finds no GPU")
        self._cupy = cupy
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self.events = cuda.external_stream(self._stream.ptr)

    def device(self, count: int) -> Any:
        with self.using():
            return self._cupy.empty(count, np.int64)

    def pinned(self, count: int) -> Any:
        memory = self._cupy.cuda.alloc_pinned_memory(8 * count)
        return np.frombuffer(memory, np.int64, count)

    def host(self, pinned: Any) -> np.ndarray:
        return pinned  # type: ignore[no-any-return]

    def copy(self, target: Any, source: Any) -> None:
        if isinstance(target, np.ndarray):
            source.data.copy_to_host_async(target.ctypes.data, target.nbytes, self._stream)
        elif isinstance(source, np.ndarray):
            target.data.copy_from_host_async(source.ctypes.data, source.nbytes, self._stream)
        else:
            target.data.copy_from_device_async(source.data, source.nbytes, self._stream)

    def consume(self, out: Any, values: Any) -> None:
        self._cupy.add(values, 0, out=out)

    def using(self) -> contextlib.AbstractContextManager[Any]:
        return self._stream  # type: ignore[no-any-return]

    def graph(self, work: Work) -> Work:
        with self._stream:
            self._stream.begin_capture()
            try:
                work()
            finally:  # the stream leaves capture mode even if the work failed
                graph = self._stream.end_capture()
        return lambda: graph.launch(self._stream)

    def synchronize(self) -> None:
        self._stream.synchronize()


def warm_graph(rival: Any, work: Work) -> Work:
    """Run `work` once, since no capture may compile or load, and return what launches its graph."""
    with rival.using():
        work()
    rival.synchronize()
    return rival.graph(work)  # type: ignore[no-any-return]


def found(kinds: Iterable[Any] = (Numba, Torch, Cupy)) -> tuple[list[Any], list[dict[str, Any]]]:
    """Return the rivals that can run here, and for each of the others a row that says why it cannot."""
    able: list[Any] = []
    missing: list[dict[str, Any]] = []
    for kind in kinds:
        with noted(missing, kind.name, "skipped"):  # not installed, no GPU, or a driver that it cannot use
            able.append(kind())
    return able, missing


@contextlib.contextmanager
def noted(rows: list[dict[str, Any]], what: str, verdict: str = "failed", **more: Any) -> Iterator[None]:
    """Let what fails inside cost its own row alone: a row with the reason is added to `rows` in its place."""
    try:
        yield
    except Exception as error:
        note = f"{verdict}: {type(error).__name__}: {error}".partition("\n")[0]
        rows.append({"what": what, **more, "note": note})
