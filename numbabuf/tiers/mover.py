"""A set of copies between blocks, made into a table and run as one launch, on a stream of its own.

Knows addresses and streams, not why something moves: `traffic` decides that, and swaps what its entries hold once a
batch is queued. Sits above the pool room, below `traffic`.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .. import _cuda
from .._cuda import kernels
from ..pool.block import Block
from ..pool.fence import Fence, Fences
from ..pool.spec import Tier

__all__ = ["BLOCKS_DOWN", "BLOCKS_UP", "ENGINE_BYTES", "Move", "Mover", "table"]

BLOCKS_UP, BLOCKS_DOWN = 16, 8
"""Most thread blocks of a launch that reads from the host, and of one that writes to it. By Little's law a PCIe 5 bus
needs 25 to 80 KB in flight to be full (bandwidth x latency), and a block has 16 KiB; reads wait for their answer and
writes do not, so that half as many do. Few enough to leave most of a card to its work."""
ENGINE_BYTES = 4 << 20
"""Moves of at least this many bytes go to the copy engine: there its call, 5 us of the host's time, is below 5 % of the
move on a PCIe 5 bus, and it takes no thread blocks from the card's work."""
THREADS = 256
_compiled: set[int] = set()  # devices that have the kernel
_PIECES_PER_BLOCK = 4
_LEAST_PIECE, _LARGEST_PIECE = 16 << 10, 256 << 10  # bytes; a block's threads have 16 KiB in flight at a time


def table(copies: Iterable[Sequence[int]], *, blocks: int = BLOCKS_UP) -> np.ndarray:
    """Make the table of one launch: runs that lie end to end on both sides merged, long ones cut into pieces.

    Parameters
    ----------
    copies : iterable of (source, target, nbytes)
        Addresses and lengths, in any order and direction. Empty copies are dropped.
    blocks
        Thread blocks that will share the pieces.

    Returns
    -------
    table : numpy.ndarray of int64, shape (pieces, 3)
        Source, target and bytes of each piece, by ascending source. The same copies, in whatever order, give the same
        table.

    Raises
    ------
    ValueError
        A length is negative, or a target overlaps another target or a source: the pieces run in no order.

    Examples
    --------
    >>> table([(4096, 65536, 96), (1024, 8192, 3072), (0, 0, 0)]).tolist()
    [[1024, 8192, 3072], [4096, 65536, 96]]
    >>> table([(96, 1096, 4), (64, 1064, 32)]).tolist()
    [[64, 1064, 36]]
    """
    runs = np.array(list(copies), np.int64).reshape(-1, 3)
    if (runs[:, 2] < 0).any():
        raise ValueError(f"a copy of {runs[:, 2].min()} bytes was asked for: give lengths >= 0")
    runs = runs[runs[:, 2] > 0]
    if not len(runs):
        return runs
    runs = runs[np.lexsort((runs[:, 1], runs[:, 0]))]
    _refuse_overlap(runs)
    begins = np.ones(len(runs), bool)
    begins[1:] = (runs[1:, :2] != runs[:-1, :2] + runs[:-1, 2:]).any(axis=1)
    first = np.flatnonzero(begins)
    merged = runs[first]
    merged[:, 2] = np.add.reduceat(runs[:, 2], first)
    share = int(merged[:, 2].sum()) // (_PIECES_PER_BLOCK * blocks)
    piece = min(max(share // _LEAST_PIECE * _LEAST_PIECE, _LEAST_PIECE), _LARGEST_PIECE)
    counts = -(-merged[:, 2] // piece)
    pieces = np.repeat(merged, counts, axis=0)
    offsets = (np.arange(len(pieces)) - np.repeat(np.cumsum(counts) - counts, counts)) * piece
    pieces[:, :2] += offsets[:, None]
    pieces[:, 2] = np.minimum(pieces[:, 2] - offsets, piece)
    return pieces


def _refuse_overlap(runs: np.ndarray) -> None:
    targets = runs[np.argsort(runs[:, 1], kind="stable")]
    starts, ends = targets[:, 1], targets[:, 1] + targets[:, 2]
    if (starts[1:] < ends[:-1]).any():
        at = int(np.argmax(starts[1:] < ends[:-1]))
        raise ValueError(f"two copies write address {starts[at + 1]:#x}: a batch runs in no order, so split it")
    last = np.searchsorted(starts, runs[:, 0] + runs[:, 2]) - 1  # the last target that begins before the source's end
    read = (last >= 0) & (ends[last] > runs[:, 0])
    if read.any():
        at = int(np.argmax(read))
        raise ValueError(
            f"the {runs[at, 2]} bytes at {runs[at, 0]:#x} are read and written in one batch, which runs in no order: "
            "split it"
        )


class Move(NamedTuple):
    """One copy between two blocks, from byte 0 of both."""

    source: Block
    target: Block
    nbytes: int


class Mover:
    """Runs batches of moves on a stream of its own, each batch as one launch of `kernels.copy_many`.

    Parameters
    ----------
    blocks
        Most thread blocks of a launch. None: by direction, `BLOCKS_UP` or `BLOCKS_DOWN`.
    engine_bytes
        Moves of at least this many bytes go to the copy engine instead, one driver call each. None: `ENGINE_BYTES`.
    fences
        Those of the pool. None: its own.
    depth
        Descriptor tables in the ring.

    Attributes
    ----------
    stream : _cuda.Stream
        The stream of all moves.
    launches, engine_copies, moved_bytes : int
        What was queued so far.

    Notes
    -----
    Threads: the owner holds a lock round every call. Capture: not to be used while a capture is open.
    """

    def __init__(
        self,
        *,
        blocks: int | None = None,
        engine_bytes: int | None = None,
        fences: Fences | None = None,
        depth: int = 4,
    ) -> None:
        self.blocks = blocks
        self.engine_bytes = ENGINE_BYTES if engine_bytes is None else engine_bytes
        self.launches = self.engine_copies = self.moved_bytes = 0
        self._fences = fences or Fences()
        self.stream = _cuda.as_stream(None)
        self._tables: list[np.ndarray | None] = [None] * depth  # pinned, each of shape (rows, 3)
        self._readers: list[Fence | None] = [None] * depth  # behind the launches that read the tables

    def run(self, moves: Sequence[Move]) -> Fence:
        """Queue a batch; returns the fence behind it.

        Raises
        ------
        Exception
            The driver's own. Nothing of the batch is running then: what was queued of it has been waited for.

        Notes
        -----
        Cost: one launch and one event, however many moves; a driver call for each that goes to the copy engine.
        """
        limit = self.engine_bytes
        large = [move for move in moves if move.nbytes >= limit]
        small = [move for move in moves if move.nbytes < limit]
        blocks = self._blocks(small)
        rows = table([(m.source.address, m.target.address, m.nbytes) for m in small], blocks=blocks)
        turn = self.launches % len(self._tables)
        try:
            for move in large:
                target, source = (
                    _cuda.device_view(block.memory.base, 0, (move.nbytes,), np.dtype(np.uint8))
                    for block in (move.target, move.source)
                )
                _cuda.copy(target, source, self.stream)
            if len(rows):
                self._compile()
                self._launch(turn, rows, blocks)
            fence = self._fences.behind([self.stream]) or Fence((), self._fences.spare)  # none: it is done
        except BaseException:
            self._settle()
            raise
        if len(rows):
            self._readers[turn] = fence
            self.launches += 1
        self.engine_copies += len(large)
        self.moved_bytes += sum(move.nbytes for move in moves)
        return fence

    def synchronize(self) -> None:
        """Block the host until all moves are done."""
        self.stream.synchronize()

    def close(self) -> None:
        """Wait for all moves and let go of the tables, here and now.

        What dies in a cycle Numba destroys in whatever thread the collector runs, context or none.
        """
        self.synchronize()
        self._readers = [None] * len(self._readers)
        self._tables = [None] * len(self._tables)

    def _blocks(self, moves: Sequence[Move]) -> int:
        """Return the most thread blocks for a batch: those of the way up where any move reads from the host."""
        if self.blocks is not None:
            return self.blocks
        return BLOCKS_UP if any(move.source.tier is not Tier.DEVICE for move in moves) else BLOCKS_DOWN

    def _compile(self) -> None:
        """Compile and load the kernel, by a launch that copies nothing, and collect what the compiler leaves.

        It leaves exceptions in cycles, and those keep every frame below them, which here hold blocks about to be freed
        and the caller's own locals: until the next collection, which in a server that turned it off never comes.
        """
        device = _cuda.device_id()
        if device not in _compiled:
            _cuda.launch(kernels.copy_many, 1, 1, self.stream, 0, 0)
            gc.collect()
            _compiled.add(device)

    def _launch(self, turn: int, pieces: np.ndarray, blocks: int) -> None:
        # The kernel reads its table in place. A table written again while an earlier launch may still read it would
        # send that launch's copies astray:
        #   host: queues launch 0, which reads table 0
        #   host: queues launches 1 to depth - 1, comes round to table 0 and writes it
        #   device: begins launch 0, and finds the rows of another
        reader = self._readers[turn]
        if reader is not None:
            reader.synchronize()
            self._readers[turn] = None
        rows = self._tables[turn]
        if rows is None or len(rows) < len(pieces):
            capacity = max(256, 1 << (len(pieces) - 1).bit_length())
            memory = _cuda.empty_pinned(capacity * kernels.COPY_ROW * kernels.WORD)
            rows = self._tables[turn] = _cuda.host_view(memory, 0, (capacity, kernels.COPY_ROW), np.dtype(np.int64))
        rows[: len(pieces)] = pieces
        grid, threads = (1, 1) if _cuda.SIM else (min(blocks, len(pieces)), THREADS)
        _cuda.launch(kernels.copy_many, grid, threads, self.stream, _cuda.address(rows), len(pieces))

    def _settle(self) -> None:
        """After a failure: let nothing of the batch run on, for the owner will take its targets back."""
        try:
            self.synchronize()
        except Exception:  # the context is gone, and nothing runs in it any more; the first error says why
            pass
