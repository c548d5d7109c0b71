"""One named input: where it lies, what may be staged for it, and how its bytes get into a staging block.

A slot knows the rules for its own values and nothing of rings, buckets or graphs; `manager` carves its memory and
calls `write`. Sits above `spec` and `kernels`, below `staging`.
"""

from __future__ import annotations

import operator
import re
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from .._cuda import kernels
from ..errors import ClosedError
from ..pool.spec import BufferSpec, is_bfloat16, resolve_dtype
from ..resource import Shown
from .conversion import Conversion
from .values import fitted, is_python

__all__ = ["InputSlot", "check_spec", "parse_axis"]

RESERVED = frozenset(
    "self inputs num_tokens each at_least max_padding timeout fn sizes on_progress warm_up verify".split()
)
"""What no axis may be called: a size is given by the name of its axis, beside these arguments."""

_AXIS = re.compile(r"([A-Za-z_]\w*)(?:\+(\d+))?")


class InputSlot(Shown):
    """A named static device array that captured graphs read.

    Made by `InputBufferManager.register_slot`, which explains the parameters. It does not keep its manager alive.

    Attributes
    ----------
    name : str
    spec : BufferSpec
        Capacity and element type of the slot.
    axis : str or None
        The size that the slot's first dimension follows; None for a slot that is always staged whole.
    extra : int
        What is added to that size: 1 for the "seqs+1" of a list of offsets.
    source_dtype : numpy.dtype
        Element type of what is staged; converted to the slot's on the device.
    max_live : int
        Most elements that one step can stage.
    keeps : bool
        Whether a step that leaves the slot out keeps what was written last.
    """

    __slots__ = (
        "_bound", "axis", "axis_index", "checked", "columns_word", "conversion", "extra", "flat", "keeps", "max_live",
        "name", "position", "source_dtype", "spec", "static", "width",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        spec: BufferSpec,
        *,
        static: bool,
        pad: Any,
        index: bool,
        source_dtype: Any,
        axis: str | None,
        max_live: int | None,
        range_check: bool,
        missing: str | None = None,
    ) -> None:
        check_spec(name, spec, axis)
        self.name, self.spec, self.static = name, spec, bool(static)
        self.axis, self.extra = parse_axis(name, axis)
        if missing not in (None, "pad", "keep"):
            raise ValueError(f"slot {name!r}: missing {missing!r}; use 'pad' or 'keep', or None for the default")
        self.keeps = axis is None if missing is None else missing == "keep"
        self.width = int(np.prod(spec.shape[1:], dtype=np.int64))
        self.source_dtype = spec.dtype if source_dtype is None else resolve_dtype(source_dtype)
        self.conversion = Conversion.of(name, self.source_dtype, spec.dtype, self.width, pad, bool(index))
        self.flat = len(spec.shape) == 1 and self.conversion.unit == 1
        elements = self.capacity * self.width
        self.max_live = elements if max_live is None else operator.index(max_live)
        if not 1 <= self.max_live <= elements:
            raise ValueError(f"slot {name!r}: max_live is {max_live}; the slot holds 1 to {elements} elements")
        self.checked = range_check and self.conversion.operation == kernels.I64_I32
        self.position = self.columns_word = self.axis_index = -1
        # Weak, so that a manager is in no reference cycle: what dies in one Numba destroys in whatever thread the
        # collector runs, context or none.
        self._bound: tuple[weakref.WeakMethod[Any], weakref.WeakMethod[Any]] | None = None

    @property
    def capacity(self) -> int:
        """Rows that the slot holds."""
        return self.spec.shape[0] if self.spec.shape else 1

    @property
    def pad(self) -> Any:
        """What fills the part of a bucket that a step does not use: a value, "repeat_last" or "keep"."""
        return self.conversion.pad

    @property
    def index(self) -> bool:
        """Whether kernels use the values as indices, so that stale ones would read out of bounds."""
        return self.conversion.index

    @property
    def array(self) -> Any:
        """The slot's whole device array; its address stays the same while a graph is live.

        None for a slot that is not static. bfloat16 is shown as uint16, which is what Numba can type.
        """
        return None if self._bound is None else self._alive(self._bound[0])(self)

    def set_data(self, data: Any) -> None:
        """Stage `data` into this slot alone, padded to its own bucket; the other slots keep what they hold.

        A slot that keeps holds it until it is written again, any other until the next step.

        Parameters
        ----------
        data
            Host array of at most the slot's length; element type `source_dtype`, or one that casts to it safely. Or a
            list, or for one element a number, whose values fit.

        Raises
        ------
        TypeError, ValueError, OverflowError
            As `InputBufferManager.stage_inputs`.

        Notes
        -----
        Streams: queued on the manager's stream. Capture: refused inside one.
        """
        if self._bound is None:
            raise TypeError(f"slot {self.name!r} is not static: its values pass through stage_inputs untouched")
        self._alive(self._bound[1])(self, data)

    def _alive(self, method: weakref.WeakMethod[Any]) -> Any:
        bound = method()
        if bound is None:
            raise ClosedError(f"the manager of slot {self.name!r} is gone: keep it for as long as its slots")
        return bound

    def bind(
        self,
        position: int,
        axis_index: int,
        resolve: Callable[[InputSlot], Any],
        set_data: Callable[[InputSlot, Any], None],
    ) -> None:
        """Take a place among the static slots, follow an axis (-1: none), and learn what `array` and `set_data` do.

        Both are methods of the manager, which the slot does not keep alive.
        """
        self.position, self.axis_index = position, axis_index
        self.columns_word = position * kernels.LIVE + kernels.COLUMNS
        self._bound = weakref.WeakMethod(resolve), weakref.WeakMethod(set_data)

    def rows(self, sizes: tuple[int, ...]) -> int:
        """Return the slot's rows in a step of `sizes`, in the order of the axes."""
        return sizes[self.axis_index] + self.extra if self.axis_index >= 0 else self.capacity

    def shape(self, rows: int) -> tuple[int, ...]:
        """Return the shape of the slot's first `rows` rows."""
        return (rows, *self.spec.shape[1:]) if self.spec.shape else ()

    def table_row(self, source: int, target: int) -> list[int]:
        """Return the slot's row of the fill table: from `source` bytes into a block to the address `target`."""
        return self.conversion.table_row(source, target, self.source_dtype, self.spec.dtype)

    def on_host(self, data: Any) -> np.ndarray:
        """Return `data` as an array, refusing one of the device, which NumPy might copy back without a word."""
        if not isinstance(data, np.ndarray):
            if _on_device(data):
                raise TypeError(
                    f"input {self.name!r} is a device array; inputs are staged from the host. Give its kernels the "
                    "array itself, as an argument of their own in the captured function, or copy it to the host first, "
                    "with the work on it done (Numba: data.copy_to_host(), CuPy: data.get(), PyTorch: data.cpu())"
                )
        elif isinstance(data, np.ma.MaskedArray) and np.ma.is_masked(data):
            raise TypeError(
                f"input {self.name!r} is a masked array, and a slot has no place for its mask: give data.filled(value)"
            )
        try:
            array = np.asarray(data)
        except ValueError as error:
            raise ValueError(f"input {self.name!r} is not an array: {error}") from None
        if array.size == 0 and not isinstance(data, np.ndarray):
            return array.astype(self.source_dtype)  # as of an empty list, which has no element type
        if array.ndim == 0 and self.spec.shape == (1,):
            array = array.reshape(1)
        if array.dtype != self.source_dtype and is_python(data) and not _casts(array.dtype, self.source_dtype):
            array = fitted(self.name, data, array, self.source_dtype).reshape(array.shape)
        return array

    def coerce(self, data: Any, live: int) -> np.ndarray:
        """Return `data` as an array that may be staged as `live` rows, or say what is wrong with it.

        Raises
        ------
        TypeError
            A device array, or an element type that does not cast safely to `source_dtype`; of Python numbers and lists
            the values decide.
        ValueError
            Wrong number of dimensions or rows, rows wider than the slot's, or more elements than `max_live`.
        OverflowError
            An integer does not fit the slot's narrower type (where the range check is on), or a Python number
            `source_dtype`.
        """
        array = self.on_host(data)
        if array.dtype != self.source_dtype and not _casts(array.dtype, self.source_dtype):
            raise TypeError(
                f"input {self.name!r} has dtype {array.dtype}; the slot takes {self.source_dtype}: convert it, or "
                "register the slot with another source_dtype"
            )
        shape = self.spec.shape
        if array.ndim != len(shape):
            raise ValueError(
                f"input {self.name!r} has shape {array.shape}; the slot has {len(shape)} dimension(s): {shape}"
            )
        if array.ndim and array.shape[0] != live:
            raise ValueError(
                f"input {self.name!r} has {array.shape[0]} rows; this step has {live}"
                f"{f' (axis {self.axis})' if self.axis else ''}{f' plus {self.extra}' if self.extra else ''}: "
                "slice it or correct the step's size"
            )
        if live > self.capacity:
            raise ValueError(
                f"input {self.name!r} has {live} rows; the slot holds {self.capacity}: register a larger slot"
            )
        if array.ndim == 2 and array.shape[1] > shape[1]:
            raise ValueError(f"input {self.name!r} has rows of {array.shape[1]}; the slot's rows hold {shape[1]}")
        if array.ndim > 2 and array.shape[1:] != shape[1:]:
            raise ValueError(
                f"input {self.name!r} has shape {array.shape}; past the first dimension it must be {shape[1:]}"
            )
        if array.size > self.max_live:
            raise ValueError(
                f"input {self.name!r} has {array.size} elements; "
                f"the slot stages at most max_live={self.max_live} a step"
            )
        if self.checked and array.size:
            self.check_range(array)
        return array

    def check_range(self, array: np.ndarray) -> None:
        """Refuse int64 values that int32 cannot hold."""
        # The union of all bits shows in one pass that no value is negative or large, which is the usual case.
        if 0 <= np.bitwise_or.reduce(array, axis=None) < 1 << 31:
            return
        if array.min() < -(1 << 31) or array.max() >= 1 << 31:
            raise OverflowError(
                f"input {self.name!r} holds values from {array.min()} to {array.max()}; the slot is int32. Correct the "
                "values or register the slot as int64 (the check can be switched off with range_check=False)"
            )

    def write(self, words: memoryview, staged: np.ndarray, data: Any, live: int, padded: int) -> None:
        """Check `data`, write it and its sizes into a staging block.

        Parameters
        ----------
        words : memoryview of int64
            The block's live words.
        staged : numpy.ndarray, shape (max_live,)
            The slot's part of the block, as `source_dtype`.
        data
            Host array of `live` rows.
        padded : int
            Rows of the slot that are valid after the fill.
        """
        array = self.coerce(data, live)
        staged[: array.size].reshape(array.shape)[...] = array
        self.describe(words, live, array.shape[1] if array.ndim == 2 else self.width, padded)

    def describe(self, words: memoryview, live: int, columns: int, padded: int) -> None:
        """Write into a block's words: `live` staged rows of `columns` elements, padded to `padded` rows."""
        # Hot path, guarded by benchmarks/step.py: a step describes each slot that it gives nothing.
        at = self.columns_word - kernels.COLUMNS
        if self.flat:  # one long row, of one unit an element
            words[at + kernels.ROWS] = words[at + kernels.PADDED_ROWS] = 1
            words[at + kernels.COLUMNS] = live
            words[at + kernels.PADDED_COLUMNS] = padded
            return
        conversion = self.conversion
        unit = conversion.unit
        width = self.width * unit
        columns *= unit
        if columns == width and conversion.pad_mode != kernels.PAD_REPEAT:
            # One long row; for rows that are repeated as a whole the kernel has to know where they begin.
            words[at + kernels.ROWS] = words[at + kernels.PADDED_ROWS] = 1
            words[at + kernels.COLUMNS] = live * width
            words[at + kernels.PADDED_COLUMNS] = padded * width
        else:
            words[at + kernels.ROWS] = live
            words[at + kernels.COLUMNS] = columns
            words[at + kernels.PADDED_ROWS] = padded
            words[at + kernels.PADDED_COLUMNS] = width

    def skip(self, words: memoryview) -> None:
        """Write into a block's words: nothing to write and nothing to pad."""
        at = self.columns_word - kernels.COLUMNS
        for word in range(at, at + kernels.LIVE):
            words[word] = 0

    def __repr__(self) -> str:
        extra = f"+{self.extra}" if self.extra else ""
        return f"InputSlot({self.name!r}, {self.spec!r}, axis={self.axis}{extra}, pad={self.pad!r})"


def check_spec(name: object, spec: object, axis: str | None) -> None:
    """Refuse a name, or a spec, that no slot can have."""
    if not isinstance(name, str) or not name:
        raise TypeError(f"slot name {name!r} is not a name: give a non-empty string")
    if not isinstance(spec, BufferSpec):
        raise TypeError(f"slot {name!r}: spec is {spec!r}: give a BufferSpec")
    if 0 in spec.shape:
        raise ValueError(f"slot {name!r}: shape {spec.shape} holds no elements: give dimensions that are all >= 1")
    if not spec.shape and axis is not None:
        raise ValueError(f"slot {name!r}: shape () has no dimension to follow {axis!r}: give axis=None")


def _on_device(data: object) -> bool:
    """Whether `data`, no ndarray, is in memory that the host does not read."""
    if hasattr(data, "__cuda_array_interface__") or hasattr(data, "copy_to_host"):
        return True
    place = getattr(data, "__dlpack_device__", None)
    return place is not None and int(place()[0]) not in (1, 3)  # DLPack's kDLCPU and kDLCUDAHost


def _casts(source: np.dtype, target: np.dtype) -> bool:
    if is_bfloat16(source) or is_bfloat16(target):
        return False
    return bool(np.can_cast(source, target, "safe")) and source.kind in "biufc"


def parse_axis(name: str, axis: str | None) -> tuple[str | None, int]:
    """Return the name and the offset of an axis; ValueError where it is none."""
    if axis is None:
        return None, 0
    match = _AXIS.fullmatch(axis) if isinstance(axis, str) else None
    if match is None:
        raise ValueError(
            f"slot {name!r}: axis {axis!r}; give a name such as 'tokens', or one with an offset such as 'seqs+1'"
        )
    if match[1] in RESERVED:
        raise ValueError(
            f"slot {name!r}: axis {axis!r} is taken, as an argument of the methods that take sizes by name; use "
            f"another name than {', '.join(sorted(RESERVED))}"
        )
    return match[1], int(match[2] or 0)
