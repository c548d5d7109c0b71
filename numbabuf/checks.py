"""What an argument must be, said in one place: the same test and the same words wherever a number is asked for.

Values in, values out: nothing here knows what the number is for but its name. Sits above `errors`, below everything
that takes arguments.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping
from types import FrameType

import numpy as np

__all__ = ["OnProgress", "check_progress", "nbytes", "outside", "whole_number"]

OnProgress = Callable[[int, int, Mapping[str, int], "int | None"], None]
"""Called with what is done, how much there is, the size just done, and the bytes free on the device if known."""


def whole_number(name: str, value: object, *, least: int = 0, most: int | None = None) -> int:
    """Return `value` as an int, or say what is wrong with it.

    Parameters
    ----------
    name
        What the caller calls it, unit included: "max_bytes".
    value
        Anything that Python takes for an index: ints and NumPy's integers, but no bool, and no float, not even 2.0.
    least, most
        The range it must be in, both ends included; `most` None for no upper end.

    Raises
    ------
    TypeError
        It is not a whole number.
    ValueError
        It is out of range.

    Examples
    --------
    >>> whole_number("max_bytes", np.int64(1024))
    1024
    >>> whole_number("k", 0, least=1)
    Traceback (most recent call last):
    ValueError: k is 0: give a whole number >= 1
    """
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]  # TypeError is the answer
    except TypeError:
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}: give a whole number") from None
    if number < least or (most is not None and number > most):
        wanted = f">= {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {number}: give a whole number {wanted}")
    return number


def outside() -> tuple[FrameType, int]:
    """Return the first frame of the stack outside this package, and the `stacklevel` that means it to its caller."""
    frame, depth = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        frame, depth = frame.f_back, depth + 1
    return frame, depth


def nbytes(count: float) -> str:
    """Return a number of bytes with its unit.

    Examples
    --------
    >>> nbytes(0), nbytes(1536), nbytes(5 << 30)
    ('0 B', '1.5 KiB', '5 GiB')
    """
    unit, size = "B", float(count)
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024:
            break
        unit, size = larger, size / 1024
    return f"{size:.4g} {unit}"


def check_progress(on_progress: object) -> None:
    """Refuse what cannot be told of progress."""
    if on_progress is not None and not callable(on_progress):
        raise TypeError(f"on_progress is {on_progress!r}: give a function of (done, total, size, free_bytes), or None")
