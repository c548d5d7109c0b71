"""How a copying kernel moves bytes fastest here: bytes per access, loads in flight, thread blocks and threads.

Our kernels use 16 bytes per access and four loads before the first store. Kernels made for this benchmark alone do the
same with 4, 8 and 16 bytes and with 1 to 8 loads, from pinned memory to the device and within it; the fastest come
first, beside the time predicted from the bytes. Without a GPU each is run once over, to show that it copies, and times
mean nothing.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from dataclasses import asdict
from typing import Any

import numpy as np

from numbabuf import _cuda
from numbabuf._cuda import access, cuda

from . import _machine, harness

WIDTHS, UNROLLS = (4, 8, 16), (1, 2, 4, 8)
BLOCKS, THREADS = (8, 16, 32, 64, 128, 256, 512), (128, 256, 512)
SIZES = (1 << 16, 1 << 20, 64 << 20)
SHOWN = 5
"""Rows printed for each size and direction; the JSON has all."""


def kernel(width: int, unroll: int) -> Any:
    """Return a kernel that copies `words` words of `width` bytes, `unroll` loads before the first store.

    Written out as source, as each of the loads has to be a statement of its own for them all to be in flight.
    """
    values = ["a{0}, b{0}" if width == 16 else "a{0}" for _ in range(unroll)]
    lines = [
        "def copy(source, target, words):",
        "    i = cuda.grid(1)",
        "    step = cuda.gridsize(1)",
        f"    while i + {unroll - 1} * step < words:",
        *(f"        {v.format(n)} = load(source + (i + {n} * step) * {width})" for n, v in enumerate(values)),
        *(f"        store(target + (i + {n} * step) * {width}, {v.format(n)})" for n, v in enumerate(values)),
        f"        i += {unroll} * step",
        "    while i < words:",
        f"        {values[0].format(0)} = load(source + i * {width})",
        f"        store(target + i * {width}, {values[0].format(0)})",
        "        i += step",
    ]
    names = {"cuda": cuda, "load": getattr(access, f"load{width}"), "store": getattr(access, f"store{width}")}
    exec("\n".join(lines), names)
    return cuda.jit(names["copy"])


def run(smoke: bool, *, repeats: int | None = None) -> dict[str, Any]:
    """Time every kernel in every launch shape; `repeats` samples of each."""
    warnings.simplefilter("ignore")  # Numba's, about small grids
    gpu = harness.on_gpu()
    whole = gpu and not smoke
    repeats = repeats or (10 if whole else 1)
    sizes = SIZES if whole else (4096 + 16,)
    shapes = list(itertools.product(BLOCKS, THREADS)) if whole else [(1, 1 if _cuda.SIM else 32)]
    stream = _cuda.as_stream(None)
    machine = _machine.measure(smoke)
    pinned, device, target = _cuda.empty_pinned(max(sizes)), *(_cuda.empty_device(max(sizes)) for _ in range(2))
    pinned[:] = np.random.default_rng(0).integers(256, size=len(pinned))
    device.copy_to_device(pinned)
    rows: list[dict[str, Any]] = []
    for width, unroll in itertools.product(WIDTHS, UNROLLS):
        copying = kernel(width, unroll)
        for (origin, source), nbytes in itertools.product({"pinned": pinned, "device": device}.items(), sizes):
            up = origin == "pinned"
            predicted_us = machine.predict_us(up=nbytes * up, device=nbytes * (1 if up else 2))
            ends = _cuda.address(source), _cuda.address(target), nbytes // width
            for blocks, threads in shapes:
                if blocks * threads * width > nbytes:
                    continue  # threads without a word to move
                call = functools.partial(_cuda.launch, copying, blocks, threads, stream, *ends)
                timing = harness.measure_device(call, stream, repeats=repeats, inner=3 if whole else 1)
                rows.append(
                    {"source": origin, "bytes": nbytes, "width": width, "unroll": unroll, "blocks": blocks,
                     "threads": threads, "median_us": timing.median_us, "GB_per_s": nbytes / timing.median_us / 1e3,
                     "predicted_us": predicted_us, "to_predicted": timing.median_us / predicted_us}
                )  # fmt: skip
            assert np.array_equal(target.copy_to_host()[:nbytes], pinned[:nbytes]), (width, unroll, origin, nbytes)
            _cuda.zero(target, stream)
            stream.synchronize()
    return {"gpu": gpu, "machine": asdict(machine), "rows": rows}


def fastest(rows: list[dict[str, Any]], count: int = SHOWN) -> list[dict[str, Any]]:
    """Return the fastest rows of each source and size, and the best of those made as our kernels are."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in sorted(rows, key=lambda line: line["median_us"]):
        groups.setdefault((line["source"], line["bytes"]), []).append(line)
    shown = []
    for _, group in sorted(groups.items()):
        shown += [{"what": "fastest", **line} for line in group[:count]]
        as_ours = [line for line in group if (line["width"], line["unroll"]) == (16, 4)]
        shown += [{"what": "as numbabuf's", **line} for line in as_ours[:1]]
    return shown


def table(result: dict[str, Any]) -> str:
    """The fastest rows as text."""
    note = "" if result["gpu"] else "no GPU: these are an interpreter's times, and say nothing of a device\n"
    head = _machine.describe(result["machine"])
    return f"{note}{head}\n{harness.render(fastest(result['rows']))}"
