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
from .stats import ManagerStats

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

    def stats(self) -> ManagerStats:
        """Return the counts of all programs ever, and of what they share; under the lock."""
        shared, arena = self._shared, self._shared.arena
        returns = arena.returns if arena else None
        steps, live = totals((self._gone, *shared.tables))
        return ManagerStats(
            steps=sum(steps.values()),
            live_tokens=sum(live.values()),
            padded_tokens=sum(tokens * ran for tokens, ran in steps.items()),
            buckets=steps,
            overflows=self._gone_overflows + sum(program.overflow.count for program in self._by_name.values()),
            ring_waits=shared.past["waits"] + (arena.ring.waits if arena else 0),
            graphs=sum(len(table) for table in shared.tables if table is not shared.fills),
            arena_bytes=arena.layout.arena_bytes if arena else 0,
            ring_bytes=arena.ring_bytes if arena else 0,
            late_reads=shared.past["late_reads"] + (returns.late_reads if returns else 0),
            bucket_tokens=live,
            programs={name: program.stats() for name, program in self.open.items()},
        )


def _free_name(fn: Callable[[Step], Any], taken: Mapping[str, Program]) -> str:
    """Return the name of a function, with a number where that is taken."""
    name = free = str(getattr(fn, "__name__", type(fn).__name__))
    number = 1
    while free in taken:
        number, free = number + 1, f"{name}-{number + 1}"
    return free
