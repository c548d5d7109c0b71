"""The graphs of a program that were captured ahead of need: made, counted, and dropped for others that are worth more.

Uses the public verbs of a program and nothing else of it. Sits above `budgets` and `choice`, below `prewarm`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

from ..demand.turn import Turn
from ..errors import BackendError, BusyError, GraphMissingError
from ..step.program import CapturedSize, Program
from .budgets import Budgets
from .choice import Plan, least_missed, trade

__all__ = ["Stock"]

_log = logging.getLogger("numbabuf")

ANEW = "the graphs were closed, or captured anew, meanwhile"


class Stock:
    """The graphs captured ahead of need, within budgets.

    Parameters
    ----------
    program : Program
    budgets : Budgets
    reserved : callable returning int
        Bytes that prewarming took besides graphs.

    Attributes
    ----------
    captures, closings, failures : int
        Graphs captured ahead of need, those dropped for others, and captures that failed.

    Notes
    -----
    Threads: one at a time may prewarm. Sizes here are numbers of tokens; further axes are at their largest, and graphs
    of other sizes on them are counted and left as they are.
    """

    def __init__(self, program: Program, budgets: Budgets, reserved: Callable[[], int]) -> None:
        self._program, self._budgets, self._reserved = program, budgets, reserved
        self._turn = Turn("this thread is counting graphs: ask when the call that counts them has returned")
        self._made: dict[int, CapturedSize] = {}  # number of the capture -> the graph as last seen, until destroyed
        self._unused = 0  # of those that are destroyed
        self._ran: dict[int, int] = {}  # tokens of a bucket -> steps of all graphs of the program when last seen
        self._too_large: object = None  # the function and the plan of which a graph turned out too large
        self.captures = self.closings = self.failures = 0

    def __len__(self) -> int:
        return len(self._made)

    # ------------------------------------------------------------------------------------------------ what is there

    def refresh(self) -> tuple[CapturedSize, ...]:
        """See which graphs are there still; return all of the program's that are in service."""
        # What was made is read first, or a graph would be missing that another thread makes meanwhile:
        #     1: asks for a snapshot, and reads which graphs the program has
        #     2: prewarms, captures a graph and counts it as made
        #     1: does not find that graph among those that it read, and takes it for destroyed.
        # No turn is held while the program is asked: its lock may be held by a thread that waits for the turn.
        made, program = list(self._made), self._program
        captured, leaving, ran = program.captured, program.leaving, program.stats().buckets
        there = {graph.number: graph for graph in (*captured, *leaving)}
        with self._turn:
            for number in made:
                if number in there:
                    self._see(there[number])
                elif number in self._made:  # another thread has not counted it yet
                    self._unused += not self._used(self._made.pop(number), ran)
            self._ran = max(self._ran, ran, key=lambda steps: sum(steps.values()))
        return captured

    def _see(self, graph: CapturedSize) -> None:
        """Note what a graph is now; not where another thread saw more."""
        seen = self._made.get(graph.number)
        if seen is not None and graph.steps >= seen.steps:
            self._made[graph.number] = graph

    def _used(self, graph: CapturedSize, ran: dict[int, int]) -> bool:
        """Whether a graph that is destroyed ran a step: until it was last seen, or since then one of its size."""
        return graph.steps > 0 or ran.get(graph.num_tokens, 0) > self._ran.get(graph.num_tokens, 0)

    def present(self) -> list[CapturedSize]:
        """Return the graphs in service of any number of tokens and all there is of the further axes."""
        full = [choices[-1] for choices in self._program.layout.buckets[1:]]
        return [graph for graph in self.refresh() if list(graph.sizes.values())[1:] == full]

    def _spare(self, keep: tuple[int, ...]) -> list[CapturedSize]:
        """Return the graphs of other sizes than `keep`, but the largest: what was served stays served."""
        return [graph for graph in self.present()[:-1] if graph.num_tokens not in keep]

    def nbytes(self, *, leaving: bool = True) -> int:
        """Return the bytes of the graphs; without `leaving`, once those out of service are destroyed."""
        there = set(self._made) if leaving else {graph.number for graph in self.refresh()}
        return sum(graph.nbytes for graph in list(self._made.values()) if graph.number in there)

    def unused(self) -> int:
        """Return how many graphs no step has used, or had used when they were destroyed."""
        return self._unused + sum(graph.steps == 0 for graph in list(self._made.values()))

    def _fits(self, *, leaving: bool = True) -> bool:
        """Whether one more graph, as large as the largest so far, stays within the byte budget."""
        most = self._budgets.prewarm_bytes
        if most is None:
            return True
        self.refresh()
        largest = max((graph.nbytes for graph in list(self._made.values())), default=0)
        return self.nbytes(leaving=leaving) + self._reserved() + largest <= most

    # ---------------------------------------------------------------------------------------------- what comes, goes

    def make_room(self, size: int, plan: Plan) -> str:
        """Drop what `size` is worth more than; return why there is no room for it, else nothing."""
        tried = self._too_large == (self._program.function, plan.sizes)
        while not self._fits(leaving=False) and self.drop_one(plan, made=True):
            pass  # what the plan does not want makes room
        if not tried and not self._fits(leaving=False):
            self._trade(size, plan)  # so does what it wants less, where there is no room for all of it
        if tried or not self._fits():
            return f"the budget of {self._budgets.prewarm_bytes:,} bytes is spent"
        count = len(self._program.captured)
        if size != self._budgets.max_size and count >= self._budgets.max_graphs and not self._spare(plan.sizes):
            return f"{count} graphs are captured"
        return ""

    def capture(self, size: int, plan: Plan) -> str:
        """Capture one size; return why not, counted where that failed, else nothing."""
        program, fn = self._program, self._program.function
        try:
            graph = program.capture(size, wait=False)  # one that is waited for may wait for what this thread does
            most = self._budgets.prewarm_bytes
            self.refresh()
            if most is not None and self.nbytes() + self._reserved() + graph.nbytes > most:
                self._too_large = fn, plan.sizes
                program.drop(graph.sizes)  # destroyed as soon as that is allowed
                raise MemoryError(f"it takes {graph.nbytes:,} bytes, more than is left of the budget")
        except BackendError:
            raise
        except BusyError as error:
            return str(error)
        except GraphMissingError:
            return ANEW
        except Exception as error:  # degrade to what was there: whatever was wrong, the graphs in service are right
            self.failures += 1
            _log.warning("prewarming a graph for %d tokens failed: %s", size, error)
            return f"the graph for {size} tokens failed, see the log"
        self._made[graph.number] = graph
        self.captures += 1
        # Only now: had the capture failed, what is dropped would still be needed.
        while len(program.captured) > self._budgets.max_graphs and self.drop_one(plan):
            pass
        return ""

    def drop_one(self, plan: Plan, *, made: bool = False) -> bool:
        """Drop the graph that is missed least of those that the plan does not want; return False if there is none.

        With `made`, of those that the byte budget counts.
        """
        spare = self._droppable(plan.sizes, made=made)
        if not spare:
            return False
        present = [graph.num_tokens for graph in self.present()]
        self._drop(spare[least_missed(spare, present, plan.price)])
        return True

    def _trade(self, size: int, plan: Plan) -> None:
        """Drop a graph of the plan in whose place `size` is worth more."""
        spare = self._droppable((), made=True)
        given = trade(size, list(spare), [graph.num_tokens for graph in self.present()], plan.price)
        if given is not None:
            self._drop(spare[given])

    def _droppable(self, keep: tuple[int, ...], *, made: bool) -> dict[int, CapturedSize]:
        spare = self._spare(keep)
        mine = {number for number, graph in self._made.items() if graph.nbytes}
        return {graph.num_tokens: graph for graph in spare if not made or graph.number in mine}

    def _drop(self, graph: CapturedSize) -> None:
        with contextlib.suppress(GraphMissingError):  # another thread was sooner
            self._program.drop(graph.sizes)
            self.closings += 1
        self.refresh()
