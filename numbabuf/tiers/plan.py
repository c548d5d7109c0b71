"""The plan of a move: which buffers come to a tier, and which go to make room for them.

Pure: it knows keys and bytes, no buffers and no memory, and changes nothing. The pool carries it out.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Generic, TypeVar

__all__ = ["Plan", "plan"]

_K = TypeVar("_K", bound=Hashable)


@dataclass(frozen=True)
class Plan(Generic[_K]):
    """What `plan` decided, each in the order of the question."""

    evict: list[_K]
    """Those that go, coldest first."""
    bring: list[_K]
    """Those that come."""
    refuse: list[_K]
    """Those that stay out, as what would have to go is worth more."""
    full: list[_K]
    """Those that stay out, as there is no room even if all goes that may."""
    room: int
    """Bytes that are left when all of this is done."""


def plan(
    wanted: Iterable[tuple[_K, int]],
    room: int,
    coldest: Iterator[tuple[_K, int]],
    admits: Callable[[_K, Sequence[_K]], bool] | None = None,
) -> Plan[_K]:
    """Decide which of `wanted` come, and what goes for them.

    Parameters
    ----------
    wanted : iterable of (key, nbytes)
        In the order in which they are served.
    room
        Bytes that are free.
    coldest : iterator of (key, nbytes)
        Those that may go, the first to go first. No more is taken from it than is looked at.
    admits
        Says of a key and the keys that would go for it whether it is worth them; None: always. Not asked where none
        have to go.

    Examples
    --------
    >>> plan([("a", 3), ("b", 4), ("c", 9)], 5, iter([("x", 2), ("y", 1)]))
    Plan(evict=['x'], bring=['a', 'b'], refuse=[], full=['c'], room=0)
    """
    evict: list[_K] = []
    bring: list[_K] = []
    refuse: list[_K] = []
    full: list[_K] = []
    for key, nbytes in wanted:
        going: list[tuple[_K, int]] = []
        while room < nbytes and (victim := next(coldest, None)) is not None:
            going.append(victim)
            room += victim[1]
        keys = [victim for victim, _ in going]
        if room >= nbytes and (not going or admits is None or admits(key, keys)):
            evict += keys
            bring.append(key)
            room -= nbytes
            continue
        (refuse if room >= nbytes else full).append(key)
        room -= sum(size for _, size in going)
        coldest = chain(going, coldest)
    return Plan(evict, bring, refuse, full, room)
