"""The memory behind a set of slots, and the way of a step into it: written into a staging block, then queued.

One device allocation that the slots are carved from, the ring before it, and the table that the fill kernel reads. An
arena is made from one layout and never changes: other slots want another one, which can take over the contents of the
last. It makes the steps that run over it (`graph.CapturedStep`), and does not know which of them serves. Sits above
`pool`, `ring` and `graph`, below `shared`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy import ndarray

from .. import _cuda
from .._cuda import kernels
from ..errors import BusyError
from ..pool.pool import BufferPool
from ..pool.spec import BufferSpec, BufferState, Tier
from .graph import CapturedStep, Step, recorded
from .kept import Kept
from .layout import Layout
from .returns import Outputs, ReturnRing, StepOutputs
from .ring import Block, StagingRing, assignable
from .slot import InputSlot

__all__ = ["Arena"]

_log = logging.getLogger("numbabuf")


class Arena:
    """Device memory for the slots of `layout`, and `depth` staging blocks.

    Parameters
    ----------
    pool : BufferPool
        Where both allocations come from.
    layout : Layout
    depth : int
        Staging blocks.
    stream : _cuda.Stream
        Where steps are queued.
    earlier : Arena, optional
        Its slots are the first of the layout's; what they hold is copied.
    returns : int
        Blocks for what the outputs send back.
    life, why_closed
        As for `ReturnRing`.

    Attributes
    ----------
    ring : StagingRing
    returns : ReturnRing or None
        None without outputs.
    whole : dict of str to device array
        Each slot, and each output, as a whole.
    live : dict of str to device array
        The live size of each axis in the step that runs, of shape (1,), int64.
    kept : Kept or None
        The slots that a step may leave out without a change.
    one_axis : bool
        Whether a step has no size but its tokens.

    Raises
    ------
    TierFullError
        The pool has no room; nothing is kept.
    """

    def __init__(
        self,
        pool: BufferPool,
        layout: Layout,
        depth: int,
        stream: _cuda.Stream,
        earlier: Arena | None = None,
        *,
        returns: int = 2,
        life: Any = None,
        why_closed: Callable[[], str] = str,
    ) -> None:
        self.layout = layout
        self.one_axis = len(layout.axes) == 1
        self._slots = slots = layout.slots
        self._groups = _groups(slots)
        self.kept: Kept | None = Kept.of(slots, None if earlier is None else earlier.kept)
        self._stream = stream
        self._core = stream.core
        words = layout.table_words
        with contextlib.ExitStack() as undo:
            # With the stream, in both: the pool must order what runs here behind whatever an earlier lease of the
            # memory has queued, and a later lease behind the steps of an owner that was dropped without `release`.
            self._device = pool.allocate(
                BufferSpec(layout.arena_bytes, "uint8", Tier.DEVICE), stream=stream, movable=False
            )
            undo.callback(self._device.release)
            self._pinned = pool.allocate(
                BufferSpec(layout.ring_bytes(depth), "uint8", Tier.PINNED), stream=stream, movable=False
            )
            undo.callback(self._pinned.release)
            self.returns: ReturnRing | None = None
            if layout.outputs:
                wanted = BufferSpec(layout.return_ring_bytes(returns), "uint8", Tier.PINNED)
                sent = pool.allocate(wanted, stream=stream, movable=False)
                undo.callback(sent.release)
                self.returns = ReturnRing(sent, layout, returns, stream, life, why_closed)
            self._memory = self._device.array
            self._table_address = _cuda.address(self._memory)
            self._table = _cuda.device_view(self._memory, 0, (words,), np.dtype(np.int64))
            inputs, outputs = self._views(tuple(s.capacity for s in slots), tuple(s.capacity for s in layout.outputs))
            self.whole = {**inputs, **outputs}
            last = layout.step_at + layout.step_words - 1
            self.live = {
                axis: _cuda.device_view(self._memory, (last - at) * kernels.WORD, (1,), np.dtype(np.int64))
                for at, axis in enumerate(layout.axes)
            }
            self.ring = StagingRing(self._pinned.array, layout, depth, stream)
            _cuda.zero(self._memory, stream)
            if earlier is not None:
                for slot in earlier.layout.slots:
                    _cuda.copy(self.whole[slot.name], earlier.whole[slot.name], stream)
            self._write_table()
            # A fill of nothing: compiles and loads the kernel, which no capture may do.
            block = self.ring.acquire()
            for slot in slots:
                slot.describe(block.words, 0, slot.width, 0)
            self.launch_fill(stream, (0,) * len(slots))
            self.ring.advance()
            if self.returns is not None:
                self.launch_send(stream, 0, ())  # likewise, of nothing
            stream.synchronize()
            undo.pop_all()

    def _views(self, rows: tuple[int, ...], sent: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return device views of the first `rows` of every slot and the first `sent` of every output, by name."""
        layout = self.layout

        def views(slots: tuple[Any, ...], targets: tuple[int, ...], rows: tuple[int, ...]) -> dict[str, Any]:
            return {
                slot.name: _cuda.device_view(self._memory, target, slot.shape(n), slot.spec.dtype)
                for slot, target, n in zip(slots, targets, rows, strict=True)
            }

        return views(layout.slots, layout.targets, rows), views(layout.outputs, layout.output_targets, sent)

    @property
    def ring_bytes(self) -> int:
        """What the staging ring has of pinned memory; device memory is the layout's `arena_bytes`."""
        return self.layout.ring_bytes(self.ring.depth)

    # ----------------------------------------------------------------------------------------------- what runs over it

    def _step(self, sizes: tuple[int, ...], stream: _cuda.Stream) -> CapturedStep:
        """Return a bucket's views and padded rows; the caller gives it something to run."""
        layout = self.layout
        padded = layout.rows(sizes)
        inputs, outputs = self._views(padded, layout.output_rows(sizes))
        step = Step(stream.numba, layout.named(sizes), inputs, outputs, self.live)
        return CapturedStep(step, sizes, padded, self)

    def recording(
        self, sizes: tuple[int, ...], stream: _cuda.Stream, *, dry: bool = False
    ) -> contextlib.AbstractContextManager[CapturedStep]:
        """Return a capture on `stream` of the fill, of what its ``with`` block queues, and of the way back.

        See `graph.recorded`.
        """
        new = self._step(sizes, stream)
        return recorded(
            stream, lambda stream: self.launch_fill(stream, new.padded), new, dry=dry,
            send=lambda stream, chosen: self.launch_send(stream, chosen, sizes),
        )  # fmt: skip

    def plain(self, sizes: tuple[int, ...]) -> CapturedStep:
        """Return a step without a graph: its fill is launched by itself."""
        plain, stream = self._step(sizes, self._stream), self._stream
        padded = plain.padded  # not `plain` itself: it would keep itself alive
        plain.plain, plain.launch_on = True, lambda core: self.launch_fill(stream, padded)
        return plain

    # ------------------------------------------------------------------------------------------------------- a step

    def write(self, block: Block, inputs: Mapping[str, Any], live: tuple[int, ...], padded: tuple[int, ...]) -> int:
        """Check `inputs` and write them into `block`, for slots padded to `padded` rows.

        Parameters
        ----------
        block
            What `ring.acquire` gave.
        inputs
            Host arrays by slot name; other names are left alone.
        live
            Sizes of the step, per axis.

        Returns
        -------
        found : int
            How many of the inputs are slots.
        """
        # Hot path, guarded by benchmarks/step.py. Slots of one length share its shape and slice.
        words, staged, views = block.words, block.staged, block.views
        before, block.padded = block.padded, None
        found = len(self._slots)
        if type(inputs) is not dict and not isinstance(inputs, Mapping):
            raise _no_mapping(inputs)  # a queue has a `get` too
        get, kept = inputs.get, self.kept
        same = before is padded and (kept is None or kept.described(words, get))
        for axis, extra, room, slots in self._groups:
            rows = live[axis] + extra if axis >= 0 else extra
            cut = slice(rows)
            for slot, strides in slots:
                data = get(slot.name)
                position = slot.position
                if data is None:
                    found -= 1
                    self._leave_out(slot, words, padded[position], same and kept is None)
                elif type(data) is ndarray and data.strides == strides and rows <= room:
                    try:
                        views[position][cut] = data  # refuses another length, or type, before a byte is written
                    except ValueError:
                        slot.write(words, staged[position], data, rows, padded[position])
                        continue
                    if slot.checked:
                        slot.check_range(data)
                    if same:
                        words[slot.columns_word] = rows  # the padding is as this block's last step left it
                    else:
                        slot.describe(words, rows, 1, padded[position])
                else:
                    slot.write(words, staged[position], data, rows, padded[position])
        words[-1] = live[0]
        if kept is not None or not self.one_axis:
            self._write_rest(words, get, live, padded)
        block.padded = padded
        return found

    @staticmethod
    def _leave_out(slot: InputSlot, words: Any, padded: int, same: bool) -> None:
        """Write into a block's words that a slot has no values; `same`: all else is as its last step left it."""
        if same and slot.flat:
            words[slot.columns_word] = 0
        else:
            slot.describe(words, 0, slot.width, padded)

    def _write_rest(self, words: Any, get: Any, live: tuple[int, ...], padded: tuple[int, ...]) -> None:
        """Write what few steps have into a block's words: further sizes, and slots that keep what they hold."""
        self._write_sizes(words, live)
        if self.kept is not None:
            self.kept.take(words, get, padded)

    @staticmethod
    def _write_sizes(words: Any, live: tuple[int, ...]) -> None:
        """Write the live sizes into a block's words: the last of them, the tokens at the very end."""
        for at, size in enumerate(live, 1):
            words[-at] = size

    def refuse_others(self, inputs: Mapping[str, Any]) -> None:
        """Refuse names that are no slot: a replay reads nothing else."""
        if not isinstance(inputs, Mapping):
            raise _no_mapping(inputs)
        static = {slot.name for slot in self._slots}
        others = [repr(name) for name in inputs if name not in static]
        if others:
            raise ValueError(
                f"input {', '.join(others)} is not a static slot; a replay accepts only: {', '.join(sorted(static))}"
            )

    def write_all(self, inputs: Mapping[str, Any], live: tuple[int, ...], padded: tuple[int, ...]) -> Block:
        """Write `inputs`, each of which must be a slot's, into the next block; returns that."""
        block = self.ring.acquire()
        if self.write(block, inputs, live, padded) != len(inputs):
            self.refuse_others(inputs)
        return block

    def describe(
        self, block: Block, written: Mapping[str, Any], live: tuple[int, ...], padded: tuple[int, ...]
    ) -> None:
        """Write into a block, in which the values of the slots `written` lie already, how many each slot has."""
        block.padded = None
        for slot in self._slots:
            rows = slot.rows(live) if slot.name in written else 0
            slot.describe(block.words, rows, slot.width, padded[slot.position])
        self._write_sizes(block.words, live)
        if self.kept is not None:
            self.kept.take(block.words, written.get, padded)

    def write_rehearsal(self, padded: tuple[int, ...]) -> None:
        """Write a step of padding alone into the next block; what slots keep stays."""
        block = self.ring.acquire()
        block.padded = None
        for slot in self._slots:
            slot.describe(block.words, 0, slot.width, padded[slot.position])
        self._write_sizes(block.words, self.layout.nothing)
        if self.kept is not None:
            self.kept.rehearse(block.words)

    def write_one(self, slot: InputSlot, data: Any, rows: int, padded: int) -> None:
        """Write the values of one slot into the next block; the others have nothing, and no padding either."""
        block, ring = self.ring.acquire(), self.ring
        block.padded = None
        axes = len(self.layout.axes)
        block.words[-axes:] = ring.blocks[(ring.step - 1) % ring.depth].words[-axes:]  # no step: the sizes stay
        slot.write(block.words, block.staged[slot.position], data, rows, padded)
        for other in self._slots:
            if other is not slot:
                other.skip(block.words)
        if self.kept is not None:
            self.kept.take_one(slot, padded)

    def submit(self, target: CapturedStep, tokens: int) -> Any:
        """Queue the step that was written last, its only driver call; returns the result of its function.

        Parameters
        ----------
        target : CapturedStep
            What runs.
        tokens : int
            Its live tokens, to count.
        """
        # Hot path, guarded by benchmarks/step.py.
        if target.arena is not self:
            raise BusyError(f"{target!r} was captured over memory that the slots have left; capture it again")
        ring = self.ring
        try:
            target.launch_on(self._core)
            ring.step += 1  # in here: an interrupt between the two would leave host and device one step apart
        except BaseException as error:
            if not _cuda.is_context_error(error):
                self.resync()
                raise
            self._launch_anew(target)
        if self.kept is not None:
            self.kept.commit()
        target.steps += 1
        target.live += tokens
        target.last_used = ring.past + ring.step
        return target.step.result

    def send(self, target: CapturedStep, block: Block, live: tuple[int, ...], *, skip: bool = False) -> Outputs:
        """Queue the step that was written last into `block`, whose graph sends outputs; see `ReturnRing.claim`."""
        # Hot path, guarded by benchmarks/outputs.py.
        outputs = self.claim(target.sends, block, live, skip=skip)
        return self.own(outputs, self.submit(target, live[0]))

    def claim(self, chosen: int, block: Block, live: tuple[int, ...], *, skip: bool = False) -> StepOutputs:
        """Give the step in `block` its number and its place on the way back."""
        assert self.returns is not None
        outputs = self.returns.claim(chosen, live, skip=skip)
        words, axes = block.words, len(live)
        words[-axes - 2], words[-axes - 1] = outputs.number, outputs.place  # NUMBER, PLACE
        return outputs

    def own(self, outputs: StepOutputs, result: Any) -> Outputs:
        """Return the outputs of a step that was queued."""
        assert self.returns is not None
        self.returns.own(outputs)
        outputs.result = result
        return outputs

    def _launch_anew(self, target: Any) -> None:
        """Launch from a thread that lost its context, as by leaving ``with cuda.gpus[i]:``; nothing was queued."""
        try:
            _cuda.refresh()
            with _cuda.on_device(self._stream.device):
                target.launch_on(self._core)
                self.ring.advance()
        except BaseException:
            self.resync()
            raise

    def launch_fill(self, stream: _cuda.Stream, rows: tuple[int, ...]) -> None:
        """Queue the fill of the ring's next block on `stream`, in a launch shape that fits the padded `rows`."""
        largest = max(
            (n * slot.width * slot.spec.dtype.itemsize for slot, n in zip(self._slots, rows, strict=True)), default=0
        )
        blocks, threads = _cuda.launch_shape(-(-largest // 64))  # a thread moves four 16-byte words at a time
        _cuda.launch(kernels.fill_slots, (blocks, max(1, len(self._slots))), threads, stream, self._table_address)

    def launch_send(self, stream: _cuda.Stream, chosen: int, sizes: tuple[int, ...]) -> None:
        """Queue the way back of the outputs `chosen`, in a launch shape that fits a step padded to `sizes`."""
        outputs = self.layout.outputs
        rows = self.layout.output_rows(sizes) if chosen else (0,) * len(outputs)
        largest = max(
            n * slot.width * slot.spec.dtype.itemsize * (chosen >> slot.position & 1)
            for slot, n in zip(outputs, rows, strict=True)
        )
        blocks, threads = _cuda.launch_shape(-(-largest // 64))
        table = self._table_address
        sends = table + self.layout.sends_at * kernels.WORD
        _cuda.launch(kernels.send_slots, (blocks, len(outputs)), threads, stream, table, sends, chosen)

    def fill(self, rows: tuple[int, ...]) -> None:
        """Queue the fill of the block that was written last, by itself; `rows` as for `launch_fill`."""
        try:
            self.launch_fill(self._stream, rows)
            self.ring.advance()
            if self.kept is not None:
                self.kept.commit()
        except BaseException:
            self.resync()
            raise

    def _write_table(self) -> None:
        head = [0] * kernels.HEAD
        head[kernels.RING_ADDRESS] = self.ring.address
        head[kernels.BLOCK_BYTES] = self.ring.block_bytes
        head[kernels.RING_DEPTH] = self.ring.depth
        head[kernels.RETIRED_ADDRESS] = self.ring.retired_address
        head[kernels.STEP_ADDRESS] = self._table_address + self.layout.step_at * kernels.WORD
        head[kernels.STEP_WORDS] = self.layout.step_words
        if self.returns is not None:
            head[kernels.RETURN_ADDRESS] = self.returns.address
            head[kernels.RETURN_BYTES] = self.layout.return_bytes
            head[kernels.RETURNED_ADDRESS] = self.returns.returned_address
        words = head + self._rows() + [0] * self.layout.step_words + self._sends()
        self._table.copy_to_device(np.array(words, np.int64), stream=self._stream.numba)
        self._stream.synchronize()

    def _rows(self) -> list[int]:
        rows = []
        for slot, source, target in zip(self._slots, self.layout.sources, self.layout.targets, strict=True):
            rows += slot.table_row(source, self._table_address + target)
        return rows or [0] * kernels.ROW

    def _sends(self) -> list[int]:
        layout, rows = self.layout, []
        for slot, target, place in zip(layout.outputs, layout.output_targets, layout.returns, strict=True):
            rows += slot.table_row(self._table_address + target, place, len(layout.axes))
        return rows

    def resync(self) -> None:
        """After a launch that failed: make the host's and the device's count of steps agree again.

        Where that fails too, the next step tries it again, and raises what the driver says.
        """
        self.ring.halt(self._recount)
        try:
            self._recount()
        except Exception as error:
            _log.warning("the staging ring could not be reset after a failed launch: %s", error)

    def _recount(self) -> None:
        with _cuda.on_device(self._stream.device):
            self._stream.synchronize()
            self._write_table()
            self.ring.reset()

    def release(self) -> None:
        """Give the memory back to the pool; the owner has waited for the stream and dropped the graphs.

        After an error of the driver it may be called again, for what is left. A return block that is held keeps the
        return ring's memory until it is let go.
        """
        if self.returns is not None:
            self.returns.retire()
        for entry in (self._device, self._pinned):
            if entry.state is not BufferState.FREE:
                entry.release()

    def check(self) -> None:
        """Assert that slots do not overlap, and that host and device agree; the owner has waited for the stream."""
        end = self.layout.table_words * kernels.WORD
        layout = self.layout
        every: tuple[Any, ...] = (*layout.slots, *layout.outputs)
        for slot, target in zip(every, (*layout.targets, *layout.output_targets), strict=True):
            assert target >= end, f"{slot!r} overlaps what lies before it"
            end = target + slot.spec.size_bytes
        assert end <= self.layout.arena_bytes
        table = self._table.copy_to_host()
        assert table[kernels.STEP] == self.ring.step, (table[kernels.STEP], self.ring.step)
        assert table[kernels.DONE] == 0 and self.ring.pending == 0
        assert table[kernels.SENT] == 0
        assert table[kernels.HEAD : self.layout.step_at].tolist() == self._rows(), "the fill table was overwritten"
        assert table[self.layout.sends_at :].tolist() == self._sends(), "the send table was overwritten"


def _no_mapping(inputs: object) -> TypeError:
    return TypeError(f"inputs is a {type(inputs).__name__}: give a mapping of slot names to arrays")


_Group = tuple[int, int, int, tuple[tuple[InputSlot, "tuple[int, ...] | None"], ...]]


def _groups(slots: tuple[InputSlot, ...]) -> list[_Group]:
    """Group the slots by what their length is: (axis, added to it, most rows they all stage, slots and `assignable`).

    A slot that follows no axis has the axis -1 and its own length in place of what is added.
    """
    groups: dict[tuple[int, int], list[InputSlot]] = {}
    for slot in slots:
        extra = slot.extra if slot.axis_index >= 0 else slot.capacity
        groups.setdefault((slot.axis_index, extra), []).append(slot)
    return [
        (*key, min(slot.max_live for slot in group), tuple((slot, assignable(slot)) for slot in group))
        for key, group in groups.items()
    ]
