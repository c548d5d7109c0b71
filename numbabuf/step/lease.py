"""The zero-copy way to stage a step: a lease on one staging block, ended exactly once.

Only an open lease can write a block, and it makes its arrays read-only when it ends, so that no caller writes a block
that a queued fill may still read. Sits above `ring`, below `shared`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import numpy as np

from ..errors import ClosedError
from .choice import Choice
from .ring import Block
from .slot import InputSlot

__all__ = ["Each", "Lease", "check_each"]

Each = Callable[[Any, int, int], object]
"""Called after each piece of a step that was split: (result, start, stop)."""


def check_each(each: object) -> None:
    """Refuse what cannot be called after each piece."""
    if not callable(each):
        raise TypeError(f"each is {each!r}: give a function of (result, start, stop), or None")


class Lease:
    """The right to write one step's inputs straight into pinned memory.

    Made by `InputBufferManager.stage`; use it as a context manager. Leaving the block normally fills the slots, unless
    `replay` or `fill` was called in it; leaving it by an exception gives the staging block back unused.

    Attributes
    ----------
    result
        What ending the lease gave: the views of a fill, or the result of a replay.

    Notes
    -----
    Threads: one thread writes; any thread may end the lease, and only the first to do so does. Capture: a lease that is
    ended by `fill` or `replay` inside a capture is refused, and stays open; leaving its block there discards it.

    Examples
    --------
    >>> import numbabuf
    >>> manager = numbabuf.InputBufferManager(max_batch_size=1, max_seq_len=8)
    >>> with manager.stage(3) as lease:
    ...     lease["input_ids"][:] = [7, 8, 9]
    >>> manager.synchronize()
    >>> lease.result["input_ids"].copy_to_host().tolist()
    [7, 8, 9, 0]
    >>> manager.close()
    """

    def __init__(
        self, block: Block, rows: dict[str, tuple[InputSlot, int]], finish: Callable[[Lease, str, Any, Any], Any]
    ) -> None:
        self._block = block
        self._rows = rows
        self._finish = finish
        self._open = True
        self._arrays: dict[str, np.ndarray] = {}
        self.result: Any = None

    def __getitem__(self, name: str) -> np.ndarray:
        """The array to write slot `name` into: its staged element type, shape (live rows, ...), contents undefined.

        A slot that is never asked for is left out. Slices of the array must not outlive the lease.
        """
        self._check_open()
        array = self._arrays.get(name)
        if array is None:
            if name not in self._rows:
                raise KeyError(f"{name!r} is not a static slot; there are {', '.join(self._rows)}")
            slot, rows = self._rows[name]
            if rows > slot.capacity:
                raise ValueError(
                    f"slot {name!r} holds {slot.capacity} rows; this step has {rows}: leave it out, or register a "
                    "larger slot"
                )
            if rows * slot.width > slot.max_live:
                raise ValueError(
                    f"slot {name!r} stages at most max_live={slot.max_live} elements a step; "
                    f"this one has {rows * slot.width}"
                )
            staged = self._block.staged[slot.position]
            array = self._arrays[name] = staged[: rows * slot.width].reshape(slot.shape(rows))
        return array

    def fill(self) -> dict[str, Any]:
        """End the lease and fill the slots; returns the views, padded to the bucket."""
        return self._end("fill")  # type: ignore[no-any-return]

    def replay(
        self,
        *,
        at_least: int | Mapping[str, int] | None = None,
        max_padding: float | None = None,
        each: Callable[[Any, int, int], None] | None = None,
    ) -> Any:
        """End the lease and replay the graph that serves the step; returns its result.

        A step that no graph covers is refused, run without one or split, as `InputBufferManager.replay` does it, and
        the arguments are as there.
        """
        if each is not None:
            check_each(each)
        choice = None if at_least is None and max_padding is None else Choice.of(at_least, max_padding)
        return self._end("replay", each, choice)

    def discard(self) -> None:
        """End the lease and give the block back unused."""
        self._end("discard")

    @property
    def open(self) -> bool:
        """Whether the lease can still be written, and ended."""
        return self._open

    @property
    def written(self) -> dict[str, np.ndarray]:
        """The arrays that were asked for, by slot name."""
        return self._arrays

    @property
    def block(self) -> Block:
        """The leased block."""
        return self._block

    def _check_open(self) -> None:
        if not self._open:
            raise ClosedError(
                "this lease has ended; its staging block may be in use for another step: call stage() again"
            )

    def expire(self) -> None:
        """End the right to write, exactly once; for the manager, which calls it under its lock."""
        self._check_open()
        for array in list(self._arrays.values()):
            array.flags.writeable = False
        self._open = False  # last: where an interrupt comes before it, the lease can be ended again

    def _end(self, how: str, each: Each | None = None, choice: Choice | None = None) -> Any:
        self._check_open()
        self.result = self._finish(self, how, each, choice)
        return self.result

    def __enter__(self) -> Lease:
        self._check_open()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._open:
            return
        try:
            self._end("fill" if kind is None else "discard")
        finally:
            if self._open:  # a capture is open: the step is lost, the manager is not
                self._end("discard")

    def __repr__(self) -> str:
        return f"Lease({'open' if self._open else 'ended'}, {', '.join(self._arrays) or 'nothing written'})"
