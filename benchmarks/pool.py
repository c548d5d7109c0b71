"""What a lease from the pool costs on the host: against other pools, from many threads, with many idle buffers.

A lease is one allocate and one release of memory that the pool has idle. CuPy's pinned pool, RMM's pool and ours get
theirs from a stand-in allocator, so that none calls a driver and no device is needed. The competitors take turns within
each repeat, so that what else the machine does falls on all of them. Times are of the process's CPU, all threads
together. Where there is a driver, a last group leases real device and pinned memory, by the clock on the wall: from
Numba without a pool, and from the pools of CuPy, RMM and torch.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np

from numbabuf import _cuda
from numbabuf._cuda import cuda
from numbabuf.pool.pool import SimpleBufferPool
from numbabuf.pool.spec import BufferSpec, Tier

from . import _rivals, harness

Loop = Callable[[int], None]
"""Makes the given number of leases, one after the other."""

NBYTES = 4096


def _spec(nbytes: int) -> BufferSpec:
    return BufferSpec(nbytes, "uint8", Tier.PINNED)


def _ours(pool: SimpleBufferPool, specs: list[BufferSpec]) -> Loop:
    if len(specs) == 1:
        spec = specs[0]

        def loop(count: int) -> None:
            allocate = pool.allocate
            for _ in range(count):
                allocate(spec).release()

        return loop

    def cycle(count: int) -> None:
        allocate = pool.allocate
        for spec in itertools.islice(itertools.cycle(specs), count):
            allocate(spec).release()

    return cycle


def _raw(count: int) -> None:
    for _ in range(count):
        np.empty(NBYTES, np.uint8)


class _Cupy:
    """CuPy's pool over an allocator that calls no driver; None of it where CuPy is not installed."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CuPy warns where there is no GPU
            import cupy
            from cupy.cuda import pinned_memory

        self.version = cupy.__version__
        self._module = pinned_memory
        self._pointers = itertools.count(1)

    def pool(self) -> Any:
        """Return a new `PinnedMemoryPool`."""
        pointers = self._pointers

        class Memory:
            def __init__(self, size: int) -> None:
                self.size = size
                self.ptr = next(pointers) << 20

        return self._module.PinnedMemoryPool(lambda size: self._module.PinnedMemoryPointer(Memory(size), 0))

    @staticmethod
    def loop(pool: Any, sizes: list[int]) -> Loop:
        """Return the loop of leases; the memory goes back with the last reference, which is CuPy's way."""
        if len(sizes) == 1:
            size = sizes[0]

            def loop(count: int) -> None:
                malloc = pool.malloc
                for _ in range(count):
                    malloc(size)

            return loop

        def cycle(count: int) -> None:
            malloc = pool.malloc
            for size in itertools.islice(itertools.cycle(sizes), count):
                malloc(size)

        return cycle


def _rmm(nbytes: int) -> Loop:
    """Leases from RMM's pool over a callback that calls no driver; raises where RMM is not installed."""
    from rmm import mr

    pointers = itertools.count(1)
    upstream = mr.CallbackMemoryResource(lambda size, stream: next(pointers) << 30, lambda pointer, size, stream: None)
    pool = mr.PoolMemoryResource(upstream, initial_pool_size=1 << 26, maximum_pool_size=1 << 28)
    return _allocate_deallocate(pool, nbytes)


def _allocate_deallocate(resource: Any, nbytes: int) -> Loop:
    def loop(count: int) -> None:
        allocate, deallocate = resource.allocate, resource.deallocate
        for _ in range(count):
            deallocate(allocate(nbytes), nbytes)

    return loop


def _threaded(loops: list[Loop]) -> Loop:
    """All loops at once, each in a thread of its own, sharing the leases between them."""

    def loop(count: int) -> None:
        barrier = threading.Barrier(len(loops))

        def run(part: Loop) -> None:
            barrier.wait()
            part(count // len(loops))

        threads = [threading.Thread(target=run, args=(part,)) for part in loops]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return loop


def _compare(loops: dict[str, Loop], *, inner: int, repeats: int, **more: Any) -> list[dict[str, Any]]:
    """Time loops in turns; a row each, with the ratio of its median to that of CuPy's row."""
    samples_us: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop(max(1, inner // 10))
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(repeats):
            for name, loop in loops.items():
                start = time.process_time_ns()
                loop(inner)
                samples_us[name].append((time.process_time_ns() - start) / inner / 1e3)
    finally:
        if collecting:
            gc.enable()
    timings = {name: harness.summarise(samples) for name, samples in samples_us.items()}
    theirs = timings.get("CuPy")
    return [
        harness.row(name, timing, **more, to_cupy=timing.median_us / theirs.median_us if theirs else None)
        for name, timing in timings.items()
    ]


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    with mock.patch.dict(os.environ, {name: value}):
        yield


def _leases(cupy: _Cupy | None, threads: int, specs: list[BufferSpec], inner: int, repeats: int) -> list[Any]:
    pool = SimpleBufferPool()
    loops = {"numbabuf": _threaded([_ours(pool, specs)] * threads) if threads > 1 else _ours(pool, specs)}
    if cupy is not None:
        part = cupy.loop(cupy.pool(), [spec.size_bytes for spec in specs])
        loops["CuPy"] = _threaded([part] * threads) if threads > 1 else part
    if len(specs) == 1:
        with contextlib.suppress(Exception):  # not installed, or a version without the callback: no row
            part = _rmm(specs[0].size_bytes)
            loops["RMM"] = _threaded([part] * threads) if threads > 1 else part
    return _compare(loops, inner=inner, repeats=repeats, case="lease", threads=threads, specs=len(specs))


def _growth(cupy: _Cupy | None, idle: int, inner: int, repeats: int) -> list[Any]:
    """Leases with `idle` buffers in the pool, half of them of the same spec and half of others."""
    pool = SimpleBufferPool()
    spec = _spec(NBYTES)
    same = [pool.allocate(spec) for _ in range(max(1, idle // 2))]
    others = [pool.allocate(_spec(8 + 8 * (i % 500))) for i in range(idle // 2)]
    for entry in itertools.chain(same, others):
        entry.release()
    del same, others
    loops = {"numbabuf": _ours(pool, [spec]), "numbabuf, an equal spec": _ours(pool, [_spec(NBYTES)])}
    if cupy is not None:
        theirs = cupy.pool()
        held = [theirs.malloc(NBYTES) for _ in range(max(1, idle // 2))]
        held += [theirs.malloc(8 + 8 * (i % 500)) for i in range(idle // 2)]
        del held
        loops["CuPy"] = cupy.loop(theirs, [NBYTES])
    rows = _compare(loops, inner=inner, repeats=repeats, case="lease among idle", idle=idle)
    for what, call in (("numbabuf: stats()", pool.stats), ("numbabuf: check()", pool.check)):
        timing = harness.measure(call, repeats=max(3, repeats // 5), warmup=1)
        rows.append(harness.row(what, timing, case="snapshot", idle=idle))
    return rows


def _prices(inner: int, repeats: int) -> list[Any]:
    """What counting, recording, debugging and naming a stream add to a lease."""
    spec = _spec(NBYTES)
    loops = {"numbabuf": _ours(SimpleBufferPool(), [spec])}
    with contextlib.ExitStack() as stack:
        counted = SimpleBufferPool()
        stack.enter_context(counted.statistics())
        loops["inside pool.statistics()"] = _ours(counted, [spec])
        loops["events=10_000"] = _ours(SimpleBufferPool(events=10_000), [spec])
        with _environment("NUMBABUF_DEBUG", "1"):
            loops["NUMBABUF_DEBUG=1"] = _ours(SimpleBufferPool(), [spec])
        pool = SimpleBufferPool()
        pool.allocate(spec).release()

        def with_block(count: int) -> None:
            for _ in range(count):
                with pool.allocate(spec):
                    pass

        def array(count: int) -> None:
            for _ in range(count):
                entry = pool.allocate(spec)
                _ = entry.array
                entry.release()

        if _cuda.SIM:  # whose events cost nothing: what is left is the pool's own part
            streams = SimpleBufferPool()
            stream = _cuda.as_stream(None)

            def with_stream(count: int) -> None:
                for _ in range(count):
                    streams.allocate(spec, stream=stream).release()

            loops["stream=s, free events"] = with_stream
        loops["with pool.allocate(spec)"] = with_block
        loops["and entry.array"] = array
        loops["np.empty, no pool"] = _raw
        return _compare(loops, inner=inner, repeats=repeats, case="price")


def _makers(nbytes: int) -> dict[tuple[str, str], Callable[[], Callable[[], object]]]:
    """(memory, whose) -> what makes a function that leases and returns `nbytes` once."""

    def ours(tier: Tier, ordered: bool) -> Callable[[], object]:
        pool, spec = SimpleBufferPool(), BufferSpec(nbytes, "uint8", tier)
        if ordered:
            stream = _cuda.as_stream(None)
            return lambda: pool.allocate(spec, stream=stream).release()
        return lambda: pool.allocate(spec).release()

    def cupy(kind: str) -> Callable[[], object]:
        import cupy

        pool = getattr(cupy.cuda, kind)()
        return lambda: pool.malloc(nbytes)

    def rmm(kind: str) -> Callable[[], object]:
        from rmm import mr

        pool = mr.PoolMemoryResource(getattr(mr, kind)(), initial_pool_size=1 << 26)
        return lambda: pool.deallocate(pool.allocate(nbytes), nbytes)

    def torch(**options: Any) -> Callable[[], object]:
        import torch

        return lambda: torch.empty(nbytes, dtype=torch.uint8, **options)

    def torch_raw() -> Callable[[], object]:
        from torch import cuda as torch_cuda

        return lambda: torch_cuda.caching_allocator_delete(torch_cuda.caching_allocator_alloc(nbytes))

    return {
        ("device", "numbabuf"): lambda: ours(Tier.DEVICE, False),
        ("device", "numbabuf, stream=s"): lambda: ours(Tier.DEVICE, True),
        ("device", "Numba, no pool"): lambda: lambda: cuda.device_array(nbytes, np.uint8),
        ("device", "CuPy: MemoryPool"): lambda: cupy("MemoryPool"),
        ("device", "RMM: PoolMemoryResource"): lambda: rmm("CudaMemoryResource"),
        ("device", "torch: empty"): lambda: torch(device="cuda"),
        ("device", "torch: caching_allocator_alloc"): torch_raw,
        ("pinned", "numbabuf"): lambda: ours(Tier.PINNED, False),
        ("pinned", "Numba, no pool"): lambda: lambda: cuda.pinned_array(nbytes, np.uint8),
        ("pinned", "CuPy: PinnedMemoryPool"): lambda: cupy("PinnedMemoryPool"),
        ("pinned", "RMM: PoolMemoryResource"): lambda: rmm("PinnedHostMemoryResource"),
        ("pinned", "torch: empty"): lambda: torch(pin_memory=True),
    }


def _with_a_driver(nbytes: int, inner: int, repeats: int) -> list[Any]:
    """Leases of real memory; `to_numbabuf` is how often a lease of ours fits into one of theirs."""
    rows: list[dict[str, Any]] = []
    first: dict[str, float] = {}
    for (memory, whose), make in _makers(nbytes).items():
        case = f"{memory}, {nbytes} B"
        with _rivals.noted(rows, whose, "skipped", case=case):  # not installed, no GPU, or a driver that it cannot use
            timing = harness.measure(make(), repeats=repeats, inner=inner, seconds=1)
            ours = first.setdefault(memory, timing.median_us)
            rows.append(harness.row(whose, timing, case=case, to_numbabuf=timing.median_us / ours))
    return rows


def run(smoke: bool, *, repeats: int | None = None, inner: int | None = None) -> dict[str, Any]:
    """Time all cases.

    Parameters
    ----------
    smoke
        Few repeats of short loops, and at most 100 idle buffers.
    repeats, inner
        Samples per row, and leases per sample.
    """
    repeats = repeats or (3 if smoke else 40)
    inner = inner or (100 if smoke else 20_000)
    note = None
    try:
        cupy: _Cupy | None = _Cupy()
    except ImportError as error:
        cupy, note = None, f"CuPy is not installed ({error}): its rows are missing"
    rows: list[dict[str, Any]] = []
    with mock.patch.object(_cuda, "empty_pinned", lambda nbytes: np.empty(nbytes, np.uint8)):
        for threads, count in ((1, 1), (1, 16), (4, 1)):
            specs = (
                [_spec(NBYTES << i) for i in range(count)] if count < 8 else [_spec(512 << i % 8) for i in range(16)]
            )
            rows += _leases(cupy, threads, specs, inner, repeats)
        for idle in (1, 100) if smoke else (1, 100, 10_000, 100_000):
            rows += _growth(cupy, idle, inner, max(3, repeats // 2))
        rows += _prices(max(1, inner // 4), max(3, repeats // 2))
    if not _cuda.SIM:
        _cuda.require()
        for nbytes in (NBYTES, 1 << 20):
            rows += _with_a_driver(nbytes, min(inner, 100), repeats)
    result: dict[str, Any] = {"rows": rows, "time": "CPU of the process, all threads; with a driver, the wall's"}
    if cupy is not None:
        result["cupy"] = cupy.version
    if note:
        result["note"] = note
    return result


def table(result: dict[str, Any]) -> str:
    """The rows as text."""
    columns = (
        "case", "what", "threads", "specs", "idle", "median_us", "p99_us", "spread_us", "repeats", "to_cupy",
        "to_numbabuf", "note",
    )  # fmt: skip
    text = harness.render(result["rows"], columns)
    return f"{text}\n{result['note']}" if "note" in result else text
