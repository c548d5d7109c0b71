"""How much may be had ready ahead of need, and the buffers that a pool was asked to have ready.

Knows no program and no graph. Sits above the room `pool`, below `stock` and `prewarm`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..checks import whole_number
from ..pool.pool import BufferPool
from ..pool.spec import BufferSpec

__all__ = ["Budgets", "Reserve"]


@dataclass(frozen=True)
class Budgets:
    """Limits of prewarming: the parameters of the same names of `PredictiveBufferManager`, None for no limit.

    `max_size` has a graph once that was captured.
    """

    max_size: int
    max_graphs: int = 16
    prewarm_bytes: int | None = None
    prewarm_seconds: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_size", whole_number("max_size", self.max_size, least=1))
        object.__setattr__(self, "max_graphs", whole_number("max_graphs", self.max_graphs, least=1, most=1 << 20))
        for name in ("prewarm_bytes", "prewarm_seconds"):
            budget = getattr(self, name)
            if budget is not None and not budget >= 0:
                raise ValueError(f"{name} is {budget!r}: give a number from 0 up, or None for no limit")


class Reserve:
    """Buffers that a pool holds ready for the sizes that are forecast.

    Parameters
    ----------
    pool : BufferPool
    specs : callable
        ``specs(num_tokens)`` names the buffers that a step of this size leases.
    """

    def __init__(self, pool: BufferPool, specs: Callable[[int], Iterable[BufferSpec]]) -> None:
        self._pool, self._specs = pool, specs
        self._reserved: Counter[BufferSpec] = Counter()  # that the pool may still hold because of prewarming

    def nbytes(self) -> int:
        """Return the bytes of the buffers reserved, until the pool was trimmed of them."""
        return _nbytes(self._reserved)

    def fill(self, sizes: Iterable[int], room: float) -> None:
        """Reserve what steps of these sizes lease, the first ones first, within `room` bytes in all."""
        wanted: Counter[BufferSpec] = Counter()  # at once: steps of two sizes may share what both of them name
        for size in sizes:
            more = wanted | Counter(self._specs(size))
            if _nbytes(more) <= room:
                wanted = more
        if _nbytes(self._reserved | wanted) > room:
            # All of it: the pool frees what is idle longest, which need not be what is no longer wanted.
            self._pool.trim(max(0, self._pool.stats().reserved_bytes - self.nbytes()))
            self._reserved.clear()
        for spec, count in wanted.items():
            self._pool.reserve([spec] * count)
            self._reserved[spec] = max(count, self._reserved[spec])


def _nbytes(specs: Counter[BufferSpec]) -> int:
    return sum(spec.size_bytes * count for spec, count in specs.items())
