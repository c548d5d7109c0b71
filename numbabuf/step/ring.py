"""The staging ring: pinned blocks that the host writes in turn and the fill kernel reads in place.

A block may be written again once its fill has read it, which the kernel itself reports (see `kernels.fill_slots`);
depth alone guards nothing. The ring knows bytes and steps, not inputs or graphs. Sits above `layout`, below `arena`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import _cuda
from .._cuda import kernels
from .layout import ALIGNMENT, Layout
from .slot import InputSlot

__all__ = ["Block", "StagingRing", "assignable"]

_HALTED = 1 << 62  # a count of steps at which every block is taken, so that the hot path has no second question to ask


def assignable(slot: InputSlot) -> tuple[int, ...] | None:
    """Return the strides of an array that a memoryview over a slot's staged part may be assigned, which checks it.

    The view refuses another length or element type by itself, in C. It is slow for other strides, and has no assignment
    for some types: None.
    """
    dtype = slot.source_dtype
    return (dtype.itemsize,) if slot.flat and dtype.isnative and dtype.char in "bBhHiIlLqQfd" else None


class Block:
    """One block of the ring, seen by the host.

    Attributes
    ----------
    words : memoryview of int64
        The live words, `kernels.LIVE` per slot.
    staged : list of numpy.ndarray
        Per slot position, its part of the block: shape (max_live,), `source_dtype`.
    views : list of memoryview or None
        Those parts again, where `assignable` says that a view checks what it is given.
    padded : tuple of int or None
        The padded rows per slot that `words` were last written for; the very tuple, so that `is` tells.
    """

    __slots__ = ("padded", "staged", "views", "words")

    def __init__(self, memory: np.ndarray, offset: int, layout: Layout) -> None:
        self.words = memoryview(memory[offset : offset + layout.words_bytes]).cast("q")  # type: ignore[arg-type]
        for at in range(len(self.words)):
            self.words[at] = 0
        self.staged = [
            _cuda.host_view(memory, offset + source, (slot.max_live,), slot.source_dtype)
            for slot, source in zip(layout.slots, layout.sources, strict=True)
        ]
        self.views: list[Any] = [
            None if assignable(slot) is None else part.data
            for slot, part in zip(layout.slots, self.staged, strict=True)
        ]
        self.padded: tuple[int, ...] | None = None


class StagingRing:
    """`depth` pinned blocks and the count of steps staged through them.

    Parameters
    ----------
    memory : numpy.ndarray of uint8
        Pinned memory of at least `layout.ring_bytes(depth)` bytes.
    layout
        Where the slots lie in a block.
    depth
        Number of blocks, >= 1.
    stream : _cuda.Stream
        Where the fills are queued.

    Notes
    -----
    Threads: the owner holds a lock round `acquire` to `advance`.
    """

    def __init__(self, memory: np.ndarray, layout: Layout, depth: int, stream: _cuda.Stream) -> None:
        self.depth = depth
        self.step = 0
        self.past = 0  # steps before the count was last reset
        self.waits = 0
        self._repair: Callable[[], None] | None = None
        self._stream = stream
        self._retired = memoryview(memory[: kernels.WORD]).cast("q")  # type: ignore[arg-type]
        self._retired[0] = 0
        self.block_bytes = layout.block_bytes
        self.address = _cuda.address(memory) + ALIGNMENT
        self.retired_address = _cuda.address(memory)
        self.blocks = [Block(memory, ALIGNMENT + i * self.block_bytes, layout) for i in range(depth)]

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
        if self.step != _HALTED:
            self.past += self.step
        self.step = _HALTED

    def reset(self) -> None:
        """Start counting anew; the owner has waited for the stream and has reset the device's count."""
        self._retired[0] = 0
        self.step = 0
        self._repair = None
