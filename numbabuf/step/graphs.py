"""Graphs by size: which of them covers a step, how one leaves, and what those that are gone have counted.

A graph is out of the table at once but destroyed later, when the replays queued before are done. Knows graphs and their
sizes, no slots and no memory. Sits above `graph`, below `program` and `fill`, whose lock its callers hold.
"""

from __future__ import annotations

import functools
import operator
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator

from .. import _cuda
from ..pool.fence import Fence, Fences
from .graph import CapturedStep

__all__ = ["Graphs", "totals"]


class Graphs:
    """The captured steps of one function, or of the fill alone, in the order of their sizes, tokens first.

    Parameters
    ----------
    stream : _cuda.Stream
        Where the replays are queued.

    Attributes
    ----------
    leaving : list of (Fence or None, CapturedStep)
        The graphs taken out of the table, each with the fence behind its last replay.
    """

    def __init__(self, stream: _cuda.Stream) -> None:
        self._stream = stream
        self._graphs: list[CapturedStep] = []
        self._tokens: list[int] = []  # of each of them
        self._by_sizes: dict[tuple[int, ...], CapturedStep] = {}
        self.leaving: list[tuple[Fence | None, CapturedStep]] = []
        self._fences = Fences()
        self._past: dict[int, list[int]] = {}  # tokens of a bucket -> [steps, live] of graphs that are gone

    def __iter__(self) -> Iterator[CapturedStep]:
        return iter(self._graphs)

    def __len__(self) -> int:
        return len(self._graphs)

    def covering(self, live: tuple[int, ...]) -> CapturedStep | None:
        """Return the graph of fewest tokens that covers `live`, if there is one."""
        # Hot path, guarded by benchmarks/step.py.
        graphs = self._graphs
        at = bisect_left(self._tokens, live[0])
        if len(live) == 1:
            if at < len(graphs):
                return graphs[at]
        else:
            for graph in graphs[at:]:
                if all(size >= wanted for size, wanted in zip(graph.sizes, live, strict=True)):
                    return graph
        return None

    def exact(self, sizes: tuple[int, ...]) -> CapturedStep | None:
        """Return the graph of these very sizes, if there is one."""
        return self._by_sizes.get(sizes)

    @property
    def sends(self) -> int:
        """A bit for each output that one of the graphs sends."""
        return functools.reduce(operator.or_, (graph.sends for graph in self._graphs), 0)

    def largest(self, axis: int, rest: tuple[int, ...] = ()) -> int:
        """Return the largest size of `axis` among the graphs that cover `rest`, the sizes past the tokens."""
        return max(g.sizes[axis] for g in self._graphs if all(a >= b for a, b in zip(g.sizes[1:], rest, strict=False)))

    def filled(self, tokens: int) -> int:
        """Return the most tokens of a graph that a step of `tokens` fills, 0 where every graph has more."""
        at = bisect_right(self._tokens, tokens)
        return self._tokens[at - 1] if at else 0

    def add(self, new: list[CapturedStep]) -> None:
        """Put new graphs into the table, in place of those of the same sizes."""
        sizes = {graph.sizes for graph in new}
        self.exchange([graph for graph in self._graphs if graph.sizes in sizes], new)

    def exchange(self, old: list[CapturedStep], new: list[CapturedStep]) -> None:
        """Take graphs out of the table and put others in, all at once or, on an error of the driver, none.

        An old graph is closed once the steps queued so far, its replays among them, are done.
        """
        leaving = self.leaving
        if old:
            with _cuda.on_device(self._stream.device):
                fence = self._fences.behind([self._stream])
            leaving = leaving + [(fence, graph) for graph in old]
        kept = [graph for graph in self._graphs if graph not in old]
        graphs = sorted(kept + new, key=lambda graph: graph.sizes)
        self._serve(graphs, leaving)
        self.reap()

    def _serve(self, graphs: list[CapturedStep], leaving: list[tuple[Fence | None, CapturedStep]]) -> None:
        """Change all four, with nothing between that an interrupt could come after."""
        tokens, by_sizes = [graph.sizes[0] for graph in graphs], {graph.sizes: graph for graph in graphs}
        self._graphs, self._tokens, self._by_sizes, self.leaving = graphs, tokens, by_sizes, leaving

    def reap(self) -> None:
        """Close the graphs that are out of the table and whose replays are done."""
        if _cuda.capturing():
            return  # a capture forbids the query, and the end of a graph may free memory
        for leaving in list(self.leaving):
            fence, graph = leaving
            try:
                done = fence is None or fence.done()
            except Exception:  # a step has failed, which the next one reports; `close` ends the graph
                done = False
            if done:
                self.leaving.remove(leaving)
                self.retire(graph)

    def retire(self, graph: CapturedStep) -> None:
        """Close a graph whose replays are done, keeping its counts."""
        self._count(graph)
        graph.close()

    def _count(self, graph: CapturedStep) -> None:
        past = self._past.setdefault(graph.sizes[0], [0, 0])
        past[0] += graph.steps
        past[1] += graph.live

    def close(self) -> None:
        """Close every graph; the caller has waited for the stream."""
        graphs = [*self._graphs, *(graph for _, graph in self.leaving)]
        self._serve([], [])  # first: no closed graph serves a step, whatever comes between
        for graph in graphs:
            self.retire(graph)

    def abandon(self) -> None:
        """Forget every graph, keeping the counts: the context is gone, and the driver has destroyed them with it."""
        graphs = [*self._graphs, *(graph for _, graph in self.leaving)]
        self._serve([], [])
        for graph in graphs:
            self._count(graph)

    def counts(self) -> dict[int, tuple[int, int]]:
        """Return (steps, live tokens) per bucket of tokens that a step ran in, smallest first: of all graphs ever."""
        counts = {tokens: list(past) for tokens, past in self._past.items()}
        for graph in (*self._graphs, *(graph for _, graph in self.leaving)):
            count = counts.setdefault(graph.sizes[0], [0, 0])
            count[0] += graph.steps
            count[1] += graph.live
        return {tokens: (steps, live) for tokens, (steps, live) in sorted(counts.items()) if steps}

    def absorb(self, other: Graphs) -> None:
        """Count what `other`, which has no graph any more, has counted."""
        for tokens, (steps, live) in other.counts().items():
            past = self._past.setdefault(tokens, [0, 0])
            past[0] += steps
            past[1] += live

    def check(self) -> None:
        """Assert that the graphs are in order, one per size."""
        assert self._tokens == [graph.sizes[0] for graph in self._graphs]
        sizes = [graph.sizes for graph in self._graphs]
        assert sizes == sorted(set(sizes)) == sorted(self._by_sizes), sizes


def totals(tables: Iterable[Graphs]) -> tuple[dict[int, int], dict[int, int]]:
    """Return the steps, and the live tokens, of all `tables` per bucket of tokens, the smallest first."""
    steps: Counter[int] = Counter()
    live: Counter[int] = Counter()
    for table in tables:
        for tokens, (ran, live_tokens) in table.counts().items():
            steps[tokens] += ran
            live[tokens] += live_tokens
    return dict(sorted(steps.items())), dict(sorted(live.items()))
