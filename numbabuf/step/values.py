"""Python's numbers, and lists of them, as values of a slot: what fits without loss is taken.

NumPy makes int64 and float64 of them, which says nothing of what was meant; so the values decide, not their type.
Pure. Sits above `spec`, below `slot`.
"""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np

from ..pool.spec import is_bfloat16

__all__ = ["fitted", "is_python"]


def is_python(data: object) -> bool:
    """Whether `data` is a number, or a list of what may be numbers: nothing whose element type somebody chose."""
    return isinstance(data, (numbers.Number, list, tuple, range))


def fitted(name: str, data: Any, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return what `is_python` as `dtype`.

    Parameters
    ----------
    name
        What the errors call the input.
    data
        As it was given.
    array
        What NumPy made of it, not empty.

    Returns
    -------
    fitted : numpy.ndarray
        As `dtype`; `array` itself where it holds no numbers, or floats for integers: not even 2.0 is one.

    Raises
    ------
    OverflowError
        A number is out of the range of `dtype`.
    ValueError
        An integer is not a value of a floating-point `dtype`. Floats are rounded.
    """
    kind, given = "f" if is_bfloat16(dtype) else dtype.kind, array.dtype.kind
    if given == "O" or (given == "f" and kind in "iu"):
        # Integers beyond int64, or on both sides of its end, NumPy makes objects or floats of.
        objects = np.asarray(data, object)
        if all(isinstance(one, numbers.Integral) for one in objects.flat):
            array, given = objects, "i"
    if given in "iu" and kind in "iu":
        return _integers(name, array, dtype)
    if given in "iu" and kind in "fc":
        return _exact(name, array, dtype)
    if given + kind in ("ff", "fc", "cc"):
        return _rounded(name, array, dtype)
    return array


def _integers(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    info, low, high = np.iinfo(dtype), int(array.min()), int(array.max())
    if low < info.min or high > info.max:
        raise OverflowError(
            f"input {name!r} holds values from {low} to {high}; the slot takes {dtype}, from {info.min} to {info.max}"
        )
    return array.astype(dtype)


def _exact(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return integers as floats, refusing those that would be rounded: an identifier would become another."""
    digits, exponent = (8, 128) if is_bfloat16(dtype) else (np.finfo(dtype).nmant + 1, int(np.finfo(dtype).maxexp))
    if max(-int(array.min()), int(array.max())) > 1 << digits:
        for one in map(int, array.flat):
            size = abs(one).bit_length()
            if size > exponent:
                raise OverflowError(f"input {name!r} holds {one}, which is out of the range of {dtype}")
            if size - (one & -one).bit_length() >= digits:
                raise ValueError(
                    f"input {name!r} holds the integer {one}, which {dtype} can only round: give a float, or register "
                    "the slot with another type"
                )
    return array.astype(dtype)


def _rounded(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(all="ignore"):
        value = array.astype(dtype)
    lost = np.isfinite(array) & ~np.isfinite(value)
    if lost.any():
        raise OverflowError(f"input {name!r} holds {array[lost][0]}, which is out of the range of {dtype}")
    return value
