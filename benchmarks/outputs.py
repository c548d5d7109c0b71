"""Host time of one step and its results: 8 inputs in, kernels, 2 outputs of 1,024 back, read one step late.

numbabuf's outputs beside what Numba offers: a synchronise and a `copy_to_host` for each output; copies into pinned
arrays behind the step, with an event, waited for one step later; the copies captured in the step's graph, and a
synchronise, as the next step overwrites them: it costs the host little where nothing runs, and the device its overlap
where something does. The floor is `replay` without outputs and NumPy's copies of two arrays.
CPU time, the ways interleaved; on the stand-in driver kernels are skipped, and the benchmark publishes the steps
itself, inside the time of numbabuf's rows.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from numbabuf import BufferSpec, InputBufferManager, Outputs, _cuda
from numbabuf._cuda import cuda

from . import harness

SLOTS, TOKENS, RESULTS = 8, 1024, 2
Way = Callable[[], object]


@cuda.jit
def _work(source: np.ndarray, out: np.ndarray) -> None:
    for i in range(cuda.grid(1), source.size, cuda.gridsize(1)):
        out[i] = source[i]


def _manager(outputs: bool, device: list[Any], pinned: list[Any]) -> InputBufferManager:
    """A manager whose function writes two outputs, or `device` arrays; `pinned`: with their copies in the graph."""
    m = InputBufferManager(max_batch_size=1, max_seq_len=TOKENS, buckets=[TOKENS], default_slots=False)
    for i in range(SLOTS):
        m.register_slot(f"slot{i}", BufferSpec(TOKENS, "int64"))
    if outputs:
        for i in range(RESULTS):
            m.register_output(f"out{i}", BufferSpec(TOKENS, "int64"))
    shape = _cuda.launch_shape(TOKENS)

    def fn(step: Any) -> None:
        for i in range(RESULTS):
            out = step[f"out{i}"] if outputs else device[i]
            _work[shape[0], shape[1], step.stream](step[f"slot{i}"], out)
        for target, source in zip(pinned, device, strict=False):
            source.copy_to_host(target, stream=step.stream)

    m.capture_buckets(fn)
    return m


def _replay(m: InputBufferManager, inputs: dict[str, np.ndarray]) -> Any:
    """A step, which the benchmark marks as read, and as sent, where no kernel runs."""
    result = m.replay(inputs, TOKENS)
    if harness.stand_in() is not None:
        arena: Any = m._shared.arena
        arena.ring._retired[0] = arena.ring.step
        if isinstance(result, Outputs):
            arena.returns._word[0] = arena.returns._number
    return result


def _ours(inputs: dict[str, np.ndarray], plain: InputBufferManager, sending: InputBufferManager) -> dict[str, Way]:
    one = np.arange(TOKENS)
    earlier: list[Outputs] = [sending.replay(inputs, TOKENS)]

    def floor() -> None:
        _replay(plain, inputs)
        for _ in range(RESULTS):
            one.copy()

    def outputs() -> None:
        new = _replay(sending, inputs)
        for i in range(RESULTS):
            earlier[0][f"out{i}"]
        earlier[0] = new

    return {
        "floor: replay, NumPy's copies of the results": floor,
        "numbabuf: replay, outputs read one step late": outputs,
    }


def _theirs(
    inputs: dict[str, np.ndarray], device: list[Any], captured: list[Any], plain: InputBufferManager,
    copying: InputBufferManager,
) -> dict[str, Way]:  # fmt: skip
    rings = [[cuda.pinned_array(TOKENS, np.int64) for _ in range(RESULTS)] for _ in range(2)]
    events = [cuda.event() for _ in rings]
    turn = [0]

    def idiom() -> None:
        _replay(plain, inputs)
        plain.synchronize()
        for out in device:
            out.copy_to_host()

    def by_hand() -> None:
        turn[0] = at = 1 - turn[0]
        _replay(plain, inputs)
        for out, target in zip(device, rings[at], strict=True):
            out.copy_to_host(target, stream=plain.stream)
        events[at].record(plain.stream)
        events[1 - at].synchronize()
        for target in rings[1 - at]:
            target.copy()

    def in_the_graph() -> None:
        _replay(copying, inputs)
        copying.synchronize()
        for target in captured:
            target.copy()

    return {
        "replay, synchronize, copy_to_host each": idiom,
        "replay, pinned copies and an event, read one step late": by_hand,
        "graph with the copies in it, synchronize (no step in flight)": in_the_graph,
    }


def run(smoke: bool) -> dict[str, Any]:
    """Time each way; CPU time, interleaved, the median of the rounds."""
    warnings.simplefilter("ignore")  # Numba's, about small grids
    stub = harness.stand_in()
    inputs = {f"slot{i}": np.arange(TOKENS) + i for i in range(SLOTS)}
    device = [cuda.device_array(TOKENS, np.int64) for _ in range(RESULTS)]
    captured = [cuda.pinned_array(TOKENS, np.int64) for _ in range(RESULTS)]
    plain, sending, copying = managers = (
        _manager(False, device, []), _manager(True, device, []), _manager(False, device, captured)
    )  # fmt: skip
    for m in managers:
        m.replay(inputs, TOKENS)
        m.synchronize()
    ways = _ours(inputs, plain, sending) | _theirs(inputs, device, captured, plain, copying)
    rounds, repeats = (1, 3) if smoke or _cuda.SIM else (15, 1000)
    times: dict[str, list[float]] = {what: [] for what in ways}
    with harness.kernels_skipped(stub):
        for _ in range(rounds):
            for what, call in ways.items():
                began = time.process_time()
                for _ in range(repeats):
                    call()
                times[what].append((time.process_time() - began) / repeats * 1e6)
    for m in managers:
        if stub is not None:  # nothing ran, so nothing counted
            m._shared.arena.resync()  # type: ignore[union-attr]
        m.close()
    floor = float(np.median(next(iter(times.values()))))
    rows = [
        {"what": what, "cpu_us": round(float(np.median(each)), 2), "times_floor": round(np.median(each) / floor, 2)}
        for what, each in times.items()
    ]
    return {"kernels_skipped": stub is not None, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """The rows as text."""
    note = "; kernels skipped by the stand-in driver" if result["kernels_skipped"] else ""
    return f"{SLOTS} inputs, {RESULTS} outputs of {TOKENS}{note}\n" + harness.render(
        result["rows"], ["what", "cpu_us", "times_floor"]
    )
