"""numbabuf on a Dask cluster: a manager and a pool in every worker, their statistics, and one demand for all of them.

Dask places the work and restarts what dies; `Fleet` sees to it that each worker has a manager, that nothing is left
when it goes, and that each one prewarms what the whole cluster was asked for. Needs the extra `dask` on the client, the
scheduler and the workers. Sits above the library; nothing imports it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from ..demand.model import DemandModel
from ..errors import BusyError
from ..pool.pool import SimpleBufferPool
from ..predict.manager import PredictiveBufferManager
from ..step.manager import InputBufferManager
from ..view import html
from ._worker import KEY, Held, Make, MakePool, WorkerStats, call, pack, plugin

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["Fleet", "SharedDemand", "WorkerManager", "WorkerStats", "worker_manager"]

_log = logging.getLogger("numbabuf")

_STEPS = frozenset({"replay", "stage", "stage_inputs"})


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
        make: Make = PredictiveBufferManager,
        *,
        pool: MakePool = SimpleBufferPool,
        name: str = "numbabuf",
    ) -> None:
        self._client = client
        self.name = name
        self.closed = False
        self._known: dict[str, DemandModel] = {}  # address -> the worker's own steps, as last heard
        client.register_plugin(plugin(make, pool, name), name=name)

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
        packed = pack(demand.settings, demand.seen)
        self._client.set_metadata([KEY, self.name], packed)  # for those that start from now on
        return SharedDemand(demand, self._ask("adopt", packed))

    def _ask(self, method: str, *arguments: Any) -> dict[str, Any]:
        """Call a method of what each worker holds; return the answers by address."""
        if self.closed:
            raise RuntimeError("the fleet is closed: make a new one")
        answers = self._client.run(call, self.name, method, arguments, on_error="return")
        for address, answer in answers.items():
            if isinstance(answer, OSError):  # distributed's word for a connection that broke
                _log.warning("worker %s left while it was asked for %s: %s", address, method, answer)
            elif isinstance(answer, Exception):
                raise answer
        return {address: answer[0] for address, answer in answers.items() if not isinstance(answer, OSError) and answer}

    def close(self) -> None:
        """Close every worker's manager and pool, and start none in workers to come. Doing it again does nothing."""
        if self.closed:
            return
        self.closed = True
        self._client.set_metadata([KEY, self.name], None)
        self._client.unregister_worker_plugin(self.name)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Fleet({self.name!r}, {'closed' if self.closed else self._client})"

    def _repr_html_(self) -> str:
        """Workers and the steps in their demand as last shared; no worker is asked."""
        rows = [(address, len(model)) for address, model in sorted(self._known.items())]
        return html.card(f"Fleet({self.name!r})", html.table(["worker", "steps known of it"], rows))


class WorkerManager:
    """A worker's manager as a task sees it; made by `worker_manager`.

    As a context manager it gives the manager itself, and no other task enters until the block is left. Leaving the
    block does not close the manager. Without a ``with``, its attributes are the manager's own and nothing is held:
    enough for what reads no results, such as `record_usage` or `stats`, and for steps where the worker has one thread.
    Where it has more, a step outside of the block is refused with BusyError.

    `Fleet` shows a task with such a block. Without it, another thread's task may step the manager before the result is
    read: what is read is then the other's.
    """

    __slots__ = ("_held", "_threads")

    def __init__(self, held: Held, threads: int = 1) -> None:
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
        The caller is not a task of a Dask worker.
    LookupError
        The worker has no manager of that name.

    Notes
    -----
    Threads: what must be inside the ``with``, and why, `WorkerManager` says.
    """
    from distributed import get_worker

    worker = get_worker()
    found = worker.plugins.get(name)
    held = None if found is None else found.held
    if held is None:
        raise LookupError(f"this worker holds no manager named {name!r}: make Fleet(client, make, name={name!r}) first")
    return WorkerManager(held, worker.state.nthreads)
