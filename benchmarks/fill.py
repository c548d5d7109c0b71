"""The fill kernel's bandwidth: bytes moved over time, against one copy of the same bytes to the device.

GPU times from events around many launches in a row, so that what the host does is not in them. Bytes count what is read
from the staging block and what is written to the slots. On a GPU only: a simulated kernel's time means nothing.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np

from numbabuf import BufferSpec, InputBufferManager, _cuda

from . import harness

SIZES, SLOTS = (1, 64, 256, 4096, 65536, 1 << 20), 8


def run(smoke: bool, *, slots: int = SLOTS, repeats: int | None = None) -> dict[str, Any]:
    """Time fills of `slots` slots of int64, full and half padded, and copies of as many bytes."""
    if not harness.on_gpu():
        return {"gpu": False, "rows": []}
    warnings.simplefilter("ignore")
    repeats = repeats or (3 if smoke else 100)
    rows: list[dict[str, Any]] = []
    for tokens in SIZES[:2] if smoke else SIZES:
        with InputBufferManager(max_batch_size=1, max_seq_len=tokens, buckets=[tokens], default_slots=False) as manager:
            for i in range(slots):
                manager.register_slot(f"slot{i}", BufferSpec(tokens, "int64"))
            for live in sorted({tokens, max(1, tokens // 2)}, reverse=True):
                inputs = {f"slot{i}": np.arange(live) for i in range(slots)}
                for _ in range(manager._depth + 1):  # every block of the ring holds such a step
                    manager.stage_inputs(inputs, live)
                manager.synchronize()
                graph = manager._fills[(tokens,)]  # launched as it is: the host writes nothing meanwhile
                launch = functools.partial(graph.launch_on, manager._core)
                timing = harness.measure_device(launch, manager.stream, repeats=repeats)
                manager._arena.resync()
                moved = 8 * slots * (live + tokens)
                rows.append(_row(f"fill, {slots} x {tokens}, {live} live", timing, moved))
        nbytes = 8 * slots * tokens
        stream = _cuda.as_stream(None)
        source, target = _cuda.empty_pinned(nbytes), _cuda.empty_device(nbytes)
        other = _cuda.empty_device(nbytes)
        for what, origin in {"pinned to device": source, "device to device": other}.items():
            copy = functools.partial(target.copy_to_device, origin, stream=stream.numba)
            timing = harness.measure_device(copy, stream.numba, repeats=repeats)
            rows.append(_row(f"copy {what}, {nbytes} B", timing, 2 * nbytes))
    return {"gpu": True, "rows": rows}


def _row(what: str, timing: harness.Timing, moved: int) -> dict[str, Any]:
    return harness.row(what, timing, bytes=moved, GB_per_s=moved / timing.median_us / 1e3)


def table(result: dict[str, Any]) -> str:
    """The rows as text."""
    return harness.render(result["rows"]) if result["gpu"] else "needs a GPU, and there is none: no rows"
