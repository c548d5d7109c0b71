"""Bucket lists: the padded sizes that graphs are captured for, and the choice of the best ones.

`plan` finds the k sizes of least expected cost for a demand by dynamic programming; `Refitter` follows a
demand that drifts and changes its list only when that repays the captures. A demand is anything with a
`histogram()`, a pair of sizes and counts, or the sizes themselves. NumPy only; this module imports nothing of
the package but `checks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..checks import whole_number

__all__ = ["Cost", "Demand", "Refitter", "padded", "plan", "powers_of_two", "validate"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

MOST_CANDIDATES = 512
"""Sizes that the dynamic programme chooses from; neighbours are merged upwards until no more are left."""

UNSEEN = 0.01
"""Share of demand that is expected where none was seen, unless the caller says otherwise."""


class HasHistogram(Protocol):
    """A demand that counts its sizes itself, as `DemandModel` does."""

    def histogram(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return sizes, increasing, and their counts."""


Demand = HasHistogram | tuple[ArrayLike, ArrayLike] | Sequence[int] | Ints


@dataclass(frozen=True)
class Cost:
    """What a bucket list costs, in one unit of the caller's choice (by default: elements of padded work).

    Attributes
    ----------
    step : callable, optional
        Cost of one step that runs in a bucket, for an array of bucket sizes; the size itself by default. It
        must not fall as sizes grow.
    graph : float
        Cost of having one more bucket: its capture, and its bytes at what a byte is worth.
    miss : float
        Extra cost of a step for which no bucket is ready.

    Examples
    --------
    In seconds, for a step of 20 ms and 20 us a token, and 0.15 s a capture:

    >>> Cost(step=lambda size: 0.020 + 20e-6 * size, graph=0.15).steps([100])
    array([0.022])
    """

    step: Callable[[Floats], ArrayLike] | None = None
    graph: float = 0.0
    miss: float = 0.0

    def __post_init__(self) -> None:
        for name in ("graph", "miss"):
            price = getattr(self, name)
            if not isinstance(price, (int, float, np.number)) or not 0 <= price < float("inf"):
                raise ValueError(f"Cost.{name} must be a finite number, 0 or more; found {price!r}")

    def steps(self, sizes: ArrayLike) -> Floats:
        """Return the cost of a step in each bucket of ``sizes``, same shape."""
        x = np.asarray(sizes, np.float64)
        costs = x if self.step is None else np.asarray(self.step(x), np.float64)
        if costs.shape != x.shape or not np.isfinite(costs).all():
            raise ValueError(f"Cost.step must return one finite cost a size, shape {x.shape}; found {costs!r}")
        return costs

    def bill(self, sizes: ArrayLike, buckets: ArrayLike, captures: int | None = None) -> float:
        """Return what a stream of sizes costs in a list: its steps, its misses and its captures.

        A size above them all runs as it is and is a miss. ``captures`` defaults to the number of buckets.
        """
        x, b = np.asarray(sizes, np.int64), np.asarray(buckets, np.int64)
        misses = int((x > b[-1]).sum())
        graphs = b.size if captures is None else captures
        return float(self.steps(padded(x, b)).sum()) + self.miss * misses + self.graph * graphs


def powers_of_two(max_size: int) -> tuple[int, ...]:
    """Return 1, 2, 4, ... up to ``max_size``, which always ends the list, a power of two or not.

    Examples
    --------
    >>> powers_of_two(20)
    (1, 2, 4, 8, 16, 20)
    """
    (top,) = validate((max_size,), max_size)
    return (*(1 << i for i in range((top - 1).bit_length())), top)


def validate(sizes: Iterable[int], max_size: int) -> tuple[int, ...]:
    """Return ``sizes`` as an increasing tuple without repeats.

    Raises
    ------
    ValueError
        If there is no size, or one is not a whole number from 1 to ``max_size``.

    Examples
    --------
    >>> validate([8, 2, 8], 16)
    (2, 8)
    """
    try:
        max_size = whole_number("max_size", max_size, least=1)
    except TypeError as error:
        raise ValueError(str(error)) from None
    found = tuple(sizes)
    for size in found:
        try:
            whole_number("one of the bucket sizes", size, least=1, most=max_size)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{error}, which is max_size={max_size}; leave it out, or raise that") from None
    if not found:
        raise ValueError(f"a bucket list needs at least one size; found none: give sizes from 1 to {max_size}")
    return tuple(sorted({int(size) for size in found}))


def padded(sizes: ArrayLike, buckets: ArrayLike) -> Ints:
    """Return the bucket that each size runs in: the smallest that holds it, or the size itself above them
    all."""
    x, b = np.asarray(sizes, np.int64), np.asarray(buckets, np.int64)
    i = np.searchsorted(b, x)
    return np.where(i < b.size, b[np.minimum(i, b.size - 1)], x)


def plan(demand: Demand, k: int, *, max_size: int, prior: float | Demand = UNSEEN, cost: Cost | None = None) -> Ints:
    """Return the bucket sizes of least expected cost for a demand.

    Parameters
    ----------
    demand : object with ``histogram()``, (sizes, counts), or sequence of int
        What was asked for. Sizes above ``max_size`` are left out: no list can serve them. Where nothing is
        left, the list is made for the prior alone.
    k : int
        Number of sizes.
    max_size : int
        The largest size of the list, always in it.
    prior : float or demand
        Demand that the future may bring and the past did not show. A number is its share of all demand,
        spread evenly over the doublings up to ``max_size``: it keeps the list useful when the demand moves. A
        demand is added as it is.
    cost : Cost, optional
        What to make least; padded work by default.

    Returns
    -------
    ndarray of int64, shape (k,)
        Increasing, its last the ``max_size``. Fewer sizes where ``max_size`` < ``k``, or where a further
        graph would cost more than it saves.

    Notes
    -----
    O(k n^2) element operations in k NumPy calls, n at most 512 candidates: about 10 ms for k = 16.

    Examples
    --------
    >>> plan([3, 3, 3, 9, 9, 60], 3, max_size=64, prior=0).tolist()
    [3, 9, 64]
    """
    k = _positive("k", k)
    max_size = _positive("max_size", max_size)
    cost = cost or Cost()
    sizes, weights = _histogram(demand)
    grid = _grid(max_size, max(64, 4 * k))
    extra, extra_weights = _expected(prior, grid, weights[sizes <= max_size].sum())
    # The grid and the maximum are candidates in any case, at no weight, so that k sizes can always be found.
    x, weight = _merge((sizes, weights), (extra, extra_weights), (grid, np.zeros(grid.size)))
    inside = x <= max_size
    x, weight = _thin(x[inside], weight[inside], max(MOST_CANDIDATES, k))
    return _best(x, weight, k, cost.steps(x), np.full(x.size, cost.graph))


def _expected(prior: float | Demand, grid: Ints, total: float) -> tuple[Ints, Floats]:
    """Demand that the past did not show: what `prior` says, or that share of all, spread over the grid."""
    if not isinstance(prior, (int, float, np.number)):
        return _histogram(prior)
    if not 0 <= prior < 1:
        raise ValueError(f"prior must be a share of the demand from 0 to below 1, or a demand; found {prior!r}")
    share = float(prior * total / (1 - prior)) if total else 1.0
    return grid, np.full(grid.size, share / grid.size)


def _best(x: Ints, weight: Floats, k: int, price: Floats, fee: Floats) -> Ints:
    """Choose at most ``k`` of the increasing sizes ``x``, the last among them: exact, by dynamic programming.

    A step in bucket x[j] costs price[j], having that bucket costs fee[j].

    best[q][j] is the least cost of serving x[0..j] with q + 1 buckets, the last of them x[j]; the bucket
    before it is x[i], so best[q][j] = fee[j] + min over i < j of best[q - 1][i] + price[j] * weight of x[i +
    1..j].
    """
    n = x.size
    below = np.concatenate([[0.0], np.cumsum(weight)])
    segment = price[:, None] * (below[1:, None] - below[None, :-1])  # [j, i]: x[i..j] served by bucket x[j]
    segment[np.triu_indices(n, 1)] = np.inf
    best = segment[:, 0] + fee
    cheapest, last = best[-1], 0
    back = np.zeros((min(k, n), n), np.int64)
    for q in range(1, min(k, n)):
        through = segment[:, 1:] + best[:-1]
        back[q] = through.argmin(1)
        best = through[np.arange(n), back[q]] + fee
        if best[-1] <= cheapest:
            cheapest, last = best[-1], q
    chosen = [n - 1]
    for q in range(last, 0, -1):
        chosen.append(int(back[q][chosen[-1]]))
    return x[chosen[::-1]]


def _merge(*parts: tuple[Ints, Floats]) -> tuple[Ints, Floats]:
    """Unite weighted sizes into increasing sizes without repeats and the sums of their weights."""
    x, where = np.unique(np.concatenate([sizes for sizes, _ in parts]), return_inverse=True)
    weight: Floats = np.bincount(where, np.concatenate([w for _, w in parts]), minlength=x.size).astype(np.float64)
    return x, weight


def _thin(x: Ints, weight: Floats, most: int, keep: ArrayLike = ()) -> tuple[Ints, Floats]:
    """Merge neighbours upwards until about ``most`` sizes are left; those in ``keep`` stay, and so does the
    last."""
    if x.size <= most:
        return x, weight
    # Half by weight, half by count, so that rare stretches keep candidates too.
    rank = np.cumsum(weight + weight.sum() / x.size + 1e-300)
    group = np.minimum((rank * (most / rank[-1])).astype(np.int64), most - 1)
    ends = np.flatnonzero((np.diff(group, append=most) > 0) | np.isin(x, keep))
    below = np.concatenate([[0.0], np.cumsum(weight)])
    return x[ends], np.diff(below[ends + 1], prepend=0.0)


class Refitter:
    """A bucket list that follows its demand.

    Parameters
    ----------
    k : int
        Number of sizes, the largest included.
    max_size : int
        The largest size, always in the list.
    cost : Cost, optional
        What to make least. Its ``graph`` is the price of a capture here, paid for each size that is new; by
        default a capture costs as much as 10 mean steps.
    window : int
        Steps after which an observation counts half. Demand is trusted to last as long as it is remembered,
        so a new list must repay its captures within as many steps.
    every : int
        Steps between two refits. The first come sooner, and so does one when the largest bucket, which stands
        for what was not expected, has served 8 smaller steps since the last.

    Attributes
    ----------
    sizes : ndarray of int64, shape (k,)
        The list in force, increasing.
    refits, captures : int
        How often the list was reconsidered, and how many sizes were new in it, those of the first included.

    Notes
    -----
    A refit is one dynamic programme over at most 256 sizes, about 2 ms, in which a size that is captured
    already costs nothing and any other costs its capture: what it finds has repaid itself, and an unchanged
    demand changes nothing. Not thread-safe: one owner at a time.

    Examples
    --------
    >>> refitter = Refitter(3, max_size=64)
    >>> any([refitter.observe(size) for size in [7, 7, 30] * 100])
    True
    >>> refitter.sizes.tolist()
    [7, 30, 64]
    """

    def __init__(
        self, k: int, *, max_size: int, cost: Cost | None = None, window: int = 1024, every: int = 256
    ) -> None:
        self.k = _positive("k", k)
        self.max_size = _positive("max_size", max_size)
        self.window = _positive("window", window)
        self.every = _positive("every", every)
        self.cost = cost or Cost()
        grid = _grid(self.max_size, 64)
        # Nothing is known yet: each doubling is as likely as the next, and padding counts in per cent.
        self.sizes = plan((grid, 1 / grid), self.k, max_size=self.max_size, prior=0)
        self.refits = 0
        self.captures = self.sizes.size
        self._x = np.empty(0, np.int64)  # [n], sizes seen, increasing
        self._weight = np.empty(0)  # [n], their counts, decayed
        self._block: list[int] = []
        self._due = min(32, self.every)
        self._surprises = 0

    def observe(self, size: int) -> bool:
        """Record one step, and return whether the list changed. O(1) but for the steps that refit."""
        size = _positive("size", size)
        self._block.append(size)
        if size < self.max_size and self.k > 1:  # a step of the largest size, or a list of one, is no surprise
            self._surprises += self.sizes.size < 2 or bool(size > self.sizes[-2])
        steps = len(self._block)
        return (steps >= self._due or (steps >= 32 and self._surprises >= 8)) and self.refit()

    def refit(self) -> bool:
        """Reconsider the list now, and return whether it changed."""
        steps = len(self._block)
        block = np.array([size for size in self._block if size <= self.max_size], np.int64)
        self._block.clear()
        self._surprises = 0
        self._due = min(2 * self._due, self.every)
        if not block.size:
            return False
        self.refits += 1
        self._remember(block, steps)
        capture = self.cost.graph or 10 * float(self.cost.steps(block).mean())
        x, weight = self._expected()
        fee = np.where(np.isin(x, self.sizes), 0.0, capture)
        best = _best(x, weight, self.k, self.cost.steps(x), fee)
        new = np.setdiff1d(best, self.sizes, assume_unique=True).size
        if not new:
            return False
        self.sizes = best
        self.captures += new
        return True

    def _remember(self, block: Ints, steps: int) -> None:
        """Count a block of sizes, and forget as much of the earlier ones as so many steps ask for."""
        before = self._x, self._weight * 0.5 ** (steps / self.window)
        self._x, self._weight = _merge(before, (block, np.ones(block.size)))
        alive = self._weight > 1e-3
        self._x, self._weight = self._x[alive], self._weight[alive]

    def _expected(self) -> tuple[Ints, Floats]:
        """The demand expected over the next `window` steps, the unseen included."""
        total = self._weight.sum()
        grid = _grid(self.max_size, 64)
        unseen = np.full(grid.size, UNSEEN * total / grid.size)
        seen = self._x, self._weight * (1 - UNSEEN)
        x, weight = _merge(seen, (grid, unseen), (self.sizes, np.zeros(self.sizes.size)))
        return _thin(x, weight * (self.window / total), MOST_CANDIDATES // 2, self.sizes)


def _grid(max_size: int, count: int) -> Ints:
    """At most ``count`` sizes from 1 to ``max_size``, evenly spread over its doublings; all of them if they
    fit."""
    if max_size <= count:
        return np.arange(1, max_size + 1)
    points = np.geomspace(1, max_size, count)
    sizes = np.unique(np.maximum(np.ceil(points - 1e-6), 1).astype(np.int64))
    sizes[-1] = max_size
    return sizes


def _histogram(demand: Any) -> tuple[Ints, Floats]:
    """Sizes and weights of any form of demand, checked."""
    if hasattr(demand, "histogram"):
        sizes, weights = demand.histogram()
    elif isinstance(demand, tuple) and len(demand) == 2 and np.ndim(demand[0]) == 1:
        sizes, weights = demand
    else:
        sizes, weights = demand, None
    x = np.asarray(sizes)
    x = x.astype(np.int64) if x.size == 0 else x
    if x.ndim != 1 or x.dtype.kind not in "iu":
        raise TypeError(
            f"the sizes of a demand must be whole numbers in one dimension; found {x.dtype}, shape {x.shape}"
        )
    if x.size and not 0 < int(x.min()) <= int(x.max()) < 1 << 53:
        raise ValueError(f"the sizes of a demand must be from 1 to 2**53; found {x.min()} to {x.max()}")
    w = np.ones(x.size) if weights is None else np.asarray(weights, np.float64)
    if w.shape != x.shape or not (np.isfinite(w).all() and (w >= 0).all()):
        raise ValueError(f"the counts of a demand must be {x.size} finite numbers, 0 or more; found {w!r}")
    return x.astype(np.int64), w


def _positive(name: str, value: object) -> int:
    """A whole number from 1 on that a float64 holds exactly."""
    return whole_number(name, value, least=1, most=1 << 53)
