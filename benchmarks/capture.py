"""What a captured graph costs: time to capture, and device bytes it takes, for 8, 16 and 51 buckets.

A step of 4 kernels over 8 slots, captured for sizes spread evenly up to the largest, the largest first. Every size was
run before, so that nothing is compiled or loaded in the time, and no kernel runs in it. Bytes are what the driver says
is free before and after, which only a GPU's own driver knows of graphs; elsewhere that column is empty.
"""

from __future__ import annotations

import gc
import time
import warnings
from typing import Any

import numpy as np

from numbabuf import BufferSpec, InputBufferManager, _cuda
from numbabuf._cuda import cuda

from . import harness

COUNTS, TOKENS, SLOTS, KERNELS = (8, 16, 51), 4096, 8, 4


@cuda.jit
def _consume(out, tokens):  # type: ignore[no-untyped-def]
    for i in range(cuda.grid(1), tokens.size, cuda.gridsize(1)):
        out[i] = tokens[i]


def run(smoke: bool, *, repeats: int | None = None) -> dict[str, Any]:
    """Capture each number of buckets `repeats` times."""
    warnings.simplefilter("ignore")  # Numba's, about small grids
    gpu = harness.on_gpu()
    repeats = repeats or (1 if smoke else 10)
    tokens = TOKENS if gpu else 64
    rows = []
    for count in COUNTS[:1] if smoke else COUNTS:
        sizes = sorted({max(1, tokens * i // count) for i in range(1, count + 1)})
        samples = _captures(sizes, tokens, repeats)
        timing = harness.summarise(np.array([us for us, _, _ in samples]) / len(sizes))
        nbytes, calls = samples[-1][1:]
        rows.append(
            harness.row(
                f"{len(sizes)} buckets, per graph", timing, total_ms=timing.median_us * len(sizes) / 1e3,
                driver_calls=None if calls is None else calls / len(sizes),
                device_bytes=nbytes / len(sizes) if gpu else None,
            )  # fmt: skip
        )
    return {"slots": SLOTS, "kernels": KERNELS, "tokens": tokens, "gpu": gpu, "rows": rows}


def _captures(sizes: list[int], tokens: int, repeats: int) -> list[tuple[float, int, int | None]]:
    """Capture all sizes, `repeats` times: microseconds, device bytes taken, driver calls (None where nobody counts)."""
    stub = harness.stand_in()
    samples = []
    with InputBufferManager(max_batch_size=1, max_seq_len=tokens, buckets=sizes, default_slots=False) as manager:
        names = [f"slot{i}" for i in range(SLOTS)]
        for name in names:
            manager.register_slot(name, BufferSpec(tokens, "int64"))
        out = cuda.device_array(tokens, np.int64)
        blocks, threads = _cuda.launch_shape(tokens)

        def fn(step: Any) -> None:
            for i in range(KERNELS):
                _consume[blocks, threads, step.stream](out, step[names[i]])

        manager.capture_buckets(fn)
        for _ in range(repeats):
            manager.close_graphs()
            gc.collect()
            free = _cuda.memory_info()
            if stub is not None:
                stub.reset_counts()
            start = time.perf_counter()
            for size in reversed(sizes):
                with manager.capture(size) as step:
                    fn(step)
            elapsed_us = (time.perf_counter() - start) * 1e6
            calls = None if stub is None else int(sum(stub.counts().values()))
            left = _cuda.memory_info()
            samples.append((elapsed_us, free[0] - left[0] if free and left else 0, calls))
    return samples


def table(result: dict[str, Any]) -> str:
    """The rows as text."""
    note = "" if result["gpu"] else "; no GPU, so no device bytes"
    head = f"{result['slots']} slots, {result['kernels']} kernels, up to {result['tokens']} tokens{note}"
    return f"{head}\n{harness.render(result['rows'])}"
