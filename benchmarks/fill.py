"""The fill kernel on the device: its time beside the time predicted from its bytes, and beside copies of those bytes.

GPU times, by events around a graph of many fills, so that nothing of the host is in them. Bytes count what is read from
the staging block and what is written to the slots. The copies are what the fill replaces: one of all bytes within the
device, one from pinned memory, and a copy per slot as nodes of a graph, by Numba, torch and CuPy. A second table tries
launch shapes. Without a GPU the same program runs, and its times mean nothing.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import asdict
from typing import Any

import numpy as np

from numbabuf import BufferSpec, InputBufferManager, _cuda
from numbabuf._cuda import kernels

from . import _machine, _rivals, harness

SIZES, SLOTS = (1, 64, 256, 4096, 65536, 1 << 20), 8
BLOCKS, THREADS = (1, 2, 4, 8, 16, 32, 64, 128), (64, 128, 256, 512)
"""Launch shapes tried: thread blocks per slot, and threads of each."""


def _inner(nbytes: int) -> int:
    """Return how often work on so many bytes is in one graph: often where it is short, not for seconds where not."""
    return 1 if _cuda.SIM else 20 if nbytes <= 1 << 20 else 3


def run(smoke: bool, *, slots: int = SLOTS, repeats: int | None = None) -> dict[str, Any]:
    """Time fills of `slots` slots of int64, full and half padded, and copies of as many bytes."""
    warnings.simplefilter("ignore")  # Numba's, about small grids
    gpu = harness.on_gpu()
    repeats = repeats or (2 if smoke else 50 if gpu else 3)
    sizes = SIZES if gpu and not smoke else SIZES[:2]
    blocks, threads = (BLOCKS, THREADS) if gpu and not smoke else ((1, 2), (64,))
    machine = _machine.measure(smoke)
    rivals, rows = _rivals.found()
    shapes: list[dict[str, Any]] = []
    for tokens in sizes:
        copies = _copies(rivals, slots, tokens, machine, repeats)
        within = next(line["median_us"] for line in copies if line["what"] == "one copy within the device")
        fills, tried = _fills(slots, tokens, machine, repeats, blocks, threads)
        for line in fills + copies:
            rows.append({**line, "to_copy": line["median_us"] / within} if "median_us" in line else line)
        shapes += tried
    return {"gpu": gpu, "slots": slots, "machine": asdict(machine), "rows": rows, "shapes": shapes}


def _row(
    what: str, tokens: int, timing: harness.Timing, moved: int, predicted_us: float, **more: Any
) -> dict[str, Any]:
    return harness.row(
        what, timing, tokens=tokens, **more, bytes=moved, GB_per_s=moved / timing.median_us / 1e3,
        predicted_us=predicted_us, to_predicted=timing.median_us / predicted_us,
    )  # fmt: skip


def _fills(
    slots: int, tokens: int, machine: _machine.Machine, repeats: int, blocks: Any, threads: Any
) -> tuple[list[Any], list[Any]]:
    """Time the fill as the manager launches it, and in other shapes; returns the rows of both tables."""
    rows, shapes = [], []
    with InputBufferManager(max_batch_size=1, max_seq_len=tokens, buckets=[tokens], default_slots=False) as manager:
        for i in range(slots):
            manager.register_slot(f"slot{i}", BufferSpec(tokens, "int64"))
        for live in sorted({tokens, max(1, tokens // 2)}, reverse=True):
            inputs = {f"slot{i}": np.arange(live) for i in range(slots)}
            for _ in range(manager._shared.depths[0] + 1):  # every block of the ring holds such a step
                manager.stage_inputs(inputs, live)
            manager.synchronize()
            arena, stream = manager._shared.arena, _cuda.as_stream(None)
            assert arena is not None
            # The fill counts for itself which block is next, so it can be launched again and again as it is.
            fill = functools.partial(arena.launch_fill, stream, (tokens,) * slots)
            up, written = 8 * slots * live, 8 * slots * tokens
            predicted_us = machine.predict_us(up=up, device=written)
            inner = _inner(written)
            timing = harness.measure_device(fill, stream, repeats=repeats, inner=inner)
            rows.append(_row("numbabuf: fill", tokens, timing, up + written, predicted_us, live=live))
            for shape in [(b, t) for b in blocks for t in threads] if live == tokens else ():
                grid, block = ((1, slots), 1) if _cuda.SIM else ((shape[0], slots), shape[1])
                fill = functools.partial(_cuda.launch, kernels.fill_slots, grid, block, stream, arena._table_address)
                tried = harness.measure_device(fill, stream, repeats=max(2, repeats // 5), inner=inner)
                shapes.append(
                    {"tokens": tokens, "blocks": shape[0], "threads": shape[1], "median_us": tried.median_us,
                     "to_predicted": tried.median_us / predicted_us, "to_default": tried.median_us / timing.median_us}
                )  # fmt: skip
            stream.synchronize()
            arena.resync()
    return rows, shapes


def _copies(rivals: list[Any], slots: int, tokens: int, machine: _machine.Machine, repeats: int) -> list[Any]:
    """Time what a fill replaces: copies of the same bytes, each way in a graph of its own."""
    nbytes = 8 * slots * tokens
    inner = _inner(nbytes)
    stream = _cuda.as_stream(None)
    target, other, pinned = _cuda.empty_device(nbytes), _cuda.empty_device(nbytes), _cuda.empty_pinned(nbytes)
    over_pinned = _cuda.device_view(pinned, 0, (nbytes,), np.dtype(np.uint8))
    rows: list[dict[str, Any]] = []
    for what, source, up in (
        ("one copy within the device", other, 0),
        ("one copy from pinned memory", over_pinned, nbytes),
    ):
        copy = functools.partial(_cuda.copy, target, source, stream)
        timing = harness.measure_device(copy, stream, repeats=repeats, inner=inner)
        predicted_us = machine.predict_us(up=up, device=nbytes if up else 2 * nbytes)
        rows.append(_row(what, tokens, timing, 2 * nbytes, predicted_us))
    for rival in rivals:
        what = f"{rival.name}: {slots} copies in a graph"
        with _rivals.noted(rows, what, tokens=tokens):
            pairs = [(rival.device(tokens), rival.pinned(tokens)) for _ in range(slots)]

            def work(rival: Any = rival, pairs: Any = pairs) -> None:
                for _ in range(inner):
                    for to, origin in pairs:
                        rival.copy(to, origin)

            launch = _rivals.warm_graph(rival, work)
            timing = harness.measure_events(launch, rival.events, repeats=repeats, inner=inner)
            rival.synchronize()
            rows.append(_row(what, tokens, timing, 2 * nbytes, machine.predict_us(up=nbytes, device=nbytes)))
    return rows


def best_shapes(shapes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each size, the fastest of the launch shapes."""
    by_size: dict[int, dict[str, Any]] = {}
    for shape in shapes:
        best = by_size.setdefault(shape["tokens"], shape)
        if shape["median_us"] < best["median_us"]:
            by_size[shape["tokens"]] = shape
    return list(by_size.values())


def table(result: dict[str, Any]) -> str:
    """The rows as text, and the best launch shape of each size."""
    note = "" if result["gpu"] else "no GPU: these are an interpreter's times, and say nothing of a device\n"
    return (
        f"{note}{_machine.describe(result['machine'])}\n{result['slots']} slots of int64\n"
        f"{harness.render(result['rows'])}\n\nfastest of the launch shapes tried, blocks per slot\n"
        f"{harness.render(best_shapes(result['shapes']))}"
    )
