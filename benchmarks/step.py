"""Host time of one step: 8 inputs of 1 to 4,096 tokens into fixed device arrays, and the work that reads them.

Numba's idiom (a `copy_to_device` per input, then the launches), the same with pinned staging arrays, graphs of Numba,
torch and CuPy with copies from pinned memory before or in them, numbabuf's fill alone and its replay, in one process.
The others' graphs do not guard the pinned arrays, which the next step overwrites whether they were read or not; ours
does. On a GPU at most four steps are queued at a time, and waited for outside the time; `end_to_end_us` ends in a
synchronise, and is empty where nothing runs: on the stand-in driver kernels are accepted and skipped, so that the
figures are what Python and the bindings cost the host; a real driver adds its own time to every row's driver calls.
With nobody to read the staging blocks there, the benchmark marks them read itself, inside the time of numbabuf's rows.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from numbabuf import BufferSpec, InputBufferManager, _cuda
from numbabuf._cuda import cuda

from . import _rivals, harness

SLOTS, TOKENS, KERNELS = 8, 256, 4
SIZES = (TOKENS, 1, 64, 4096)
"""The headline first."""


@cuda.jit
def _consume(out: np.ndarray, tokens: np.ndarray) -> None:
    for i in range(cuda.grid(1), tokens.size, cuda.gridsize(1)):
        out[i] = tokens[i]


def _count(stub: Any, call: Callable[[], object]) -> int | None:
    """Driver calls of one `call`; None where nobody counts."""
    if stub is None:
        return None
    stub.reset_counts()
    call()
    return int(sum(stub.counts().values()))


def _theirs(rival: Any, inputs: list[Any], tokens: int, kernels: int, copies_inside: bool) -> Callable[[], object]:
    """A step of another library: pinned writes, a copy for each input and one graph, the copies in it or before it."""
    staged = [rival.pinned(tokens) for _ in inputs]
    device = [rival.device(tokens) for _ in inputs]
    out = rival.device(tokens)
    views = [rival.host(part) for part in staged]

    def copy() -> None:
        for target, source in zip(device, staged, strict=True):
            rival.copy(target, source)

    def work() -> None:
        if copies_inside:
            copy()
        for i in range(kernels):
            rival.consume(out, device[i % len(device)])

    launch = _rivals.warm_graph(rival, work)

    def step() -> None:
        for view, values in zip(views, inputs, strict=True):
            view[:] = values
        if not copies_inside:
            with rival.using():
                copy()
        launch()

    return step


COMPETITORS = (
    ("Numba: pinned writes, graph with memcpy nodes", _rivals.Numba, True),
    ("torch: pinned writes, copy_, CUDAGraph.replay", _rivals.Torch, False),
    ("torch: pinned writes, CUDAGraph with copy_ in it", _rivals.Torch, True),
    ("CuPy: pinned writes, graph with memcpy nodes", _rivals.Cupy, True),
)
"""What it is called, whose it is, whether the copies are part of the graph."""


def run(
    smoke: bool, *, slots: int = SLOTS, tokens: int | None = None, kernels: int = KERNELS, competitors: bool = True
) -> dict[str, Any]:
    """Time each way to stage `slots` inputs and launch `kernels` kernels that read them.

    Parameters
    ----------
    smoke
        Few repeats, and the headline's size alone.
    slots, kernels
        Inputs, and kernels that read them.
    tokens
        One size; by default the sizes of `SIZES`.
    competitors
        Whether to try torch and CuPy; what is not installed, or finds no GPU, is a row that says so.
    """
    sizes = (tokens,) if tokens is not None else (TOKENS,) if smoke or _cuda.SIM else SIZES
    rows = list(itertools.chain.from_iterable(_rows(smoke, slots, size, kernels, competitors) for size in sizes))
    return {"slots": slots, "tokens": sizes[0], "kernels_skipped": harness.stand_in() is not None, "rows": rows}


Work = Callable[[Any, list[Any]], None]
"""Launches the kernels that read the inputs: (stream, arrays)."""


def _idioms(inputs: dict[str, np.ndarray], tokens: int, work: Work) -> tuple[Callable[[], None], Callable[[], None]]:
    """What Numba alone offers: a copy an input from pageable memory, and one from pinned memory."""
    stream = cuda.stream()
    device = [cuda.device_array(tokens, np.int64) for _ in inputs]
    pinned = [cuda.pinned_array(tokens, np.int64) for _ in inputs]

    def idiom() -> None:
        for target, data in zip(device, inputs.values(), strict=True):
            target.copy_to_device(data, stream=stream)
        work(stream, device)

    def idiom_pinned() -> None:
        for target, staged, data in zip(device, pinned, inputs.values(), strict=True):
            staged[:] = data
            target.copy_to_device(staged, stream=stream)
        work(stream, device)

    return idiom, idiom_pinned


def _managers(inputs: dict[str, np.ndarray], tokens: int, work: Work) -> tuple[InputBufferManager, ...]:
    """Managers that stage int64 as it is, and into int32 slots with the range check on and off; captured, and used."""
    made = []
    for check, dtype in ((None, "int64"), (True, "int32"), (False, "int32")):
        each = InputBufferManager(
            max_batch_size=1, max_seq_len=tokens, buckets=[tokens], default_slots=False, range_check=check
        )
        for name in inputs:
            each.register_slot(name, BufferSpec(tokens, dtype), source_dtype="int64")
        each.capture_buckets(lambda step: work(step.stream, [step[name] for name in inputs]))
        each.stage_inputs(inputs, tokens)
        each.synchronize()
        made.append(each)
    return tuple(made)


def _rows(smoke: bool, slots: int, tokens: int, kernels: int, competitors: bool) -> list[dict[str, Any]]:
    warnings.simplefilter("ignore")  # Numba's, about small grids
    stub = harness.stand_in()
    shape = _cuda.launch_shape(tokens)
    names = [f"slot{i}" for i in range(slots)]
    inputs = {name: np.arange(tokens) + i for i, name in enumerate(names)}
    out = cuda.device_array(tokens, np.int64)

    def work(stream: Any, arrays: list[Any]) -> None:
        for i in range(kernels):
            _consume[shape[0], shape[1], stream](out, arrays[i % len(arrays)])

    idiom, idiom_pinned = _idioms(inputs, tokens, work)
    managers = plain, checked, unchecked = _managers(inputs, tokens, work)

    def ours(each: InputBufferManager, call: str) -> Callable[[], object]:
        return harness.step_of(each, call, inputs, tokens, stub)

    ways = {
        f"numba: {slots} copy_to_device, {kernels} launches": idiom,
        f"numba: {slots} pinned writes and copies, {kernels} launches": idiom_pinned,
        "numbabuf: stage_inputs (fill alone)": ours(plain, "stage_inputs"),
        "numbabuf: replay (fill and kernels)": ours(plain, "replay"),
        "numbabuf: replay, int64 to int32, range check off": ours(unchecked, "replay"),
        "numbabuf: replay, int64 to int32, range check on": ours(checked, "replay"),
    }
    missing: list[dict[str, Any]] = []
    for what, kind, copies_inside in COMPETITORS if competitors else ():
        with _rivals.noted(missing, what, "skipped", tokens=tokens):  # not installed, no GPU, or something it lacks
            ways[what] = _theirs(kind(), list(inputs.values()), tokens, kernels, copies_inside)
    repeats = 5 if smoke or _cuda.SIM else 300 if tokens == TOKENS else 100
    options = harness.host_options()
    with harness.kernels_skipped(stub):
        for call in ways.values():
            call()
        times = {what: harness.measure(call, repeats=repeats, **options) for what, call in ways.items()}
        calls = {what: _count(stub, call) for what, call in ways.items()}
        ends = {
            what: harness.measure(call, repeats=repeats, finish=_cuda.synchronize).median_us
            for what, call in ways.items()
            if harness.on_gpu()
        }
    for each in managers:
        if stub is not None:  # nothing ran, so nothing counted: start the device's count anew before the end
            assert each._shared.arena is not None
            each._shared.arena.resync()
        each.close()
    first = times[next(iter(ways))].median_us
    rows = [
        harness.row(
            what,
            timing,
            tokens=tokens,
            driver_calls=calls[what],
            less_than_idiom=first / timing.median_us,
            end_to_end_us=ends.get(what),
        )  # fmt: skip
        for what, timing in times.items()
    ]
    return rows + missing


def table(result: dict[str, Any]) -> str:
    """The rows as text."""
    note = "; kernels skipped by the stand-in driver" if result["kernels_skipped"] else ""
    return f"{result['slots']} slots{note}\n" + harness.render(result["rows"])
