"""Which buckets a log of sizes calls for, beside the lists that serving engines capture by default.

`compare` plans a list and sets it against powers of two and the lists of vLLM, SGLang and TensorRT-LLM, each
as it is and thinned to the same count; `numbabuf plan` prints the result. NumPy only: the picture is
fetched from `view.plots` by name. It sits above `buckets` and knows neither traces nor devices.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .buckets import Cost, padded, plan, powers_of_two

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "LISTS",
    "POWERS_OF_TWO",
    "SGLANG",
    "TENSORRT_LLM",
    "VLLM",
    "Comparison",
    "Fit",
    "SizeList",
    "compare",
]

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class SizeList:
    """A list of sizes that some engine captures unless told otherwise.

    Attributes
    ----------
    name : str
    source : str
        Where the rule is from.
    """

    name: str
    source: str
    _rule: Callable[[int], list[int]]

    def sizes(self, max_size: int) -> tuple[int, ...]:
        """Return the list for a largest size: its own sizes up to there, at least the smallest."""
        full = sorted(set(self._rule(max_size)))
        return tuple(size for size in full if size <= max_size) or (full[0],)


POWERS_OF_TWO = SizeList("powers of two", "1, 2, 4, ... up to the largest size", lambda m: list(powers_of_two(m)))
VLLM = SizeList(
    "vLLM",
    "vllm/config/vllm.py, _set_cudagraph_sizes: 1, 2, 4, every 8 below 256, every 16 to 512",
    lambda _: [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)],
)
SGLANG = SizeList(
    "SGLang",
    "sglang server_args, _generate_cuda_graph_batch_sizes: 1, 2, 4, 8, 12, every 8 to 256, every 16 to 512",
    lambda _: [1, 2, 4, 8, 12, *range(16, 257, 8), *range(272, 512, 16), 512],
)
TENSORRT_LLM = SizeList(
    "TensorRT-LLM",
    "CudaGraphConfig with enable_padding: 1, 2, 4, every 8 to 128, then powers of two to 2048",
    lambda _: [1, 2, 4, *range(8, 129, 8), 256, 512, 1024, 2048],
)
LISTS = (POWERS_OF_TWO, VLLM, SGLANG, TENSORRT_LLM)
"""What a planned list is compared with."""


@dataclass(frozen=True)
class Fit:
    """How one list of buckets fits a stream of sizes.

    Attributes
    ----------
    name : str
    buckets : tuple of int
    padding : float
        Padded work over work, less one, on the steps that the list covers; 0 if it covers none.
    covered : float
        Share of the steps that have a bucket.
    used : int
        Buckets that at least one step ran in.
    """

    name: str
    buckets: tuple[int, ...]
    padding: float
    covered: float
    used: int

    @classmethod
    def of(cls, name: str, buckets: ArrayLike, sizes: Ints) -> Fit:
        """Measure a list on a stream."""
        b = np.asarray(buckets, np.int64)
        inside = sizes[sizes <= b[-1]]
        ran = padded(inside, b)
        return cls(
            name=name,
            buckets=tuple(b.tolist()),
            padding=float(ran.sum() / inside.sum() - 1) if inside.size else 0.0,
            covered=inside.size / sizes.size,
            used=int(np.unique(ran).size),
        )

    def row(self) -> tuple[str, ...]:
        """Return name, count of buckets, those used, and padding and covered steps in per cent."""
        percent = (f"{100 * share:.2f}" for share in (self.padding, self.covered))
        return (self.name, str(len(self.buckets)), str(self.used), *percent)


@dataclass(frozen=True)
class Comparison:
    """A planned list, and what other lists would have done on the same stream.

    Attributes
    ----------
    planned : Fit
    as_they_are : tuple of Fit
        Each of `LISTS` at its own count.
    at_equal_count : tuple of Fit
        Each of them thinned to the planned count, those sizes kept that pad this stream least.
    steps : int
        Length of the stream.
    """

    planned: Fit
    as_they_are: tuple[Fit, ...]
    at_equal_count: tuple[Fit, ...]
    steps: int

    @property
    def fits(self) -> tuple[Fit, ...]:
        """All of them, the planned first."""
        return (self.planned, *self.as_they_are, *self.at_equal_count)

    def table(self) -> str:
        """Return the comparison as text, the planned sizes above it."""
        lines = [f"buckets: {', '.join(map(str, self.planned.buckets))}", ""]
        head = ("list", "count", "used", "padding %", "covered %")
        rows = [fit.row() for fit in self.fits]
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        for row in (head, *rows):
            cells = [row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw each list's padding as a bar and return the axes (needs matplotlib, the extra "plot").

        Steps that a list has no bucket for are named at its bar: its padding speaks of the others alone.
        """
        axes: Axes = importlib.import_module("numbabuf.view.plots").comparison(self, ax=ax)
        return axes


def compare(sizes: ArrayLike, k: int, *, max_size: int | None = None, cost: Cost | None = None) -> Comparison:
    """Plan ``k`` buckets for a stream of sizes and compare them with other lists on it.

    Parameters
    ----------
    sizes : array_like of int, shape (steps,)
        One size a step.
    k : int
        Buckets to plan.
    max_size : int, optional
        Largest size to serve; the largest of the stream by default.
    cost : Cost, optional
        What the plan makes least; padded work by default.

    Returns
    -------
    Comparison

    Raises
    ------
    ValueError
        If the stream is empty or holds anything but whole numbers from 1.

    Notes
    -----
    The plan is made on the stream that it is measured on: what a list can do for this log, not a forecast.

    Examples
    --------
    >>> compare([3, 3, 5, 60], 3).planned.buckets
    (3, 5, 60)
    """
    x = _stream(sizes)
    top = int(x.max()) if max_size is None else max_size
    planned = plan(x, k, max_size=top, cost=cost)
    full = [(other.name, np.array(other.sizes(top), np.int64)) for other in LISTS]
    own = tuple(Fit.of(name, buckets, x) for name, buckets in full)
    equal = tuple(_thinned(name, buckets, planned.size, x) for name, buckets in full)
    return Comparison(Fit.of("planned", planned, x), own, equal, int(x.size))


def _stream(sizes: ArrayLike) -> Ints:
    x = np.asarray(sizes)
    if x.ndim != 1 or not x.size or x.dtype.kind not in "iu":
        raise ValueError(f"a stream of sizes must be whole numbers in one dimension; found {x.dtype}, shape {x.shape}")
    x = x.astype(np.int64)
    if x.min() < 1:
        raise ValueError(f"a stream of sizes must be whole numbers from 1; found {x.min()}")
    return x


def _thinned(name: str, full: Ints, count: int, x: Ints) -> Fit:
    """The same engine with as many graphs: its best sizes for this stream, its own largest among them."""
    if full.size <= count:
        return Fit.of(f"{name}, no more to thin", full, x)
    some, counts = np.unique(padded(x[x <= full[-1]], full), return_counts=True)
    thin = np.intersect1d(plan((some, counts), count, max_size=int(full[-1]), prior=0), full)
    spare = np.setdiff1d(full, thin)[: count - thin.size]  # no step needs them, but they count
    return Fit.of(f"{name}, thinned", np.union1d(thin, spare), x)
