"""The staging ring: pinned blocks that the host writes in turn and the fill kernel reads in place.

A block may be written again once its fill has read it, which the kernel itself reports (see `kernels.fill_slots`);
depth alone guards nothing. The ring knows bytes and steps, not inputs or graphs. Sits above `slot`, below `graph`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import _cuda
from .._cuda import kernels
from .slot import InputSlot

__all__ = ["ALIGNMENT", "Block", "StagingRing", "align"]

ALIGNMENT = 256
"""Bytes on which blocks, and slots within the arena, begin: what the driver aligns its own allocations to."""

_HALTED = 1 << 62  # a count of steps at which every block is taken, so that the hot path has no second question to ask


def align(nbytes: int) -> int:
    """Return `nbytes` rounded up to `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _words_nbytes(slots: tuple[InputSlot, ...]) -> int:
    """Bytes of a block's live words: a launch has a row of thread blocks even without a slot, which finds zeros."""
    return max(1, len(slots)) * kernels.LIVE * kernels.WORD


class Block:
    """One block of the ring, seen by the host.

    Attributes
    ----------
    words : memoryview of int64
        The live words, `kernels.LIVE` per slot.
    staged : list of numpy.ndarray
        Per slot position, its part of the block: shape (max_live,), `source_dtype`.
    padded : tuple of int or None
        The padded rows per slot that `words` were last written for; the very tuple, so that `is` tells.
    """

    __slots__ = ("padded", "staged", "words")

    def __init__(self, memory: np.ndarray, offset: int, slots: tuple[InputSlot, ...]) -> None:
        self.words = memoryview(memory[offset : offset + _words_nbytes(slots)]).cast("q")  # type: ignore[arg-type]
        for at in range(len(self.words)):
            self.words[at] = 0
        self.staged = [
            _cuda.host_view(memory, offset + slot.source_offset, (slot.max_live,), slot.source_dtype) for slot in slots
        ]
        self.padded: tuple[int, ...] | None = None


class StagingRing:
    """`depth` pinned blocks and the count of steps staged through them.

    Parameters
    ----------
    memory : numpy.ndarray of uint8
        Pinned memory of at least `nbytes(slots, depth)` bytes.
    slots
        The static slots; their `source_offset` is set by `nbytes`.
    depth
        Number of blocks, >= 1.
    stream : _cuda.Stream
        Where the fills are queued.

    Notes
    -----
    Threads: the owner holds a lock round `acquire` to `advance`.
    """

    def __init__(self, memory: np.ndarray, slots: tuple[InputSlot, ...], depth: int, stream: Any) -> None:
        self.depth = depth
        self.step = 0
        self.waits = 0
        self._repair: Callable[[], None] | None = None
        self._stream = stream
        self._retired = memoryview(memory[: kernels.WORD]).cast("q")  # type: ignore[arg-type]
        self._retired[0] = 0
        self.block_bytes = (self.nbytes(slots, depth) - ALIGNMENT) // depth
        self.address = _cuda.address(memory) + ALIGNMENT
        self.retired_address = _cuda.address(memory)
        self.blocks = [Block(memory, ALIGNMENT + i * self.block_bytes, slots) for i in range(depth)]

    @staticmethod
    def nbytes(slots: tuple[InputSlot, ...], depth: int) -> int:
        """Lay the slots out in a block and return the bytes of the whole ring."""
        offset = align(_words_nbytes(slots))
        for slot in slots:
            slot.source_offset = offset
            offset += align(slot.max_live * slot.source_dtype.itemsize)
        return ALIGNMENT + depth * offset

    def acquire(self) -> Block:
        """Return the next block, once its last fill has read it.

        Raises
        ------
        Exception
            What the driver reports for the stream, if queued work has failed while the ring was full.
        """
        # Hot path, guarded by benchmarks/step.py.
        step = self.step
        if step - self._retired[0] >= self.depth:
            self._wait(step)
            step = self.step
        return self.blocks[step % self.depth]

    def advance(self) -> None:
        """Count the acquired block as staged: a fill that reads it has been queued."""
        self.step += 1

    @property
    def pending(self) -> int:
        """Number of staged blocks that are not yet known to be read."""
        return min(self.step - self._retired[0], self.depth)

    def _wait(self, step: int) -> None:
        """Poll until the oldest block is read.

        Waiting for the stream instead would wait for every step queued behind that block, and the device would idle
        while the host writes the next ones. The query also raises if a kernel has faulted, so this cannot hang on a
        count that will never come.
        """
        if self._repair is not None:
            self._repair()
            return
        self.waits += 1
        pause = 0.0
        with _cuda.on_device(self._stream.device):  # a thread that left ``with cuda.gpus[i]:`` has no context to ask in
            while step - self._retired[0] >= self.depth:
                idle = self._stream.query()
                if idle and step - self._retired[0] >= self.depth:
                    raise RuntimeError(
                        f"the stream is idle but only {self._retired[0]} of {step} staged steps were read: "
                        "a captured graph ran without its fill, or its memory was overwritten"
                    )
                time.sleep(pause)
                pause = min(pause + 1e-6, 5e-5)

    def halt(self, repair: Callable[[], None]) -> None:
        """Lend no block before `repair` has called `reset`; `acquire` calls it, and raises what it raises.

        For an owner that cannot tell whether host and device count alike.
        """
        self._repair = repair
        self.step = _HALTED

    def reset(self) -> None:
        """Start counting anew; the owner has waited for the stream and has reset the device's count."""
        self._retired[0] = 0
        self.step = 0
        self._repair = None
