"""Graphs and buffers that are ready before the sizes that they serve turn up, for one program.

Puts together what is known of the demand (`learning`), what to capture next (`choice`), and what it may cost
(`budgets`), through the public verbs of a program and a pool. What cannot be prewarmed leaves everything as it was,
counted. Sits above the room `step`, below `manager`.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable

from .. import _cuda
from ..checks import OnProgress, check_progress, whole_number
from ..demand import buckets
from ..demand.model import DemandModel
from ..errors import BusyError, ClosedError
from ..pool.pool import BufferPool
from ..pool.spec import BufferSpec
from ..resource import Resource
from ..step.graph import Step
from ..step.program import Program, check_function, free_bytes
from .background import Background
from .budgets import Budgets, Reserve
from .choice import Plan, by_value, pricing
from .learning import Learning
from .stats import PredictionStats
from .stock import ANEW, Stock
from .usage import Usage

__all__ = ["Prewarmer"]

_log = logging.getLogger("numbabuf")


class Prewarmer(Resource):
    """Watches the steps of one program, and captures the graphs and reserves the buffers that its demand asks for.

    Parameters
    ----------
    program : Program
        Its observers are set; those set before are called no more.
    pool : BufferPool
        Where buffers are reserved.
    model : DemandModel
        From now on this prewarmer's, until it is closed; one model serves one program.
    budgets : Budgets
    cost, specs, clock
        As in `PredictiveBufferManager`.
    max_tokens : int, optional
        The largest step that the slots hold. Default: ``budgets.max_size``.

    Raises
    ------
    BusyError
        The model is another's.

    Notes
    -----
    Threads: any thread may call any method; one prewarms at a time, and others go on stepping meanwhile. What was
    learned may be asked inside a captured function, too.

    Examples
    --------
    >>> import numbabuf
    >>> from numbabuf.demand import DemandModel
    >>> from numbabuf.predict import Budgets, Prewarmer
    >>> manager = numbabuf.InputBufferManager(max_batch_size=1, max_seq_len=64)
    >>> program = manager.program(lambda step: None, name="encode")
    >>> with Prewarmer(program, manager.pool, DemandModel(), Budgets(max_size=64, max_graphs=3)) as prewarmer:
    ...     for size in [5, 5, 30] * 40:
    ...         prewarmer.record_usage(size)
    ...     sorted(prewarmer.prewarm())
    [5, 30, 64]
    >>> manager.close()
    """

    def __init__(
        self,
        program: Program,
        pool: BufferPool,
        model: DemandModel,
        budgets: Budgets,
        *,
        cost: buckets.Cost | None = None,
        specs: Callable[[int], Iterable[BufferSpec]] | None = None,
        max_tokens: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not isinstance(model, DemandModel):
            raise TypeError(f"demand is {model!r}: give a DemandModel")
        if cost is not None and not isinstance(cost, buckets.Cost):
            raise TypeError(f"cost is {cost!r}: give a buckets.Cost, or None for padded work")
        if specs is not None and not callable(specs):
            raise TypeError(f"specs is {specs!r}: give a function of the number of tokens that returns BufferSpecs")
        if not callable(clock):
            raise TypeError(f"clock is {clock!r}: give a function that returns seconds")
        self.program, self.budgets = program, budgets
        self.max_tokens = budgets.max_size if max_tokens is None else max_tokens
        self.closed = False
        self._cost, self._clock = cost or buckets.Cost(), clock
        refitter = functools.partial(_refitter, budgets, cost)
        self._reserve = None if specs is None else Reserve(pool, specs)
        self._usage = Usage(program.name, self.max_tokens, max(4096, 4 * model.window))
        self._learning = Learning(self._usage, model, refitter, clock)
        self._stock = Stock(program, budgets, self._reserved_bytes)
        self._background = Background(self._work, program.device)
        self._prewarming = threading.Lock()
        self._failures = 0
        self._capture_seconds = 0.0
        model.claim(self)  # last: what could not be made owns nothing
        program.observer, program.refusal_observer = self._usage.note, self._usage.refuse

    # ---------------------------------------------------------------------------------------------------- demand

    @property
    def demand(self) -> DemandModel:
        """The model, with every step so far learned; save it, or merge it with those of other workers."""
        with self._learning.learned() as demand:
            return demand

    @property
    def refusal_observer(self) -> Callable[[int], None] | None:
        """Called with the number of tokens of each step that is refused for its size, if the slots could hold it.

        The manager's lock is held: it must not use the manager, nor wait. What it raises is logged.
        """
        return self._usage.refusal_observer

    @refusal_observer.setter
    def refusal_observer(self, observer: Callable[[int], None] | None) -> None:
        self._usage.refusal_observer = observer

    def adopt(self, demand: DemandModel) -> None:
        """Go on with `demand` in place of what was learned here: a loaded model, or those of many workers merged.

        Buckets are planned from it too; the sizes planned so far are kept where a new one would not repay its capture.

        Raises
        ------
        BusyError
            It is another's; nothing has changed.
        """
        if not isinstance(demand, DemandModel):
            raise TypeError(f"demand is {demand!r}: give a DemandModel")
        self._learning.adopt(demand, self)

    def record_usage(self, num_tokens: int) -> None:
        """See `PredictiveBufferManager.record_usage`; the most is `max_tokens`."""
        self._usage.note(whole_number("num_tokens", num_tokens, least=1, most=self.max_tokens))

    def predict_next_sizes(self, n: int = 3) -> list[int]:
        """See `PredictiveBufferManager.predict_next_sizes`."""
        return self._learning.forecast(n, self.max_tokens)

    def plan_buckets(self, k: int) -> tuple[int, ...]:
        """See `PredictiveBufferManager.plan_buckets`."""
        with self._learning.learned() as demand:
            return tuple(buckets.plan(demand, k, max_size=self.budgets.max_size, cost=self._cost).tolist())

    def planned(self) -> tuple[int, ...]:
        """Return the sizes to have captured: the plan in force, which changes where that repays the captures."""
        with self._learning.learned():
            return self._learning.planned

    # --------------------------------------------------------------------------------------------------- prewarm

    def prewarm(
        self, fn: Callable[[Step], object] | None = None, *, on_progress: OnProgress | None = None
    ) -> tuple[int, ...]:
        """Have ready what the demand suggests: graphs of the planned sizes, and the buffers of those forecast.

        Parameters
        ----------
        fn : callable, optional
            What to capture; default: the program's function. It is called twice per size and changes no data, as in
            `InputBufferManager.capture_buckets`.
        on_progress : callable
            ``on_progress(done, total, size, free_bytes)`` is called after each graph, as by `capture_buckets`.

        Returns
        -------
        captured : tuple of int
            The sizes captured by this call, in the order of their value.

        Raises
        ------
        BusyError
            This thread is in the middle of a call on the manager.
        BackendError
            Another device is current in this thread.

        Notes
        -----
        A graph that fails, or does not fit the byte budget, is left out, and counted in `prediction()`. A graph that is
        no longer in the plan is closed, once its last replay is done, when all planned ones are there, or sooner where
        a budget has no room for them; the largest one stays, so that no size is left without a graph. Does nothing in
        a thread that has a capture open, nor while another thread prewarms, and captures nothing while another thread
        captures with this manager.
        """
        if fn is not None:
            check_function(fn)
        check_progress(on_progress)
        program = self.program
        if _cuda.capturing() or self.closed or program.closed:
            return ()
        if program.inside:
            raise BusyError(
                "prewarm was called from within another call on the manager in the same thread; nothing has changed: "
                "call it when that has returned"
            )
        _cuda.one_device(program.device, program)
        # Without waiting: the other thread may be waiting for what this one holds.
        if not self._prewarming.acquire(blocking=False):
            return ()
        try:
            if fn is not None:
                program.function = fn
            captured = self._prewarm_graphs(on_progress)
            self._prewarm_buffers()
            return captured
        finally:
            self._prewarming.release()

    def _prewarm_graphs(self, on_progress: OnProgress | None) -> tuple[int, ...]:
        fn = self.program.function
        if fn is None:
            return ()
        with self._learning.learned() as demand:
            plan = Plan(self._learning.planned, pricing(demand, self._cost, self.budgets.max_size))
        present = [graph.num_tokens for graph in self._stock.present()]
        missing = [size for size in plan.sizes if size not in present]
        order = by_value(missing, present, self.budgets.max_size, plan.price)
        captured: list[int] = []
        began = self._clock()
        why = ""
        for size in order:
            why = self._spent(began, captured) or self._stock.make_room(size, plan)
            if not why and self.program.function is not fn:
                why = ANEW
            why = why or self._stock.capture(size, plan)
            if why:
                break
            captured.append(size)
            if on_progress is not None:
                on_progress(len(captured), len(order), {"tokens": size}, free_bytes())
        self._capture_seconds += self._clock() - began
        if why:
            _log.debug("prewarm stopped after %d of %d: %s", len(captured), len(order), why)
        while len(captured) == len(order) and self._stock.drop_one(plan):
            pass
        return tuple(captured)

    def _spent(self, began: float, captured: list[int]) -> str:
        """Say that the time is up, else nothing; one capture is always made."""
        most = self.budgets.prewarm_seconds
        over = captured and most is not None and self._clock() - began >= most
        return f"the budget of {most} s is spent" if over else ""

    def _prewarm_buffers(self) -> None:
        if self._reserve is None or not len(self.demand):
            return
        room = float("inf")
        if self.budgets.prewarm_bytes is not None:
            room = self.budgets.prewarm_bytes - self._stock.nbytes()
        try:
            self._reserve.fill(self.predict_next_sizes(self.budgets.max_graphs), room)
        except Exception as error:  # as for graphs: what was reserved stays right
            self._failures += 1
            _log.warning("prewarming buffers failed: %s", error)

    def _reserved_bytes(self) -> int:
        return 0 if self._reserve is None else self._reserve.nbytes()

    # ------------------------------------------------------------------------------------------------ background

    def start(self, interval_s: float = 1.0) -> None:
        """See `PredictiveBufferManager.start`; ClosedError where the program is closed."""
        if self.closed or self.program.closed:
            raise ClosedError("the program that would be prewarmed is closed: make a new one")
        self._background.start(interval_s)

    def _work(self) -> bool:
        if self.closed or self.program.closed:
            return False
        self.prewarm()
        return True

    def stop(self) -> None:
        """End the background thread and wait for it; in a function that is being captured, without waiting.

        Again, it does nothing.
        """
        # The thread may be waiting for the manager's lock, for the end of a capture or of learning, which are here.
        here = self.program.inside or _cuda.capturing() or self._learning.inside
        self._background.stop(wait=not here)

    def close(self) -> None:
        """Stop the thread and let the model go; the program's graphs stay. Again, it does nothing."""
        self.stop()
        if not self.closed:
            self.closed = True
            self._learning.let_go(self)

    def prediction(self) -> PredictionStats:
        """Return one snapshot of how the predictions did."""
        scores, stats = self._learning.scores(), self.program.stats()
        self._stock.refresh()
        return PredictionStats(
            hits=scores.hits,
            misses=scores.misses,
            unserved=stats.overflows + self._usage.refused,
            warmed=self._stock.captures,
            warmed_unused=self._stock.unused(),
            closed=self._stock.closings,
            failures=self._failures + self._stock.failures + self._background.failures,
            graph_bytes=self._stock.nbytes(),
            reserved_bytes=self._reserved_bytes(),
            padding=stats.padding,
            refits=scores.refits,
            capture_seconds=self._capture_seconds,
            model_seconds=scores.seconds,
        )

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self._stock)} graphs"
        return f"Prewarmer({self.program.name!r}, {state})"


def _refitter(budgets: Budgets, cost: buckets.Cost | None, window: int) -> buckets.Refitter:
    return buckets.Refitter(budgets.max_graphs, max_size=budgets.max_size, cost=cost, window=window)
