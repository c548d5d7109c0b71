"""What a fleet keeps in each worker of a Dask cluster, and the plugin that brings it there.

Private to `dask`: what Dask pickles by name is here. Imports distributed when a plugin is first made.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import _cuda
from ..demand.model import DemandModel
from ..errors import BusyError
from ..pool.pool import BufferPool
from ..pool.stats import PoolStats
from ..predict.manager import PredictiveBufferManager
from ..predict.stats import PredictionStats
from ..step.manager import InputBufferManager
from ..step.stats import ManagerStats

if TYPE_CHECKING:
    from distributed import Worker, WorkerPlugin

    from ..step.program import Program

__all__ = ["KEY", "LAST_TASK_S", "Held", "WorkerStats", "call", "pack", "plugin", "plugin_class"]

_log = logging.getLogger("numbabuf")

Make = Callable[[BufferPool], InputBufferManager]
MakePool = Callable[[], BufferPool]


class WorkerStats(NamedTuple):
    """One worker's figures, at one moment."""

    device: str
    """Name of the device that the worker uses."""
    pool: PoolStats
    manager: ManagerStats
    prediction: PredictionStats | None
    """None where the manager predicts nothing."""


KEY = "numbabuf-demand"  # of the scheduler's metadata: the last merged demand, by the name of the fleet

LAST_TASK_S = 60.0
"""Seconds that the end of a worker's manager waits for the task that is inside its block."""


class Held:
    """What one worker holds: a pool, a manager over it, and the steps that ran here."""

    def __init__(self, make: Make, pool: MakePool, clock: Callable[[], float] = time.time) -> None:
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

        def observe(size: int, program: Program) -> None:
            if program.name == "main":  # what is shared is the demand on the manager's own calls
                note(size)
            if before is not None:
                before(size, program)

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
        return pack(self._settings, self._own.copy())

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
        """Close the manager, then the pool; say so if other leases of it are open."""
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


def pack(settings: dict[str, Any], seen: Iterable[tuple[float, int]]) -> dict[str, Any]:
    """Return a model as lists of numbers, which Dask's own protocol carries: the arguments of its like."""
    buckets = settings["buckets"]
    return {**settings, "buckets": buckets and list(buckets), "seen": [list(pair) for pair in seen]}


async def call(name: str, method: str, arguments: tuple[Any, ...], dask_worker: Worker) -> tuple[Any] | None:
    """Call a method of what a worker holds, in a thread of its own: the worker goes on talking to its scheduler."""
    found = dask_worker.plugins.get(name)
    if found is None or found.held is None:
        return None  # it is being set up
    return (await asyncio.to_thread(getattr(found.held, method), *arguments),)


@functools.cache
def plugin_class() -> type:
    """The plugin's class, made when first needed, as its base is an optional package's."""
    try:
        from distributed import WorkerPlugin
    except ImportError:
        raise ImportError("numbabuf.ext.dask needs Dask's package distributed: pip install numbabuf[dask]") from None

    class Plugin(WorkerPlugin):  # type: ignore[misc]
        """Dask calls it in every worker: `setup` when it starts, `teardown` when it ends in good order."""

        def __init__(self, make: Make, pool: MakePool, name: str) -> None:
            self.name = name
            self.held: Held | None = None
            self._make, self._pool = make, pool

        async def setup(self, worker: Worker) -> None:
            held = await asyncio.to_thread(Held, self._make, self._pool)
            try:
                demand = await worker.scheduler.get_metadata(keys=[KEY, self.name], default=None)
                if demand is not None:
                    await asyncio.to_thread(held.adopt, demand)
            except BaseException:  # what was never set up is never torn down
                await asyncio.to_thread(held.close)
                raise
            self.held = held

        async def teardown(self, worker: Worker) -> None:
            held, self.held = self.held, None
            if held is not None:
                await asyncio.to_thread(held.close)

        def __reduce__(self) -> tuple[object, ...]:
            return plugin, (self._make, self._pool, self.name)  # the class itself has no name to be found by

    return Plugin


def plugin(make: Make, pool: MakePool, name: str) -> WorkerPlugin:
    return plugin_class()(make, pool, name)
