"""Shape demand: which sizes were asked for lately, and which are worth having ready next.

`DemandModel` is a moving window of observed sizes with a small learner on top. NumPy only: this module knows no pool,
no device and no graph, so that a whole trace runs through it alone. It imports nothing of the package but `resource`,
`checks`, `errors` and `files`; `buckets.plan` reads a model's `histogram()`, and `predictive` turns forecasts into warm
buffers and graphs.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import files
from ..checks import whole_number
from ..errors import BusyError
from ..resource import Shown
from . import learner
from .turn import Turn

__all__ = ["DemandModel", "Forecast"]

Ints = NDArray[np.int64]

MAX_SIZE = 1 << 40
"""Largest size that can be observed; more than that is a damaged number and not a shape."""


MAX_WINDOW = 1 << 20
"""Longest window of a model."""

MAX_CELLS = 1 << 18
"""Most buckets times steps ahead (``warm_steps + 8``) that a learner keeps in view, at 64 bytes each."""

FORMAT, VERSION = "numbabuf demand", 1
"""How a saved model says what it is."""

MAX_STATE_BYTES = 64 << 20
"""Largest saved model that is read: a full window of the longest numbers takes 41 MB."""

LEARNED = 1 << 16
"""Observations, the newest, that a new model learns from: about two seconds; the window may be longer."""

RELEARNED = 1 << 10
"""Those learned again when demand outgrows the buckets; once a doubling, whatever the window."""


class Forecast(NamedTuple):
    """One size worth having ready."""

    size: int
    """The bucket."""
    probability: float
    """Estimated probability, in [0, 1], that it is used within the model's ``horizon`` steps."""


class DemandModel(Shown):
    """A moving window of the demand on one axis, and a forecast of what it asks for next.

    Parameters
    ----------
    window : int
        Observations kept, 1 to 2**20. Estimates forget over a quarter of it.
    buckets : sequence of int, optional
        Sizes that a forecast may name, increasing. An observed size counts for the smallest bucket that holds
        it, one above them all for the largest. By default four sizes a doubling, as far up as demand has
        reached.
    warm_steps : int
        Steps from asking for a size to having it ready: the time of a warm-up over the time of a step; 1 to 1024.
    clock : callable returning float
        Time stamps of the observations, in seconds. `merge` keeps the newest, so workers on several machines
        need one wall clock.
    seen : iterable of (float, int)
        Observations to begin with, as `seen` gives them; with `settings` they are all there is to a model:
        ``DemandModel(**model.settings, seen=model.seen)`` is another of the same forecasts.

    Notes
    -----
    The window is the whole state: `save` writes it, `merge` unites it, and what was learned is learned again
    from its newest 65,536 observations.
    Cost: `observe` with `forecast` takes some tens of microseconds (``python -m benchmarks prediction``), whatever the
    window. A size above all buckets, where these are not given, adds buckets and learns the newest 1,024
    observations again; that happens once a doubling.
    Threads: any thread may call any method, one at a time; `save`, `seen` and `histogram` read one moment of the
    window. A model serves one manager, see `claim`.

    Examples
    --------
    >>> model = DemandModel(buckets=[8, 16, 32], warm_steps=1)
    >>> for size in [5, 6, 30] * 40:
    ...     model.observe(size)
    >>> sorted(forecast.size for forecast in model.forecast(2))
    [8, 32]
    """

    def __init__(
        self,
        window: int = 1024,
        *,
        buckets: Sequence[int] | None = None,
        warm_steps: int = 8,
        clock: Callable[[], float] = time.time,
        seen: Iterable[tuple[float, int]] = (),
    ) -> None:
        self.window = whole_number("window", window, least=1, most=MAX_WINDOW)
        self.warm_steps = whole_number("warm_steps", warm_steps, least=1, most=1024)
        self._fixed = buckets is not None
        self._clock = clock
        self._turn = Turn("this thread is in a call of the demand model already: call it when that has returned")
        self._owner: weakref.ref[Any] | None = None
        self._seen: deque[tuple[float, int]] = deque((_observation(*pair) for pair in seen), self.window)
        largest = max((size for _, size in self._seen), default=1)
        self._learn(_four_per_doubling(largest) if buckets is None else _increasing(buckets), LEARNED)

    def __reduce__(self) -> tuple[object, ...]:
        return _remade, (self.settings, self._clock, self.seen)

    def __len__(self) -> int:
        return len(self._seen)

    def __repr__(self) -> str:
        return f"<DemandModel: {len(self)} of {self.window} observations, {len(self.buckets)} buckets>"

    @property
    def buckets(self) -> tuple[int, ...]:
        """The sizes that a forecast may name, increasing."""
        return self._buckets

    @property
    def settings(self) -> dict[str, Any]:
        """What the model was made with: "window", "warm_steps", and "buckets" or None; the arguments of another."""
        return {
            "window": self.window, "warm_steps": self.warm_steps, "buckets": self._buckets if self._fixed else None
        }  # fmt: skip

    @property
    def seen(self) -> tuple[tuple[float, int], ...]:
        """The observations in the window, (seconds, size) each, in the order in which they came."""
        with self._turn:
            return tuple(self._seen)

    @property
    def horizon(self) -> int:
        """Steps ahead that the probabilities of a forecast speak of: a warm-up and 8 more."""
        return self.learner.horizon

    def observe(self, size: int) -> None:
        """Record that one step needed ``size``.

        Raises
        ------
        TypeError, ValueError
            If ``size`` is not a whole number from 1 to 2**40, or the clock gives no finite number.
        """
        now, size = _observation(self._clock(), size)
        with self._turn:
            self._seen.append((now, size))
            if size > self._buckets[-1] and not self._fixed:
                self._learn(_four_per_doubling(size), RELEARNED)  # this step with them
            else:
                self.learner.observe(self._index(size))

    def claim(self, owner: object) -> None:
        """Make the model `owner`'s, until `let_go`, or until the owner is gone.

        Raises
        ------
        BusyError
            It is another's: two managers would take each other's steps and forecasts for their own.
        """
        with self._turn:
            other = self._owner and self._owner()
            if other is not None and other is not owner:
                raise BusyError(
                    f"the demand model is that of {other!r}: close that one first, or give this one a copy, "
                    "DemandModel(**model.settings, seen=model.seen)"
                )
            self._owner = weakref.ref(owner)

    def let_go(self, owner: object) -> None:
        """End what `claim` began; nothing where the model is not `owner`'s."""
        with self._turn:
            if self._owner is not None and self._owner() is owner:
                self._owner = None

    def forecast(self, k: int) -> tuple[Forecast, ...]:
        """Return the ``k`` sizes to hold ready, those that promise most hits for their room first.

        Fewer where there are fewer buckets, none before the first observation.

        Notes
        -----
        A model takes it that its last forecast is followed: what that named is warm or warming, and is kept
        rather than dropped for a little more, since anything new has to be warmed first.
        """
        k = whole_number("k", k, least=1, most=1 << 24)
        with self._turn:
            chosen, probability = self.learner.forecast(k)
            buckets = self._buckets
        return tuple(Forecast(buckets[i], p) for i, p in zip(chosen, probability, strict=True))

    def histogram(self) -> tuple[Ints, Ints]:
        """Return the sizes in the window, increasing, and how often each was observed."""
        sizes, counts = np.unique(np.array([size for _, size in self.seen], np.int64), return_counts=True)
        return sizes, counts.astype(np.int64)

    @classmethod
    def merge(cls, models: Iterable[DemandModel]) -> DemandModel:
        """Return a new model of what all of ``models`` saw: the newest ``window`` observations of any of
        them.

        In whatever order and grouping models are merged, the result is the same. Its clock is the first
        one's.

        Raises
        ------
        ValueError
            If there is no model, or two differ in window, buckets or warm_steps.
        """
        models = list(models)
        if not models:
            raise ValueError("merge needs at least one DemandModel; found none")
        first = models[0]
        for other in models[1:]:
            if other.settings != first.settings:
                raise ValueError(
                    f"only models of equal window, warm_steps and buckets can be merged; found "
                    f"{first.settings} and {other.settings}: make them alike"
                )
        seen = sorted(pair for model in models for pair in model.seen)
        return cls(**first.settings, clock=first._clock, seen=seen)  # noqa: SLF001 - of this very class

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to ``path`` as JSON; a file there is replaced whole or not at all."""
        seen = self.seen  # one moment of a window that other threads go on filling
        state = {
            "format": FORMAT,
            "version": VERSION,
            **self.settings,
            "times": [at for at, _ in seen],
            "sizes": [size for _, size in seen],
        }
        files.replace(path, json.dumps(state).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, clock: Callable[[], float] = time.time) -> DemandModel:
        """Return the model that `save` wrote.

        Raises
        ------
        ValueError
            The file is larger than `MAX_STATE_BYTES`, is not one that `save` wrote, or holds what no model can hold.
        OSError
            The file cannot be read.
        """
        try:
            data = files.read_regular(path, most=MAX_STATE_BYTES)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} cannot be read: {error}") from None
        if data.startswith(b"PK"):
            raise ValueError(
                f"{os.fspath(path)} is an NPZ file, as earlier versions saved demand, and only JSON is read: "
                "begin with a new DemandModel, and save that one here"
            )
        try:
            return cls._restored(json.loads(data), clock)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            why = " ".join(str(error).split())[:300]
        raise ValueError(f"{os.fspath(path)} holds no saved demand ({why}): save it again")

    @classmethod
    def _restored(cls, state: object, clock: Callable[[], float]) -> DemandModel:
        if not isinstance(state, dict) or (state.get("format"), state.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"it does not begin with the format {FORMAT!r}, version {VERSION}")
        if missing := {"window", "buckets", "warm_steps", "times", "sizes"} - set(state):
            raise ValueError(f"{', '.join(sorted(missing))} missing")
        times, sizes, window = state["times"], state["sizes"], state["window"]
        for name, column in (("times", times), ("sizes", sizes)):
            fits = isinstance(column, list) and len(column) <= whole_number("window", window)
            if not fits or any(type(number) not in (int, float) for number in column):
                raise ValueError(f"{name} must be a list of at most window={window} numbers")
        return cls(
            window,
            buckets=state["buckets"],
            warm_steps=state["warm_steps"],
            clock=clock,
            seen=zip(times, sizes, strict=True),
        )

    def _index(self, size: int) -> int:
        found = self._at.get(size)
        if found is None:
            found = min(int(np.searchsorted(self._buckets, size)), len(self._buckets) - 1)
            if len(self._at) < 1 << 16:
                self._at[size] = found
        return found

    def _learn(self, buckets: tuple[int, ...], newest: int) -> None:
        """Begin anew with these buckets, from the newest observations."""
        cells = len(buckets) * (self.warm_steps + 8)
        if cells > MAX_CELLS:
            raise ValueError(
                f"{len(buckets)} buckets and warm_steps {self.warm_steps}: give at most "
                f"{MAX_CELLS // (self.warm_steps + 8)} buckets, or fewer steps"
            )
        self._buckets = buckets
        self._at: dict[int, int] = {}
        self.learner = learner.Learner(len(buckets), self.window, self.warm_steps)
        for _, size in itertools.islice(self._seen, max(0, len(self._seen) - newest), None):
            self.learner.observe(self._index(size))


def _observation(at: float, size: int) -> tuple[float, int]:
    """One observation, checked."""
    size, at = whole_number("size", size, least=1, most=MAX_SIZE), float(at)
    if not math.isfinite(at):
        raise ValueError(f"the clock must return finite seconds; found {at}")
    return at, size


def _four_per_doubling(largest: int) -> tuple[int, ...]:
    """Sizes from 1 to at least ``largest`` and 16, each at most 19 % above the last where whole numbers
    allow."""
    doublings = max(4, (largest - 1).bit_length())
    return tuple(sorted({math.ceil(2 ** (i / 4)) for i in range(4 * doublings + 1)}))


def _increasing(buckets: Iterable[int]) -> tuple[int, ...]:
    sizes = tuple(whole_number("a bucket", size, least=1, most=MAX_SIZE) for size in buckets)
    if not sizes or any(a >= b for a, b in zip(sizes, sizes[1:], strict=False)):
        raise ValueError(f"buckets must be one size or more, increasing; found {sizes}: sort them, without repeats")
    return sizes


def _remade(settings: dict[str, Any], clock: Callable[[], float], seen: Iterable[tuple[float, int]]) -> DemandModel:
    return DemandModel(**settings, clock=clock, seen=seen)
