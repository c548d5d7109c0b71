"""Which of the graphs that cover a step runs it, where the caller asks for more than the smallest.

Pure: checks what was asked, compares sizes, and queues nothing. Sits above `graphs` and `layout`, below `overflow`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checks import whole_number
from .graph import CapturedStep
from .graphs import Graphs
from .layout import Layout

__all__ = ["SMALLEST", "Choice"]


@dataclass(frozen=True)
class Choice:
    """What a step asks of the graph that runs it, beyond that it covers the step.

    Attributes
    ----------
    at_least : dict of str to int
        The least padded size by axis.
    max_padding : float
        The most padded tokens for each token asked for.
    """

    at_least: Mapping[str, int]
    max_padding: float

    @classmethod
    def of(cls, at_least: Any, max_padding: Any) -> Choice:
        """Return the choice of the arguments of `replay`; TypeError or ValueError where they mean nothing."""
        if at_least is None:
            at_least = {}
        elif not isinstance(at_least, Mapping):
            at_least = {"tokens": whole_number("at_least", at_least)}
        least = {axis: whole_number(f"at_least[{axis!r}]", size) for axis, size in at_least.items()}
        if max_padding is None:
            max_padding = math.inf
        if isinstance(max_padding, bool) or not isinstance(max_padding, numbers.Real):
            raise TypeError(f"max_padding is {max_padding!r}: give a ratio of padded to live tokens, or None")
        ratio = float(max_padding)
        if not ratio >= 1:
            raise ValueError(f"max_padding is {ratio}: give a ratio of padded to live tokens, 1.0 or more")
        return cls(least, ratio)

    def wanted(self, layout: Layout, live: tuple[int, ...]) -> tuple[int, ...]:
        """Return the least padded size per axis of a step of the sizes `live`."""
        least = self.at_least
        unknown = set(least) - set(layout.axes)
        if unknown:
            names = ", ".join(sorted(map(str, unknown)))
            raise ValueError(f"at_least names {names}; the axes are {', '.join(layout.axes)}")
        return tuple(max(size, least.get(axis, 0)) for axis, size in zip(layout.axes, live, strict=True))

    def graph(self, graphs: Graphs, layout: Layout, live: tuple[int, ...]) -> CapturedStep | None:
        """Return the graph of fewest tokens that covers a step of the sizes `live`, unless it pads too much."""
        wanted = self.wanted(layout, live)
        graph = graphs.covering(wanted)  # the others that cover them have more tokens, and pad more
        return None if graph is None or self.pads_too_much(graph, wanted) else graph

    def pads_too_much(self, graph: CapturedStep, wanted: tuple[int, ...]) -> bool:
        """Whether a graph has more than `max_padding` tokens for each one wanted; none wanted counts as one."""
        return graph.sizes[0] > self.max_padding * max(1, wanted[0])


SMALLEST = Choice({}, math.inf)
"""The smallest graph that covers the step: what a step runs in that asks for nothing."""
