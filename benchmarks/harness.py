"""What every benchmark shares: timing, the columns of a table, and the environment that a figure belongs to.

A figure is a median over repeats after a warm-up, with the 99th percentile and the spread beside it. Timings
taken on the host say what they end in: a plain return, or a synchronise after which the work is done.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from numbabuf import _cuda

COLUMNS = ("what", "median_us", "p99_us", "spread_us", "repeats", "ends_in")
PACKAGES = (
    "numba", "numba-cuda", "cuda-core", "cuda-bindings", "numpy", "torch", "cupy-cuda13x", "cupy-cuda12x", "rmm-cu13",
    "rmm-cu12",
)  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """Host time of one call, in microseconds."""

    median_us: float
    p99_us: float
    spread_us: float
    """Half of all repeats lie within this much of each other (the interquartile range)."""
    repeats: int
    ends_in: str
    """"return", "synchronise", or "event" for times of the GPU."""


def measure(
    call: Callable[[], object],
    *,
    repeats: int = 200,
    warmup: int = 20,
    inner: int = 1,
    finish: Callable[[], object] | None = None,
    settle: Callable[[], object] | None = None,
    seconds: float = math.inf,
) -> Timing:
    """Time `call` on the host.

    Parameters
    ----------
    call
        What is timed; takes nothing, its result is dropped.
    repeats, warmup : int
        Samples taken, and calls made before the first of them.
    inner : int
        Calls per sample, for calls too short for the clock; the sample is divided by it.
    finish
        Called at the end of each sample, inside the time, to wait for the work that `call` queued. Without it
        the figure is the time until `call` returns.
    settle
        Called before each sample, outside the time, to wait for the work of earlier ones: a device that is behind
        makes the host wait, and what a call costs the host is then the device's time.
    seconds
        No further sample is begun when so much time has passed, but five are taken whatever they cost.

    Returns
    -------
    Timing

    Notes
    -----
    The garbage collector is off while samples are taken, as in `timeit`.
    """
    for _ in range(warmup):
        call()
    if finish is not None:
        finish()
    samples_us = np.empty(repeats)
    clock = time.perf_counter_ns
    collecting = gc.isenabled()
    gc.disable()
    deadline = time.perf_counter() + seconds
    taken = 0
    try:
        for index in range(repeats):
            if index >= 5 and time.perf_counter() > deadline:
                break
            if settle is not None:
                settle()
            start = clock()
            for _ in range(inner):
                call()
            if finish is not None:
                finish()
            samples_us[index] = (clock() - start) / inner / 1e3
            taken += 1
    finally:
        if collecting:
            gc.enable()
    return summarise(samples_us[:taken], "return" if finish is None else "synchronise")


def measure_device(call: Callable[[], object], stream: Any, *, repeats: int = 100, inner: int = 20) -> Timing:
    """Time the GPU's part of `call`, which queues work on a `_cuda.Stream`: microseconds per call.

    `inner` calls are captured into one graph and events recorded around its launch, so that nothing of the host is in
    the figure however small the work. The simulator has no events: there, it is the host's time of a launch.
    """
    call()  # compiles and loads, which no capture may do
    stream.synchronize()
    capture = _cuda.Capture(stream)
    capture.begin()
    try:
        for _ in range(inner):
            call()
    except BaseException:
        capture.abort()
        raise
    graph = capture.end()
    try:
        return measure_events(lambda: graph.launch_on(stream.core), stream.numba, repeats=repeats, inner=inner)
    finally:
        stream.synchronize()
        graph.close()


def measure_events(launch: Callable[[], object], stream: Any, *, repeats: int = 100, inner: int = 1) -> Timing:
    """Time the work that `launch` queues on a Numba stream by events around it, in microseconds per `inner`th of it."""
    if _cuda.SIM:
        return measure(launch, repeats=repeats, warmup=1)
    from numbabuf._cuda import cuda

    begin, end = cuda.event(), cuda.event()
    launch()
    stream.synchronize()
    samples_us = np.empty(repeats)
    for index in range(repeats):
        begin.record(stream)
        launch()
        end.record(stream)
        end.synchronize()
        samples_us[index] = cuda.event_elapsed_time(begin, end) * 1e3 / inner
    return summarise(samples_us, "event")


def stand_in() -> Any:
    """The stand-in driver's controls, None on a GPU and in the simulator."""
    if _cuda.SIM:
        return None
    try:
        import cudastub
    except ImportError:
        return None
    return cudastub if cudastub.active else None


def on_gpu() -> bool:
    """Whether a real driver runs the kernels."""
    return not _cuda.SIM and stand_in() is None


@contextlib.contextmanager
def kernels_skipped(stub: Any) -> Iterator[None]:
    """Let the stand-in driver, where it is there, accept kernels and skip them: what is timed is the host."""
    if stub is not None:
        stub.set_exec(0)
    try:
        yield
    finally:
        if stub is not None:
            stub.set_exec(1)
            stub.clear_errors()


def host_options() -> dict[str, Any]:
    """Return options of `measure` for what a step costs the host: on a GPU as few at once as a ring has blocks."""
    return {"inner": 4, "settle": _cuda.synchronize} if on_gpu() else {"inner": 1 if _cuda.SIM else 20}


def step_of(manager: Any, call: str, inputs: Any, tokens: int, stub: Any) -> Callable[[], object]:
    """Return a step of a manager, as a function of nothing.

    On the stand-in driver, where nobody reads the staging blocks, it also marks them read.
    """
    method, ring = getattr(manager, call), manager._shared.arena.ring
    if stub is None:
        return lambda: method(inputs, tokens)

    def marked() -> None:
        ring._retired[0] = ring.step
        method(inputs, tokens)

    return marked


def summarise(samples_us: Sequence[float] | np.ndarray, ends_in: str = "return") -> Timing:
    """Make a `Timing` of samples in microseconds, shape (repeats,)."""
    low, median, high, p99 = np.percentile(samples_us, (25, 50, 75, 99))
    return Timing(float(median), float(p99), float(high - low), len(samples_us), ends_in)


def row(what: str, timing: Timing, **more: Any) -> dict[str, Any]:
    """One row of a table: the fixed columns and, after them, columns of the benchmark's own."""
    return {"what": what, **asdict(timing), **more}


def render(rows: Iterable[dict[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows as text, a column each, numbers to the right; without `columns` the fixed ones come first."""
    rows = list(rows)
    if columns is None:
        extra = dict.fromkeys(name for line in rows for name in line if name not in COLUMNS)
        columns = [name for name in COLUMNS if any(name in line for line in rows)] + list(extra)
    cells = [list(columns)] + [[_cell(line.get(name)) for name in columns] for line in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [any(isinstance(line.get(name), (int, float)) for line in rows) for name in columns]
    return "\n".join(
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def environment() -> dict[str, Any]:
    """Device, driver and versions: what a figure is worth nothing without."""
    import numbabuf

    found: dict[str, Any] = {"backend": _cuda.backend(), "device": None, "driver": None}
    try:
        found["device"] = _cuda.device_name()
        found["driver"] = _driver()
    except Exception as error:  # a benchmark of the host alone runs without a device, and says so
        found["device"] = f"none ({type(error).__name__})"
    found["host"] = f"{_processor()}, {os.cpu_count()} cores"
    found["system"] = platform.platform()
    found["python"] = platform.python_version()
    found["versions"] = {"numbabuf": numbabuf.__version__} | {name: _version(name) for name in PACKAGES}
    found["commit"] = _commit()
    found["date"] = time.strftime("%Y-%m-%d", time.gmtime())
    return found


def _driver() -> str | None:
    """Version of the CUDA driver; says so where it is the stand-in, which runs kernels on the CPU."""
    if _cuda.SIM:
        return None
    from numba.cuda.cudadrv.driver import driver

    major, minor = driver.get_version()
    version = f"{major}.{minor}"
    try:
        import cudastub
    except ImportError:
        return version
    return f"{version}, stand-in on the CPU" if cudastub.active else version


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def describe(found: dict[str, Any]) -> str:
    """An environment as text, a line for each part."""
    lines = []
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {version}" for key, version in value.items() if version)
        if value is not None:
            lines.append(f"{name:8} {value}")
    return "\n".join(lines)
