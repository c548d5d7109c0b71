"""The input manager: named static slots, a staging ring before them, and one graph replay per step.

A facade: `shared` holds the slots, their memory and the one lock, `fill` stages without a function, and a `program`
captures and replays one. The manager's own calls are those of its first program. Sits on top of everything but
`predictive`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .. import _cuda, config
from ..checks import OnProgress, whole_number
from ..errors import CaptureError
from ..pool.fence import Fences
from ..pool.pool import BufferPool, SimpleBufferPool
from ..pool.spec import BufferSpec
from ..resource import Resource
from .choice import Choice
from .fill import Fill
from .graph import Step
from .layout import Layout, SlotSet
from .lease import Lease
from .order import put_behind
from .output import OutputSlot
from .overflow import Overflow
from .program import CapturedSize, Program, check_function
from .programs import Programs
from .shared import Shared
from .slot import InputSlot
from .stats import ManagerStats

__all__ = ["InputBufferManager"]


class InputBufferManager(Resource):
    """Static input slots, filled from the host in one launch or one graph replay per step.

    Parameters
    ----------
    pool : BufferPool, optional
        Where the slots' arena and the staging ring are allocated; by default a `SimpleBufferPool` of the manager's own.
    max_batch_size, max_seq_len : int
        The default slots hold ``max_batch_size * max_seq_len`` tokens.
    ring : int
        Staging blocks: how many steps the host may be ahead of the device before it waits.
    returns : int, optional
        Return blocks: the outputs of how many steps wait for their reader where the device put them; those of older
        ones are copied out. Default: `ring`, at least 2.
    buckets : sequence of int, or mapping of axis to sequence of int, optional
        Padded sizes; a bare sequence is for the axis "tokens". Default: powers of two up to the largest size.
    overflow : {"raise", "eager", "split"}
        What a replay does with a step larger than the largest captured one: refuse it, run fill and function without a
        graph (counted, and warned about once), or replay it in pieces along "tokens", which serves managers whose slots
        follow "tokens" or nothing.
    default_slots : bool
        Register ``input_ids`` and ``positions`` (int64, index, padded with 0).
    stream
        Where steps are queued: a Numba or cuda.core stream, anything with ``__cuda_stream__``, or None for a
        non-blocking stream of the manager's own.
    range_check : bool, optional
        Refuse integers that do not fit a narrower slot; costs a NumPy reduction for each such input (about 2 us).
        Default: the switch NUMBABUF_RANGE_CHECK, which is on.

    Attributes
    ----------
    stream
        The Numba stream of the steps.
    max_tokens : int
        Capacity of the default slots.
    overflow : str
        What becomes of a step of the manager's own that no graph covers.
    owns_pool : bool
        Whether `close` closes the pool, too.

    Notes
    -----
    Memory is allocated at the first step, `get_slot(name).array` or capture, not when slots are registered: all slots
    are carved from one device allocation, all staging blocks from one pinned one.
    Threads: any thread may call any method; steps are serialised by one lock. A call from within another one in the
    same thread (an input's ``__array__``, a signal handler, a finaliser, `each` of a split step) raises BusyError and
    changes nothing; `stats` and the slots' arrays may be read there. Streams: everything is queued on
    `stream`; outputs are ready after `synchronize` or for work queued on it. Capture: steps are refused inside one.
    Devices: a manager is on its stream's device. What is more than a replay (memory, captures, fills without a graph)
    is refused while another device is current in the calling thread.
    Processes: after a fork the child's copy is closed; the parent's goes on.

    Examples
    --------
    >>> import numpy as np
    >>> manager = InputBufferManager(max_batch_size=4, max_seq_len=8, buckets=[8, 16, 32])
    >>> views = manager.stage_inputs({"input_ids": np.arange(5), "positions": np.arange(5)}, 5)
    >>> manager.synchronize()
    >>> views["input_ids"].copy_to_host().tolist()
    [0, 1, 2, 3, 4, 0, 0, 0]
    >>> manager.close()
    """

    def __init__(
        self,
        pool: BufferPool | None = None,
        max_batch_size: int = 256,
        max_seq_len: int = 4096,
        *,
        ring: int = 4,
        returns: int | None = None,
        buckets: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
        overflow: str = "raise",
        default_slots: bool = True,
        stream: _cuda.StreamLike | None = None,
        range_check: bool | None = None,
    ) -> None:
        self.max_batch_size = whole_number("max_batch_size", max_batch_size, least=1)
        self.max_seq_len = whole_number("max_seq_len", max_seq_len, least=1)
        self.max_tokens = self.max_batch_size * self.max_seq_len
        depth = whole_number("ring", ring, least=1)
        depths = depth, max(2, depth) if returns is None else whole_number("returns", returns, least=1)
        policy = Overflow(overflow)
        self.overflow = overflow
        if pool is not None and not isinstance(pool, BufferPool):
            raise TypeError(f"pool is {pool!r}: give a BufferPool, or None for one of the manager's own")
        slots = SlotSet(self.max_tokens, buckets)
        self._range_check = config.enabled("NUMBABUF_RANGE_CHECK") if range_check is None else bool(range_check)
        queue = _cuda.as_stream(stream)
        if queue.thread is not None:
            raise ValueError(
                "stream is the per-thread default stream, which is another stream in every thread that steps: give "
                "None for a stream of the manager's own, or cuda.stream()"
            )
        self.stream = queue.numba
        self.owns_pool = pool is None
        self._shared = Shared(SimpleBufferPool() if pool is None else pool, queue, slots, depths)
        self._fill = Fill(self._shared, policy)
        self._programs = Programs(self._shared, self._fill, policy)
        self._first = self._programs.first
        self._fences = Fences()
        if default_slots:
            for name in ("input_ids", "positions"):
                self.register_slot(name, BufferSpec(self.max_tokens, "int64"), index=True)

    # ------------------------------------------------------------------------------------------------------ slots

    def register_slot(
        self,
        name: str,
        spec: BufferSpec,
        is_static: bool = True,
        *,
        pad: Any = 0,
        index: bool = False,
        source_dtype: Any = None,
        axis: str | None = "tokens",
        max_live: int | None = None,
        missing: str | None = None,
    ) -> InputSlot:
        """Add a named input.

        Parameters
        ----------
        name : str
        spec : BufferSpec
            Capacity and element type. The first dimension follows `axis`; a two-dimensional slot takes inputs whose
            rows are shorter than its own. Shape () is one number, with axis=None: kernels read ``step["lr"][()]``.
        is_static : bool
            False: the name is known, but its values pass through `stage_inputs` untouched.
        pad : scalar, "repeat_last" or "keep"
            What fills the slot past a step's values up to its bucket: a value; the last value (in two dimensions the
            last row, and each row's last value, as `numpy.pad` mode "edge"; zero where a step has none); nothing.
        index : bool
            The values are used as indices: refuses `pad` "keep".
        source_dtype
            Element type of the inputs where it differs from the slot's; converted on the device, with NumPy's rounding.
        axis : str or None
            Which size of a step the first dimension follows: "tokens", another name, or a name with an offset such as
            "seqs+1". None: always staged whole.
        max_live : int, optional
            Most elements one step stages; the staging ring keeps room for no more. Default: all.
        missing : {"pad", "keep"}, optional
            What a step does with the slot that leaves it out: pad it, or keep its last write (refused where the step
            needs more rows than that was padded to). Default: "keep" where `axis` is None, else "pad".

        Raises
        ------
        ValueError, TypeError
            The name is taken, or an argument cannot be used.
        BusyError
            A graph is live: it reads the slots where they lie now. `close_graphs` first.
        """
        shared = self._shared
        with shared.alone("register_slot"):
            shared.check_open()
            slots = shared.slots
            slot = InputSlot(
                name, spec, static=is_static, pad=pad, index=index, source_dtype=source_dtype, axis=axis,
                max_live=max_live, range_check=self._range_check, missing=missing,
            )  # fmt: skip
            slots.check(slot)
            if slot.static:
                shared.check_movable(f"slot {name!r} cannot be added")
                shared.dismantle(keep=True)
            slots.add(slot, shared.array, self._fill.set_slot)
            return slot

    def register_output(
        self,
        name: str,
        spec: BufferSpec,
        *,
        axis: str | None = "tokens",
        result_dtype: Any = None,
        max_live: int | None = None,
    ) -> OutputSlot:
        """Add a named output: a device array that kernels write, whose live rows every step sends back to the host.

        A function that asks for it, by ``step[name]``, has its values sent by the last node of its graph, so that
        `replay` returns `Outputs`. An output is neither padded nor filled; what a step does not write is what the
        array held before. Refused as `register_slot` refuses.

        Parameters
        ----------
        name : str
        spec : BufferSpec
            Capacity and element type.
        axis : str or None
            As for `register_slot`: how many rows a step sends; None sends all.
        result_dtype
            Element type on the host where it differs; converted on the device, with NumPy's rounding.
        max_live : int, optional
            Most elements one step sends; the return ring keeps room for no more. Default: all.
        """
        shared = self._shared
        with shared.alone("register_output"):
            shared.check_open()
            output = OutputSlot(name, spec, axis=axis, result_dtype=result_dtype, max_live=max_live)
            shared.slots.check(output)
            shared.check_movable(f"output {name!r} cannot be added")
            shared.dismantle(keep=True)
            shared.slots.add_output(output, shared.array)
            return output

    def get_slot(self, name: str) -> InputSlot | OutputSlot:
        """Return the slot, or the output, `name`; KeyError where there is none."""
        slots = self._shared.slots
        found = slots.find(name)
        if found is None:
            there = ", ".join([*slots.by_name, *slots.outputs])
            raise KeyError(f"no slot {name!r}; registered are {there or 'none'}")
        return found

    @property
    def slots(self) -> tuple[InputSlot, ...]:
        """All slots, in the order in which they were registered."""
        return tuple(self._shared.slots.by_name.values())

    def get_static_tensors(self) -> dict[str, Any]:
        """Return every static slot's whole device array, by name."""
        return {slot.name: slot.array for slot in self.slots if slot.static}

    @property
    def pool(self) -> BufferPool:
        """Where the memory of the slots and the staging ring comes from."""
        return self._shared.pool

    @property
    def layout(self) -> Layout:
        """The axes, limits and buckets of a step over the slots so far: a frozen value."""
        return self._shared.slots.layout

    @property
    def observer(self) -> Callable[[int, Program], Any] | None:
        """Called as ``observer(num_tokens, program)`` after each step is queued; the seam for demand models.

        What it raises is logged, as the step runs all the same. Fills count for the first program; set for all of them.
        """
        return self._first.observer

    @observer.setter
    def observer(self, observer: Callable[[int, Program], Any] | None) -> None:
        self._programs.observe(observer)

    # ------------------------------------------------------------------------------------------------- fill alone

    def stage_inputs(self, inputs: Mapping[str, Any], num_tokens: int, **sizes: int) -> dict[str, Any]:
        """Fill the slots with `inputs` and pad them to the step's bucket, without running a captured function.

        Parameters
        ----------
        inputs : mapping of str to array
            Host arrays by slot name; each has as many rows as the size that its slot follows. Lists will do, and a
            number for a slot of one element, where the values fit: floats are rounded, nothing else is changed. A slot
            that is left out, or None, is all padding or kept (see `register_slot`). Other names pass through.
        num_tokens, **sizes : int
            Live tokens, >= 0, and the step's other sizes, one for each further axis.

        Returns
        -------
        views : dict of str to array
            Device views padded to the bucket, and what passed through.

        Raises
        ------
        TypeError, ValueError, OverflowError
            An input does not fit its slot; no slot was written.
        BucketOverflowError
            The step is larger than the largest bucket; with `overflow` "eager" it runs in its own size instead.
        ClosedError, BusyError, CaptureError
            The manager is closed, a lease is open, or a capture is open in this thread.

        Notes
        -----
        The inputs may be overwritten as soon as this returns. The views hold this step until the next one is staged.
        """
        return self._fill.run(inputs, num_tokens, sizes, self._first)

    def stage(self, num_tokens: int, **sizes: int) -> Lease:
        """Lend the caller a staging block to write a step's inputs into, without a copy.

        Parameters
        ----------
        num_tokens, **sizes : int
            As for `stage_inputs`.

        Returns
        -------
        lease : Lease
            A context manager: ``lease["input_ids"]`` is the pinned array to write. `Lease.replay` runs the step, one
            that no graph covers after the `overflow` policy; leaving the block without it fills the slots; leaving it
            by an exception does nothing.

        Raises
        ------
        BusyError
            Another lease is open.
        BucketOverflowError
            No slot can hold the step. What some of them cannot hold is refused when it is asked for.
        """
        return self._first.stage(num_tokens, **sizes)

    # ----------------------------------------------------------------------------------------------------- graphs

    def capture(self, num_tokens: int, **sizes: int) -> contextlib.AbstractContextManager[Step]:
        """Capture the launches in the ``with`` block into the first program's graph for steps of up to this size.

        Parameters
        ----------
        num_tokens, **sizes : int
            Rounded up to their buckets.

        Yields
        ------
        step : Step
            Launch on ``step.stream``, read ``step["slot"]``; what is assigned to ``step.result`` is what `replay`
            returns.

        Raises
        ------
        CaptureError
            The driver refused the capture, or a launch went to another stream. Manager and stream stay usable, and an
            earlier graph for the bucket stays as it was.
        BucketOverflowError
            The size is beyond the largest bucket.

        Notes
        -----
        Call every kernel once before: a capture cannot compile or load code. Other threads may go on replaying.
        """
        return self._first.recording(num_tokens, sizes)

    def capture_buckets(
        self,
        fn: Callable[[Step], Any],
        sizes: Iterable[int | Mapping[str, int]] | None = None,
        *,
        on_progress: OnProgress | None = None,
        warm_up: str | None = None,
    ) -> tuple[dict[str, int], ...]:
        """Capture `fn` once per size: every size is rehearsed first, then captured, the largest first.

        Parameters
        ----------
        fn
            ``fn(step)`` launches on ``step.stream`` and reads ``step["slot"]``, a view padded to ``step.bucket``;
            what it returns is what `replay` returns. It is called twice per size: first in a capture that is dropped,
            in which its kernels compile and load, then in the one that is kept. Neither runs what it queues on
            ``step.stream``.
        sizes : iterable of int, or of mappings of axis to int, optional
            The sizes to capture, as they are; an int is a number of tokens, with every further axis at its largest.
            Default: the bucket list of "tokens".
        on_progress : callable
            ``on_progress(done, total, size, free_bytes)`` is called after each of the two calls per size;
            `progress.Bar` is one that shows a bar. What it raises ends the capture as what `fn` raises does.
        warm_up : {None, "run"}
            "run": the first call for each size runs, over padded or kept slots, in place of the dropped capture.
            For functions that need a run before they can be captured; it changes what the function writes.

        Returns
        -------
        captured : tuple of dict
            The sizes captured, smallest first.

        Raises
        ------
        ValueError, TypeError
            A size is not one, or larger than the slots.
        CaptureError, Exception
            A capture was refused, or `fn` raised. The graphs from before the call are as they were.

        Notes
        -----
        Largest first lets the driver reuse what the largest graph needed for the smaller ones. A function that was
        captured before gets further sizes; another one replaces all graphs of the manager's own calls at once, when
        the new ones are captured. For several functions over the same slots see `program`.
        Capture: no data changes, unless `warm_up` is "run". What remains: Python code in `fn` runs twice per size, and
        work that it sends to other streams past Numba (drivers, other libraries) runs at once.
        """
        check_function(fn)
        return self._first.capture_all(fn, sizes, on_progress=on_progress, warm_up=warm_up)

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
        """Stage `inputs` and replay the smallest captured graph that covers the step: one driver call.

        Parameters
        ----------
        inputs : mapping of str to array
            Host arrays by slot name, as for `stage_inputs`; here every name must be a static slot.
        num_tokens, **sizes : int
            As for `stage_inputs`.
        at_least : int, or mapping of axis to int, optional
            The least padded size, so that data-parallel ranks run graphs of one size; an int is a number of tokens.
            The pieces of a split step have it, too.
        max_padding : float, optional
            The most padded tokens for each live token (or each that `at_least` asks for), 1.0 or more. No graph covers
            a step that needs more padding, and `overflow` decides; "split" fills smaller graphs, but for the last
            piece, which max_padding does not bind.
        each : callable, optional
            With `overflow` "split": called as ``each(result, start, stop)`` after each piece of a step that was split
            is queued, the moment to queue what reads its result, which the next piece overwrites. Other threads' steps
            wait meanwhile; it must not wait for a thread that uses this manager, and its own calls of it raise
            BusyError.

        Returns
        -------
        result
            What the captured function returned for the bucket; of the last piece, if the step was split. Where the
            function asked for outputs: `Outputs`, whose `result` is that.

        Raises
        ------
        TypeError, ValueError, OverflowError
            An input does not fit its slot; nothing was launched.
        GraphMissingError
            Nothing is captured.
        BucketOverflowError
            No captured graph is large enough and `overflow` is "raise", or the slots cannot hold the step.

        Notes
        -----
        Returns when the step is queued; `synchronize` waits for it. The inputs may be overwritten as soon as this
        returns. Waits only when the ring is full of steps that the device has not read yet, and counts that.
        """
        choice = None if at_least is None and max_padding is None else Choice.of(at_least, max_padding)
        return self._first.run(inputs, num_tokens, each, sizes, choice)

    # --------------------------------------------------------------------------------------------------- programs

    def program(
        self,
        fn: Callable[[Step], Any],
        *,
        name: str | None = None,
        buckets: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
        overflow: str | None = None,
    ) -> Program:
        """Make a further program: another function over the same slots, with graphs and counts of its own.

        Parameters
        ----------
        fn
            As for `capture_buckets`. Nothing is captured yet.
        name : str, optional
            What `stats().programs` calls it; by default the function's name, with a number where that is taken.
        buckets
            The sizes that its `capture_buckets` captures by default; by default the manager's.
        overflow : {"raise", "eager", "split"}, optional
            By default the manager's.

        Raises
        ------
        ValueError
            The name is that of another open program, or a bucket is larger than the slots.
        """
        check_function(fn)
        with self._shared.alone("program"):
            self._shared.check_open()
            policy = self.overflow if overflow is None else overflow
            return self._programs.add(fn, name, buckets, policy, self.max_tokens)

    @property
    def programs(self) -> dict[str, Program]:
        """The open programs by name; the first, of the manager's own calls, is "main"."""
        return self._programs.open

    @property
    def captured(self) -> tuple[CapturedSize, ...]:
        """The sizes that the manager's own calls have graphs for, the smallest first."""
        return self._first.captured

    def close_graphs(self) -> None:
        """Wait for all steps, then destroy every program's graphs and let their operands go.

        The function of the first program is let go as well; other programs keep theirs, and can capture again.
        """
        with self._shared.alone("close_graphs"):
            self._shared.check_context()
            self._shared.capturing.refuse("graphs cannot be closed")
            self._shared.close_graphs()
            self._first.function = None

    # ------------------------------------------------------------------------------------------------------- the end

    def synchronize(self) -> None:
        """Wait for every step queued so far; raises what their kernels raised."""
        if _cuda.capturing():
            raise CaptureError(
                "synchronize was called inside a captured function, which no graph can hold: wait after the replay"
            )
        self._shared.synchronize()

    def wait_for(self, other: InputBufferManager | _cuda.StreamLike | None) -> None:
        """Put what this manager queues from now on behind what is queued on `other` so far; the host does not wait.

        ::

            other   step 1 ---+   step 2 ----->
                              |
            this              +-> step 1 ----->

        Parameters
        ----------
        other
            A manager, or a stream as for `InputBufferManager`; None for the default stream.

        Raises
        ------
        ClosedError
            One of the managers is closed.
        CaptureError
            A capture is open in this thread or on one of the streams.
        BackendError
            `other` is on another device.

        Notes
        -----
        Cost: an event and a wait; none where both managers have one stream. Where the next step of `other` overwrites
        what this manager's steps read, it waits in turn: ``other.wait_for(manager)``.
        """
        shared = self._shared
        if isinstance(other, InputBufferManager):
            stream = other._shared.open_stream()  # noqa: SLF001  # this very class
        else:
            stream = _cuda.default_stream() if other is None else _cuda.as_stream(other)
        with shared.alone("wait_for"):
            shared.check_open()
            put_behind(shared, stream, self._fences)

    def release_all(self) -> None:
        """Close the graphs and give all memory back to the pool; the slots stay registered.

        The next step allocates anew, at other addresses and with zeroed slots.
        """
        with self._shared.alone("release_all"):
            self._shared.check_context()
            self._shared.check_no_lease()
            self._shared.capturing.refuse("graphs cannot be closed")
            self._shared.release()
            self._first.function = None

    @property
    def closed(self) -> bool:  # type: ignore[override]
        """Whether no further step is taken."""
        return bool(self._shared.closed)

    def close(self) -> None:
        """Release everything and refuse further steps. Doing it again does nothing.

        A lease that is still open is discarded, so that an exception in its block is not hidden by another. A pool that
        the manager was given stays open; one of its own is closed. Where queued work has failed, its error is raised
        here, once, and the manager is closed all the same.
        """
        shared = self._shared
        if not self.closed:
            with shared.alone("close"):
                try:
                    shared.close()
                except Exception:
                    self.owns_pool &= not self.closed  # its frees would fail like this, at every further close
                    raise
                self._first.function = None
        self._fences = Fences()  # the events of the old go with the pool's memory
        if self.owns_pool:
            self.owns_pool = False
            try:
                shared.pool.close()
            except Exception:
                if not shared.life.ended:  # what is gone with its context gives nothing back
                    raise

    def __enter__(self) -> InputBufferManager:
        self._shared.check_open()
        return self

    def stats(self) -> ManagerStats:
        """Return one consistent snapshot of the counters."""
        with self._shared.lock:
            return self._programs.stats()

    def check(self) -> None:
        """Assert the manager's own invariants; waits for all steps.

        AssertionError: slots overlap, a graph was captured over other memory, or host and device count steps apart.
        """
        self._shared.check()

    @property
    def _lease(self) -> Lease | None:
        """The lease that `stage` gave out last, until it is ended."""
        return self._shared.lease

    @property
    def pending(self) -> tuple[int, int] | None:
        """Blocks of the staging ring that a queued fill may still read, and the ring's depth; None where none is."""
        # Once: another thread may give the memory back meanwhile. Nor is memory read that went with its context.
        arena = None if self._shared.life.ended else self._shared.arena
        return None if arena is None else (arena.ring.pending, self._shared.depths[0])

    def __repr__(self) -> str:
        shared, name = self._shared, type(self).__name__
        state = "closed" if self.closed else f"{sum(len(table) for table in shared.tables[1:])} graphs"
        return f"{name}({len(self.slots)} slots, {self.max_tokens} tokens, ring={shared.depths[0]}, {state})"
