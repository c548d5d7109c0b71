"""The graphs in service: which one serves a step, how one leaves, and what those that are gone have counted.

A graph leaves service at once but is destroyed later, when the replays queued before are done. Knows graphs and their
sizes, no slots and no memory. Sits above `graph`, below `manager`, whose lock its callers hold.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Any

from .. import _cuda
from ..errors import GraphMissingError
from .graph import CapturedStep

__all__ = ["Service"]


class Service:
    """The captured steps that `replay` chooses from, in the order of their sizes, tokens first.

    Parameters
    ----------
    stream : _cuda.Stream
        Where the replays are queued.

    Attributes
    ----------
    leaving : list of (event, CapturedStep)
        The graphs taken out of service, each with the event after its last replay.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._graphs: list[CapturedStep] = []
        self._tokens: list[int] = []  # of each of them
        self.leaving: list[tuple[Any, CapturedStep]] = []
        self._past: dict[int, list[int]] = {}  # tokens of a bucket -> [steps, live] of graphs that are gone

    def __iter__(self) -> Iterator[CapturedStep]:
        return iter(self._graphs)

    def __len__(self) -> int:
        return len(self._graphs)

    def covering(self, live: tuple[int, ...]) -> CapturedStep | None:
        """Return the graph of fewest tokens that covers `live`, if there is one.

        Raises
        ------
        GraphMissingError
            There is no graph at all.
        """
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
        if not graphs:
            raise GraphMissingError("no graph is captured: call capture_buckets(fn), or use `with capture(n)`, first")
        return None

    def largest(self, axis: int, rest: tuple[int, ...] = ()) -> int:
        """Return the largest size of `axis` among the graphs that cover `rest`, the sizes past the tokens."""
        return max(g.sizes[axis] for g in self._graphs if all(a >= b for a, b in zip(g.sizes[1:], rest, strict=False)))

    def adopt(self, new: list[CapturedStep]) -> None:
        """Put new graphs in service, in place of those of the same sizes."""
        sizes = {graph.sizes for graph in new}
        self.exchange([graph for graph in self._graphs if graph.sizes in sizes], new)

    def exchange(self, old: list[CapturedStep], new: list[CapturedStep]) -> None:
        """Take graphs out of service and put others in, all at once or, on an error of the driver, none.

        An old graph is closed once the steps queued so far, its replays among them, are done.
        """
        leaving = self.leaving
        if old:
            event = _cuda.Event(self._stream.device)
            event.record(self._stream)
            leaving = leaving + [(event, graph) for graph in old]
        kept = [graph for graph in self._graphs if graph not in old]
        graphs = sorted(kept + new, key=lambda graph: graph.sizes)
        self._serve(graphs, [graph.sizes[0] for graph in graphs], leaving)
        self.reap()

    def _serve(self, graphs: list[CapturedStep], tokens: list[int], leaving: list[tuple[Any, CapturedStep]]) -> None:
        """Change all three, with nothing between that an interrupt could come after."""
        self._graphs, self._tokens, self.leaving = graphs, tokens, leaving

    def reap(self) -> None:
        """Close the withdrawn graphs whose replays are done."""
        if _cuda.capturing():
            return  # a capture forbids the query, and the end of a graph may free memory
        for leaving in list(self.leaving):
            event, graph = leaving
            try:
                done = event.query()
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
        self._serve([], [], [])  # first: no closed graph is in service, whatever comes between
        for graph in graphs:
            self.retire(graph)

    def abandon(self) -> None:
        """Forget every graph, keeping the counts: the context is gone, and the driver has destroyed them with it."""
        graphs = [*self._graphs, *(graph for _, graph in self.leaving)]
        self._serve([], [], [])
        for graph in graphs:
            self._count(graph)

    def counts(self, others: Iterable[CapturedStep]) -> dict[int, tuple[int, int]]:
        """Return (steps, live tokens) per bucket of tokens, smallest first: all graphs ever, and `others`."""
        counts = {tokens: list(past) for tokens, past in self._past.items()}
        for graph in (*others, *self._graphs, *(graph for _, graph in self.leaving)):
            count = counts.setdefault(graph.sizes[0], [0, 0])
            count[0] += graph.steps
            count[1] += graph.live
        return {tokens: (steps, live) for tokens, (steps, live) in sorted(counts.items()) if steps}

    def check(self) -> None:
        """Assert that the graphs are in order, one per size."""
        assert self._tokens == [graph.sizes[0] for graph in self._graphs]
        sizes = [graph.sizes for graph in self._graphs]
        assert sizes == sorted(set(sizes)), sizes
