"""What is known of one program's demand: the model, the bucket list that follows it, and how the forecasts did.

Steps are learned when something is asked, never while they run. Knows no program, no pool and no device. Sits above
`usage` and the room `demand`, below `prewarm`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ..demand import buckets
from ..demand.model import DemandModel
from ..demand.turn import Turn
from .usage import Usage

__all__ = ["Learning", "Scores"]


class Scores(NamedTuple):
    """How the forecasts did, and what they cost."""

    hits: int
    """Steps whose size was among those last forecast."""
    misses: int
    """Steps whose size was not."""
    refits: int
    """Times the bucket list was reconsidered."""
    seconds: float
    """Time spent on learning and forecasting."""


class Learning:
    """A demand model and a bucket list of one program's steps.

    Parameters
    ----------
    usage : Usage
        Where the steps are noted.
    demand : DemandModel
    refitter : callable
        ``refitter(window)`` makes a bucket list for demand that is remembered for so many steps.
    clock : callable returning float
        Seconds.

    Notes
    -----
    Threads: any thread may ask, one at a time; no lock is taken while one is answered, so that a captured function may
    ask too. In the middle of learning, as from the model's clock or a signal handler, BusyError.
    """

    def __init__(
        self,
        usage: Usage,
        demand: DemandModel,
        refitter: Callable[[int], buckets.Refitter],
        clock: Callable[[], float],
    ) -> None:
        self._usage, self._demand, self._clock = usage, demand, clock
        self._make_refitter = refitter
        self._refitter = refitter(demand.window)
        self._turn = Turn("this thread is learning a step's demand: ask when the call that learns it has returned")
        self._expected: frozenset[int] = frozenset()  # the model's buckets last forecast
        self._hits = self._misses = 0
        self._seconds = 0.0

    @property
    def inside(self) -> bool:
        """Whether this thread is in the middle of learning, so that other threads may wait for it."""
        return self._turn.inside

    @contextlib.contextmanager
    def learned(self) -> Iterator[DemandModel]:
        """Give the model, with every step so far in it; other threads' questions wait for the end of the block."""
        with self._turn:
            began = self._clock()
            for size, steps in self._usage.take_older().items():
                self._score(size, steps)
            for size in self._usage.take_recent():
                self._score(size, 1)
                if size < 1:
                    continue  # a step without tokens asks for nothing
                self._demand.observe(size)
                self._refitter.observe(size)
            self._seconds += self._clock() - began
            yield self._demand

    def _score(self, size: int, steps: int) -> None:
        """Count steps of one size as hits or misses of the last forecast."""
        if not self._expected or size < 1:
            return
        known = self._demand.buckets
        if known[min(int(np.searchsorted(known, size)), len(known) - 1)] in self._expected:
            self._hits += steps
        else:
            self._misses += steps

    def forecast(self, n: int, most: int) -> list[int]:
        """Return at most `n` sizes worth having ready, the best first; those above `most` as `most`."""
        with self.learned() as demand:
            began = self._clock()
            sizes = [forecast.size for forecast in demand.forecast(n)]
            self._expected = frozenset(sizes)
            self._seconds += self._clock() - began
        return list(dict.fromkeys(min(size, most) for size in sizes))

    @property
    def planned(self) -> tuple[int, ...]:
        """The bucket list in force, increasing; the steps since the last question are not in it."""
        return tuple(self._refitter.sizes.tolist())

    def adopt(self, demand: DemandModel, owner: object) -> None:
        """Go on with `demand`, which becomes the `owner`'s, and plan from it too."""
        refitter = self._make_refitter(demand.window)
        with self.learned() as before:
            demand.claim(owner)
            refitter.sizes = self._refitter.sizes
            for _, size in demand.seen:
                refitter.observe(size)
            refitter.refit()
            refitter.refits += self._refitter.refits
            self._demand, self._refitter = demand, refitter
            if before is not demand:
                before.let_go(owner)

    def let_go(self, owner: object) -> None:
        """Give the model up at the end."""
        self._demand.let_go(owner)

    def scores(self) -> Scores:
        """Return how the forecasts did so far."""
        with self.learned():
            return Scores(self._hits, self._misses, self._refitter.refits, self._seconds)
