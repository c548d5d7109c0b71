"""What fills the part of a slot that a step does not use: a mode of the fill, and the 16 bytes that it repeats.

Everything that a user may give as a pad is checked here, when the slot is registered. Sits above `kernels`.
"""

from __future__ import annotations

import numpy as np

from .._cuda import kernels
from ..pool.spec import is_bfloat16

__all__ = ["ITEM_BYTES", "Pad", "resolve_pad"]

ITEM_BYTES = (1, 2, 4, 8, 16)
"""Element sizes that a fill moves as they are."""

Pad = tuple[int, tuple[int, int]]
"""A mode of `kernels`, and two words of a pattern whose phase is the address modulo 16."""

_MODES = {"repeat_last": kernels.PAD_REPEAT, "keep": kernels.PAD_KEEP}


def resolve_pad(name: str, pad: object, dtype: np.dtype, *, index: bool) -> Pad:
    """Return what `pad` means for a slot of `dtype`, or raise ValueError in the name of the slot."""
    if isinstance(pad, str):
        return _mode(name, pad, dtype, index), (0, 0)
    given = np.asarray(pad)
    if index and given.shape == () and given.dtype.kind in "iuf" and given < 0:
        raise ValueError(
            f"slot {name!r} holds indices, and pad {pad!r} is none: a kernel that follows it writes to "
            "the last row, or out of bounds. Pad with a valid index, as of a row that nothing else uses"
        )
    try:
        raw = _converted(given, dtype).tobytes()
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"slot {name!r}: pad {pad!r} is no value of {dtype} ({error})") from None
    if len(raw) not in ITEM_BYTES:
        if any(raw):
            raise ValueError(
                f"slot {name!r}: elements of {len(raw)} bytes are padded with zeros or kept: use pad=0, or 'keep'"
            )
        raw = bytes(16)
    low, high = np.frombuffer(raw * (16 // len(raw)), np.int64).tolist()
    return kernels.PAD_VALUE, (low, high)


def _mode(name: str, pad: str, dtype: np.dtype, index: bool) -> int:
    if pad not in _MODES:
        raise ValueError(f"slot {name!r}: pad {pad!r}; use a value, 'repeat_last' or 'keep'")
    if pad == "repeat_last" and dtype.itemsize not in ITEM_BYTES:
        raise ValueError(
            f"slot {name!r}: elements of {dtype.itemsize} bytes are padded with zeros or kept: use pad=0 or 'keep'"
        )
    if pad == "keep" and index:
        raise ValueError(
            f"slot {name!r} holds indices, and pad 'keep' would leave stale ones in the padding, which "
            "kernels follow out of bounds: use a valid index or 'repeat_last'"
        )
    return _MODES[pad]


def _converted(given: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return the pad as a value of `dtype`; what does not become one without loss of meaning says why."""
    if given.shape != ():
        raise TypeError("it is not a scalar")
    _check_kind(given, dtype)
    if dtype.kind in "SUV" and given.dtype.kind in "iub" and given == 0:
        return np.zeros((), dtype)  # zero bytes where an element is no number; NumPy would make it the letter "0"
    with np.errstate(all="ignore"):
        value = given.astype(dtype)
    if dtype.kind in "SU" and given.dtype.kind != dtype.kind:
        raise TypeError("it is not a string")
    if (dtype.kind in "fc" or is_bfloat16(dtype)) and given.dtype.kind in "iuf":
        if np.isfinite(given) and not np.isfinite(value):
            raise ValueError("it does not fit")
    return value


def _check_kind(given: np.ndarray, dtype: np.dtype) -> None:
    kind = given.dtype.kind
    if dtype.kind in "iu" and kind in "iub":
        info = np.iinfo(dtype)
        if not info.min <= int(given) <= info.max:
            raise ValueError("it does not fit")
    elif dtype.kind in "iub" and kind not in "iub":
        raise TypeError("it is not an integer")
    elif kind in "OSU" and kind != dtype.kind:
        raise TypeError("it is not a number")
    elif kind == "c" and dtype.kind != "c":
        raise TypeError("it is complex")
