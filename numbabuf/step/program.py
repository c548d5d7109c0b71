"""A program: one function and its graphs by size, over the slots that it shares with other programs.

It captures its function, chooses the graph that covers a step, and counts. Marked "hot path" is a step: it allocates
nothing on the device, logs nothing and makes one driver call. Sits above `fill`, below `manager`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .. import _cuda
from ..checks import OnProgress, check_progress
from ..errors import BucketOverflowError, ClosedError, GraphMissingError
from ..resource import Resource
from .arena import Arena
from .choice import SMALLEST, Choice
from .fill import Fill
from .graph import CapturedStep, Step
from .graphs import Graphs
from .layout import Layout, bucket_lists
from .lease import Each, Lease, check_each
from .overflow import Overflow
from .returns import Held, ReturnRing
from .shared import Shared
from .stats import ProgramStats

__all__ = ["CapturedSize", "Program", "check_function"]

_log = logging.getLogger("numbabuf")
_this_thread = _cuda.this_thread
_captures = _cuda.captures


@dataclass(frozen=True)
class CapturedSize:
    """A size that a program has a graph for.

    Attributes
    ----------
    num_tokens : int
        Padded number of tokens.
    sizes : dict of str to int
        Padded size by axis, the tokens first.
    nbytes : int
        Device bytes that the driver took for the graph, as far as it tells them; measured by `Program.capture` and
        `capture_buckets`.
    steps : int
        Steps that it ran so far.
    last_used : int
        Which of the steps over the slots' memory was the last that it ran; 0 before the first. The larger, the later.
    number : int
        Tells two captures of one size apart.
    """

    num_tokens: int
    sizes: dict[str, int]
    nbytes: int
    steps: int
    last_used: int
    number: int


def check_function(fn: object) -> None:
    """Refuse what cannot be captured: no function, or one whose call runs none of its code."""
    if not callable(fn):
        raise TypeError(f"fn is {fn!r}: give a function of the step, which launches the kernels to capture")
    kinds = inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction
    if any(kind(code) for kind in kinds for code in (fn, type(fn).__call__)):
        raise TypeError(f"fn is {fn!r}, whose call runs none of its code: give a function without async or yield")


class Program(Resource):
    """A function and its graphs by size; made by `InputBufferManager.program`, which explains the parameters.

    Attributes
    ----------
    name : str
    function : callable or None
        What is captured; the manager's first program has none before `InputBufferManager.capture_buckets`.
    observer : callable or None
        Called as ``observer(num_tokens, program)`` after each step is queued; the seam for demand models. What it
        raises is logged, as the step runs all the same. A new program takes that of the manager.
    refusal_observer : callable or None
        Likewise, of each step that is refused for its size. The manager's lock is held: it must not use the manager,
        nor wait.

    Notes
    -----
    Threads: as `InputBufferManager`, whose lock it takes. The programs of a manager share its slots, its staging ring
    and its stream, so that their steps run one after the other in the order of the calls.

    Examples
    --------
    >>> import numbabuf
    >>> manager = numbabuf.InputBufferManager(max_batch_size=1, max_seq_len=8, buckets=[4, 8])
    >>> with manager.program(lambda step: step.bucket["tokens"], name="size") as program:
    ...     _ = program.capture_buckets()
    ...     program.replay({"input_ids": [7, 8, 9]}, 3)
    4
    >>> manager.close()
    """

    def __init__(
        self, shared: Shared, fill: Fill, name: str, function: Callable[[Step], Any] | None, overflow: Overflow,
        buckets: Any = None, max_tokens: int = 0,
    ) -> None:  # fmt: skip
        self.name = name
        self.function = function
        self.graphs = Graphs(shared.stream)
        self.overflow = overflow
        self.observer: Callable[[int, Program], Any] | None = None
        self.refusal_observer: Callable[[int, Program], Any] | None = None
        self._shared = shared
        self._fill = fill
        self._buckets = bucket_lists(buckets, max_tokens)
        self._closed = False
        self._capture_s = 0.0
        shared.tables.append(self.graphs)

    # ---------------------------------------------------------------------------------------------------- the steps

    def replay(
        self,
        inputs: Mapping[str, Any],
        num_tokens: int,
        *,
        at_least: int | Mapping[str, int] | None = None,
        max_padding: float | None = None,
        each: Callable[[Any, int, int], None] | None = None,
        **sizes: int,
    ) -> Any:
        """Stage `inputs` and replay the smallest graph of this program that covers the step: one driver call.

        See `InputBufferManager.replay`.
        """
        choice = None if at_least is None and max_padding is None else Choice.of(at_least, max_padding)
        return self.run(inputs, num_tokens, each, sizes, choice)

    def run(
        self,
        inputs: Mapping[str, Any],
        num_tokens: int,
        each: Each | None,
        sizes: Mapping[str, int],
        choice: Choice | None = None,
    ) -> Any:
        """Run one step; `replay` with its sizes in a mapping, and what it asks of its graph checked."""
        # Hot path, guarded by benchmarks/step.py.
        shared = self._shared
        if shared.inside():
            shared.refuse_inside("replay")
        if each is not None:
            check_each(each)
        held = None
        with shared.lock:
            arena = shared.arena
            if arena is None or shared.life.ended or shared.pool.closed or not _this_thread.ready:
                arena = None
            else:
                if shared.lease is not None or _captures or sizes or type(num_tokens) is not int or num_tokens < 0:
                    live = shared.begin_step(arena, num_tokens, sizes)
                else:
                    live = (num_tokens,) if arena.one_axis else arena.layout.live(num_tokens, sizes)
                graphs = self.graphs
                target = graphs.covering(live) if choice is None else choice.graph(graphs, arena.layout, live)
                if target is None:
                    result = self._run_uncovered(arena, inputs, live, each, choice)
                else:
                    block = arena.ring.acquire()
                    if arena.write(block, inputs, live, target.padded) != len(inputs):
                        arena.refuse_others(inputs)
                    try:
                        result = arena.send(target, block, live) if target.sends else arena.submit(target, live[0])
                    except Held:
                        held, arena = arena.returns, None
        if arena is None:
            self._make_way(held)  # with no lock held; then the step begins anew
            return self.run(inputs, num_tokens, each, sizes, choice)
        if self.observer is not None:
            self.observe(live[0])
        return result

    def _make_way(self, held: ReturnRing | None) -> None:
        """Give the slots memory, or wait for who holds a return block, and may want the lock."""
        if held is None:
            self._shared.prepare("replay")
        else:
            held.wait_free()

    def _run_uncovered(
        self, arena: Arena, inputs: Mapping[str, Any], live: tuple[int, ...], each: Each | None, choice: Choice | None
    ) -> Any:
        """Run a step that no graph covers after the policy, or raise."""
        if self._closed:
            raise ClosedError(f"program {self.name!r} is closed: make a new one with manager.program(fn)")
        try:
            return self.overflow.run(self._shared, arena, self, inputs, live, each, choice or SMALLEST)
        except BucketOverflowError:
            self.refuse(live[0] if choice is None else max(live[0], choice.at_least.get("tokens", 0)))
            raise

    def observe(self, num_tokens: int) -> None:
        """Tell the observer of a step that is queued."""
        try:
            self.observer(num_tokens, self)  # type: ignore[misc]
        except Exception as error:  # had it been raised, the caller would repeat a step that is queued
            text = "the observer of %r failed on a step of %d tokens, which is queued: %r"
            _log.warning(text, self, num_tokens, error)

    def refuse(self, num_tokens: int) -> None:
        """Tell the observer of a step that is refused for its size; the lock is held."""
        if self.refusal_observer is not None:
            try:
                self.refusal_observer(num_tokens, self)
            except Exception as error:  # the refusal is what is raised
                _log.warning("the refusal observer of %r failed on a step of %d tokens: %r", self, num_tokens, error)

    def stage(self, num_tokens: int, **sizes: int) -> Lease:
        """Lend the caller a staging block to write a step's inputs into; its `replay` runs this program.

        See `InputBufferManager.stage`.
        """
        shared = self._shared
        with shared.working("stage") as arena:
            live = shared.begin_step(arena, num_tokens, sizes)
            arena.layout.check(live)
            rows = {slot.name: (slot, slot.rows(live)) for slot in arena.layout.slots}
            shared.lease = Lease(arena.ring.acquire(), rows, functools.partial(self._end_lease, arena, live))
            return shared.lease

    def _end_lease(
        self, arena: Arena, live: tuple[int, ...], lease: Lease, how: str, each: Each | None, choice: Choice | None
    ) -> Any:
        shared, returns = self._shared, arena.returns if how == "replay" and self.graphs.sends else None
        if returns is not None:
            shared.refuse_inside("the end of a lease")
            returns.wait_free()  # with no lock held: who holds a return block may want it
        with shared.alone("the end of a lease"):
            if how != "discard":
                shared.check_open()
                shared.refuse_capture()
                _cuda.require()
            if how == "fill":
                self._fill.check_device(arena, live)  # what is refused leaves the lease open
            if choice is not None:
                choice.wanted(arena.layout, live)  # likewise
            if returns is not None:
                returns.refuse_held()  # likewise
            lease.expire()  # here, as two threads may end it at once, and `close` too
            shared.lease = None
            if how == "discard":
                return None
            _check_written(arena, lease)
            if how == "fill":
                result: Any = self._fill.end_lease(arena, live, lease, self)
            else:
                result = self._replay_lease(arena, live, lease, each, choice)
        if self.observer is not None:
            self.observe(live[0])
        return result

    def _replay_lease(
        self, arena: Arena, live: tuple[int, ...], lease: Lease, each: Each | None, choice: Choice | None
    ) -> Any:
        target = self.graphs.covering(live) if choice is None else choice.graph(self.graphs, arena.layout, live)
        if target is None:
            # As any other inputs, though they lie in the very block that is written first: a whole step over itself,
            # a piece to where an earlier one lay. No other step gets the block before the last piece is written: the
            # lock keeps other threads out, and `Shared.refuse_inside` what `each` might stage in this one.
            return self._run_uncovered(arena, lease.written, live, each, choice)
        arena.describe(lease.block, lease.written, live, target.padded)
        return arena.send(target, lease.block, live, skip=True) if target.sends else arena.submit(target, live[0])

    # -------------------------------------------------------------------------------------------------------- graphs

    @property
    def layout(self) -> Layout:
        """The sizes of a step over the slots so far, with this program's buckets."""
        return self._shared.slots.layout.with_buckets(self._buckets)

    @property
    def captured(self) -> tuple[CapturedSize, ...]:
        """The sizes that have a graph, the smallest first."""
        with self._shared.lock:
            return tuple(_size(graph) for graph in self.graphs)

    @property
    def leaving(self) -> tuple[CapturedSize, ...]:
        """The sizes that were dropped or replaced, and whose last replays are not done, so that they hold memory."""
        with self._shared.lock:
            self.graphs.reap()
            return tuple(_size(graph) for _, graph in self.graphs.leaving)

    @property
    def inside(self) -> bool:
        """Whether this thread is in the middle of a call on the manager, and so holds its lock."""
        return bool(self._shared.inside())

    @property
    def device(self) -> int:
        """The number of the device that the program runs on."""
        return int(self._shared.stream.device)

    def capture_buckets(
        self,
        sizes: Iterable[int | Mapping[str, int]] | None = None,
        *,
        on_progress: OnProgress | None = None,
        warm_up: str | None = None,
    ) -> tuple[dict[str, int], ...]:
        """Capture the function once per size, in addition to the sizes that have graphs.

        See `InputBufferManager.capture_buckets`; by default the sizes are the program's `buckets`.
        """
        return self.capture_all(self._function(), sizes, on_progress=on_progress, warm_up=warm_up)

    def capture_all(
        self,
        fn: Callable[[Step], Any],
        sizes: Iterable[int | Mapping[str, int]] | None,
        *,
        on_progress: OnProgress | None,
        warm_up: str | None,
    ) -> tuple[dict[str, int], ...]:
        """Capture `fn` once per size; where it is another function than before, its graphs replace all others."""
        if warm_up not in (None, "run"):
            raise ValueError(f'warm_up is {warm_up!r}: give None, which runs nothing, or "run"')
        check_progress(on_progress)
        shared = self._shared
        shared.prepare("capture_buckets")
        with shared.capturing.held(), shared.working("capture_buckets") as arena:
            self._check_open()
            layout, began = self.layout, time.perf_counter()
            shared.begin_step(arena, 0, dict.fromkeys(layout.axes[1:], 0))
            asked = sorted(layout.wanted(sizes), reverse=True)
            captured: list[CapturedStep] = []
            work = [("warm", size) for size in asked] + [("capture", size) for size in asked]
            try:
                for done, (phase, size) in enumerate(work, 1):
                    if phase == "warm":
                        self._rehearse(arena, size, fn, run=warm_up == "run")
                    else:
                        if not captured:
                            shared.stream.synchronize()
                        captured.append(self._record(arena, size, fn))
                    if on_progress is not None:
                        on_progress(done, len(work), layout.named(size), free_bytes())
            except BaseException:
                for graph in captured:
                    graph.close()
                raise
            if fn == self.function:
                self.graphs.add(captured)
            else:
                self.graphs.exchange(list(self.graphs), captured)
                self.function = fn
            seconds, nbytes = time.perf_counter() - began, sum(graph.nbytes for graph in captured)
            self._capture_s += seconds
            _log.info("%r: %d sizes captured in %.2f s, %d bytes of graphs", self, len(captured), seconds, nbytes)
            return tuple(layout.named(size) for size in reversed(asked))

    def capture(self, size: int | Mapping[str, int], *, wait: bool = True) -> CapturedSize:
        """Capture the function for one size, as it is; other threads go on stepping meanwhile.

        Parameters
        ----------
        size : int, or mapping of axis to int
            An int is a number of tokens, with every further axis at its largest bucket.
        wait : bool
            False: BusyError while another thread captures with this manager.

        Returns
        -------
        captured : CapturedSize

        Raises
        ------
        GraphMissingError
            The program has no function yet.
        ValueError, TypeError
            The size is not one, or larger than the slots.
        CaptureError, Exception
            The capture was refused, or the function raised. An earlier graph of this size is as it was.

        Notes
        -----
        The function is called twice, as in `capture_buckets`. The manager's lock is held only to begin and to end.
        """
        shared = self._shared
        shared.prepare("capture")
        with shared.capturing.held(wait=wait):
            began = time.perf_counter()
            with shared.working("capture") as arena:
                fn = self._function()
                sizes = self.layout.full(size)
                shared.begin_step(arena, 0, dict.fromkeys(arena.layout.axes[1:], 0))
            self._rehearse(arena, sizes, fn, run=False)
            graph = self._record(arena, sizes, fn)
            with shared.alone("capture"):
                self._check_open()
                self.graphs.add([graph])
                self._capture_s += time.perf_counter() - began
                return _size(graph)

    @contextlib.contextmanager
    def recording(self, num_tokens: int, sizes: Mapping[str, int]) -> Iterator[Step]:
        """Capture what is launched in the ``with`` block for the bucket of these sizes."""
        shared = self._shared
        shared.prepare("capture")
        with shared.capturing.held():
            with shared.working("capture") as arena:
                self._check_open()
                recording = shared.recording(arena, self.layout.bucket_of(shared.begin_step(arena, num_tokens, sizes)))
            with recording as graph:
                yield graph.step
            with shared.lock:
                self.graphs.add([graph])

    def _rehearse(self, arena: Arena, sizes: tuple[int, ...], fn: Callable[[Step], Any], *, run: bool) -> None:
        """Call `fn` once for a bucket before its capture, so that the capture has nothing to compile or load.

        What it queues is recorded in a capture that is dropped, so that no data changes; with `run`, it runs, over
        slots of padding, or what they keep.
        """
        if not run:
            with self._shared.recording(arena, sizes, dry=True) as rehearsal:
                fn(rehearsal.step)
            return
        target = self._shared.plain(arena, sizes)
        arena.write_rehearsal(target.padded)
        arena.submit(target, 0)
        fn(target.step)

    def _record(self, arena: Arena, sizes: tuple[int, ...], fn: Callable[[Step], Any]) -> CapturedStep:
        """Capture `fn` for a bucket; its code is loaded, so that what memory is left less is the graph's."""
        before = _cuda.memory_info()
        with self._shared.recording(arena, sizes) as graph:
            graph.step.result = fn(graph.step)
        after = _cuda.memory_info()
        graph.nbytes = max(0, before[0] - after[0]) if before and after else 0
        return graph

    def drop(self, size: int | Mapping[str, int]) -> None:
        """Take the graph of one size out of service; it is destroyed once its last replay is done.

        Parameters
        ----------
        size : int, or mapping of axis to int
            As `capture` was given it, or as `captured` has it.

        Raises
        ------
        GraphMissingError
            There is no graph of this size.
        """
        shared = self._shared
        with shared.alone("drop"):
            shared.check_context()
            sizes = self.layout.full(size)
            graph = self.graphs.exact(sizes)
            if graph is None:
                there = ", ".join(str(graph.sizes[0]) for graph in self.graphs) or "none"
                raise GraphMissingError(
                    f"program {self.name!r} has no graph of {self.layout.named(sizes)}; its graphs have {there} tokens"
                )
            self.graphs.exchange([graph], [])

    def _function(self) -> Callable[[Step], Any]:
        self._check_open()
        if self.function is None:
            raise GraphMissingError(f"program {self.name!r} has no function yet: call capture_buckets(fn) first")
        return self.function

    # ------------------------------------------------------------------------------------------------------- the end

    @property
    def closed(self) -> bool:  # type: ignore[override]
        """Whether the program, or its manager, is closed."""
        return self._closed or bool(self._shared.closed)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"program {self.name!r} is closed: make a new one with manager.program(fn)")
        self._shared.check_open()

    def close(self) -> None:
        """Wait for all steps, then destroy this program's graphs and let its function go. Again, it does nothing."""
        shared = self._shared
        if self.closed:
            return
        with shared.alone("close"):
            if not shared.life.ended:
                shared.capturing.refuse("a program's graphs cannot be closed")
                if self.graphs or self.graphs.leaving:
                    shared.synchronize()
                self.graphs.close()
            self._closed, self.function = True, None

    def stats(self) -> ProgramStats:
        """Return one consistent snapshot of the counters."""
        with self._shared.lock:
            counts = self.graphs.counts()
            return ProgramStats(
                steps=sum(steps for steps, _ in counts.values()),
                live_tokens=sum(live for _, live in counts.values()),
                padded_tokens=sum(tokens * steps for tokens, (steps, _) in counts.items()),
                buckets={tokens: steps for tokens, (steps, _) in counts.items()},
                bucket_tokens={tokens: live for tokens, (_, live) in counts.items()},
                overflows=self.overflow.count,
                graphs=len(self.graphs),
                graph_bytes=sum(graph.nbytes for graph in self.graphs),
                capture_s=self._capture_s,
            )

    def check(self) -> None:
        """Assert that the graphs are in order, and were captured over the slots' memory."""
        with self._shared.alone("check"):
            self.graphs.check()
            assert all(graph.arena is self._shared.arena for graph in self.graphs)

    def __enter__(self) -> Program:
        self._check_open()
        return self

    def __repr__(self) -> str:
        return f"Program({self.name!r}, {'closed' if self.closed else f'{len(self.graphs)} graphs'})"


def _check_written(arena: Arena, lease: Lease) -> None:
    for slot in arena.layout.slots:
        if slot.checked and slot.name in lease.written:
            slot.check_range(lease.written[slot.name])


def _size(graph: CapturedStep) -> CapturedSize:
    return CapturedSize(
        graph.sizes[0], dict(graph.step.bucket), graph.nbytes, graph.steps, graph.last_used, graph.number
    )


def free_bytes() -> int | None:
    """Bytes free on the device, as far as the backend tells."""
    free = _cuda.memory_info()
    return free[0] if free else None
