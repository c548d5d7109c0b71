"""Which size is captured next, and which graph gives way to it. Pure: sizes and prices in, sizes out.

Sits above the room `demand`, below `prewarm`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ..demand.buckets import Cost, padded
from ..demand.model import DemandModel

__all__ = ["Plan", "Price", "by_value", "least_missed", "pricing", "trade"]

TRADED = 0.95
"""Part of the cost that is left, at most, where a graph of the plan gives way to another."""

Price = Callable[[Iterable[int]], float]
"""What the demand of the window costs in a list of sizes."""


class Plan(NamedTuple):
    """The sizes to have captured, and what they are worth."""

    sizes: tuple[int, ...]
    """Increasing."""
    price: Price


def pricing(demand: DemandModel, cost: Cost, max_size: int) -> Price:
    """Return the price of lists of sizes, for the demand in the model's window now."""
    sizes, counts = demand.histogram()
    counts, sizes = counts[sizes <= max_size], sizes[sizes <= max_size]

    def price(ready: Iterable[int]) -> float:
        if not sizes.size:
            return 0.0
        return float(counts @ cost.steps(padded(sizes, np.array(sorted(set(ready))))))

    return price


def by_value(missing: Sequence[int], present: Iterable[int], max_size: int, price: Price) -> list[int]:
    """Order sizes by what each saves on top of those before it, the most first; an absent `max_size` leads."""
    ready, order, left = set(present), [], list(missing[::-1])
    while left:
        best = max_size if max_size in left else min(left, key=lambda extra: price({*ready, extra}))
        left.remove(best)
        order.append(best)
        ready.add(best)
    return order


def least_missed(spare: Iterable[int], present: Iterable[int], price: Price) -> int:
    """Return that size of `spare` without which the sizes in `present` cost least."""
    there = set(present)
    return min(spare, key=lambda size: price(there - {size}))


def trade(size: int, spare: Sequence[int], present: Iterable[int], price: Price) -> int | None:
    """Return the size of `spare` in whose place `size` saves a twentieth of the cost or more; None where none is.

    Each trade lowers the cost by as much, so that two sizes do not take turns.
    """
    if not spare:
        return None
    there = set(present)
    cost, at = min((price((there - {other}) | {size}), at) for at, other in enumerate(spare))
    return spare[at] if cost <= TRADED * price(there) else None
