"""An input manager that watches its own demand: it chooses the sizes worth a graph and has them ready before use.

Puts `demand` (what comes next), `buckets` (which sizes serve it best) and the manager's captures together under
budgets. A step only notes its size; models learn, and graphs are captured, in `prewarm` or in a thread
that calls it. What cannot be prewarmed leaves everything as it was, counted. Nothing but people's tools sits above.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from .. import _cuda
from ..checks import nbytes, whole_number
from ..demand import buckets
from ..demand.model import DemandModel
from ..errors import BusyError, NumbabufError
from ..pool.pool import BufferPool
from ..pool.spec import BufferSpec
from ..pool.stats import PredictionStats
from ..step.graph import CapturedStep, Step
from ..step.manager import InputBufferManager
from ..step.program import Program, check_function
from ..view.progress import stopped, track

__all__ = ["PredictiveBufferManager"]

_log = logging.getLogger("numbabuf")

TRADED = 0.95
"""Part of the cost that is left, at most, where a graph of the plan gives way to another."""

_running: weakref.WeakSet[PredictiveBufferManager] = weakref.WeakSet()  # those that have started a thread


@atexit.register
def _stop_all() -> None:
    """End the threads before the interpreter does: it would unwind them inside a driver call, which aborts."""
    for manager in list(_running):
        manager.stop()


class PredictiveBufferManager(InputBufferManager):
    """An `InputBufferManager` that plans its own buckets and prewarms graphs and buffers.

    Parameters
    ----------
    pool, max_batch_size, max_seq_len
        As `InputBufferManager`.
    max_size : int, optional
        The largest number of tokens that must always have a graph. Default: the largest of `buckets`, else all tokens
        that the default slots hold.
    max_graphs : int
        Most graphs to have captured (one more while it takes another's place); also the length of the planned bucket
        list. Graphs of other sizes on further axes count too, and are left as they are.
    window : int
        Steps that the models remember.
    prewarm_bytes : int, optional
        Device bytes that prewarming may take in all, graphs and reserved buffers together, as far as the driver tells
        them: a graph that turns out too large is given up again, and the pool is trimmed of what was reserved for
        sizes that are no longer forecast. Default: no limit of its own.
    prewarm_seconds : float, optional
        Seconds that one call of `prewarm` may spend on captures; at least one capture is made. Default: no limit.
    specs : callable, optional
        ``specs(num_tokens)`` names the buffers that a step of this size leases from the pool, as an iterable of
        `BufferSpec`; they are reserved for the sizes that are forecast.
    cost : buckets.Cost, optional
        What the planned list makes least: padded work by default.
    demand : DemandModel, optional
        A model to go on with, for instance one that another worker saved. It is this manager's until that is closed.
    clock : callable returning float
        Seconds, for the budgets and the account.
    **options
        As `InputBufferManager`; `buckets` are the sizes that `stage_inputs` pads to.

    Notes
    -----
    Demand: each step counts, those that are refused for their size too, if the slots could hold them. What is not
    learned for long, as without `start`, is learned from its newest steps, at least 4,096; the others count as hits and
    misses alone.
    Threads: `prewarm` may run in any thread, `start` runs it in one of its own. Other threads go on stepping: a capture
    uses its own stream in thread-local mode and holds the manager's lock only to begin and to put the graph in service.
    While a capture is open, a pool grows in no thread: reserve what steps lease.

    Examples
    --------
    >>> manager = PredictiveBufferManager(max_batch_size=1, max_seq_len=64, max_graphs=3)
    >>> for size in [5, 5, 30] * 40:
    ...     manager.record_usage(size)
    >>> manager.plan_buckets(3)
    (5, 30, 64)
    >>> sorted(manager.predict_next_sizes(2))
    [5, 32]
    >>> manager.close()
    """

    def __init__(
        self,
        pool: BufferPool | None = None,
        max_batch_size: int = 256,
        max_seq_len: int = 4096,
        *,
        max_size: int | None = None,
        max_graphs: int = 16,
        window: int = 1024,
        prewarm_bytes: int | None = None,
        prewarm_seconds: float | None = None,
        specs: Callable[[int], Iterable[BufferSpec]] | None = None,
        cost: buckets.Cost | None = None,
        demand: DemandModel | None = None,
        clock: Callable[[], float] = time.perf_counter,
        **options: Any,
    ) -> None:
        if demand is not None and not isinstance(demand, DemandModel):
            raise TypeError(f"demand is {demand!r}: give a DemandModel, or None for a new one")
        if cost is not None and not isinstance(cost, buckets.Cost):
            raise TypeError(f"cost is {cost!r}: give a buckets.Cost, or None for padded work")
        if specs is not None and not callable(specs):
            raise TypeError(f"specs is {specs!r}: give a function of the number of tokens that returns BufferSpecs")
        if not callable(clock):
            raise TypeError(f"clock is {clock!r}: give a function that returns seconds")
        for name, budget in (("prewarm_bytes", prewarm_bytes), ("prewarm_seconds", prewarm_seconds)):
            if budget is not None and not budget >= 0:
                raise ValueError(f"{name} is {budget!r}: give a number from 0 up, or None for no limit")
        super().__init__(pool, max_batch_size, max_seq_len, **options)
        given = self._shared.slots.buckets.get("tokens")
        largest = given[-1] if given else self.max_tokens
        max_size = largest if max_size is None else max_size
        self.max_size = whole_number("max_size", max_size, least=1, most=self.max_tokens)
        self.max_graphs = whole_number("max_graphs", max_graphs, least=1, most=1 << 20)
        self._demand = DemandModel(window) if demand is None else demand
        self._cost = cost or buckets.Cost()
        self._refitter = buckets.Refitter(self.max_graphs, max_size=self.max_size, cost=cost, window=window)
        self._byte_budget, self._second_budget = prewarm_bytes, prewarm_seconds
        self._specs = specs
        self._clock = clock
        self._recent: deque[int] = deque()  # sizes of steps, not learned yet
        self._keep = max(4096, 4 * self._demand.window)  # the newest of them that are learned; the others are counted
        self._older: Counter[int] = Counter()  # size -> steps that were too many to be learned
        self._counting = threading.Lock()
        self._midway = False  # whether the thread that learns is in the middle of it
        self._refusals = 0  # steps refused for their size
        # One thread learns or prewarms at a time; taken before every other lock, and again by a function that asks.
        self._learning = threading.RLock()
        self._expected: frozenset[int] = frozenset()  # the model's buckets last forecast
        self._made: dict[CapturedStep, int] = {}  # a prewarmed graph, until it is closed -> device bytes it took
        self._refused: Any = None  # the function and the plan of which a graph turned out too large
        self._hits = self._misses = self._captures = self._failures = self._unused = self._closings = 0
        self._capture_seconds = self._model_seconds = 0.0
        self._reserved: Counter[BufferSpec] = Counter()  # buffers that the pool may still hold because of prewarming
        self._worker: threading.Thread | None = None
        self._stopping = threading.Event()
        self.refusal_observer: Callable[[int], None] | None = None
        """Called with the number of tokens of each step that is refused for its size, if the slots could hold it. The
        manager's lock is held: it must not use the manager, nor wait. What it raises is logged."""
        self.observer = self._note = _noter(self._recent, 2 * self._keep, self._count_older)
        noted = weakref.WeakMethod(self._note_refused)  # weak, so that the manager is in no reference cycle
        self._first.refusal_observer = lambda size, program: noted()(size)  # type: ignore[misc]
        try:
            self._demand.claim(self)  # last: a manager that could not be made owns nothing
        except BusyError:
            self.close()
            raise

    # ---------------------------------------------------------------------------------------------------- demand

    @property
    def demand(self) -> DemandModel:
        """The model, with every step so far learned; save it, or merge it with those of other workers."""
        with self._learned():
            return self._demand

    def adopt(self, demand: DemandModel) -> None:
        """Go on with `demand` in place of what was learned here: a loaded model, or those of many workers merged.

        Buckets are planned from it too; the sizes planned so far are kept where a new one would not repay its capture.

        Parameters
        ----------
        demand : DemandModel
            From now on the manager's, which observes its steps.

        Raises
        ------
        BusyError
            It is another manager's; nothing has changed.
        """
        if not isinstance(demand, DemandModel):
            raise TypeError(f"demand is {demand!r}: give a DemandModel")
        refitter = buckets.Refitter(self.max_graphs, max_size=self.max_size, cost=self._cost, window=demand.window)
        with self._learned():
            demand.claim(self)
            refitter.sizes = self._refitter.sizes
            for _, size in demand.seen:
                refitter.observe(size)
            refitter.refit()
            refitter.refits += self._refitter.refits
            before, self._demand, self._refitter = self._demand, demand, refitter
            if before is not demand:
                before.let_go(self)

    def record_usage(self, num_tokens: int) -> None:
        """Count a step of `num_tokens` that did not run through this manager; its own steps are counted by themselves.

        Raises
        ------
        TypeError, ValueError
            It is not a whole number from 1 to the manager's capacity.
        """
        self._note(whole_number("num_tokens", num_tokens, least=1, most=self.max_tokens))

    def _count_older(self) -> None:
        """Count all but the newest `_keep` steps by size instead of keeping them."""
        # Without waiting: another thread, or a step that this one was interrupted in, is doing it.
        if not self._counting.acquire(blocking=False):
            return
        try:
            recent, sizes = self._recent, []
            with contextlib.suppress(IndexError):  # `_learn` takes them meanwhile
                for _ in range(len(recent) - self._keep):
                    sizes.append(recent.popleft())
            self._older.update(sizes)
        finally:
            self._counting.release()

    def _note_refused(self, size: int) -> None:
        """Count a step that is refused for its size; it is demand like any other. Holds the manager's lock."""
        self._refusals += 1
        if size <= self.max_tokens:  # what no slot can hold, no graph will serve
            self._note(size)
            if self.refusal_observer is not None:
                try:
                    self.refusal_observer(size)
                except Exception as error:  # the refusal is what is raised
                    _log.warning("the refusal observer of %r failed on a step of %d tokens: %r", self, size, error)

    def predict_next_sizes(self, n: int = 3) -> list[int]:
        """Return at most `n` sizes worth having ready for the next steps, the best first."""
        with self._learned():
            return self._forecast(n)

    def plan_buckets(self, k: int) -> tuple[int, ...]:
        """Return the `k` sizes that serve the demand so far at the least cost, `max_size` always the last."""
        with self._learned():
            sizes = buckets.plan(self._demand, k, max_size=self.max_size, cost=self._cost)
            return tuple(int(size) for size in sizes)

    @contextlib.contextmanager
    def _learned(self) -> Iterator[None]:
        """The right to the models, with every step so far in them.

        Whoever holds the manager's lock, as a function does that `capture_buckets` calls, waits for nobody: the thread
        that learns may be waiting for that lock.
        """
        if not self._learning.acquire(blocking=not _owned(self._shared.lock)):
            raise BusyError("another thread learns or prewarms with this manager: ask outside of the captured function")
        try:
            self._learn()
            yield
        finally:
            self._learning.release()

    def _learn(self) -> None:
        """Feed the steps since the last time to the models."""
        # `_learning` lets its own thread in again, as a captured function may ask for what was learned. In the middle
        # of this, though, it is a signal handler or a clock that asks, and a step taken here would be learned by none.
        if self._midway:
            raise BusyError("this thread is learning a step's demand: ask when the call that learns it has returned")
        self._midway = True
        try:
            began = self._clock()
            self._count_older()  # at most `_keep` are learned at once
            with self._counting:
                older, self._older = self._older, Counter()
            for size, steps in older.items():
                self._score(size, steps)
            recent = self._recent
            for _ in range(len(recent)):  # not those that come meanwhile: they may come faster than they are learned
                try:
                    size = recent.popleft()
                except IndexError:
                    break  # a step counts older ones meanwhile
                self._score(size, 1)
                if size < 1:
                    continue  # a step without tokens asks for nothing
                self._demand.observe(size)
                self._refitter.observe(size)
            self._model_seconds += self._clock() - began
        finally:
            self._midway = False

    def _score(self, size: int, steps: int) -> None:
        """Count steps of one size as hits or misses of the last forecast."""
        if not self._expected or size < 1:
            return
        known = self._demand.buckets
        if known[min(int(np.searchsorted(known, size)), len(known) - 1)] in self._expected:
            self._hits += steps
        else:
            self._misses += steps

    def _forecast(self, n: int) -> list[int]:
        began = self._clock()
        sizes = [int(forecast.size) for forecast in self._demand.forecast(n)]
        self._expected = frozenset(sizes)
        self._model_seconds += self._clock() - began
        return list(dict.fromkeys(min(size, self.max_tokens) for size in sizes))

    # --------------------------------------------------------------------------------------------------- prewarm

    def capture_buckets(
        self,
        fn: Callable[[Step], Any],
        sizes: Iterable[int | Mapping[str, int]] | None = None,
        *,
        progress: bool = False,
        warm_up: str | None = None,
    ) -> tuple[dict[str, int], ...]:
        """As `InputBufferManager.capture_buckets`; without `sizes`, the sizes that the demand so far suggests.

        `prewarm` goes on with the same function.
        """
        if sizes is None:
            with self._learned():
                sizes = [int(size) for size in self._refitter.sizes]
        return super().capture_buckets(fn, sizes, progress=progress, warm_up=warm_up)

    def prewarm(self, fn: Callable[[Step], Any] | None = None, *, progress: bool = False) -> tuple[int, ...]:
        """Have ready what the demand suggests: graphs of the planned sizes, and the buffers of those forecast.

        Parameters
        ----------
        fn : callable, optional
            What to capture; default: the function last given here or to `capture_buckets`. It is called twice per size
            and changes no data, as in `InputBufferManager.capture_buckets`.
        progress : bool
            Show a progress bar on standard error, and what was reached if it ends early.

        Returns
        -------
        captured : tuple of int
            The sizes captured by this call, in the order of their value.

        Notes
        -----
        A graph that fails, or does not fit the byte budget, is left out, and counted in `prediction()`. A graph that is
        no longer in the plan is closed, once its last replay is done, when all planned ones are there, or sooner where
        a budget has no room for them; the largest one stays, so that no size is left without a graph. Does nothing in
        a thread that has a capture open, and captures nothing while another thread captures with this manager.
        """
        if fn is not None:
            check_function(fn)
        if _cuda.capturing() or self.closed:
            return ()
        self._shared.refuse_inside("prewarm")
        _cuda.one_device(self._shared.stream.device, self)
        with self._learned():
            if fn is not None:
                self._first.function = fn
            captured = self._prewarm_graphs(progress)
            self._prewarm_buffers()
            return captured

    def _prewarm_graphs(self, progress: bool) -> tuple[int, ...]:
        fn = self._first.function
        if fn is None:
            return ()
        with self._shared.working("prewarm"):
            self._first.graphs.reap()
            full = tuple(choices[-1] for choices in self.layout.buckets[1:])
            present = [graph.sizes for graph in self._first.graphs]
        planned = [int(size) for size in self._refitter.sizes]
        missing = [size for size in planned if (size, *full) not in present]
        captured: list[int] = []
        began = self._clock()
        why = ""
        price = self._pricing()
        order = _by_value(missing, [sizes[0] for sizes in present if sizes[1:] == full], self.max_size, price)
        for size in track(order, total=len(order), label="prewarm", enabled=progress, note=_size_and_room):
            spent = self._clock() - began
            if captured and self._second_budget is not None and spent >= self._second_budget:
                why = f"the budget of {self._second_budget} s is spent"
                break
            while not self._fits_bytes(leaving=False) and self._drop_one(planned, full, price, made=True):
                pass  # what the plan does not want makes room
            if self._refused != (fn, planned) and not self._fits_bytes(leaving=False):
                self._trade(size, full, price)  # so does what it wants less, where there is no room for all of it
            if not self._fits_bytes() or self._refused == (fn, planned):
                why = f"the budget of {self._byte_budget:,} bytes is spent"
                break
            if size != self.max_size and len(self._first.graphs) >= self.max_graphs and not self._spare(planned, full):
                why = f"{len(self._first.graphs)} graphs are captured"
                break
            why = self._capture_one((size, *full), fn, planned)
            if why:
                break
            captured.append(size)
            # Only now: had the capture failed, what is dropped would still be needed.
            while len(self._first.graphs) > self.max_graphs and self._drop_one(planned, full, price):
                pass
        self._capture_seconds += self._clock() - began
        if progress and why:
            stopped("prewarm", len(captured), len(missing), why)
        if len(captured) == len(missing):
            while self._drop_one(planned, full, price):
                pass
        return tuple(captured)

    def _pricing(self) -> Callable[[Iterable[int]], float]:
        """What the demand of the window costs in a list of sizes, as a function."""
        sizes, counts = self._demand.histogram()
        counts, sizes = counts[sizes <= self.max_size], sizes[sizes <= self.max_size]

        def price(ready: Iterable[int]) -> float:
            if not sizes.size:
                return 0.0
            return float(counts @ self._cost.steps(buckets.padded(sizes, np.array(sorted(set(ready))))))

        return price

    def _capture_one(self, sizes: tuple[int, ...], fn: Callable[[Step], Any], planned: list[int]) -> str:
        """Capture one size and put it in service; return why not, counted where that failed, else nothing."""
        try:
            with self._shared.lock:
                if self._first.function is not fn:
                    return "the graphs were closed, or captured anew, meanwhile"
            try:  # a capture that is waited for may itself wait for what this thread is learning
                nbytes = self._first.capture(self.layout.named(sizes), wait=False).nbytes
            except BusyError as error:
                return str(error)
            with self._shared.lock:
                graph = self._first.graphs.exact(sizes)
                if graph is None:
                    return "the graphs were closed meanwhile"
                if self._byte_budget is not None and self._taken() + nbytes > self._byte_budget:
                    self._first.graphs.exchange([graph], [])  # closed as soon as that is allowed
                    self._refused = fn, planned
                    raise MemoryError(f"it takes {nbytes:,} bytes, more than is left of the budget")
                self._made[graph] = nbytes
                self._captures += 1
        except Exception as error:  # degrade to what was there: whatever was wrong, the graphs in service are right
            self._failures += 1
            _log.warning("prewarming a graph for %s failed: %s", self.layout.named(sizes), error)
            return f"the graph for {sizes[0]} tokens failed, see the log"
        return ""

    def _spare(self, planned: list[int], full: tuple[int, ...]) -> list[CapturedStep]:
        """The graphs that the plan does not want, but the largest: whatever was served stays served."""
        with self._shared.lock:
            ours = [graph for graph in self._first.graphs if graph.sizes[1:] == full]
        return [graph for graph in ours[:-1] if graph.sizes[0] not in planned]

    def _drop_one(
        self, planned: list[int], full: tuple[int, ...], price: Callable[[Iterable[int]], float], *, made: bool = False
    ) -> bool:
        """Take the graph out of service that is missed least of those that the plan does not want; False if none is.

        With `made`, of those that the byte budget counts.
        """
        with self._shared.lock:
            spare = [graph for graph in self._spare(planned, full) if not made or self._made.get(graph)]
            if not spare:
                return False
            present = {graph.sizes[0] for graph in self._first.graphs if graph.sizes[1:] == full}
            self._withdraw(min(spare, key=lambda graph: price(present - {graph.sizes[0]})))
        return True

    def _trade(self, size: int, full: tuple[int, ...], price: Callable[[Iterable[int]], float]) -> None:
        """Take a prewarmed graph out of service where `size` in its place saves a twentieth of the cost, or more.

        Each trade lowers the cost by as much, so that two sizes do not take turns.
        """
        with self._shared.lock:
            spare = [graph for graph in self._spare([], full) if self._made.get(graph)]
            if not spare:
                return
            present = {graph.sizes[0] for graph in self._first.graphs if graph.sizes[1:] == full}
            costs = [(price((present - {graph.sizes[0]}) | {size}), at) for at, graph in enumerate(spare)]
            cost, at = min(costs)
            if cost <= TRADED * price(present):
                self._withdraw(spare[at])

    def _withdraw(self, graph: CapturedStep) -> None:
        """Take a graph out of service, because another is worth more. Holds the manager's lock."""
        self._first.graphs.exchange([graph], [])
        self._closings += 1
        self._settle()

    def _settle(self) -> None:
        """Settle the account of prewarmed graphs that are closed. Holds the manager's lock."""
        present = {*self._first.graphs, *(graph for _, graph in self._first.graphs.leaving)}
        for graph in [graph for graph in self._made if graph not in present]:
            self._unused += graph.steps == 0
            del self._made[graph]

    def _taken(self, *, leaving: bool = True) -> int:
        """Bytes that prewarming takes; without `leaving`, once the graphs out of service are closed."""
        with self._shared.lock:
            self._settle()
            graphs = self._made if leaving else [graph for graph in self._first.graphs if graph in self._made]
            return sum(self._made[graph] for graph in graphs) + _nbytes(self._reserved)

    def _fits_bytes(self, *, leaving: bool = True) -> bool:
        """Whether one more graph, as large as the largest so far, stays within the byte budget."""
        if self._byte_budget is None:
            return True
        return self._taken(leaving=leaving) + max(self._made.values(), default=0) <= self._byte_budget

    def _prewarm_buffers(self) -> None:
        if self._specs is None or not len(self._demand):
            return
        room = float("inf") if self._byte_budget is None else self._byte_budget - sum(self._made.values())
        try:
            wanted: Counter[BufferSpec] = Counter()  # at once: steps of two sizes may share what both of them name
            for size in self._forecast(self.max_graphs):
                more = wanted | Counter(self._specs(size))
                if _nbytes(more) <= room:
                    wanted = more
            if _nbytes(self._reserved | wanted) > room:
                # All of it: the pool frees what is idle longest, which need not be what is no longer wanted.
                self._shared.pool.trim(max(0, self._shared.pool.stats().reserved_bytes - _nbytes(self._reserved)))
                self._reserved.clear()
            for spec, count in wanted.items():
                self._shared.pool.reserve([spec] * count)
                self._reserved[spec] = max(count, self._reserved[spec])
        except Exception as error:  # as for graphs: what was reserved stays right
            self._failures += 1
            _log.warning("prewarming buffers failed: %s", error)

    # ------------------------------------------------------------------------------------------------ background

    def start(self, interval_s: float = 1.0) -> None:
        """Prewarm in a thread of its own, every `interval_s` seconds, until `stop` or `close`.

        Raises
        ------
        ValueError
            The interval is not a positive number of seconds.
        """
        if not 0 < interval_s <= threading.TIMEOUT_MAX:
            raise ValueError(f"interval_s is {interval_s!r}: give a positive number of seconds that a thread can wait")
        with self._shared.lock:
            self._shared.check_open()
            if self._worker is not None and self._worker.is_alive() and not self._stopping.is_set():
                return
            self._stopping = threading.Event()  # this thread's own: the end of an earlier one cannot end it
            self._worker = threading.Thread(
                target=self._work, args=(float(interval_s), self._stopping), name="numbabuf-prewarm", daemon=True
            )
            self._worker.start()
            _running.add(self)

    def _work(self, interval_s: float, stopping: threading.Event) -> None:
        if self._shared.stream.device:  # a new thread begins on device 0
            _cuda.cuda.select_device(self._shared.stream.device)
        with contextlib.suppress(NumbabufError):  # prewarm says so, if there is no device any more
            _cuda.require()  # before the collector runs here: Numba destroys what it finds in this thread's context
        while not stopping.wait(interval_s) and not self.closed:
            try:
                self.prewarm()
            except Exception as error:  # closed under the thread, or a device that is gone: the next step says so
                self._failures += 1
                _log.warning("prewarming failed: %s", error)

    def stop(self) -> None:
        """End the background thread and wait for it; in a function that is being captured, without waiting.

        Again, it does nothing.
        """
        inside = _owned(self._shared.lock) or _owned(self._learning)  # the thread may be waiting for one of them
        with self._shared.lock:
            worker = self._worker
            self._stopping.set()
        if worker is not None and not inside and worker is not threading.current_thread():
            worker.join()

    def close(self) -> None:
        """Stop the thread, then as `InputBufferManager.close`."""
        if not self.closed:  # before the thread is stopped: what is refused changes nothing
            self._shared.refuse_inside("close")
            if self._shared.capturing.thread == threading.get_ident():
                self._shared.capturing.refuse("the manager cannot be closed")
        self.stop()
        try:
            super().close()
        finally:
            if self.closed:
                self._demand.let_go(self)

    def _disown(self) -> None:
        super()._disown()
        self._learning, self._worker = threading.RLock(), None  # threads do not survive a fork
        self._counting, self._midway = threading.Lock(), False

    def prediction(self) -> PredictionStats:
        """Return one snapshot of how the predictions did."""
        with self._learned():
            with self._shared.lock:
                self._settle()
                return PredictionStats(
                    hits=self._hits,
                    misses=self._misses,
                    unserved=self._first.overflow.count + self._refusals,
                    warmed=self._captures,
                    warmed_unused=self._unused + sum(graph.steps == 0 for graph in self._made),
                    closed=self._closings,
                    failures=self._failures,
                    graph_bytes=sum(self._made.values()),
                    reserved_bytes=_nbytes(self._reserved),
                    padding=self.stats().padding,
                    refits=self._refitter.refits,
                    capture_seconds=self._capture_seconds,
                    model_seconds=self._model_seconds,
                )


def _noter(recent: deque[int], most: int, count_older: Callable[[], None]) -> Callable[..., None]:
    """Return a manager's observer: it remembers each step's size, and has the oldest counted where there are many."""
    append = recent.append

    # Hot path, guarded by benchmarks/step.py; a closure, as each attribute would cost as much as the append.
    def note(size: int, program: Program | None = None) -> None:
        append(size)
        if len(recent) > most:
            count_older()

    return note


def _by_value(
    missing: list[int], present: list[int], max_size: int, price: Callable[[Iterable[int]], float]
) -> list[int]:
    """Order sizes by what each saves on top of those before it, the most first; an absent `max_size` leads."""
    ready, order, left = set(present), [], missing[::-1]
    while left:
        best = max_size if max_size in left else min(left, key=lambda extra: price({*ready, extra}))
        left.remove(best)
        order.append(best)
        ready.add(best)
    return order


def _nbytes(specs: Counter[BufferSpec]) -> int:
    return sum(spec.size_bytes * count for spec, count in specs.items())


def _owned(lock: Any) -> bool:
    """Whether this thread holds an RLock; what `threading.Condition` asks of it too."""
    return bool(lock._is_owned())


def _size_and_room(size: int) -> str:
    """What a progress bar says while a size is captured."""
    free = _cuda.memory_info()
    return f"{size} tokens" + (f", {nbytes(free[0])} free" if free else "")
