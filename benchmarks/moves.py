"""Moves between pinned and device memory: one batch by our kernel, by the copy engine, and by a loop of copies.

On a GPU: bandwidth of single large copies and of 1,000 small ones, up, down and within the device, with the number of
thread blocks swept. Anywhere: what planning and queueing a batch cost the host. In the simulator and on the stand-in
driver times say nothing of a GPU, so there only the host's part of few and small batches is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from numbabuf import _cuda
from numbabuf.memory import Block
from numbabuf.moves import BLOCKS, Move, Mover, plan
from numbabuf.spec import BufferSpec, Tier

from . import harness

DIRECTIONS = {
    "up": (Tier.PINNED, Tier.DEVICE),
    "down": (Tier.DEVICE, Tier.PINNED),
    "within": (Tier.DEVICE, Tier.DEVICE),
}
COUNTS = (4, 8, 16, 32, 64, 128)
LARGE, SMALL = (1 << 20, 16 << 20, 256 << 20), (4 << 10, 16 << 10, 64 << 10)


def _on_gpu() -> bool:
    return not _cuda.SIM and "stand-in" not in str(harness.environment()["driver"])


def _moves(direction: str, nbytes: int, count: int) -> list[Move]:
    source, target = (BufferSpec(nbytes, "uint8", tier) for tier in DIRECTIONS[direction])
    return [Move(Block(source, nbytes), Block(target, nbytes), nbytes) for _ in range(count)]


def _loop(mover: Mover, moves: Sequence[Move]) -> Callable[[], object]:
    """The loop of Numba copies that a batch replaces; views are made once, which favours it."""
    pairs = [
        tuple(_cuda.device_view(b.base, 0, (move.nbytes,), np.dtype(np.uint8)) for b in (move.target, move.source))
        for move in moves
    ]

    def run() -> None:
        for target, source in pairs:
            _cuda.copy(target, source, mover.stream)

    return run


def _batch_of_the_driver(mover: Mover, moves: Sequence[Move]) -> Callable[[], object] | None:
    """cuMemcpyBatchAsync over the same copies, None where the driver or its bindings do not have it."""
    try:
        from cuda.bindings import driver

        targets = [driver.CUdeviceptr(move.target.address) for move in moves]
        sources = [driver.CUdeviceptr(move.source.address) for move in moves]
        sizes = [move.nbytes for move in moves]
        attributes = driver.CUmemcpyAttributes()
        attributes.srcAccessOrder = driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM

        def run() -> None:
            (status,) = driver.cuMemcpyBatchAsync(
                targets, sources, sizes, len(sizes), [attributes], [0], 1, mover.stream.handle
            )
            if status != driver.CUresult.CUDA_SUCCESS:
                raise RuntimeError(str(status))

        run()
        mover.synchronize()
        return run
    except (ImportError, AttributeError, RuntimeError):  # no driver, old bindings or an old driver: one row less
        return None


def _rows(
    direction: str, nbytes: int, count: int, counts: Sequence[int], repeats: int, gpu: bool
) -> list[dict[str, Any]]:
    moves = _moves(direction, nbytes, count)
    total = nbytes * count
    ways: list[tuple[str, int | None, Mover, Callable[[], object] | None]] = []
    for blocks in counts:
        mover = Mover(blocks=blocks)
        ways.append(("kernel", blocks, mover, lambda mover=mover: mover.run(moves)))  # type: ignore[misc]
    mover = Mover(engine_bytes=1)
    ways.append(("loop of copies" if count > 1 else "copy engine", None, mover, _loop(mover, moves)))
    if count > 1:
        ways.append(("cuMemcpyBatchAsync", None, mover, _batch_of_the_driver(mover, moves)))
    rows: list[dict[str, Any]] = []
    for what, blocks_used, mover, call in ways:
        name = f"{direction}, {count} x {nbytes} B: {what}"
        if call is None:
            rows.append({"what": name, "note": "not offered by this driver"})
            continue
        timing = harness.measure(call, repeats=repeats, warmup=3, finish=mover.synchronize)
        queueing = harness.measure(call, repeats=repeats, warmup=0)
        mover.synchronize()
        rows.append(harness.row(name, timing, blocks=blocks_used, queue_us=queueing.median_us))
        if gpu:
            rows[-1]["GB_per_s"] = total / timing.median_us / 1e3
    return rows


def run(smoke: bool, *, repeats: int | None = None) -> dict[str, Any]:
    """Time every way of moving; `repeats` samples of each."""
    gpu = _on_gpu()
    repeats = repeats or (2 if smoke else 50 if gpu else 10)
    large, small, many = (LARGE, SMALL, 1000) if gpu and not smoke else ((4096,), (256,), 20)
    counts = COUNTS if gpu and not smoke else (BLOCKS,)
    rows = []
    for direction in DIRECTIONS:
        for nbytes in large:
            rows += _rows(direction, nbytes, 1, counts, repeats, gpu)
        for nbytes in small:
            rows += _rows(direction, nbytes, many, counts, repeats, gpu)
    planning = []
    for count in (1, 100, 1000):
        copies = [(i << 20, (1 << 45) + (i << 20), 4096) for i in range(count)]
        timing = harness.measure(lambda copies=copies: plan(copies), repeats=10 * repeats)  # type: ignore[misc]
        planning.append(harness.row(f"plan of {count} copies", timing))
    return {"gpu": gpu, "rows": rows, "planning": planning}


def table(result: dict[str, Any]) -> str:
    """The rows as text; without a GPU they are about the host alone."""
    note = (
        "" if result["gpu"] else "no GPU: these times are an interpreter's and the host's, and say nothing of a bus\n"
    )
    return note + harness.render(result["rows"]) + "\n\n" + harness.render(result["planning"])
