"""The input manager: named static slots, a staging ring before them, and one graph replay per step.

Puts the parts together, and is the one lock round them: `sizes` rounds a step up to its bucket, `service` chooses the
graph, `arena` writes the inputs and queues it, `overflow` says what becomes of a step that no graph covers. What is
marked "hot path" is a step: it allocates nothing on the device, logs nothing and makes one driver call. Sits on top of
everything but `predictive`.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from threading import get_ident
from typing import Any

from .. import _cuda, config
from ..checks import nbytes, whole_number
from ..errors import BackendError, BucketOverflowError, BusyError, CaptureError, ClosedError, GraphMissingError
from ..pool.pool import BufferPool, SimpleBufferPool
from ..pool.spec import BufferSpec
from ..pool.stats import ManagerStats
from ..resource import Resource
from ..view.progress import stopped, track
from .arena import Arena
from .graph import CapturedStep, Recording, Step
from .lease import Lease
from .overflow import POLICIES, check_each, cut, uncut, warn
from .service import Service
from .sizes import bucket_lists, check_limits, live_sizes, round_up, settle, too_large, wanted
from .slot import InputSlot

__all__ = ["InputBufferManager", "check_function"]

_log = logging.getLogger("numbabuf")
MAX_SLOTS = 65_535
"""Static slots of a manager: the largest second dimension of a grid (CUDA C++ Programming Guide, "Compute
Capabilities")."""

_this_thread = _cuda.this_thread
_captures = _cuda.captures


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
        buckets: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
        overflow: str = "raise",
        default_slots: bool = True,
        stream: Any = None,
        range_check: bool | None = None,
    ) -> None:
        self.max_batch_size = whole_number("max_batch_size", max_batch_size, least=1)
        self.max_seq_len = whole_number("max_seq_len", max_seq_len, least=1)
        self.max_tokens = self.max_batch_size * self.max_seq_len
        self._depth = whole_number("ring", ring, least=1)
        if overflow not in POLICIES:
            raise ValueError(f"overflow is {overflow!r}; use one of {', '.join(POLICIES)}")
        if pool is not None and not isinstance(pool, BufferPool):
            raise TypeError(f"pool is {pool!r}: give a BufferPool, or None for one of the manager's own")
        self.overflow = overflow
        self._bucket_lists = bucket_lists(buckets, self.max_tokens)
        self._range_check = config.enabled("NUMBABUF_RANGE_CHECK") if range_check is None else bool(range_check)
        self._stream = _cuda.as_stream(stream)
        if self._stream.thread is not None:
            raise ValueError(
                "stream is the per-thread default stream, which is another stream in every thread that steps: give "
                "None for a stream of the manager's own, or cuda.stream()"
            )
        self.stream = self._stream.numba
        self._device = self._stream.device
        self._own_pool = pool is None
        self._pool: BufferPool = SimpleBufferPool() if pool is None else pool
        with _cuda.on_device(self._device):
            self._life = _cuda.lifetime()  # of the context that the stream, and later the memory, is in
        self._why_closed = ""
        self._lock = threading.RLock()
        self._inside = self._lock._is_owned  # type: ignore[attr-defined]  # as threading.Condition asks it
        self._capturing = threading.Lock()  # one capture at a time; always taken before `_lock`
        self._slots: dict[str, InputSlot] = {}
        self._static: tuple[InputSlot, ...] = ()
        self._axes: tuple[str, ...] = ("tokens",)
        self._further_axes = False
        self._choices: tuple[tuple[int, ...], ...] = ()  # bucket list per axis, known once there is memory
        self._limits: tuple[int, ...] = ()  # largest size per axis, likewise
        self._arena: Any = None  # an Arena once there is memory; Any, because every step asks
        self._ring: Any = None  # its ring; None once closed, so that a step asks for both at once
        self._kept: Arena | None = None  # an arena whose contents the next one takes over
        self._capture_stream: Any = None
        self._generation = 0
        self._fills: dict[tuple[int, ...], CapturedStep] = {}
        self._service = Service(self._stream)
        self._function: Callable[[Step], Any] | None = None
        self._lease: Lease | None = None
        self._capturer: int | None = None  # the thread that captures
        self._past_waits = 0
        self._overflows = 0
        self._warned = False
        self.closed = False
        self.observer: Callable[[int], None] | None = None
        """Called with each step's number of tokens after it is queued; the seam for demand models. What it raises is
        logged, as the step runs all the same."""
        _managers.add(self)
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
    ) -> InputSlot:
        """Add a named input.

        Parameters
        ----------
        name : str
        spec : BufferSpec
            Capacity and element type. The first dimension follows `axis`; a two-dimensional slot takes inputs whose
            rows are shorter than its own.
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

        Returns
        -------
        slot : InputSlot

        Raises
        ------
        ValueError, TypeError
            The name is taken, or an argument is no use.
        BusyError
            A graph is live: it reads the slots where they lie now. `close_graphs` first.
        """
        with self._alone("register_slot"):
            self._check_open()
            if name in self._slots:
                raise ValueError(f"slot {name!r} is registered already, as {self._slots[name]!r}")
            slot = InputSlot(
                name, spec, static=is_static, pad=pad, index=index, source_dtype=source_dtype, axis=axis,
                max_live=max_live, range_check=self._range_check,
            )  # fmt: skip
            if slot.static:
                if len(self._static) >= MAX_SLOTS:
                    raise ValueError(
                        f"slot {name!r} is one too many: a fill launches a row of thread blocks for each, of which a "
                        f"grid has at most {MAX_SLOTS:,}; put several inputs into one slot"
                    )
                if slot.axis is not None and slot.extra >= slot.capacity:
                    raise ValueError(
                        f"slot {name!r}: axis {axis!r} adds {slot.extra} rows to a size; the slot holds {slot.capacity}"
                    )
                self._check_movable(f"slot {name!r} cannot be added")
                self._dismantle(keep=True)
                if slot.axis is not None and slot.axis not in self._axes:
                    self._axes, self._further_axes = (*self._axes, slot.axis), True
                axis_index = -1 if slot.axis is None else self._axes.index(slot.axis)
                slot.bind(len(self._static), axis_index, self._slot_array, self._set_slot)
                self._static = (*self._static, slot)
            self._slots[name] = slot
            return slot

    def get_slot(self, name: str) -> InputSlot:
        """Return the slot `name`.

        Raises
        ------
        KeyError
            There is none.
        """
        try:
            return self._slots[name]
        except KeyError:
            raise KeyError(f"no slot {name!r}; registered are {', '.join(self._slots) or 'none'}") from None

    @property
    def slots(self) -> tuple[InputSlot, ...]:
        """All slots, in the order in which they were registered."""
        return tuple(self._slots.values())

    def get_static_tensors(self) -> dict[str, Any]:
        """Return every static slot's whole device array, by name."""
        return {slot.name: slot.array for slot in self._static}

    def _slot_array(self, slot: InputSlot) -> Any:
        if self._ring is None:
            self._refuse_inside("the memory of a slot")
        with self._lock:
            self._ready()
            return self._arena.whole[slot.position]

    # ----------------------------------------------------------------------------------------------------- memory

    @contextlib.contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """Hold the lock for a call that its own thread may not enter from within another; see `_refuse_inside`."""
        self._refuse_inside(what)
        with self._lock:
            yield

    def _refuse_inside(self, what: str) -> None:
        """Refuse a call from within another on this manager in the same thread, which the lock alone lets in.

        As by an input's ``__array__``, a signal handler or a finaliser in the middle of a step:
            step: takes block 0 of the ring and begins to write it
            within: another step takes block 0, too, writes and queues it
            step: writes over what that one has queued, and queues it a second time.
        """
        if self._inside():
            if _cuda.capturing():
                raise CaptureError(
                    f"{what} was called inside a captured function, which no graph can hold: call it before or after"
                )
            raise BusyError(
                f"{what} was called from within another call on {self!r} in the same thread, as by an input's "
                "__array__, a signal handler or a finaliser; nothing has changed: call it when that has returned"
            )

    def _check_open(self) -> None:
        if self._life.ended and not self.closed:
            self._bury()
        if self.closed:
            raise ClosedError(self._why_closed or "the manager is closed: make a new one")
        if self._pool.closed:
            raise ClosedError("the manager's pool was closed under it: close the manager first, then its pool")

    def _check_context(self) -> None:
        """Refuse what a closed manager allows and one whose context is gone cannot do."""
        if self._life.ended:
            self._check_open()

    def _check_movable(self, what: str) -> None:
        """Refuse to move the slots' memory from under anybody who counts on where it lies."""
        if self._service:
            raise BusyError(
                f"{what} while {len(self._service)} graph(s) read the slots where they lie: register every slot "
                "before capturing, or call close_graphs() first"
            )
        if self._capturer is not None:
            raise BusyError(f"{what} while a graph is being captured")
        self._check_no_lease()

    def _check_no_capture(self, what: str) -> None:
        """Refuse what ends graphs or memory during a capture: this thread's own, or another's with this manager."""
        if _cuda.capturing():
            raise CaptureError(f"{what} inside a captured function, which no graph can hold: do it before or after")
        if self._capturer is not None:
            raise BusyError(f"{what} while one is being captured")

    def _check_no_lease(self) -> None:
        if self._lease is not None and self._lease.open:
            raise BusyError("a stage() lease is open: leave its with block first")

    def _ready(self) -> None:
        """Make the memory, and this thread's context, ready."""
        self._check_open()
        _cuda.require()
        if self._ring is None:
            self._build()

    def _build(self) -> None:
        """Give the slots memory, and what an earlier arena held."""
        if _cuda.capturing():
            raise CaptureError("the slots have no memory yet and a capture is open: run one step before capturing")
        _cuda.one_device(self._device, self)
        if self._pool.device not in (None, self._device):
            raise BackendError(
                f"{self!r} is on device {self._device} and its pool's memory on device {self._pool.device}: give each "
                "device a pool of its own"
            )
        self._limits, self._choices = settle(self._axes, self._static, self._bucket_lists, self.max_tokens)
        arena = Arena(self._pool, self._static, self._depth, self._stream, self._generation + 1, self._kept)
        self._arena, self._ring, self._generation = arena, arena.ring, arena.generation
        if self._kept is not None:
            self._kept.release()
            self._kept = None

    def _dismantle(self, *, keep: bool = False) -> None:
        """Give the memory back to the pool; `keep` holds it until the next arena has its contents."""
        if self._arena is None:
            return
        self.synchronize()
        # First of all, for what fails, or is interrupted, may have done half.
        fills, arena, self._fills, self._arena, self._ring = self._fills, self._arena, {}, None, None
        if keep:
            self._kept = arena
        self._past_waits += arena.ring.waits
        for fill in fills.values():
            self._service.retire(fill)
        if not keep:
            arena.release()

    # --------------------------------------------------------------------------------------------- the parts of a step

    def _new_step(self, sizes: tuple[int, ...], stream: Any) -> CapturedStep:
        """A bucket's views and padded rows; what runs it is put in by whoever asks."""
        _cuda.one_device(self._device, self)
        padded = tuple(min(slot.capacity, slot.rows(sizes)) for slot in self._static)
        step = Step(stream.numba, dict(zip(self._axes, sizes, strict=True)), self._arena.views(padded))
        return CapturedStep(step, sizes, padded, self._generation)

    def _recording(self, sizes: tuple[int, ...], *, dry: bool = False) -> Recording:
        """A capture of the fill, and of what its ``with`` block queues, for a bucket; `dry`: one that is dropped."""
        _cuda.one_device(self._device, self)  # first: the stream below is made on the device that is current
        if self._capture_stream is None or self._capture_stream.closed:
            # Or a capture was given up in another thread than it was begun in, and its stream with it.
            self._capture_stream = _cuda.as_stream(None)
        new, arena = self._new_step(sizes, self._capture_stream), self._arena
        return Recording(self._capture_stream, lambda stream: arena.launch_fill(stream, new.padded), new, dry=dry)

    def _plain(self, sizes: tuple[int, ...]) -> CapturedStep:
        """A step without a graph, for sizes that have none: its fill is launched by itself."""
        plain, arena, stream = self._new_step(sizes, self._stream), self._arena, self._stream
        padded = plain.padded  # not `plain` itself: it would keep itself alive
        plain.launch_on = lambda core: arena.launch_fill(stream, padded)
        return plain

    # ------------------------------------------------------------------------------------------------- fill alone

    def stage_inputs(self, inputs: Mapping[str, Any], num_tokens: int, **sizes: int) -> dict[str, Any]:
        """Fill the slots with `inputs` and pad them to the step's bucket, without running a captured function.

        Parameters
        ----------
        inputs : mapping of str to array
            Host arrays by slot name; each has as many rows as the size that its slot follows. A slot that is left out,
            or None, is all padding. Names that are no slot, and slots that are not static, pass through.
        num_tokens : int
            Live tokens, >= 0.
        **sizes : int
            The step's other sizes, one for each further axis.

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
        if self._inside():  # as `_alone`, which costs more
            self._refuse_inside("stage_inputs")
        with self._lock:
            if self._ring is None or self._life.ended or self._pool.closed or not _this_thread.ready:
                self._ready()
            live = self._begin_step(num_tokens, sizes)
            target = self._fill_for(live)
            found = self._arena.write(self._ring.acquire(), inputs, live, target.padded)
            self._submit_fill(target, live)
            views = target.step.views()
        if found != len(inputs):
            for name, value in inputs.items():
                views.setdefault(name, value)
        if self.observer is not None:
            try:
                self.observer(live[0])
            except Exception as error:
                self._unobserved(live, error)
        return views

    def _unobserved(self, live: tuple[int, ...], error: Exception) -> None:
        """Log an observer that failed. Had it raised, the caller would repeat a step that is queued."""
        _log.warning("the observer of %r failed on a step of %d tokens, which is queued: %r", self, live[0], error)

    def _begin_step(self, num_tokens: Any, sizes: Mapping[str, Any]) -> tuple[int, ...]:
        """What every step checks first."""
        if self._lease is not None:
            self._check_no_lease()
        self._refuse_capture()
        return live_sizes(self._axes, num_tokens, sizes)

    def _refuse_capture(self) -> None:
        if _captures and _cuda.capturing():
            raise CaptureError(
                "host inputs cannot be staged inside a capture: the graph's own fill reads them at replay"
            )

    def _fill_for(self, live: tuple[int, ...]) -> CapturedStep:
        """What fills the slots, and nothing else, for the bucket that covers `live`: a graph made at its first use."""
        sizes, over = round_up(self._choices, live)
        if over is not None:
            if self.overflow != "eager":
                fits = all(size <= limit for size, limit in zip(live, self._limits, strict=True))
                raise self._too_large(over, live, self._choices[over][-1], *(("eager",) if fits else ()))
            check_limits(self._axes, self._limits, self._choices, live)
            return self._plain(sizes)
        fill = self._fills.get(sizes)
        if fill is None:
            # Not waiting: whoever captures in another thread may want the lock that this thread holds.
            if not self._capturing.acquire(blocking=False):
                return self._plain(sizes)
            try:
                recording = self._recording(sizes)
                with recording:
                    pass
            finally:
                self._capturing.release()
            fill = self._fills[sizes] = recording.captured
        return fill

    def _too_large(self, axis: int, live: tuple[int, ...], largest: int, *policies: str, why: str = "") -> Exception:
        return too_large(self._axes[axis], live[axis], largest, self._limits[axis], policies, why)

    def _submit_plain(self, target: CapturedStep, live: tuple[int, ...]) -> None:
        """Queue and count a step without a graph, and say so once. Its inputs are written, so they are good."""
        if not self._warned:
            self._warned = True
            warn(self._axes, live)
        self._arena.submit(target, live[0])
        self._overflows += 1
        self._service.retire(target)

    def _submit_fill(self, target: CapturedStep, live: tuple[int, ...]) -> None:
        """Queue a fill: the graph of its bucket or, for a step that has none, a launch."""
        if self._fills.get(target.sizes) is target:
            self._arena.submit(target, live[0])
        elif any(size > choices[-1] for size, choices in zip(live, self._choices, strict=True)):
            self._submit_plain(target, live)
        else:  # another thread was capturing, so that the bucket could not get its graph yet
            self._arena.submit(target, live[0])
            self._service.retire(target)

    def _set_slot(self, slot: InputSlot, data: Any) -> None:
        """`InputSlot.set_data`: a fill in which every other slot has nothing to write."""
        with self._alone("set_data"):
            self._ready()
            _cuda.one_device(self._device, self)
            self._begin_step(0, dict.fromkeys(self._axes[1:], 0))
            data = slot.on_host(data)
            rows = len(data) if data.ndim else 0
            padded = slot.capacity
            if slot.axis_index >= 0:
                ((bucket,), _) = round_up(self._choices[slot.axis_index :][:1], (rows - slot.extra,))
                padded = min(slot.capacity, bucket + slot.extra)
            self._arena.write_one(slot, data, rows, padded)
            self._arena.fill(tuple(padded if other is slot else 0 for other in self._static))

    def stage(self, num_tokens: int, **sizes: int) -> Lease:
        """Lend the caller a staging block to write a step's inputs into, without a copy.

        Parameters
        ----------
        num_tokens : int
            Live tokens.
        **sizes : int
            The step's other sizes.

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
        with self._alone("stage"):
            self._ready()
            live = self._begin_step(num_tokens, sizes)
            check_limits(self._axes, self._limits, self._choices, live)
            rows = {slot.name: (slot, slot.rows(live)) for slot in self._static}

            def finish(lease: Lease, how: str, each: Any) -> Any:
                with self._alone("the end of a lease"):
                    if how != "discard":
                        self._check_open()
                        self._refuse_capture()
                    if how == "fill" and round_up(self._choices, live)[0] not in self._fills:
                        _cuda.one_device(self._device, self)  # what is refused leaves the lease open
                    lease.expire()  # here, as two threads may end it at once, and `close` too
                    self._lease = None
                    if how == "discard":
                        return None
                    result = self._finish(lease, live, each, replay=how == "replay")
                if self.observer is not None:
                    try:
                        self.observer(live[0])
                    except Exception as error:
                        self._unobserved(live, error)
                return result

            self._lease = Lease(self._ring.acquire(), rows, finish)
            return self._lease

    def _finish(self, lease: Lease, live: tuple[int, ...], each: Any, *, replay: bool) -> Any:
        """Run the step that a lease wrote."""
        self._ready()
        for name, array in lease.written.items():
            if self._slots[name].checked:
                self._slots[name].check_range(array)
        target = self._service.covering(live) if replay else self._fill_for(live)
        if target is None:
            # As any other inputs, though they lie in the very block that is written first: a whole step over itself,
            # a piece to where an earlier one lay. No other step gets the block before the last piece is written: the
            # lock keeps other threads out, and `_refuse_inside` what `each` might stage in this one.
            return self._overflow(lease.written, live, each)
        block = lease.block
        block.padded = None
        for slot in self._static:
            rows = slot.rows(live) if slot.name in lease.written else 0
            slot.describe(block.words, rows, slot.width, target.padded[slot.position])
        if replay:
            return self._arena.submit(target, live[0])
        self._submit_fill(target, live)
        return target.step.views()

    # ----------------------------------------------------------------------------------------------------- graphs

    @contextlib.contextmanager
    def capture(self, num_tokens: int, **sizes: int) -> Iterator[Step]:
        """Capture the launches in the ``with`` block into the graph that serves steps of up to this size.

        Parameters
        ----------
        num_tokens : int
            Rounded up to its bucket.
        **sizes : int
            The other sizes, rounded up likewise.

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
        self._refuse_inside("capture")
        with self._exclusive():
            with self._lock:
                self._ready()
                live = self._begin_step(num_tokens, sizes)
                rounded, over = round_up(self._choices, live)
                if over is not None:
                    raise self._too_large(over, live, self._choices[over][-1])
                recording = self._recording(rounded)
            with recording as step:
                yield step
            with self._lock:
                self._service.adopt([recording.captured])

    @contextlib.contextmanager
    def _exclusive(self, *, wait: bool = True) -> Iterator[None]:
        """The right to capture: one at a time, and the slots' memory stays where it is meanwhile.

        Without `wait`, BusyError while anybody captures.
        """
        if wait and _cuda.capturing():
            raise CaptureError("this thread already has a capture open: end it before beginning another")
        if wait and self._capturer == get_ident():
            raise CaptureError("this thread is capturing with this manager: a captured function cannot capture others")
        capturing = self._capturing  # a forked child gets another lock, and leaves this one
        if not capturing.acquire(blocking=wait):
            raise BusyError("another thread captures")
        try:
            self._capturer = get_ident()
            yield
        finally:
            self._capturer = None
            capturing.release()

    def capture_buckets(
        self,
        fn: Callable[[Step], Any],
        sizes: Iterable[int | Mapping[str, int]] | None = None,
        *,
        progress: bool = False,
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
        progress : bool
            Show a progress bar on standard error, and what was reached if it fails.
        warm_up : {None, "run"}
            "run": the first call for each size is no capture but runs, over slots that are all padding. For functions
            that need a run before they can be captured; it changes what the function writes.

        Returns
        -------
        captured : tuple of dict
            The sizes captured, smallest first.

        Raises
        ------
        ValueError, TypeError
            A size is no size, or larger than the slots.
        CaptureError, Exception
            A capture was refused, or `fn` raised. The graphs from before the call are as they were.

        Notes
        -----
        Largest first lets the driver reuse what the largest graph needed for the smaller ones. A size that was captured
        before gets the new graph.
        Capture: no data changes, unless `warm_up` is "run". What remains: Python code in `fn` runs twice per size, and
        work that it sends to other streams past Numba (drivers, other libraries) runs at once.
        """
        check_function(fn)
        if warm_up not in (None, "run"):
            raise ValueError(f'warm_up is {warm_up!r}: give None, which runs nothing, or "run"')
        with self._exclusive(), self._alone("capture_buckets"):
            self._ready()
            self._begin_step(0, dict.fromkeys(self._axes[1:], 0))
            asked = sorted(wanted(self._axes, self._limits, self._choices, sizes), reverse=True)
            total = 2 * len(asked)
            captured: list[CapturedStep] = []

            def note(item: tuple[str, tuple[int, ...]]) -> str:
                free = _cuda.memory_info()
                room = f", {nbytes(free[0])} free" if free else ""
                return f"{item[0]} {dict(zip(self._axes, item[1], strict=True))}{room}"

            work = [("warm", size) for size in asked] + [("capture", size) for size in asked]
            try:
                for phase, size in track(work, total=total, label="capture_buckets", enabled=progress, note=note):
                    if phase == "warm":
                        self._warm(size, fn, run=warm_up == "run")
                        continue
                    if not captured:
                        self._stream.synchronize()
                    recording = self._recording(size)
                    with recording as step:
                        step.result = fn(step)
                    captured.append(recording.captured)
            except BaseException as error:
                for graph in captured:
                    graph.close()
                if progress:
                    why = f"{type(error).__name__} at {phase} {dict(zip(self._axes, size, strict=True))}; none is kept"
                    stopped("capture_buckets", len(captured), len(asked), why)
                raise
            self._service.adopt(captured)
            self._function = fn
            return tuple(dict(zip(self._axes, size, strict=True)) for size in reversed(asked))

    def _warm(self, sizes: tuple[int, ...], fn: Callable[[Step], Any], *, run: bool) -> None:
        """Call `fn` once for a bucket before its capture, so that the capture has nothing to compile or load.

        What it queues is recorded in a capture that is dropped, so that no data changes; with `run`, it runs, over
        slots that are all padding.
        """
        if not run:
            with self._recording(sizes, dry=True) as step:
                fn(step)
            return
        target = self._plain(sizes)
        self._arena.write(self._ring.acquire(), {}, (0,) * len(sizes), target.padded)
        self._arena.submit(target, 0)
        fn(target.step)

    def replay(
        self,
        inputs: Mapping[str, Any],
        num_tokens: int,
        *,
        each: Callable[[Any, int, int], None] | None = None,
        **sizes: int,
    ) -> Any:
        """Stage `inputs` and replay the smallest captured graph that covers the step: one driver call.

        Parameters
        ----------
        inputs : mapping of str to array
            Host arrays by slot name, as for `stage_inputs`; here every name must be a static slot.
        num_tokens : int
            Live tokens.
        each : callable, optional
            With `overflow` "split": called as ``each(result, start, stop)`` after each piece of a step that was split
            is queued, the moment to queue what reads its result, which the next piece overwrites. Other threads' steps
            wait meanwhile; it must not wait for a thread that uses this manager, and its own calls of it raise
            BusyError.
        **sizes : int
            The step's other sizes.

        Returns
        -------
        result
            What the captured function returned for the bucket; of the last piece, if the step was split.

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
        # Hot path, guarded by benchmarks/step.py.
        if self._inside():
            self._refuse_inside("replay")
        if each is not None:
            check_each(each)
        with self._lock:
            if self._ring is None or self._life.ended or self._pool.closed or not _this_thread.ready:
                self._ready()
            if self._lease is not None or _captures or sizes or type(num_tokens) is not int or num_tokens < 0:
                live = self._begin_step(num_tokens, sizes)
            else:
                live = live_sizes(self._axes, num_tokens, sizes) if self._further_axes else (num_tokens,)
            target = self._service.covering(live)
            if target is None:
                result = self._overflow(inputs, live, each)
            else:
                arena = self._arena
                if arena.write(self._ring.acquire(), inputs, live, target.padded) != len(inputs):
                    arena.refuse_others(inputs)
                result = arena.submit(target, live[0])
        if self.observer is not None:
            try:
                self.observer(live[0])
            except Exception as error:
                self._unobserved(live, error)
        return result

    def _overflow(self, inputs: Mapping[str, Any], live: tuple[int, ...], each: Any) -> Any:
        """A step that no captured graph covers, after the policy."""
        if self.overflow != "raise":
            self._arena.refuse_others(inputs)
        if self.overflow == "split" and self._can_split(inputs, live):
            return self._split(inputs, live, each)
        if self.overflow == "eager":
            return self._eager(inputs, live)
        raise self._uncovered(inputs, live)

    def _can_split(self, inputs: Mapping[str, Any], live: tuple[int, ...]) -> bool:
        """Whether "split" runs a step: no slot is left uncut, and the slots or an input bound its length."""
        if uncut(self._static) is not None:
            return False
        if live[0] <= self._limits[0]:
            return True
        return isinstance(inputs, Mapping) and any(
            slot.axis is not None and inputs.get(slot.name) is not None for slot in self._static
        )

    def _uncovered(self, inputs: Mapping[str, Any], live: tuple[int, ...]) -> Exception:
        """The error for a step that no captured graph covers; the policies that it names would run this very step."""
        largest = [self._service.largest(axis) for axis in range(len(live))]
        over = [axis for axis, size in enumerate(live) if size > largest[axis]]
        fits = all(size <= limit for size, limit in zip(live, self._limits, strict=True))
        ways = ["eager"] if fits and self._function is not None else []
        if self.overflow != "split" and self._can_split(inputs, live):
            ways.append("split")
        why, whole = "", uncut(self._static)
        if self.overflow == "split" and whole is not None:
            follows = f"{whole.axis}+{whole.extra}" if whole.extra else whole.axis
            why = (
                f"; overflow='split' cuts along the tokens alone, and of slot {whole.name!r}, which follows {follows}, "
                "every piece would get the whole"
            )
        if over:  # first what the slots cannot hold, for which no bucket helps
            axis = max(over, key=lambda axis: (live[axis] > self._limits[axis], axis))
            return self._too_large(axis, live, largest[axis], *ways, why=why)
        size = dict(zip(self._axes, live, strict=True))
        offer = f", or make the manager with overflow={' or '.join(map(repr, ways))}" if ways else ""
        return BucketOverflowError(
            f"this step has {size}: there is a graph for each of these sizes, and none for all of them; capture "
            f"this one, or a larger, as well{offer}{why}"
        )

    def _eager(self, inputs: Mapping[str, Any], live: tuple[int, ...]) -> Any:
        """Run fill and function without a graph."""
        if self._function is None:
            raise GraphMissingError("overflow='eager' runs the function given to capture_buckets; none was given")
        check_limits(self._axes, self._limits, self._choices, live)
        target, arena = self._plain(live), self._arena
        if arena.write(self._ring.acquire(), inputs, live, target.padded) != len(inputs):
            arena.refuse_others(inputs)
        self._submit_plain(target, live)
        return self._function(target.step)

    def _split(self, inputs: Mapping[str, Any], live: tuple[int, ...], each: Any) -> Any:
        """Replay a step in pieces of the largest captured number of tokens; its slots follow tokens or nothing."""
        arena = self._arena
        pieces = cut(inputs, live[0], self._service.largest(0), self._static)
        self._overflows += 1
        result = None
        for start, stop, piece in pieces:
            sizes = (stop - start,)
            target = self._service.covering(sizes)
            assert target is not None
            arena.write(self._ring.acquire(), piece, sizes, target.padded)
            result = arena.submit(target, stop - start)
            if each is not None:
                each(result, start, stop)
        return result

    def close_graphs(self) -> None:
        """Wait for all steps, then destroy every captured graph and let its operands go."""
        with self._alone("close_graphs"):
            self._check_context()
            self._check_no_capture("graphs cannot be closed")
            self._close_graphs()

    def _close_graphs(self) -> None:
        with _cuda.on_device(self._device):
            if self._service or self._service.leaving:
                self.synchronize()
            self._service.close()
            self._function = None

    # ------------------------------------------------------------------------------------------------------- the end

    def synchronize(self) -> None:
        """Wait for every step queued so far; raises what their kernels raised."""
        if _cuda.capturing():
            raise CaptureError(
                "synchronize was called inside a captured function, which no graph can hold: wait after the replay"
            )
        self._check_context()
        with _cuda.on_device(self._device):  # this thread may never have called the driver, or have no context left
            self._stream.synchronize()

    def release_all(self) -> None:
        """Close the graphs and give all memory back to the pool; the slots stay registered.

        The next step allocates anew, at other addresses and with zeroed slots.
        """
        with self._alone("release_all"):
            self._check_context()
            self._check_no_lease()
            self._check_no_capture("graphs cannot be closed")
            self._release_all()

    def _release_all(self) -> None:
        with _cuda.on_device(self._device):
            self._close_graphs()
            self._dismantle()
            if self._kept is not None:
                self._kept.release()
                self._kept = None

    def close(self) -> None:
        """Release everything and refuse further steps. Doing it again does nothing.

        A lease that is still open is discarded, so that an exception in its block is not hidden by another. A pool that
        the manager was given stays open; one of its own is closed. Where queued work has failed, its error is raised
        here, once, and the manager is closed all the same.
        """
        if self.closed:
            return
        with self._alone("close"):
            if self._life.ended:
                self._bury()
                return
            self._check_no_capture("the manager cannot be closed")
            if self._lease is not None and self._lease.open:
                self._lease.expire()
                self._lease = None
            try:
                self._release_all()
            except Exception as error:
                if _cuda.is_capture_error(error):  # of somebody else's capture in this thread; nothing has changed
                    raise CaptureError(
                        f"the manager cannot be closed while this thread captures a stream ({error}): it is still "
                        "open, close it after the capture"
                    ) from error
                self.closed, self._ring = True, None  # the context is gone: no other attempt would end better
                raise
            self.closed = True
            self._capture_stream = None
            if self._own_pool:
                self._pool.close()

    def _bury(self) -> None:
        """Be closed, as the context is gone, and with it all memory, graphs and streams: nothing of it is touched."""
        self._why_closed = (
            "the CUDA context of this manager was closed or reset (cuda.close()), and its memory and graphs went with "
            "it: make a new manager"
        )
        self.closed = True
        if self._lease is not None and self._lease.open:
            self._lease.expire()
        self._service.abandon()
        for arena in (self._arena, self._kept):
            with contextlib.suppress(Exception):  # the pool's context is gone too: it only counts them as given back
                if arena is not None:
                    arena.release()
        self._lease = self._arena = self._ring = self._kept = self._capture_stream = None
        self._fills = {}
        if self._own_pool:
            with contextlib.suppress(Exception):  # what is gone gives nothing back
                self._pool.close()

    def _disown(self) -> None:
        """In a forked child: be closed, and leave the memory to the parent."""
        self._lock, self._capturing = threading.RLock(), threading.Lock()  # another thread may have held them
        self._inside = self._lock._is_owned  # type: ignore[attr-defined]
        # The driver does not serve a forked process, so there is nothing to give back.
        self.closed, self._ring = True, None

    def __enter__(self) -> InputBufferManager:
        self._check_open()
        return self

    def stats(self) -> ManagerStats:
        """Return one consistent snapshot of the counters."""
        with self._lock:
            counts = self._service.counts(self._fills.values())
            return ManagerStats(
                steps=sum(steps for steps, _ in counts.values()),
                live_tokens=sum(live for _, live in counts.values()),
                padded_tokens=sum(tokens * steps for tokens, (steps, _) in counts.items()),
                buckets={tokens: steps for tokens, (steps, _) in counts.items()},
                overflows=self._overflows,
                ring_waits=self._past_waits + (self._ring.waits if self._ring else 0),
                graphs=len(self._service),
                arena_bytes=self._arena.slot_bytes if self._arena else 0,
                ring_bytes=self._arena.ring_bytes if self._arena else 0,
                bucket_tokens={tokens: live for tokens, (_, live) in counts.items()},
            )

    def check(self) -> None:
        """Assert the manager's own invariants; waits for all steps.

        Raises
        ------
        AssertionError
            Slots overlap, a graph was captured over other memory, or host and device disagree about the steps.
        """
        with self._alone("check"):
            self._check_context()
            self._service.check()
            assert all(graph.generation == self._generation for graph in (*self._service, *self._fills.values()))
            if self._ring is None:
                return
            self.synchronize()
            self._arena.check()

    @property
    def pending(self) -> tuple[int, int] | None:
        """Blocks of the staging ring that a queued fill may still read, and the ring's depth; None where none is."""
        # Once: another thread may give the memory back meanwhile. Nor is memory read that went with its context.
        ring = None if self._life.ended else self._ring
        return None if ring is None else (ring.pending, self._depth)

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self._service)} graphs"
        return f"{type(self).__name__}({len(self._slots)} slots, {self.max_tokens} tokens, ring={self._depth}, {state})"



def check_function(fn: Any) -> None:
    """Refuse what cannot be captured: no function, or one whose call runs none of its code."""
    if not callable(fn):
        raise TypeError(f"fn is {fn!r}: give a function of the step, which launches the kernels to capture")
    kinds = inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction
    if any(kind(code) for kind in kinds for code in (fn, type(fn).__call__)):
        raise TypeError(f"fn is {fn!r}, whose call runs none of its code: give a function without async or yield")


# ------------------------------------------------------------------------------------------------------------- fork

_managers: weakref.WeakSet[InputBufferManager] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for manager in list(_managers):
        manager._disown()


_cuda.watch_forks(_after_fork_in_child)
