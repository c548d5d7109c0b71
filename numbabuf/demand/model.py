"""Shape demand: which sizes were asked for lately, and which are worth having ready next.

`DemandModel` is a moving window of observed sizes with a small learner on top. NumPy only: this module knows no pool,
no device and no graph, so that a whole trace runs through it alone. It imports nothing of the package but `html`,
`checks`, `errors` and `files`; `buckets.plan` reads a model's `histogram()`, and `predictive` turns forecasts into warm
buffers and graphs.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import threading
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
from ..view import html

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

NEVER = 1 << 60
"""A step that does not come."""


class Forecast(NamedTuple):
    """One size worth having ready."""

    size: int
    """The bucket."""
    probability: float
    """Estimated probability, in [0, 1], that it is used within the model's ``horizon`` steps."""


class _Turn:
    """One thread at a time; a thread that is inside already is refused rather than let in, or left waiting for itself.

    It is a signal handler, or a clock, that comes back so, in the middle of an update.
    """

    def __init__(self) -> None:
        self._renew()

    def _renew(self) -> None:
        self._lock, self._inside, self._pid = threading.Lock(), 0, os.getpid()

    def __enter__(self) -> None:
        if self._pid != os.getpid():  # a fork in another thread's turn, which does not go on in the child
            self._renew()
        if self._inside == threading.get_ident():
            raise BusyError("this thread is in a call of the demand model already: call it when that has returned")
        self._lock.acquire()
        self._inside = threading.get_ident()

    def __exit__(self, *exc: object) -> None:
        self._inside = 0
        self._lock.release()


class DemandModel:
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
        self._turn = _Turn()
        self._owner: weakref.ref[Any] | None = None
        self._seen: deque[tuple[float, int]] = deque((_observation(*pair) for pair in seen), self.window)
        largest = max((size for _, size in self._seen), default=1)
        self._learn(_four_per_doubling(largest) if buckets is None else _increasing(buckets), LEARNED)

    def __reduce__(self) -> Any:
        return _remade, (self.settings, self._clock, self.seen)

    def __len__(self) -> int:
        return len(self._seen)

    def __repr__(self) -> str:
        return f"<DemandModel: {len(self)} of {self.window} observations, {len(self.buckets)} buckets>"

    def _repr_html_(self) -> str:
        sizes, counts = self.histogram()
        return html.card(repr(self), html.columns(dict(zip(sizes.tolist(), counts.tolist(), strict=True))))

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
        return self._learner.horizon

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
                self._learner.observe(self._index(size))

    def claim(self, owner: object) -> None:
        """Make the model `owner`'s, until `let_go`, or until there is no owner any more.

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
            chosen, probability = self._learner.forecast(k)
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
        return cls(**first.settings, clock=first._clock, seen=seen)

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
        self._learner = _Learner(len(buckets), self.window, self.warm_steps)
        for _, size in itertools.islice(self._seen, max(0, len(self._seen) - newest), None):
            self._learner.observe(self._index(size))


class _Learner:
    """Estimates when each of ``m`` buckets is used next, and picks those most worth a place.

    What is estimated. Once a bucket is used it exists, so having it ready ahead buys exactly one hit, at its
    next use, and takes a place until then. Four probabilities say when that use falls, in steps ahead:

        (0, 4], (0, horizon]              what keeping a warm bucket can catch
        (warm, warm+2], (warm, warm+8]    what a warm-up that starts now can catch

    How. Four tables of counters hold the share of past steps, in a like situation of the bucket, after which
    its use did fall into the window. Each step the tables' logits are added up with weights learned on line
    by logistic regression, so tables that know nothing of this demand fade out. Outcomes are counted
    ``horizon`` steps late, when they are known.
    """

    TABLES = ("usage", "after", "trend", "idle")
    """Situations: none (the plain rate); which bucket is in use, and whether it was reached upwards or
    downwards; the distance from it and the move over the last 4 steps; the steps since the bucket's own last
    use. All but ``trend``, which carries over to sizes never seen, are kept for each bucket by itself."""

    FORGET = 0.25
    """Share of the window over which counters average."""
    LEARN = np.float32(0.001)
    """Step of the weights, in units of the usual slope."""
    FAR = 8
    """Moves over 4 steps are told apart up to this many buckets."""
    AGES = np.array([n if n < 32 else min(51, int(32 + 4 * math.log2(n / 32))) for n in range(1025)])
    """Class of each number of steps without use: its own up to 32, four a doubling beyond, one from 1,024."""

    def __init__(self, m: int, window: int, warm_steps: int) -> None:
        self.m, self.warm_steps = m, warm_steps
        self.horizon = warm_steps + 8
        low = np.array([0, 0, warm_steps, warm_steps])
        high = np.array([4, self.horizon, warm_steps + 2, warm_steps + 8])
        H, W, E = low.size, self.horizon, len(self.TABLES)
        # Row n: did a use n steps ahead fall into each window? Kept off 0 and 1, so that logits are finite.
        ahead = np.arange(W + 2)[:, None]
        self._outcomes = np.where((ahead > low) & (ahead <= high), 0.999, 0.001).astype(np.float32)
        # A place is taken to the end of the window or, if the use comes, on average to the middle of it.
        self._steps = high.astype(np.float32)
        self._saved = ((high - low - 1) / 2).astype(np.float32)

        # Beyond 256 buckets "after" tells fewer of them apart, so that its table stays small.
        self._groups = min(m, max(1, (1 << 16) // m))
        moves = 2 * self.FAR + 1
        rows = {
            "usage": m,
            "after": 3 * self._groups * m,
            "trend": moves * 2 * m,
            "idle": 52 * m,
        }
        start = np.cumsum([0] + [rows[table] for table in self.TABLES])
        self._share = np.empty((start[-1], H), np.float32)  # the tables, one below the other
        self._share[:] = np.minimum((high - low) / (m + 1), 0.5)
        self._rate = np.full(start[-1], 0.5, np.float32)  # how much of a new outcome each row takes in
        self._slowest = np.float32(1 / max(1, self.FORGET * window))
        self._weight = np.full(E, 1 / E, np.float32)
        self._slope = np.ones(E, np.float32)  # usual size, squared

        apart = np.array([52 if table == "idle" else 1 for table in self.TABLES])
        self._own = start[:-1, None] + apart[:, None] * np.arange(m)  # [E, m], each bucket's first row
        self._offset = np.zeros((E, 1), np.intp)
        self._row = {table: i for i, table in enumerate(self.TABLES)}
        # Rings over the last W steps: rows looked up, their logits, the estimates; and the buckets used,
        # written twice so that any W of them lie in a row.
        self._rows = np.zeros((W, E, m), np.intp)
        self._logits = np.zeros((W, E, m, H), np.float32)
        self._estimates = np.zeros((W, m, H), np.float32)
        self._past = np.zeros(2 * W, np.intp)
        self._countdown = np.arange(W, 0, -1)
        self._until = np.empty(m, np.intp)  # [m], steps from the source to the bucket's next use
        self._used = np.full(m, -1 << 20)  # [m], step of the last use
        self._ready = np.full(m, NEVER)  # [m], step from which the bucket is warm, if forecasts are followed
        self.t = self._now = self._direction = 0

    def observe(self, b: int) -> None:
        """Take in that bucket ``b`` is used now: learn how a step ``horizon`` ago went on, then look
        ahead."""
        t, m, slot = self.t, self.m, self.t % self.horizon
        self._past[slot] = self._past[slot + self.horizon] = b
        if t >= self.horizon:
            self._learn(slot)
        if b != self._now:
            self._direction = 1 if b > self._now else 2
            self._now = b
        self._used[b] = t
        move = b - int(self._past[(t - 4) % self.horizon]) if t >= 4 else 0
        offsets = {
            "after": (3 * (b * self._groups // m) + self._direction) * m,
            "trend": (2 * (min(max(move, -self.FAR), self.FAR) + self.FAR) + 1) * m - b,
        }
        for table, offset in offsets.items():
            if table in self._row:
                self._offset[self._row[table]] = offset
        rows = np.add(self._own, self._offset, out=self._rows[slot])
        if "idle" in self._row:
            rows[self._row["idle"]] += self.AGES.take(t - self._used, mode="clip")
        share = self._share.take(rows, 0)
        logits = np.log(share / (1 - share), out=self._logits[slot])
        odds = np.exp(np.minimum(self._weight @ logits.reshape(len(rows), -1), 30))
        np.divide(odds, 1 + odds, out=self._estimates[slot].reshape(-1))
        self.t = t + 1

    def _learn(self, slot: int) -> None:
        """Compare the estimates made ``horizon`` steps ago with what came; ``slot`` still holds their
        workings."""
        self._until.fill(self.horizon + 1)
        # Last to first, so that of several uses of one bucket the soonest is what stays.
        self._until[self._past[slot + self.horizon : slot : -1]] = self._countdown
        outcome = self._outcomes.take(self._until, 0)  # [m, H]
        error = outcome - self._estimates[slot]
        logits = self._logits[slot]
        slope = logits.reshape(len(logits), -1) @ error.reshape(-1)
        self._slope += np.float32(0.005) * (slope * slope - self._slope)
        self._weight += self.LEARN * slope / (np.sqrt(self._slope) + np.float32(1e-4))
        rows = self._rows[slot].reshape(-1)  # no row twice, so plain indexing is enough
        rate = self._rate.take(rows)
        rate /= 1 + rate  # 1/3, 1/4, 1/5 ...: a mean in which the start counts twice
        np.maximum(rate, self._slowest, out=rate)
        share = self._share.take(rows, 0)
        change = (outcome - share.reshape(logits.shape)).reshape(share.shape)
        change *= rate[:, None]
        share += change
        self._rate[rows] = rate
        self._share[rows] = share

    def forecast(self, k: int) -> tuple[list[int], list[float]]:
        """Return the ``k`` buckets of most expected hits for each step that they take a place, and their
        chances."""
        if not self.t:
            return [], []
        t, ready = self.t, self._ready
        ready[self._now] = min(ready[self._now], t)  # it was used, so it exists
        p = self._estimates[(t - 1) % self.horizon]
        hits = (p / (self._steps - self._saved * p)).T  # [H, m], for each step of the place
        keep, fetch = np.maximum(hits[0], hits[1]), np.maximum(hits[2], hits[3])
        wait = np.minimum(np.maximum(ready - t, 0), self.warm_steps)
        value = keep + (fetch - keep) * (wait * (1 / self.warm_steps))  # half warm, half of each
        k = min(k, self.m)
        best = value.argpartition(self.m - k)[self.m - k :]
        best = best[(-value[best]).argsort()]
        self._ready = np.full(self.m, NEVER)
        self._ready[best] = t + wait[best]
        return best.tolist(), p[best, 1].tolist()


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
        raise ValueError(
            f"buckets must be one size or more, increasing; found {sizes}: sort them, without repeats"
        )
    return sizes


def _remade(settings: dict[str, Any], clock: Callable[[], float], seen: Iterable[tuple[float, int]]) -> DemandModel:
    return DemandModel(**settings, clock=clock, seen=seen)
