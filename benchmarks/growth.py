"""How a step's host time grows with the number of slots, 1 to 128; that of a lease with idle buffers is in `pool`.

Every slot is given an input at each step. Beside it Numba's idiom, a write to pinned memory and a copy for each, and
one graph of such copies, which does not guard the pinned memory. On the stand-in driver kernels are accepted and
skipped, so that the figures are what Python and the bindings cost; the blocks that nobody reads there are marked read,
inside the time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from numbabuf import BufferSpec, InputBufferManager, _cuda

from . import _rivals, harness

COLUMNS = (*harness.COLUMNS, "us_per_slot")
COUNTS, TOKENS = (1, 2, 4, 8, 16, 32, 64, 128), 256


def _numba(inputs: list[Any], tokens: int) -> dict[str, Callable[[], object]]:
    """Numba's two ways of giving every slot its input."""
    rival = _rivals.Numba()
    pairs = [(rival.device(tokens), rival.pinned(tokens)) for _ in inputs]

    def write() -> None:
        for (_, pinned), values in zip(pairs, inputs, strict=True):
            pinned[:] = values

    def copy() -> None:
        for target, pinned in pairs:
            rival.copy(target, pinned)

    launch = _rivals.warm_graph(rival, copy)

    def idiom() -> None:
        write()
        copy()

    def graph() -> None:
        write()
        launch()

    return {"Numba: copies": idiom, "Numba: graph of copies": graph}


def run(smoke: bool, *, tokens: int = TOKENS) -> dict[str, Any]:
    """Time a fill and a replay of `tokens` for each number of slots."""
    warnings.simplefilter("ignore")  # Numba's, about small grids
    stub = harness.stand_in()
    repeats = 3 if smoke or _cuda.SIM else 200
    options = harness.host_options()
    rows = []
    for count in (1, 8) if smoke or _cuda.SIM else COUNTS:
        manager = InputBufferManager(max_batch_size=1, max_seq_len=tokens, buckets=[tokens], default_slots=False)
        names = [f"slot{i}" for i in range(count)]
        for name in names:
            manager.register_slot(name, BufferSpec(tokens, "int64"))
        inputs = {name: np.arange(tokens) for name in names}
        manager.capture_buckets(lambda step: None)
        manager.stage_inputs(inputs, tokens)
        manager.synchronize()
        ways = {call: harness.step_of(manager, call, inputs, tokens, stub) for call in ("replay", "stage_inputs")}
        ways |= _numba(list(inputs.values()), tokens)
        try:
            with harness.kernels_skipped(stub):
                for what, step in ways.items():
                    timing = harness.measure(step, repeats=repeats, **options, seconds=1)
                    per_slot = timing.median_us / count
                    rows.append(
                        harness.row(f"{what}, {count} slots", timing, slots=count, way=what, us_per_slot=per_slot)
                    )
        finally:
            if stub is not None:
                assert manager._shared.arena is not None
                manager._shared.arena.resync()  # nothing ran there, so nothing counted
            manager.close()
    return {"tokens": tokens, "kernels_skipped": stub is not None, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """The rows as text."""
    note = "; kernels skipped by the stand-in driver" if result["kernels_skipped"] else ""
    return f"{result['tokens']} tokens of int64 a slot{note}\n{harness.render(result['rows'], COLUMNS)}"
