"""What a demand model learns: when each bucket is used next, and which buckets are most worth a place.

`Learner` counts in buckets, by their index, and in steps. NumPy only, and nothing of the package: `model` gives it the
buckets of its observations, and names the sizes in its forecasts.

What is estimated. Once a bucket is used it exists, so having it ready ahead buys exactly one hit, at its next use, and
takes a place until then. Four probabilities say when that use falls, in steps ahead:

    (0, 4], (0, horizon]              what keeping a warm bucket can catch
    (warm, warm+2], (warm, warm+8]    what a warm-up that starts now can catch

How. Four tables of counters hold the share of past steps, in a like situation of the bucket, after which its use did
fall into the window. Each step the tables' logits are added up with weights learned on line by logistic regression, so
that tables that know nothing of this demand fade out. Outcomes are counted ``horizon`` steps late, when they are known.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["History", "Learner", "Tables", "Windows"]

Ints = NDArray[np.intp]
Floats = NDArray[np.float32]

NEVER = 1 << 60
"""A step that does not come."""

TABLES = ("usage", "after", "trend", "idle")
"""Situations: "usage", none (the plain rate); "after", which bucket is in use, and whether it was reached upwards or
downwards; "trend", the distance from it and the move over the last 4 steps; "idle", the steps since the bucket's own
last use. All but "trend", which carries over to sizes never seen, are kept for each bucket by itself."""

FORGET = 0.25
"""Share of the window over which counters average."""

LEARN = 0.001
"""Step of the weights, in units of the usual slope."""

FAR = 8
"""Moves over 4 steps are told apart up to this many buckets."""

AGES = np.array([n if n < 32 else min(51, int(32 + 4 * math.log2(n / 32))) for n in range(1025)])
"""Class of each number of steps without use: its own up to 32, four a doubling beyond, one from 1,024."""


class Windows:
    """The four stretches of steps ahead that a use may fall into, and what a use there is worth."""

    def __init__(self, warm_steps: int) -> None:
        self.horizon = warm_steps + 8
        low = np.array([0, 0, warm_steps, warm_steps])
        high = np.array([4, self.horizon, warm_steps + 2, warm_steps + 8])
        ahead = np.arange(self.horizon + 2)[:, None]
        self.outcomes: Floats = np.where((ahead > low) & (ahead <= high), 0.999, 0.001).astype(np.float32)
        """[horizon + 2, 4]: does a use n steps ahead fall into each? Kept off 0 and 1, so that logits are finite."""
        self._lengths = high - low
        # A place is taken to the end of the window or, if the use comes, on average to the middle of it.
        self._steps = high.astype(np.float32)
        self._saved = ((high - low - 1) / 2).astype(np.float32)

    def unknown(self, m: int) -> NDArray[np.float64]:
        """Return the probabilities to begin with, shape (4,), where one of ``m`` buckets is as likely as another."""
        first: NDArray[np.float64] = np.minimum(self._lengths / (m + 1), 0.5)
        return first

    def hits(self, p: Floats) -> Floats:
        """Return the hits for each step of a place, shape (4, m), from probabilities of shape (m, 4)."""
        return (p / (self._steps - self._saved * p)).T


class History:
    """The buckets used over the last ``horizon`` steps, and the situation that each bucket is in.

    A situation is one row in each of the tables, which lie one below the other.
    """

    def __init__(self, m: int, horizon: int, tables: tuple[str, ...] = TABLES) -> None:
        self._m, self._horizon = m, horizon
        # Beyond 256 buckets "after" tells fewer of them apart, so that its table stays small.
        self._groups = min(m, max(1, (1 << 16) // m))
        sizes = {"usage": m, "after": 3 * self._groups * m, "trend": (2 * FAR + 1) * 2 * m, "idle": 52 * m}
        start = np.cumsum([0, *(sizes[table] for table in tables)])
        self.rows = int(start[-1])
        """Rows of all tables together."""
        apart = np.array([52 if table == "idle" else 1 for table in tables])
        self._own = start[:-1, None] + apart[:, None] * np.arange(m)  # [tables, m], each bucket's first row
        self._offset = np.zeros((len(tables), 1), np.intp)
        self._place = {table: i for i, table in enumerate(tables)}
        self._past = np.zeros(2 * horizon, np.intp)  # written twice, so that any `horizon` of them lie in a row
        self._countdown = np.arange(horizon, 0, -1)
        self._used = np.full(m, -1 << 20)  # [m], step of the last use
        self._direction = 0
        self.now = 0
        """The bucket in use."""

    def note(self, slot: int, b: int) -> None:
        """Note bucket ``b`` in the place ``slot``, of step modulo horizon."""
        self._past[slot] = self._past[slot + self._horizon] = b

    def steps_until(self, slot: int, until: Ints) -> Ints:
        """Fill ``until``, shape (m,), with the steps from the one ``horizon`` ago to each bucket's next use."""
        until.fill(self._horizon + 1)
        # Last to first, so that of several uses of one bucket the soonest is what stays.
        until[self._past[slot + self._horizon : slot : -1]] = self._countdown
        return until

    def situation(self, t: int, b: int, out: Ints) -> Ints:
        """Fill ``out``, shape (tables, m), with the rows of every bucket at step ``t``, in which ``b`` is used."""
        m, place = self._m, self._place
        if b != self.now:
            self._direction = 1 if b > self.now else 2
            self.now = b
        self._used[b] = t
        move = b - int(self._past[(t - 4) % self._horizon]) if t >= 4 else 0
        if "after" in place:
            self._offset[place["after"]] = (3 * (b * self._groups // m) + self._direction) * m
        if "trend" in place:
            self._offset[place["trend"]] = (2 * (min(max(move, -FAR), FAR) + FAR) + 1) * m - b
        np.add(self._own, self._offset, out=out)
        if "idle" in place:
            out[place["idle"]] += AGES.take(t - self._used, mode="clip")
        return out


class Tables:
    """Shares of past outcomes by situation, and the weights with which their logits are added up."""

    def __init__(self, tables: int, rows: int, first: NDArray[np.float64], slowest: float, learn: float) -> None:
        self.share: Floats = np.empty((rows, first.size), np.float32)
        """[rows, 4]: the part of the outcomes in each situation that fell into each window."""
        self.share[:] = first
        self._rate: Floats = np.full(rows, 0.5, np.float32)  # how much of a new outcome each row takes in
        self._slowest, self._learn = np.float32(slowest), np.float32(learn)
        self.weight: Floats = np.full(tables, 1 / tables, np.float32)
        self._slope: Floats = np.ones(tables, np.float32)  # usual size, squared

    def estimate(self, rows: Ints, logits: Floats, estimates: Floats) -> None:
        """Fill ``logits``, shape (tables, m, 4), and ``estimates``, shape (m, 4), for a situation."""
        share = self.share.take(rows, 0)
        np.log(share / (1 - share), out=logits)
        odds = np.exp(np.minimum(self.weight @ logits.reshape(len(rows), -1), 30))
        np.divide(odds, 1 + odds, out=estimates.reshape(-1))

    def learn(self, rows: Ints, logits: Floats, estimates: Floats, outcome: Floats) -> None:
        """Take in what came, shape (m, 4), after the situation that these were estimated in."""
        error = outcome - estimates
        slope = logits.reshape(len(logits), -1) @ error.reshape(-1)
        self._slope += np.float32(0.005) * (slope * slope - self._slope)
        self.weight += self._learn * slope / (np.sqrt(self._slope) + np.float32(1e-4))
        rows = rows.reshape(-1)  # no row twice, so plain indexing is enough
        rate = self._rate.take(rows)
        rate /= 1 + rate  # 1/3, 1/4, 1/5 ...: a mean in which the start counts twice
        np.maximum(rate, self._slowest, out=rate)
        share = self.share.take(rows, 0)
        change = (outcome - share.reshape(logits.shape)).reshape(share.shape)
        change *= rate[:, None]
        share += change
        self._rate[rows] = rate
        self.share[rows] = share


class Learner:
    """Estimates when each of ``m`` buckets is used next, and picks those most worth a place.

    Parameters
    ----------
    m : int
        Buckets, counted from 0.
    window : int
        Steps; counters forget over a quarter of it.
    warm_steps : int
        Steps from asking for a bucket to having it ready.
    tables, forget, learn
        `TABLES`, `FORGET` and `LEARN`; others are for measuring what each of them buys.
    """

    def __init__(
        self,
        m: int,
        window: int,
        warm_steps: int,
        *,
        tables: tuple[str, ...] = TABLES,
        forget: float = FORGET,
        learn: float = LEARN,
    ) -> None:
        self.m, self.warm_steps = m, warm_steps
        self.windows = Windows(warm_steps)
        self.horizon = H = self.windows.horizon
        self.history = History(m, H, tables)
        slowest = 1 / max(1, forget * window)
        self.tables = Tables(len(tables), self.history.rows, self.windows.unknown(m), slowest, learn)
        # Rings over the last steps: rows looked up, their logits, the estimates.
        self.rows: Ints = np.zeros((H, len(tables), m), np.intp)
        self._logits: Floats = np.zeros((H, len(tables), m, 4), np.float32)
        self.estimates: Floats = np.zeros((H, m, 4), np.float32)
        self.until: Ints = np.empty(m, np.intp)
        """[m]: steps from the one last learned from to each bucket's next use."""
        self.ready = np.full(m, NEVER)
        """[m]: step from which each bucket is warm, if forecasts are followed."""
        self.t = 0
        """Steps so far."""

    def observe(self, b: int) -> None:
        """Take in that bucket ``b`` is used now: learn how a step ``horizon`` ago went on, then look ahead."""
        t, slot = self.t, self.t % self.horizon
        self.history.note(slot, b)
        if t >= self.horizon:  # the ring still holds the workings of that step
            outcome = self.windows.outcomes.take(self.history.steps_until(slot, self.until), 0)  # [m, 4]
            self.tables.learn(self.rows[slot], self._logits[slot], self.estimates[slot], outcome)
        rows = self.history.situation(t, b, self.rows[slot])
        self.tables.estimate(rows, self._logits[slot], self.estimates[slot])
        self.t = t + 1

    def forecast(self, k: int) -> tuple[list[int], list[float]]:
        """Return the ``k`` buckets of most expected hits for each step that they take a place, and their chances."""
        if not self.t:
            return [], []
        t, ready, now = self.t, self.ready, self.history.now
        ready[now] = min(ready[now], t)  # it was used, so it exists
        p = self.estimates[(t - 1) % self.horizon]
        hits = self.windows.hits(p)  # [4, m]
        keep, fetch = np.maximum(hits[0], hits[1]), np.maximum(hits[2], hits[3])
        wait = np.minimum(np.maximum(ready - t, 0), self.warm_steps)
        value = keep + (fetch - keep) * (wait * (1 / self.warm_steps))  # half warm, half of each
        k = min(k, self.m)
        best = value.argpartition(self.m - k)[self.m - k :]
        best = best[(-value[best]).argsort()]
        self.ready = np.full(self.m, NEVER)
        self.ready[best] = t + wait[best]
        return best.tolist(), p[best, 1].tolist()
