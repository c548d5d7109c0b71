"""A step captured as a graph: what the capturing function sees, and what a replay needs.

Knows one graph at a time; `program` decides which steps are captured, `graphs` which of them serves a step. Sits above
`_cuda`, below `arena`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from .. import _cuda
from ..errors import CaptureError
from ..resource import Shown

__all__ = ["CapturedStep", "Step", "recorded"]


class Step(Shown, Mapping[str, Any]):
    """A step as the user's function sees it: a mapping from slot names to device views padded to the bucket.

    Outputs are in it, too; those that the function asks for by ``step[name]`` are sent back to the host.

    Attributes
    ----------
    stream
        The Numba stream to launch on: ``kernel[grid, block, step.stream](step["input_ids"], ...)``.
    bucket : dict
        Axis -> padded size.
    live : dict
        Axis -> device array of shape (1,), int64: the live size of the step that runs, for kernels to read. Work that
        is queued outside of a step sees that of the last one.
    result
        What `replay` returns for this bucket; `capture_buckets` sets it to what the function returned.
    """

    __slots__ = ("_outputs", "_views", "asked", "bucket", "live", "result", "stream")

    def __init__(
        self, stream: _cuda.Stream, bucket: dict[str, int], views: dict[str, Any],
        outputs: Mapping[str, Any] = MappingProxyType({}), live: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.stream = stream
        self.bucket = bucket
        self.live = live
        self._views = views
        self._outputs = list(outputs.items())
        self.asked = 0
        self.result: Any = None

    def __getitem__(self, name: str) -> Any:
        view = self._views.get(name)
        if view is not None:
            return view
        for position, (output, view) in enumerate(self._outputs):
            if output == name:
                self.asked |= 1 << position
                return view
        raise KeyError(f"{name!r} is not a static slot; there are {', '.join(self)}")

    def __iter__(self) -> Any:
        return iter([*self._views, *(name for name, _ in self._outputs)])

    def __contains__(self, name: object) -> bool:
        return name in self._views or any(name == output for output, _ in self._outputs)

    def views(self) -> dict[str, Any]:
        """Return the views of the inputs in a dictionary of the caller's own."""
        return self._views.copy()

    def __len__(self) -> int:
        return len(self._views) + len(self._outputs)

    def __repr__(self) -> str:
        return f"Step({', '.join(f'{axis}={size}' for axis, size in self.bucket.items())})"


_numbers = itertools.count(1)


class CapturedStep(Shown):
    """A bucket ready to run: usually a graph of the fill of every slot and then the user's kernels.

    Attributes
    ----------
    launch_on
        Queues one run on a ``stream.core``; None until there is a graph.
    step : Step
        Kept because its views are what the graph reads.
    sizes : tuple of int
        Padded size per axis, in the manager's order of axes (tokens first).
    padded : tuple of int
        Padded rows per static slot.
    sends : int
        A bit for each output that the graph sends back.
    arena : Arena
        The memory that the graph was captured over; it runs over no other.
    plain : bool
        Whether it has no graph, and runs only once.
    nbytes : int
        Device bytes that the driver took for the graph, as far as it tells them.
    steps, live, last_used : int
        Runs so far, the live tokens in them, and which step over its memory was the last of them.
    number : int
        No other captured step has it.
    """

    __slots__ = (
        "_graph", "arena", "last_used", "launch_on", "live", "nbytes", "number", "padded", "plain", "sends", "sizes",
        "step", "steps",
    )  # fmt: skip

    def __init__(self, step: Step, sizes: tuple[int, ...], padded: tuple[int, ...], arena: Any) -> None:
        self._graph: Any = None
        self.launch_on: Any = None
        self.step = step
        self.sizes = sizes
        self.padded = padded
        self.arena = arena
        self.plain = False
        self.sends = 0
        self.nbytes = self.steps = self.live = self.last_used = 0
        self.number = next(_numbers)

    @property
    def operands(self) -> list[Any]:
        """What the graph keeps alive: the arguments of every launch and copy in it."""
        return [] if self._graph is None else self._graph.operands

    def hold(self, graph: Any) -> None:
        """Run `graph`, a `_cuda.Graph`, from now on."""
        self._graph = graph
        self.launch_on = graph.launch_on

    def close(self) -> None:
        """Destroy the graph and let its operands go; the caller has waited for its runs."""
        self.launch_on = None
        if self._graph is not None:
            self._graph.close()

    def __repr__(self) -> str:
        return f"CapturedStep({self.step!r}, {self.steps} runs)"


@contextlib.contextmanager
def recorded(
    stream: _cuda.Stream,
    fill: Callable[[Any], None],
    captured: CapturedStep,
    *,
    dry: bool = False,
    send: Callable[[Any, int], None] | None = None,
) -> Iterator[CapturedStep]:
    """Capture what is queued on a stream inside a ``with`` block into `captured`, and give it.

    Parameters
    ----------
    stream : _cuda.Stream
        A long-lived non-blocking stream, in no other capture; it is usable again whatever happens in the block.
    fill
        Launches the fill on the stream it is given: the graph's first node.
    captured : CapturedStep
        Gets the graph when the block ends well.
    send
        Launches the way back of the outputs that the block asked for, if it did: the graph's last node.
    dry : bool
        Drop what was recorded: the block compiles and loads its kernels, and nothing of it ever runs.

    Raises
    ------
    CaptureError
        The driver refused the capture. What the block itself raises passes through, the capture given up.
    """
    capture = _cuda.Capture(stream, dry=dry)
    try:  # first: an interrupt that comes when the capture is begun finds the way to its end
        capture.begin()
        fill(stream)
        yield captured
        if send is not None and captured.step.asked:
            send(stream, captured.step.asked)
            captured.sends = captured.step.asked
        if not dry:
            captured.hold(capture.end())
    except Exception as error:
        if not isinstance(error, CaptureError) and _cuda.is_capture_error(error):
            raise CaptureError(
                f"something in the captured function is forbidden in a capture: {error}. Allocate, compile (one plain "
                "call), copy from pageable memory and synchronise before capturing"
            ) from error
        raise
    finally:
        capture.abort()  # if it is open still
