"""The memory behind a set of slots: one device allocation they are carved from, and the staging ring before it.

Lays the slots out, writes the table that the fill kernel reads, and launches it. An arena never changes: other slots
want another arena, which can take over the contents of the last. Sits above `pool` and `staging`, below `graph`.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import numpy as np

from . import _cuda, kernels
from .pool import BufferPool
from .slot import InputSlot
from .spec import BufferSpec, Tier
from .staging import StagingRing, align

__all__ = ["Arena"]

_log = logging.getLogger("numbabuf")


class Arena:
    """Device memory for `slots`, and `depth` staging blocks.

    Parameters
    ----------
    pool : BufferPool
        Where both allocations come from.
    slots : tuple of InputSlot
        Their offsets are set.
    depth : int
        Staging blocks.
    stream : _cuda.Stream
        Where fills are queued.
    earlier : Arena, optional
        Its slots are the first of `slots`; what they hold is copied.

    Attributes
    ----------
    ring : StagingRing
    whole : list
        Each slot's whole device array.
    slot_bytes, ring_bytes : int
        What was allocated, device and pinned.

    Raises
    ------
    TierFullError
        The pool has no room; nothing is kept.
    """

    def __init__(
        self, pool: BufferPool, slots: tuple[InputSlot, ...], depth: int, stream: Any, earlier: Arena | None = None
    ) -> None:
        self._slots = slots
        self._stream = stream
        words = kernels.HEAD + kernels.ROW * max(1, len(slots))
        offset = align(words * kernels.WORD)
        for slot in slots:
            slot.target_offset = offset
            offset += align(slot.spec.size_bytes)
        self.slot_bytes = offset
        self.ring_bytes = StagingRing.nbytes(slots, depth)
        with contextlib.ExitStack() as undo:
            self._device = pool.allocate(BufferSpec(self.slot_bytes, "uint8", Tier.DEVICE))
            undo.callback(self._device.release)
            self._pinned = pool.allocate(BufferSpec(self.ring_bytes, "uint8", Tier.PINNED))
            undo.callback(self._pinned.release)
            self._memory = self._device.array
            self._table_address = _cuda.address(self._memory)
            self._table = _cuda.device_view(self._memory, 0, (words,), np.dtype(np.int64))
            self.whole = list(self.views(tuple(slot.capacity for slot in slots)).values())
            self.ring = StagingRing(self._pinned.array, slots, depth, stream)
            _cuda.zero(self._memory, stream)
            if earlier is not None:
                for old, new in zip(earlier.whole, self.whole, strict=False):
                    _cuda.copy(new, old, stream)
            self._write_table()
            # A fill of nothing: compiles and loads the kernel, which no capture may do.
            block = self.ring.acquire()
            for slot in slots:
                slot.describe(block.words, 0, slot.width, 0)
            self.launch_fill(stream, (0,) * len(slots))
            self.ring.advance()
            stream.synchronize()
            undo.pop_all()

    def views(self, rows: tuple[int, ...]) -> dict[str, Any]:
        """Return device views of the first `rows` of every slot, by name."""
        return {
            slot.name: _cuda.device_view(self._memory, slot.target_offset, (n, *slot.spec.shape[1:]), slot.spec.dtype)
            for slot, n in zip(self._slots, rows, strict=True)
        }

    def launch_fill(self, stream: Any, rows: tuple[int, ...]) -> None:
        """Queue the fill of the ring's next block on `stream`, in a launch shape that fits the padded `rows`."""
        largest = max(
            (n * slot.width * slot.spec.dtype.itemsize for slot, n in zip(self._slots, rows, strict=True)), default=0
        )
        blocks, threads = _cuda.launch_shape(-(-largest // 64))  # a thread moves four 16-byte words at a time
        _cuda.launch(kernels.fill_slots, (blocks, max(1, len(self._slots))), threads, stream, self._table_address)

    def _write_table(self) -> None:
        head = [0] * kernels.HEAD
        head[kernels.RING_ADDRESS] = self.ring.address
        head[kernels.BLOCK_BYTES] = self.ring.block_bytes
        head[kernels.RING_DEPTH] = self.ring.depth
        head[kernels.RETIRED_ADDRESS] = self.ring.retired_address
        self._table.copy_to_device(np.array(head + self._rows(), np.int64), stream=self._stream.numba)
        self._stream.synchronize()

    def _rows(self) -> list[int]:
        rows = [word for slot in self._slots for word in slot.table_row(self._table_address)]
        return rows or [0] * kernels.ROW

    def resync(self) -> None:
        """After a launch that failed: make the host's and the device's count of steps agree again."""
        try:
            self._stream.synchronize()
            self.ring.reset()
            self._write_table()
        except Exception as error:  # the context is gone; the next step raises what the driver says
            _log.warning("the staging ring could not be reset after a failed launch: %s", error)

    def release(self) -> None:
        """Give the memory back to the pool; the owner has waited for the stream and dropped the graphs."""
        self._device.release()
        self._pinned.release()

    def check(self) -> None:
        """Assert that slots do not overlap, and that host and device agree; the owner has waited for the stream."""
        end = (kernels.HEAD + kernels.ROW * len(self._slots)) * kernels.WORD
        for slot in self._slots:
            assert slot.target_offset >= end, f"{slot!r} overlaps what lies before it"
            end = slot.target_offset + slot.spec.size_bytes
        assert end <= self.slot_bytes
        table = self._table.copy_to_host()
        assert table[kernels.STEP] == self.ring.step, (table[kernels.STEP], self.ring.step)
        assert table[kernels.DONE] == 0 and self.ring.pending == 0
        assert table[kernels.HEAD :].tolist() == self._rows(), "the fill table was overwritten"
