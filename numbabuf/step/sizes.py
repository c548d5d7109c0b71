"""The sizes of a step: how they are checked, rounded up to buckets, and settled from the slots that follow them.

A step has a size for each axis, the tokens first: the manager's "axes" are their names, its "choices" the bucket list
of each, its "limits" the largest that the slots hold. All functions here are pure and know no memory. Sits above
`slot`, below `manager`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..checks import whole_number
from ..demand import buckets
from ..errors import BucketOverflowError
from .slot import InputSlot

__all__ = ["bucket_lists", "check_limits", "live_sizes", "round_up", "settle", "too_large", "wanted"]


def bucket_lists(given: Any, max_tokens: int) -> dict[str, tuple[int, ...]]:
    """Return the bucket list of each axis that `given` names; a bare sequence is for the tokens."""
    if given is None:
        return {}
    lists = dict(given) if isinstance(given, Mapping) else {"tokens": given}
    return {axis: buckets.validate(sizes, max_tokens if axis == "tokens" else 1 << 62) for axis, sizes in lists.items()}


def settle(
    axes: Sequence[str], slots: Sequence[InputSlot], given: Mapping[str, tuple[int, ...]], max_tokens: int
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Return the largest size and the bucket list of every axis, from the slots that follow it.

    Raises
    ------
    ValueError
        A bucket is larger than the slots, or is given for an axis that no slot follows.
    """
    limits, choices = [], []
    for axis in axes:
        limit = max((slot.capacity - slot.extra for slot in slots if slot.axis == axis), default=max_tokens)
        chosen = given.get(axis)
        if chosen is not None and chosen[-1] > limit:
            raise ValueError(f"bucket {chosen[-1]} of axis {axis!r} is larger than its slots, which hold {limit}")
        limits.append(limit)
        choices.append(chosen or buckets.powers_of_two(limit))
    unknown = set(given) - set(axes)
    if unknown:
        raise ValueError(f"buckets are given for {', '.join(sorted(unknown))}; no slot follows such an axis")
    return tuple(limits), tuple(choices)


def live_sizes(axes: Sequence[str], num_tokens: int, further: Mapping[str, Any]) -> tuple[int, ...]:
    """Check the sizes of a step and bring them into the order of the axes."""
    if num_tokens.__class__ is int and num_tokens >= 0 and not further and len(axes) == 1:
        return (num_tokens,)
    if len(further) != len(axes) - 1 or any(axis not in further for axis in axes[1:]):
        asked = ", ".join(f"{axis}=..." for axis in axes[1:]) or "no further sizes"
        given = ", ".join(further) or "none"
        raise TypeError(f"the slots follow the axes {', '.join(axes)}: give {asked}; given were {given}")
    live = [num_tokens, *(further[axis] for axis in axes[1:])]
    return tuple(whole_number(axis, value) for axis, value in zip(axes, live, strict=True))


def round_up(choices: Sequence[Sequence[int]], live: Sequence[int]) -> tuple[tuple[int, ...], int | None]:
    """Return the bucket of `live`, and the first axis beyond its largest bucket (its size stays as it is)."""
    sizes, over = [], None
    for at, value in enumerate(live):
        place = bisect_left(choices[at], value)
        if place < len(choices[at]):
            value = choices[at][place]
        elif over is None:
            over = at
        sizes.append(value)
    return tuple(sizes), over


def too_large(
    axis: str, value: int, largest: int, limit: int, policies: Sequence[str] = (), why: str = ""
) -> BucketOverflowError:
    """The error for a step whose size of `axis` is beyond the `largest` bucket; the slots hold `limit`.

    `policies` are those that would run it: "eager" if the slots hold it, "split" in any case. `why` another would not.
    """
    remedy = "add a bucket" if value <= limit else "make its slots larger"
    ways = " or ".join(repr(policy) for policy in policies if value <= limit or policy == "split")
    return BucketOverflowError(
        f"this step has {axis}={value}; the largest bucket is {largest} and the slots hold {limit}: {remedy}"
        f"{f', or make the manager with overflow={ways}' if ways else ''}{why}"
    )


def check_limits(
    axes: Sequence[str], limits: Sequence[int], choices: Sequence[Sequence[int]], live: Sequence[int]
) -> None:
    """Refuse a step that the slots cannot hold."""
    for axis, limit, sizes, value in zip(axes, limits, choices, live, strict=True):
        if value > limit:
            raise too_large(axis, value, sizes[-1], limit)


def wanted(
    axes: Sequence[str],
    limits: Sequence[int],
    choices: Sequence[Sequence[int]],
    sizes: Iterable[int | Mapping[str, int]] | None,
) -> set[tuple[int, ...]]:
    """The sizes that `capture_buckets` was asked for, checked; an axis that is left out is at its largest."""
    if isinstance(sizes, (int, Mapping)):
        raise TypeError(f"sizes is {sizes!r}: give a list of sizes")
    found = set()
    for one in choices[0] if sizes is None else sizes:
        given = dict(one) if isinstance(one, Mapping) else {"tokens": one}
        unknown = set(given) - set(axes)
        if unknown:
            raise ValueError(f"size {one!r} names {', '.join(sorted(unknown))}; the axes are {', '.join(axes)}")
        full = tuple(whole_number(axis, given.get(axis, c[-1])) for axis, c in zip(axes, choices, strict=True))
        for axis, value, limit in zip(axes, full, limits, strict=True):
            if not 1 <= value <= limit:
                raise ValueError(f"size {axis}={value} cannot be captured; the slots hold 1 to {limit}")
        found.add(full)
    if not found:
        raise ValueError("sizes is empty: give at least one size to capture")
    return found
