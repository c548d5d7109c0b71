"""How a slot's values become its elements on the device: which conversion, and what fills the padding.

Pure: it checks what a slot was registered with, and knows no memory. Sits below `slot`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .._cuda import kernels
from .pad import ITEM_BYTES, resolve_pad

__all__ = ["CONVERSIONS", "Conversion"]

CONVERSIONS = {
    ("int64", "int32"): kernels.I64_I32,
    ("int32", "int64"): kernels.I32_I64,
    ("float64", "float32"): kernels.F64_F32,
    ("float32", "float16"): kernels.F32_F16,
    ("float16", "float32"): kernels.F16_F32,
    ("float32", "bfloat16"): kernels.F32_BF16,
    ("bfloat16", "float32"): kernels.BF16_F32,
}
"""(staged type, slot's type) -> what `fill_slots` calls the conversion."""


@dataclass(frozen=True)
class Conversion:
    """What a fill does with the elements of one slot.

    Attributes
    ----------
    pad : scalar or str
    index : bool
        As the slot was registered.
    operation : int
        What `fill_slots` calls the conversion.
    unit : int
        Parts of an element that are moved one by one: 1, or its bytes where a fill has no move of its size.
    width : int
        Elements of a row.
    pad_mode : int
    pad_words : tuple of int
        The pad over and over, in 16 bytes.
    """

    pad: Any
    index: bool
    operation: int
    unit: int
    width: int
    pad_mode: int
    pad_words: tuple[int, int]

    @classmethod
    def of(cls, slot: str, source: np.dtype, target: np.dtype, width: int, pad: Any, index: bool) -> Conversion:
        """Return the conversion for a slot of rows of `width` elements; TypeError or ValueError where there is none."""
        if index and target.kind not in "iu":
            raise TypeError(
                f"slot {slot!r} holds indices, and its elements are {target}: give an integer type, or index=False"
            )
        operation = kernels.RAW if source == target else CONVERSIONS.get((source.name, target.name))
        if operation is None:
            known = ", ".join(f"{a} to {b}" for a, b in CONVERSIONS)
            raise TypeError(f"slot {slot!r}: no conversion from {source} to {target}; there are {known}")
        unit = 1 if target.itemsize in ITEM_BYTES else target.itemsize
        mode, words = resolve_pad(slot, pad, target, index=index)
        return cls(pad, index, operation, unit, width, mode, words)

    def table_row(self, source: int, target: int, source_dtype: np.dtype, dtype: np.dtype) -> list[int]:
        """Return the row of the fill table: from `source` bytes into a staging block to the address `target`."""
        row = [0] * kernels.ROW
        row[kernels.SOURCE] = source
        row[kernels.TARGET] = target
        row[kernels.OPERATION] = self.operation
        row[kernels.SOURCE_ITEM] = source_dtype.itemsize // self.unit
        row[kernels.TARGET_ITEM] = dtype.itemsize // self.unit
        row[kernels.PITCH] = self.width * self.unit
        row[kernels.PAD_MODE] = self.pad_mode
        row[kernels.PAD_LOW], row[kernels.PAD_HIGH] = self.pad_words
        return row
