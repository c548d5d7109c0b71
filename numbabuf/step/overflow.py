"""What a manager does with a step that is larger than every captured one: the policies, and how "split" cuts a step.

Cutting is pure: all pieces are checked before the first of them is queued, and none is made before its turn. Sits
above `slot`, below `manager`, which runs what is cut here.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..checks import outside
from .slot import InputSlot

__all__ = ["POLICIES", "check_each", "cut", "uncut", "warn"]

POLICIES = ("raise", "eager", "split")
"""Refuse the step; run fill and function without a graph; replay it in pieces along the tokens."""


def check_each(each: object) -> None:
    """Refuse what cannot be called after each piece."""
    if not callable(each):
        raise TypeError(f"each is {each!r}: give a function of (result, start, stop), or None")


def uncut(slots: Sequence[InputSlot]) -> InputSlot | None:
    """Return a slot that no cut along the tokens divides rightly, so that no step over `slots` may be split.

    Offsets on "seqs+1", say, point into all tokens of the step; a piece that gets them all reads out of its bounds.
    """
    for slot in slots:
        if slot.axis not in ("tokens", None) or slot.extra:
            return slot
    return None


def cut(
    inputs: Mapping[str, Any], tokens: int, width: int, slots: Sequence[InputSlot]
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Check the inputs of a step and return its pieces of `width` tokens, each made when it is asked for.

    Parameters
    ----------
    inputs
        Every name is that of one of `slots`.
    tokens
        Live tokens of the step.
    slots
        Each follows the tokens or nothing (see `uncut`).

    Returns
    -------
    pieces : iterator of (start, stop, inputs)
        The tokens of each piece, and its inputs: slices where a slot follows the tokens, else the whole.

    Raises
    ------
    TypeError, ValueError, OverflowError
        An input does not fit its slot, in any piece.
    """
    cuts, wholes = {}, {}
    for slot in slots:
        data = inputs.get(slot.name)
        if data is None:
            continue
        if slot.axis is None:
            wholes[slot.name] = slot.coerce(data, slot.capacity)
            continue
        data = slot.on_host(data)
        if data.ndim == 0 or len(data) != tokens:
            raise ValueError(f"input {slot.name!r} has shape {data.shape}; this step has {tokens} tokens")
        slot.coerce(data[:width], min(width, tokens))  # no piece is longer, and all are alike but for their values
        if slot.checked and data.size:
            slot.check_range(data)
        cuts[slot.name] = data
    return _pieces(cuts, wholes, tokens, width)


def _pieces(
    cuts: dict[str, Any], wholes: dict[str, Any], tokens: int, width: int
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    for start in range(0, tokens, width):
        stop = min(start + width, tokens)
        yield start, stop, {**{name: data[start:stop] for name, data in cuts.items()}, **wholes}


def warn(axes: Sequence[str], live: Sequence[int]) -> None:
    """Say that a step runs without a graph, at the line that asked for it; the caller says it once."""
    _, depth = outside()
    size = ", ".join(f"{axis}={value}" for axis, value in zip(axes, live, strict=True))
    warnings.warn(
        f"a step with {size} fits no bucket and runs without a graph, which is slower: "
        "capture a bucket for it (further such steps are only counted, in stats().overflows)",
        RuntimeWarning,
        stacklevel=depth,
    )
