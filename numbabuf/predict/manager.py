"""An input manager that watches its own demand: it chooses the sizes worth a graph and has them ready before use.

A facade: a `Prewarmer` of the manager's first program does what the names here say. Nothing but people's tools sits
above.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .. import _cuda
from ..checks import OnProgress, whole_number
from ..demand import buckets
from ..demand.model import DemandModel
from ..pool.pool import BufferPool
from ..pool.spec import BufferSpec
from ..step.graph import Step
from ..step.layout import bucket_lists
from ..step.manager import InputBufferManager
from .budgets import Budgets
from .prewarm import Prewarmer
from .stats import PredictionStats

__all__ = ["PredictiveBufferManager"]


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
    Programs: what is said here is about the manager's own calls; a further program gets a `Prewarmer` of its own.

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
        super().__init__(pool, max_batch_size, max_seq_len, **options)
        try:
            given = bucket_lists(options.get("buckets"), self.max_tokens).get("tokens", (self.max_tokens,))
            top = whole_number("max_size", given[-1] if max_size is None else max_size, most=self.max_tokens)
            self.prewarmer = Prewarmer(
                self.programs["main"],
                self.pool,
                DemandModel(window) if demand is None else demand,
                Budgets(top, max_graphs, prewarm_bytes, prewarm_seconds),
                cost=cost,
                specs=specs,
                max_tokens=self.max_tokens,
                clock=clock,
            )
        except BaseException:  # a manager that could not be made owns nothing
            super().close()
            raise

    # ---------------------------------------------------------------------------------------------------- demand

    @property
    def demand(self) -> DemandModel:
        """The model, with every step so far learned; save it, or merge it with those of other workers."""
        return self.prewarmer.demand

    @property
    def max_size(self) -> int:
        """The largest number of tokens that always has a graph."""
        return self.prewarmer.budgets.max_size

    @property
    def max_graphs(self) -> int:
        """Most graphs to have captured."""
        return self.prewarmer.budgets.max_graphs

    @property
    def refusal_observer(self) -> Callable[[int], None] | None:
        """See `Prewarmer.refusal_observer`."""
        return self.prewarmer.refusal_observer

    @refusal_observer.setter
    def refusal_observer(self, observer: Callable[[int], None] | None) -> None:
        self.prewarmer.refusal_observer = observer

    def adopt(self, demand: DemandModel) -> None:
        """Go on with `demand` in place of what was learned here; see `Prewarmer.adopt`."""
        self.prewarmer.adopt(demand)

    def record_usage(self, num_tokens: int) -> None:
        """Count a step of `num_tokens` that did not run through this manager; its own steps are counted by themselves.

        Raises
        ------
        TypeError, ValueError
            It is not a whole number from 1 to the manager's capacity.
        """
        self.prewarmer.record_usage(num_tokens)

    def predict_next_sizes(self, n: int = 3) -> list[int]:
        """Return at most `n` sizes worth having ready for the next steps, the best first."""
        return self.prewarmer.predict_next_sizes(n)

    def plan_buckets(self, k: int) -> tuple[int, ...]:
        """Return the `k` sizes that serve the demand so far at the least cost, `max_size` always the last."""
        return self.prewarmer.plan_buckets(k)

    # --------------------------------------------------------------------------------------------------- prewarm

    def capture_buckets(
        self,
        fn: Callable[[Step], Any],
        sizes: Iterable[int | Mapping[str, int]] | None = None,
        *,
        on_progress: OnProgress | None = None,
        warm_up: str | None = None,
    ) -> tuple[dict[str, int], ...]:
        """As `InputBufferManager.capture_buckets`; without `sizes`, the sizes that the demand so far suggests.

        `prewarm` goes on with the same function.
        """
        sizes = self.prewarmer.planned() if sizes is None else sizes
        return super().capture_buckets(fn, sizes, on_progress=on_progress, warm_up=warm_up)

    def prewarm(
        self, fn: Callable[[Step], Any] | None = None, *, on_progress: OnProgress | None = None
    ) -> tuple[int, ...]:
        """Have ready what the demand suggests: graphs of the planned sizes, and buffers; see `Prewarmer.prewarm`."""
        return self.prewarmer.prewarm(fn, on_progress=on_progress)

    def start(self, interval_s: float = 1.0) -> None:
        """Prewarm in a thread of its own, every `interval_s` seconds, until `stop` or `close`.

        Raises
        ------
        ValueError
            The interval is not a positive number of seconds.
        """
        self.prewarmer.start(interval_s)

    def stop(self) -> None:
        """End the background thread and wait for it; in a function that is being captured, without waiting."""
        self.prewarmer.stop()

    def close(self) -> None:
        """Stop the thread, then as `InputBufferManager.close`."""
        # Not where the close below is refused: what is refused changes nothing.
        if not (self.closed or _cuda.capturing() or self.prewarmer.program.inside):
            self.prewarmer.stop()
        try:
            super().close()
        finally:
            if self.closed:
                self.prewarmer.close()

    def prediction(self) -> PredictionStats:
        """Return one snapshot of how the predictions did."""
        return dataclasses.replace(self.prewarmer.prediction(), padding=self.stats().padding)
