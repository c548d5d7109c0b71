"""numbabuf on a Dask cluster: a manager and a pool in every worker, their statistics, and one demand for all of them.

Dask places the work and restarts what dies; `Fleet` sees to it that each worker has a manager, that nothing is left
when it goes, and that each one prewarms what the whole cluster was asked for. Needs the extra `dask` on the client, the
scheduler and the workers. Sits above the library; nothing imports it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from .. import _cuda
from ..demand.model import DemandModel
from ..errors import BusyError
from ..pool.pool import BufferPool, SimpleBufferPool
from ..pool.stats import ManagerStats, PoolStats, PredictionStats
from ..predict.manager import PredictiveBufferManager
from ..step.manager import InputBufferManager
from ..view import html

if TYPE_CHECKING:
    from distributed import Client, Worker, WorkerPlugin

__all__ = ["Fleet", "SharedDemand", "WorkerManager", "WorkerStats", "worker_manager"]

_log = logging.getLogger("numbabuf")

_Make = Callable[[BufferPool], InputBufferManager]
_MakePool = Callable[[], BufferPool]


class WorkerStats(NamedTuple):
    """One worker's figures, at one moment."""

    device: str
    """Name of the device that the worker uses."""
    pool: PoolStats
    manager: ManagerStats
    prediction: PredictionStats | None
    """None where the manager predicts nothing."""


class SharedDemand(NamedTuple):
    """What one exchange of demand did."""

    demand: DemandModel
    """The newest steps of all workers together, those of workers that are gone included."""
    captured: dict[str, tuple[int, ...]]
    """Worker's address -> the sizes that it captured upon it."""


class Fleet:
    """A manager and a pool in each worker of a cluster, those that join or are restarted later included.

    Parameters
    ----------
    client : distributed.Client
        The cluster, by a client that is not asynchronous.
    make : callable, optional
        ``make(pool)`` returns a worker's manager over the worker's pool; called once in each, and sent there by pickle.
        Default: a `PredictiveBufferManager` with its own defaults. Graphs that must be there from the start are
        captured in it.
    pool : callable
        Makes a worker's pool, without arguments.
    name : str
        What the tasks ask for in `worker_manager`; two fleets of one cluster need two names.

    Raises
    ------
    ImportError
        Dask's package distributed is not installed.
    Exception
        What `make` or `pool` raised in a worker.

    Notes
    -----
    GPUs: a worker uses the first device that it sees. Start workers with one each (CUDA_VISIBLE_DEVICES, which the
    package dask-cuda sets), or they share the first.
    Threads: a step's result lies in memory that the next step writes. A task that steps and reads does both inside one
    ``with worker_manager() as manager:``, which the other tasks of the worker wait for: the result is its own, whatever
    the number of threads.
    Clocks: demand is merged by the workers' wall clocks, which should agree.

    Examples
    --------
    In a program, on a cluster of two processes of this machine::

        def make(pool):
            manager = PredictiveBufferManager(pool, max_batch_size=8, max_seq_len=512)
            manager.capture_buckets(step)
            return manager

        def serve(tokens):
            with worker_manager() as manager:  # no other task steps it until the result is read
                scores = manager.replay({"input_ids": tokens}, len(tokens))
                manager.synchronize()
                return scores.copy_to_host()[: len(tokens)]

        with LocalCluster(n_workers=2) as cluster, Client(cluster) as client, Fleet(client, make) as fleet:
            client.gather(client.map(serve, requests))
            fleet.share_demand()
            print(fleet.stats())
    """

    def __init__(
        self,
        client: Client,
        make: Callable[[BufferPool], InputBufferManager] = PredictiveBufferManager,
        *,
        pool: Callable[[], BufferPool] = SimpleBufferPool,
        name: str = "numbabuf",
    ) -> None:
        self._client = client
        self.name = name
        self.closed = False
        self._known: dict[str, DemandModel] = {}  # address -> the worker's own steps, as last heard
        client.register_plugin(_plugin(make, pool, name), name=name)

    def stats(self) -> dict[str, WorkerStats]:
        """Return the figures of each worker, by its address; a worker that goes meanwhile is left out, and logged."""
        return self._ask("stats")

    def share_demand(self) -> SharedDemand:
        """Merge what all workers were asked for, and have each prewarm it.

        Returns
        -------
        shared : SharedDemand

        Notes
        -----
        Call it from time to time. A worker's steps count once, however often this is called; what a worker did that has
        died since its last exchange is lost, what it did before counts as long as it is among the newest. Workers that
        start later take the last merged demand over. Steps that a manager refused for their size are shared, those
        reported by `record_usage` alone are not. A manager that predicts nothing is counted, and captures nothing.
        Cost: a round trip, the learning of a window of steps and, in each worker, `prewarm`.
        """
        self._known |= {address: DemandModel(**packed) for address, packed in self._ask("own_demand").items()}
        if not self._known:
            raise RuntimeError("no worker answered: start one, and see the log of numbabuf for those that left")
        demand = DemandModel.merge(self._known.values())
        oldest = demand.seen[0][0] if len(demand) == demand.window else float("-inf")
        present = self._client.scheduler_info(n_workers=-1)["workers"]
        self._known = {
            address: model
            for address, model in self._known.items()
            if address in present or (len(model) and model.seen[-1][0] >= oldest)
        }
        packed = _pack(demand.settings, demand.seen)
        self._client.set_metadata([_KEY, self.name], packed)  # for those that start from now on
        return SharedDemand(demand, self._ask("adopt", packed))

    def _ask(self, method: str, *arguments: Any) -> dict[str, Any]:
        """Call a method of what each worker holds; return the answers by address."""
        if self.closed:
            raise RuntimeError("the fleet is closed: make a new one")
        answers = self._client.run(_call, self.name, method, arguments, on_error="return")
        for address, answer in answers.items():
            if isinstance(answer, OSError):  # distributed's word for a connection that broke
                _log.warning("worker %s left while it was asked for %s: %s", address, method, answer)
            elif isinstance(answer, Exception):
                raise answer
        return {
            address: answer[0] for address, answer in answers.items() if not isinstance(answer, OSError) and answer
        }

    def close(self) -> None:
        """Close every worker's manager and pool, and start none in workers to come. Doing it again does nothing."""
        if self.closed:
            return
        self.closed = True
        self._client.set_metadata([_KEY, self.name], None)
        self._client.unregister_worker_plugin(self.name)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Fleet({self.name!r}, {'closed' if self.closed else self._client})"

    def _repr_html_(self) -> str:
        """Workers and the steps in their demand as last shared; asks nobody."""
        rows = [(address, len(model)) for address, model in sorted(self._known.items())]
        return html.card(f"Fleet({self.name!r})", html.table(["worker", "steps known of it"], rows))


class WorkerManager:
    """A worker's manager as a task sees it; made by `worker_manager`.

    As a context manager it gives the manager itself, and no other task enters until the block is left. Leaving the
    block does not close the manager. Without a ``with``, its attributes are the manager's own and nothing is held:
    enough for what reads no results, such as `record_usage` or `stats`, and for steps where the worker has one thread.
    Where it has more, a step outside of the block is refused with BusyError.

    Examples
    --------
    In a task::

        with worker_manager() as manager:
            scores = manager.replay({"input_ids": tokens}, len(tokens))
            manager.synchronize()
            return scores.copy_to_host()[: len(tokens)]
    """

    __slots__ = ("_held", "_threads")

    def __init__(self, held: _Held, threads: int = 1) -> None:
        self._held = held
        self._threads = threads  # that the worker runs tasks in

    def __enter__(self) -> InputBufferManager:
        """Wait for the other tasks of this worker to leave, and return the manager.

        Raises
        ------
        BusyError
            This thread is inside such a block already: a second step would overwrite the first one's results.
        """
        return self._held.enter()

    def __exit__(self, *exc: object) -> None:
        self._held.leave()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a worker's manager stays in its worker: call worker_manager() in each task")

    def __getattr__(self, name: str) -> Any:
        if name in _STEPS and self._threads > 1 and not self._held.inside:
            raise BusyError(
                f"worker_manager().{name} outside of its block, in a worker of {self._threads} threads: another task "
                f"may step before the result is read; write `with worker_manager() as manager:` around "
                f"manager.{name}(...) and the reading"
            )
        return getattr(self._held.manager, name)

    def __repr__(self) -> str:
        return f"WorkerManager({self._held.manager!r})"


def worker_manager(name: str = "numbabuf") -> WorkerManager:
    """Return the manager of the worker that this task runs in, to be used as ``with worker_manager() as manager:``.

    Raises
    ------
    ValueError
        This is no task of a Dask worker.
    LookupError
        The worker has no manager of that name.

    Notes
    -----
    Threads: a task that reads what its steps leave does both inside the ``with`` block. Outside of one, a task of
    another thread may step the manager between the two, and the task would read the other's result: only in a worker
    of one thread is ``worker_manager().replay(...)`` accepted.
    """
    from distributed import get_worker

    worker = get_worker()
    plugin = worker.plugins.get(name)
    held = None if plugin is None else plugin.held
    if held is None:
        raise LookupError(f"this worker holds no manager named {name!r}: make Fleet(client, make, name={name!r}) first")
    return WorkerManager(held, worker.state.nthreads)


# ------------------------------------------------------------------------------------------------- inside a worker

_KEY = "numbabuf-demand"  # of the scheduler's metadata: the last merged demand, by the name of the fleet


_STEPS = frozenset({"replay", "stage", "stage_inputs"})

LAST_TASK_S = 60.0
"""Seconds that the end of a worker's manager waits for the task that is inside its block."""


class _Held:
    """What one worker holds: a pool, a manager over it, and the steps that ran here."""

    def __init__(
        self,
        make: Callable[[BufferPool], InputBufferManager],
        pool: Callable[[], BufferPool],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._turn = threading.Lock()  # one task at a time, from its step to the reading of its results
        self._inside: int | None = None  # the thread that holds it
        self.pool = pool()
        try:
            self.manager = make(self.pool)
            if not isinstance(self.manager, InputBufferManager):
                raise TypeError(f"make(pool) returned {self.manager!r}: return an InputBufferManager")
        except BaseException:
            self.pool.close()
            raise
        self._settings = (DemandModel() if self._predicting is None else self._predicting.demand).settings
        # Kept apart from the manager's own model: that takes over the others' steps, which must not come back from
        # here as this worker's.
        self._own: deque[tuple[float, int]] = deque(maxlen=self._settings["window"])
        before, own = self.manager.observer, self._own

        def note(size: int) -> None:
            if size > 0:
                own.append((clock(), size))

        def observe(size: int) -> None:
            note(size)
            if before is not None:
                before(size)

        self.manager.observer = observe
        if self._predicting is not None and self._predicting.refusal_observer is None:
            self._predicting.refusal_observer = note  # what was refused for want of a graph is demand above all

    @property
    def _predicting(self) -> PredictiveBufferManager | None:
        return self.manager if isinstance(self.manager, PredictiveBufferManager) else None

    @property
    def inside(self) -> bool:
        """Whether this thread's task has its turn."""
        return self._inside == threading.get_ident()

    def enter(self) -> InputBufferManager:
        """Take the manager for one task.

        Two tasks without it: A steps; B steps, in another thread, and its graph writes where A's wrote; A reads B's
        results.
        """
        if self.inside:
            raise BusyError(
                "this thread is inside `with worker_manager()` already: use the manager that the outer block gave"
            )
        self._turn.acquire()
        self._inside = threading.get_ident()
        return self.manager

    def leave(self) -> None:
        """End a task's turn; the manager stays as it is."""
        self._inside = None
        self._turn.release()

    def own_demand(self) -> dict[str, Any]:
        """The steps that ran here, as sent."""
        return _pack(self._settings, self._own.copy())

    def adopt(self, packed: dict[str, Any]) -> tuple[int, ...]:
        """Go on with the demand of all workers, and prewarm it."""
        if self._predicting is None:
            return ()
        self._predicting.adopt(DemandModel(**packed))
        return self._predicting.prewarm()

    def stats(self) -> WorkerStats:
        """The figures of this worker."""
        prediction = None if self._predicting is None else self._predicting.prediction()
        return WorkerStats(_cuda.device_name(), self.pool.stats(), self.manager.stats(), prediction)

    def close(self) -> None:
        """Close the manager, then the pool; say so if somebody else still leases from it."""
        mine = self.inside
        # A task inside its block still reads memory that goes back to the driver here.
        waited = not mine and self._turn.acquire(timeout=LAST_TASK_S)
        if not (mine or waited):
            _log.warning("a task still holds a worker's manager after %g s: it is closed under it", LAST_TASK_S)
        try:
            self.manager.close()
        finally:
            if waited:
                self._turn.release()
            leased = self.pool.stats().in_use_count
            if leased:
                _log.warning("%d buffer(s) of a worker's pool are still leased at its end: release them", leased)
            self.pool.close()


def _pack(settings: dict[str, Any], seen: Iterable[tuple[float, int]]) -> dict[str, Any]:
    """Return a model as lists of numbers, which Dask's own protocol carries: the arguments of its like."""
    buckets = settings["buckets"]
    return {**settings, "buckets": buckets and list(buckets), "seen": [list(pair) for pair in seen]}


async def _call(name: str, method: str, arguments: tuple[Any, ...], dask_worker: Worker) -> tuple[Any] | None:
    """Call a method of what a worker holds, in a thread of its own: the worker goes on talking to its scheduler."""
    plugin = dask_worker.plugins.get(name)
    if plugin is None or plugin.held is None:
        return None  # it is being set up
    return (await asyncio.to_thread(getattr(plugin.held, method), *arguments),)


@functools.cache
def _plugin_class() -> type:
    """The plugin's class, made when first needed, as its base is an optional package's."""
    try:
        from distributed import WorkerPlugin
    except ImportError:
        raise ImportError("numbabuf.ext.dask needs Dask's package distributed: pip install numbabuf[dask]") from None

    class Plugin(WorkerPlugin):  # type: ignore[misc]
        """Dask calls it in every worker: `setup` when it starts, `teardown` when it ends in good order."""

        def __init__(self, make: _Make, pool: _MakePool, name: str) -> None:
            self.name = name
            self.held: _Held | None = None
            self._make, self._pool = make, pool

        async def setup(self, worker: Worker) -> None:
            held = await asyncio.to_thread(_Held, self._make, self._pool)
            try:
                demand = await worker.scheduler.get_metadata(keys=[_KEY, self.name], default=None)
                if demand is not None:
                    await asyncio.to_thread(held.adopt, demand)
            except BaseException:  # nobody tears down what was never set up
                await asyncio.to_thread(held.close)
                raise
            self.held = held

        async def teardown(self, worker: Worker) -> None:
            held, self.held = self.held, None
            if held is not None:
                await asyncio.to_thread(held.close)

        def __reduce__(self) -> tuple[object, ...]:
            return _plugin, (self._make, self._pool, self.name)  # the class itself has no name to be found by

    return Plugin


def _plugin(make: _Make, pool: _MakePool, name: str) -> WorkerPlugin:
    return _plugin_class()(make, pool, name)
