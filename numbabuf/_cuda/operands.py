"""Who is told what a capture will read or write, so that memory under a graph is never given to somebody else.

Both backends collect the operands of a capture through `kept`. Knows no pool: whoever owns memory registers a watcher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

watchers: list[Callable[[Any], Iterable[Any]]] = []
"""Each is called with every operand (an array, or a tuple of a launch's arguments) while the capture is open."""


def kept(operand: Any) -> list[Any]:
    """Return what a graph must keep alive for `operand`: itself and what the watchers return for it."""
    return [operand, *(pin for watcher in watchers for pin in watcher(operand))]
