"""Host time of one step: 8 inputs of 256 tokens into fixed device arrays, and the work that reads them.

Numba's idiom (a `copy_to_device` per input, then the launches), the same with pinned staging arrays, numbabuf's fill
alone and its replay, all in one process. On the stand-in driver kernels are accepted and skipped, so that the figures
are what Python and the bindings cost the host; a real driver adds its own time to every row's driver calls. With
nobody to read the staging blocks there, the benchmark marks them read itself, inside the time of numbabuf's rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from numbabuf import BufferSpec, InputBufferManager, _cuda
from numbabuf._cuda import cuda

from . import harness

SLOTS, TOKENS, KERNELS = 8, 256, 4


@cuda.jit
def _consume(out, tokens):  # type: ignore[no-untyped-def]
    for i in range(cuda.grid(1), tokens.size, cuda.gridsize(1)):
        out[i] = tokens[i]


def _stand_in() -> Any:
    """The stand-in driver's controls, None on a GPU and in the simulator."""
    if _cuda.SIM:
        return None
    try:
        import cudastub
    except ImportError:
        return None
    return cudastub if cudastub.active else None


def _count(stub: Any, call: Callable[[], object]) -> int | None:
    """Driver calls of one `call`; None where nobody counts."""
    if stub is None:
        return None
    stub.reset_counts()
    call()
    return int(sum(stub.counts().values()))


def run(smoke: bool, *, slots: int = SLOTS, tokens: int = TOKENS, kernels: int = KERNELS) -> dict[str, Any]:
    """Time each way to stage `slots` inputs of `tokens` and launch `kernels` kernels that read them."""
    warnings.simplefilter("ignore")  # Numba's, about small grids
    stub = _stand_in()
    shape = _cuda.launch_shape(tokens)
    names = [f"slot{i}" for i in range(slots)]
    inputs = {name: np.arange(tokens) + i for i, name in enumerate(names)}
    out = cuda.device_array(tokens, np.int64)

    def work(stream: Any, arrays: list[Any]) -> None:
        for i in range(kernels):
            _consume[shape[0], shape[1], stream](out, arrays[i % len(arrays)])

    stream = cuda.stream()
    device = [cuda.device_array(tokens, np.int64) for _ in names]
    pinned = [cuda.pinned_array(tokens, np.int64) for _ in names]

    def idiom() -> None:
        for target, name in zip(device, names, strict=True):
            target.copy_to_device(inputs[name], stream=stream)
        work(stream, device)

    def idiom_pinned() -> None:
        for target, staged, name in zip(device, pinned, names, strict=True):
            staged[:] = inputs[name]
            target.copy_to_device(staged, stream=stream)
        work(stream, device)

    managers = []

    def manager(**options: Any) -> InputBufferManager:
        made = InputBufferManager(max_batch_size=1, max_seq_len=tokens, buckets=[tokens], default_slots=False, **options)
        managers.append(made)
        return made

    plain, checked, unchecked = manager(), manager(range_check=True), manager(range_check=False)
    for name in names:
        plain.register_slot(name, BufferSpec(tokens, "int64"))
        for other in (checked, unchecked):
            other.register_slot(name, BufferSpec(tokens, "int32"), source_dtype="int64")
    for each in managers:
        each.capture_buckets(lambda step: work(step.stream, [step[name] for name in names]))
        each.stage_inputs(inputs, tokens)
        each.synchronize()

    def ours(each: InputBufferManager, call: str) -> Callable[[], object]:
        method, ring = getattr(each, call), each._ring
        if stub is None:
            return lambda: method(inputs, tokens)

        def marked() -> None:
            ring._retired[0] = ring.step
            method(inputs, tokens)

        return marked

    ways = {
        f"numba: {slots} copy_to_device, {kernels} launches": idiom,
        f"numba: {slots} pinned writes and copies, {kernels} launches": idiom_pinned,
        "numbabuf: stage_inputs (fill alone)": ours(plain, "stage_inputs"),
        "numbabuf: replay (fill and kernels)": ours(plain, "replay"),
        "numbabuf: replay, int64 to int32, range check off": ours(unchecked, "replay"),
        "numbabuf: replay, int64 to int32, range check on": ours(checked, "replay"),
    }
    repeats = 5 if smoke or _cuda.SIM else 300
    if stub is not None:
        stub.set_exec(0)
    try:
        for call in ways.values():
            call()
        times = {
            what: harness.measure(call, repeats=repeats, inner=1 if smoke or _cuda.SIM else 20)
            for what, call in ways.items()
        }
        calls = {what: _count(stub, call) for what, call in ways.items()}
    finally:
        if stub is not None:
            stub.set_exec(1)
            stub.clear_errors()
    for each in managers:
        if stub is not None:  # nothing ran, so nothing counted: start the device's count anew before the end
            each._arena.resync()
        each.close()
    first = times[next(iter(ways))].median_us
    return {
        "slots": slots,
        "tokens": tokens,
        "kernels_skipped": stub is not None,
        "rows": [
            harness.row(what, timing, driver_calls=calls[what], less_than_idiom=first / timing.median_us)
            for what, timing in times.items()
        ],
    }


def table(result: dict[str, Any]) -> str:
    """The rows as text."""
    note = "; kernels skipped by the stand-in driver" if result["kernels_skipped"] else ""
    return f"{result['slots']} slots of {result['tokens']} tokens{note}\n" + harness.render(result["rows"])
