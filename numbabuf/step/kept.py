"""Which slots keep what was written last when a step leaves them out, and up to where that is padded.

A step counts once it is queued: what is written into a block that is never launched changes nothing here. Sits above
`slot`, below `arena`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .._cuda import kernels
from .slot import InputSlot

__all__ = ["Kept"]


class Kept:
    """The slots that keep, of one arena.

    Attributes
    ----------
    rows : dict of str to int
        By slot that was written, the rows that its last write was padded to.
    """

    def __init__(self, slots: Sequence[InputSlot], earlier: Kept | None) -> None:
        self.rows: dict[str, int] = {} if earlier is None else dict(earlier.rows)
        self._slots = [slot for slot in slots if slot.keeps]
        self._next: dict[str, int] = {}  # rows of the step that is written, and may be queued

    @classmethod
    def of(cls, slots: Sequence[InputSlot], earlier: Kept | None) -> Kept | None:
        """Return the slots that keep, of an arena that takes over what an `earlier` one holds; None without any."""
        return cls(slots, earlier) if any(slot.keeps for slot in slots) else None

    def described(self, words: memoryview, get: Callable[[str], Any]) -> bool:
        """Whether a block's words speak of every slot that a step writes: some may have been left out last time."""
        for slot in self._slots:
            if not words[slot.columns_word + _PADDED] and get(slot.name) is not None:
                return False
        return True

    def take(self, words: memoryview, get: Callable[[str], Any], padded: tuple[int, ...]) -> None:
        """Leave alone what a step leaves out, in the words of a block that is written otherwise.

        A slot that was never written is left out as others are: it is all padding.

        Raises
        ------
        ValueError
            The step needs more rows of a slot than its last write was padded to.
        """
        self._next = {}
        for slot in self._slots:
            name, wanted = slot.name, padded[slot.position]
            if get(name) is not None:
                if self.rows.get(name) != wanted:
                    self._next[name] = wanted
            elif name in self.rows:
                if wanted > self.rows[name]:
                    raise ValueError(
                        f"input {name!r} was left out, and what it keeps is padded to {self.rows[name]} rows; this "
                        f"step is padded to {wanted}: give it again"
                    )
                slot.skip(words)

    def take_one(self, slot: InputSlot, padded: int) -> None:
        """Take note of a write of one slot alone."""
        self._next = {slot.name: padded} if slot.keeps else {}

    def rehearse(self, words: memoryview) -> None:
        """Leave alone what is kept, in a run that no user asked values of."""
        for slot in self._slots:
            if slot.name in self.rows:
                slot.skip(words)
        self._next = {}

    def commit(self) -> None:
        """Take what was written last as what the slots hold: it is queued."""
        if self._next:
            self.rows.update(self._next)
            self._next = {}


_PADDED = kernels.PADDED_COLUMNS - kernels.COLUMNS
