"""Moves between pinned and device memory: one batch by our kernel, by the copy engine, and by other libraries' copies.

On a GPU: single large copies and 1,000 small ones, up, down and within the device, the number of thread blocks swept.
Times end in a synchronise and hold what the host needs to plan and queue (`queue_us` alone); beside them the time
predicted from the bytes and the bandwidth of the device's own copies, measured in the same run. Anywhere: what planning
and queueing a batch cost the host. Without a GPU only few and small batches are moved, and times say nothing of a bus.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from numbabuf import _cuda
from numbabuf.pool.block import Block
from numbabuf.pool.spec import BufferSpec, Tier
from numbabuf.tiers import mover as movers
from numbabuf.tiers.mover import BLOCKS_UP, Move, Mover

from . import _machine, _rivals, harness

DIRECTIONS = {
    "up": (Tier.PINNED, Tier.DEVICE),
    "down": (Tier.DEVICE, Tier.PINNED),
    "within": (Tier.DEVICE, Tier.DEVICE),
}
COUNTS = (4, 8, 16, 32, 64, 128)
LARGE, SMALL = (1 << 20, 16 << 20, 256 << 20), (4 << 10, 16 << 10, 64 << 10)

Way = tuple[str, int | None, Callable[[], Callable[[], object]], Callable[[], object]]
"""What it is called, thread blocks where it has any, what makes that which queues the batch, what waits for it."""


def _moves(direction: str, nbytes: int, count: int) -> list[Move]:
    source, target = (BufferSpec(nbytes, "uint8", tier) for tier in DIRECTIONS[direction])
    return [Move(Block(source, nbytes), Block(target, nbytes), nbytes) for _ in range(count)]


def _engine(mover: Mover, moves: Sequence[Move]) -> Callable[[], object]:
    """The copy engine, a call for each; views are made once, which favours it."""
    pairs = [
        tuple(
            _cuda.device_view(b.memory.base, 0, (move.nbytes,), np.dtype(np.uint8)) for b in (move.target, move.source)
        )
        for move in moves
    ]

    def run() -> None:
        for target, source in pairs:
            _cuda.copy(target, source, mover.stream)

    return run


def _batch_of_the_driver(mover: Mover, moves: Sequence[Move]) -> Callable[[], object]:
    """cuMemcpyBatchAsync over the same copies; raises, here or when run, where driver or bindings do not have it."""
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

    return run


def _copies(rival: Any, direction: str, nbytes: int, count: int) -> Callable[[], object]:
    """A copy for each, in another library, between memory of its own."""
    make = {Tier.PINNED: rival.pinned, Tier.DEVICE: rival.device}
    source, target = (make[tier] for tier in DIRECTIONS[direction])
    pairs = [(target(nbytes // 8), source(nbytes // 8)) for _ in range(count)]

    def run() -> None:
        with rival.using():
            for to, origin in pairs:
                rival.copy(to, origin)

    return run


def _ways(direction: str, nbytes: int, count: int, counts: Sequence[int], rivals: list[Any]) -> list[Way]:
    moves = _moves(direction, nbytes, count)
    ways: list[Way] = []
    for blocks in counts:
        mover = Mover(blocks=blocks, engine_bytes=1 << 62)  # no move goes to the copy engine
        ours = functools.partial(functools.partial, mover.run, moves)
        ways.append(("numbabuf: kernel", blocks, ours, mover.synchronize))
    mover = Mover()
    ways.append(("copy engine", None, functools.partial(_engine, mover, moves), mover.synchronize))
    if count > 1:
        batch = functools.partial(_batch_of_the_driver, mover, moves)
        ways.append(("cuMemcpyBatchAsync", None, batch, mover.synchronize))
    for rival in rivals:
        theirs = functools.partial(_copies, rival, direction, nbytes, count)
        ways.append((f"{rival.name}: copies", None, theirs, rival.synchronize))
    return ways


def _rows(
    direction: str, nbytes: int, count: int, ways: list[Way], machine: _machine.Machine, repeats: int
) -> list[dict[str, Any]]:
    total = nbytes * count
    bus = {"up": {"up": total, "device": total}, "down": {"down": total, "device": total}}
    predicted_us = machine.predict_us(**bus.get(direction, {"device": 2 * total}))
    rows: list[dict[str, Any]] = []
    for way, blocks, make, finish in ways:
        what = f"{direction}, {count} x {nbytes} B, {way}"
        with _rivals.noted(rows, what):
            call = make()
            timing = harness.measure(call, repeats=repeats, warmup=2, finish=finish, seconds=0.5)
            queueing = harness.measure(call, repeats=repeats, warmup=0, settle=finish, seconds=0.5)
            finish()
            rows.append(
                harness.row(
                    what,
                    timing,
                    direction=direction,
                    nbytes=nbytes,
                    count=count,
                    way=way,
                    blocks=blocks,
                    queue_us=queueing.median_us,
                    GB_per_s=total / timing.median_us / 1e3,
                    predicted_us=predicted_us,
                    to_predicted=timing.median_us / predicted_us,
                )  # fmt: skip
            )
    return rows


def run(smoke: bool, *, repeats: int | None = None) -> dict[str, Any]:
    """Time every way of moving; `repeats` samples of each."""
    gpu = harness.on_gpu()
    repeats = repeats or (2 if smoke else 30 if gpu else 10)
    large, small, many = (LARGE, SMALL, 1000) if gpu and not smoke else ((4096,), (256,), 20)
    counts = COUNTS if gpu and not smoke else (BLOCKS_UP,)
    machine = _machine.measure(smoke)
    rivals, rows = _rivals.found()
    for direction in DIRECTIONS:
        for nbytes, count in [(nbytes, 1) for nbytes in large] + [(nbytes, many) for nbytes in small]:
            ways = _ways(direction, nbytes, count, counts, rivals)
            rows += _rows(direction, nbytes, count, ways, machine, repeats)
    planning = []
    for count in (1, 100, 1000):
        copies = [(i << 20, (1 << 45) + (i << 20), 4096) for i in range(count)]
        timing = harness.measure(lambda copies=copies: movers.table(copies), repeats=10 * repeats)  # type: ignore[misc]
        planning.append(harness.row(f"plan of {count} copies", timing))
    return {"gpu": gpu, "machine": asdict(machine), "rows": rows, "planning": planning, "numbers": numbers(rows)}


def numbers(rows: list[dict[str, Any]]) -> dict[str, dict[str, int | None]]:
    """What `HierarchicalBufferPool(move_blocks=, engine_bytes=)` would be given by these rows, for each direction.

    The fewest blocks within 5 % of the fastest for the largest single move, and the least bytes from which on the copy
    engine is faster at every size; None where there is no such size.
    """
    found: dict[str, dict[str, int | None]] = {}
    for direction in DIRECTIONS:
        alone = [row for row in rows if row.get("direction") == direction and row["count"] == 1 and "median_us" in row]
        kernel: dict[int, dict[int, float]] = {}
        engine: dict[int, float] = {}
        for row in alone:
            if row["way"] == "numbabuf: kernel":
                kernel.setdefault(row["nbytes"], {})[row["blocks"]] = row["median_us"]
            elif row["way"] == "copy engine":
                engine[row["nbytes"]] = row["median_us"]
        if not kernel:
            continue
        largest = kernel[max(kernel)]
        least = None
        for nbytes in sorted(kernel, reverse=True):
            if engine.get(nbytes, math.inf) >= min(kernel[nbytes].values()):
                break
            least = nbytes
        fewest = min(blocks for blocks, time in largest.items() if time <= 1.05 * min(largest.values()))
        found[direction] = {"move_blocks": fewest, "engine_bytes": least}
    return found


COLUMNS = (*harness.COLUMNS[:-1], "blocks", "queue_us", "GB_per_s", "predicted_us", "to_predicted", "note")


def table(result: dict[str, Any]) -> str:
    """The rows as text; without a GPU they are about the host alone."""
    note = "" if result["gpu"] else "no GPU: times of an interpreter and the host, which say nothing of a bus\n"
    return (
        f"{note}{_machine.describe(result['machine'])}\n{harness.render(result['rows'], COLUMNS)}\n\n"
        f"{harness.render(result['planning'])}\n\n{_advice(result['numbers'])}"
    )


def _advice(numbers: dict[str, dict[str, int | None]]) -> str:
    """The numbers as text, as a pool takes them."""
    return "\n".join(
        f"{direction}: HierarchicalBufferPool(move_blocks={found['move_blocks']}, engine_bytes={found['engine_bytes']})"
        for direction, found in numbers.items()
    )
