"""The programs of one manager by name, and what those that are closed have counted.

Sits above `program`, below `manager`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .fill import Fill
from .graph import Step
from .graphs import Graphs, totals
from .overflow import Overflow
from .program import Program
from .shared import Shared

__all__ = ["Programs"]


class Programs:
    """The first program, of the manager's own calls, and those that `add` makes.

    Parameters
    ----------
    shared : Shared
    fill : Fill
    overflow : Overflow
        Of the first program.

    Attributes
    ----------
    first : Program

    Notes
    -----
    Threads: `add` under the lock of `shared`; anything may be read without it.
    """

    def __init__(self, shared: Shared, fill: Fill, overflow: Overflow) -> None:
        self._shared, self._fill = shared, fill
        self.first = Program(shared, fill, "main", None, overflow)
        self._by_name = {"main": self.first}
        self._gone = Graphs(shared.stream)  # the counts of programs that are closed
        self._gone_overflows = 0

    def add(self, fn: Callable[[Step], Any], name: Any, buckets: Any, overflow: str, max_tokens: int) -> Program:
        """Make a further program; see `InputBufferManager.program`."""
        policy = Overflow(overflow)
        self._forget_closed()
        name = _free_name(fn, self._by_name) if name is None else name
        if not isinstance(name, str) or not name:
            raise TypeError(f"name is {name!r}: give a non-empty string, or None")
        if name in self._by_name:
            raise ValueError(f"a program {name!r} is open already: close it first, or give another name")
        program = Program(self._shared, self._fill, name, fn, policy, buckets, max_tokens)
        program.observer, program.refusal_observer = self.first.observer, self.first.refusal_observer
        self._by_name = {**self._by_name, name: program}  # a new one: other threads may be reading the old
        return program

    def _forget_closed(self) -> None:
        """Let closed programs go, but for their counts."""
        for name, program in self._by_name.items():
            if program.closed and program is not self.first:
                self._by_name = {other: kept for other, kept in self._by_name.items() if other != name}
                self._shared.tables.remove(program.graphs)
                self._gone.absorb(program.graphs)
                self._gone_overflows += program.overflow.count

    @property
    def open(self) -> dict[str, Program]:
        """The programs that are not closed, by name."""
        return {name: program for name, program in self._by_name.items() if not program.closed}

    def observe(self, observer: Callable[[int, Program], Any] | None) -> None:
        """Give every program this observer."""
        for program in self._by_name.values():
            program.observer = observer

    @property
    def overflows(self) -> int:
        """Steps that no graph covered and that ran all the same, of all programs ever."""
        return self._gone_overflows + sum(program.overflow.count for program in self._by_name.values())

    def totals(self) -> tuple[dict[int, int], dict[int, int]]:
        """Return the steps, and the live tokens, of all programs ever and of the fill, per bucket of tokens."""
        return totals((self._gone, *self._shared.tables))


def _free_name(fn: Callable[[Step], Any], taken: Mapping[str, Program]) -> str:
    """Return the name of a function, with a number where that is taken."""
    name = free = str(getattr(fn, "__name__", type(fn).__name__))
    number = 1
    while free in taken:
        number, free = number + 1, f"{name}-{number + 1}"
    return free
