"""One named output: a static device array that kernels write, whose live rows each step sends back to the host.

An output knows the rules for its own values and nothing of rings or graphs. Sits above `slot` and `conversion`, below
`layout`.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from .._cuda import kernels
from ..errors import ClosedError
from ..pool.spec import BufferSpec, resolve_dtype
from ..resource import Shown
from .conversion import Conversion
from .slot import check_spec, parse_axis

__all__ = ["OutputSlot"]


class OutputSlot(Shown):
    """A named static device array that captured functions write, and whose live rows `send_slots` moves to the host.

    Made by `InputBufferManager.register_output`, which explains the parameters. It does not keep its manager alive.

    Attributes
    ----------
    name : str
    spec : BufferSpec
        Capacity and element type of what the kernels write.
    axis : str or None
        The size that the first dimension follows; None for an output that is always sent whole.
    extra : int
        What is added to that size.
    result_dtype : numpy.dtype
        Element type of what the host reads; converted on the device.
    max_live : int
        Most elements that one step can send.
    limited, flat : bool
        Whether that is less than what the output holds, and whether it has one dimension.
    """

    __slots__ = (
        "_resolve", "axis", "axis_index", "conversion", "extra", "flat", "limited", "max_live", "name", "position",
        "result_dtype", "spec", "width",
    )  # fmt: skip

    def __init__(
        self, name: str, spec: BufferSpec, *, axis: str | None, result_dtype: Any, max_live: int | None
    ) -> None:
        check_spec(name, spec, axis)
        self.name, self.spec = name, spec
        self.axis, self.extra = parse_axis(name, axis)
        self.width = int(np.prod(spec.shape[1:], dtype=np.int64))
        self.result_dtype = spec.dtype if result_dtype is None else resolve_dtype(result_dtype)
        self.conversion = Conversion.of(name, spec.dtype, self.result_dtype, self.width, 0, False)
        elements = self.capacity * self.width
        self.max_live = elements if max_live is None else operator.index(max_live)
        if not 1 <= self.max_live <= elements:
            raise ValueError(f"output {name!r}: max_live is {max_live}; the output holds 1 to {elements} elements")
        self.limited, self.flat = self.max_live < elements, len(spec.shape) == 1
        if self.axis is not None and self.extra >= self.capacity:
            raise ValueError(
                f"output {name!r}: axis {axis!r} adds {self.extra} rows to a size; the output holds {self.capacity}"
            )
        self.position = self.axis_index = -1
        self._resolve: weakref.WeakMethod[Any] | None = None

    @property
    def capacity(self) -> int:
        """Rows that the output holds."""
        return self.spec.shape[0] if self.spec.shape else 1

    @property
    def array(self) -> Any:
        """The whole device array; its address stays the same while a graph is live."""
        resolve = None if self._resolve is None else self._resolve()
        if resolve is None:
            raise ClosedError(f"the manager of output {self.name!r} is gone: keep it for as long as its outputs")
        return resolve(self)

    def bind(self, position: int, axis_index: int, resolve: Callable[[OutputSlot], Any]) -> None:
        """Take a place among the outputs, follow an axis (-1: none), and learn what `array` does."""
        self.position, self.axis_index = position, axis_index
        self._resolve = weakref.WeakMethod(resolve)

    def rows(self, sizes: tuple[int, ...]) -> int:
        """Return the output's rows in a step of `sizes`, in the order of the axes."""
        return sizes[self.axis_index] + self.extra if self.axis_index >= 0 else self.capacity

    def shape(self, rows: int) -> tuple[int, ...]:
        """Return the shape of `rows` of the output; () has no rows."""
        return (rows, *self.spec.shape[1:]) if self.spec.shape else ()

    def check_live(self, sizes: tuple[int, ...]) -> None:
        """Refuse a step that would send more than the return ring has room for."""
        elements = self.rows(sizes) * self.width
        if elements > self.max_live:
            raise ValueError(
                f"output {self.name!r} sends at most max_live={self.max_live} elements a step; this one has {elements}"
            )

    def table_row(self, source: int, target: int, axes: int) -> list[int]:
        """Return the output's row for `send_slots`: from the address `source` to `target` bytes into a return block."""
        unit = self.conversion.unit
        row = [0] * kernels.SEND_ROW
        row[kernels.SEND_SOURCE] = source
        row[kernels.SEND_TARGET] = target
        row[kernels.SEND_SIZE] = kernels.SIZES + axes - 1 - self.axis_index if self.axis_index >= 0 else -1
        row[kernels.SEND_EXTRA] = self.extra if self.axis_index >= 0 else self.capacity
        row[kernels.SEND_WIDTH] = self.width * unit
        row[kernels.SEND_OPERATION] = self.conversion.operation
        row[kernels.SEND_SOURCE_ITEM] = self.spec.dtype.itemsize // unit
        row[kernels.SEND_TARGET_ITEM] = self.result_dtype.itemsize // unit
        return row

    def __repr__(self) -> str:
        extra = f"+{self.extra}" if self.extra else ""
        return f"OutputSlot({self.name!r}, {self.spec!r}, axis={self.axis}{extra})"
