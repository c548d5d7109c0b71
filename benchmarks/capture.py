"""What a captured graph costs: time to capture, and device bytes it takes, for 8, 16 and 51 buckets.

A step of 4 kernels over 8 slots, captured for sizes spread evenly up to the largest, the largest first. Every size was
run before, so that nothing is compiled or loaded in the time. Bytes are what the driver says is free before and after,
which only a GPU's own driver knows of graphs; elsewhere that column is empty. The same step of Numba, torch and CuPy is
captured beside it, over arrays of their own, with a copy for each slot in place of the fill.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from numbabuf import BufferSpec, InputBufferManager, _cuda
from numbabuf._cuda import cuda

from . import _rivals, harness

COUNTS, TOKENS, SLOTS, KERNELS = (8, 16, 51), 4096, 8, 4


@cuda.jit
def _consume(out: np.ndarray, tokens: np.ndarray) -> None:
    for i in range(cuda.grid(1), tokens.size, cuda.gridsize(1)):
        out[i] = tokens[i]


def run(smoke: bool, *, repeats: int | None = None) -> dict[str, Any]:
    """Capture each number of buckets `repeats` times."""
    warnings.simplefilter("ignore")  # Numba's, about small grids
    gpu = harness.on_gpu()
    repeats = repeats or (1 if smoke else 10)
    tokens = TOKENS if gpu else 64
    rivals, rows = _rivals.found()
    for count in COUNTS[:1] if smoke else COUNTS:
        sizes = sorted({max(1, tokens * i // count) for i in range(1, count + 1)}, reverse=True)
        with contextlib.ExitStack() as stack:
            rows.append(_row("numbabuf", *_ours(stack, sizes, tokens), len(sizes), repeats))
        for rival in rivals:
            with _rivals.noted(rows, f"{rival.name}: {count} buckets"):
                rows.append(_row(rival.name, *_theirs(rival, sizes, tokens), len(sizes), repeats))
    return {"slots": SLOTS, "kernels": KERNELS, "tokens": tokens, "gpu": gpu, "rows": rows}


Way = tuple[Callable[[], object], Callable[[], object]]
"""What captures all sizes and returns what keeps the graphs alive; what closes those graphs that it does not return."""


def _row(
    what: str, capture_all: Callable[[], object], close: Callable[[], object], count: int, repeats: int
) -> dict[str, Any]:
    """Capture `count` graphs `repeats` times; time, driver calls and device bytes are those of one of them."""
    stub = harness.stand_in()
    samples_us, nbytes, calls = [], None, None
    for _ in range(repeats):
        close()
        gc.collect()
        free = _cuda.memory_info()
        if stub is not None:
            stub.reset_counts()
        start = time.perf_counter()
        graphs = capture_all()
        samples_us.append((time.perf_counter() - start) * 1e6 / count)
        calls = None if stub is None else int(sum(stub.counts().values())) / count
        left = _cuda.memory_info()
        if nbytes is None and free and left and harness.on_gpu():
            nbytes = (free[0] - left[0]) / count  # the first time: the driver keeps what a graph had for the next
        del graphs
    timing = harness.summarise(np.array(samples_us))
    return harness.row(
        f"{what}: {count} buckets, per graph", timing, total_ms=timing.median_us * count / 1e3, driver_calls=calls,
        device_bytes=nbytes,
    )  # fmt: skip


def _ours(stack: contextlib.ExitStack, sizes: list[int], tokens: int) -> Way:
    """Return the way of a manager, which `stack` closes."""
    manager = stack.enter_context(
        InputBufferManager(max_batch_size=1, max_seq_len=tokens, buckets=sizes[::-1], default_slots=False)
    )
    names = [f"slot{i}" for i in range(SLOTS)]
    for name in names:
        manager.register_slot(name, BufferSpec(tokens, "int64"))
    out = cuda.device_array(tokens, np.int64)
    blocks, threads = _cuda.launch_shape(tokens)

    def fn(step: Any) -> None:
        for i in range(KERNELS):
            _consume[blocks, threads, step.stream](out, step[names[i]])

    manager.capture_buckets(fn)  # which runs every size before

    def capture_all() -> None:
        for size in sizes:
            with manager.capture(size) as step:
                fn(step)

    return capture_all, manager.close_graphs


def _theirs(rival: Any, sizes: list[int], tokens: int) -> Way:
    """Return the way of another library; views of each size are made before, as a manager's are."""
    device, pinned = ([make(tokens) for _ in range(SLOTS)] for make in (rival.device, rival.pinned))
    out = rival.device(tokens)
    views = {size: [(part[:size], full[:size]) for part, full in zip(device, pinned, strict=True)] for size in sizes}
    outs = {size: out[:size] for size in sizes}

    def work(size: int) -> None:
        for target, source in views[size]:
            rival.copy(target, source)
        for i in range(KERNELS):
            rival.consume(outs[size], views[size][i][0])

    with rival.using():
        for size in sizes:
            work(size)
    rival.synchronize()
    return (lambda: [rival.graph(functools.partial(work, size)) for size in sizes]), (lambda: None)


def table(result: dict[str, Any]) -> str:
    """The rows as text."""
    note = "" if result["gpu"] else "; no GPU, so no device bytes"
    head = f"{result['slots']} slots, {result['kernels']} kernels, up to {result['tokens']} tokens{note}"
    return f"{head}\n{harness.render(result['rows'])}"
