"""What a manager's slots make of a step: its axes, the largest size of each, its buckets, and where every slot lies.

A layout is a frozen value, made from all static slots; another slot makes another layout. Pure: it allocates nothing
and knows no device. Sits above `slot`, below `ring` and `arena`, which build what it describes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .._cuda import kernels
from ..checks import whole_number
from ..demand import buckets as bucket_lists_of
from ..errors import BucketOverflowError
from .output import OutputSlot
from .slot import InputSlot

__all__ = ["ALIGNMENT", "Layout", "SlotSet", "align", "bucket_lists"]

ALIGNMENT = 256
"""Bytes on which blocks, and slots within the arena, begin: what the driver aligns its own allocations to."""

MAX_OUTPUTS = 62
"""Outputs of a manager: which of them a step sends is told by the bits of one word."""

MAX_SLOTS = 65_535
"""Static slots of a manager: the largest second dimension of a grid (CUDA C++ Programming Guide, "Compute
Capabilities")."""


def align(nbytes: int) -> int:
    """Return `nbytes` rounded up to `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def bucket_lists(given: Any, max_tokens: int) -> dict[str, tuple[int, ...]]:
    """Return the bucket list of each axis that `given` names; a bare sequence is for the tokens."""
    if given is None:
        return {}
    lists = dict(given) if isinstance(given, Mapping) else {"tokens": given}
    validate = bucket_lists_of.validate
    return {axis: validate(sizes, max_tokens if axis == "tokens" else 1 << 62) for axis, sizes in lists.items()}


@dataclass(frozen=True)
class Layout:
    """The sizes that a step over some slots may have, and the places of the slots in memory.

    Attributes
    ----------
    slots : tuple of InputSlot
        The static slots, in the order of their positions.
    axes : tuple of str
        What a step has a size of; the tokens first.
    limits : tuple of int
        Largest size per axis that the slots hold.
    buckets : tuple of tuple of int
        Sizes to pad to, per axis, increasing.
    targets, arena_bytes : tuple of int, int
        Where each slot begins in the arena, behind the fill table, and the arena's bytes.
    sources, words_bytes, block_bytes : tuple of int, int, int
        Where each slot's values begin in a staging block, behind its live words, and their and the block's bytes.
    outputs : tuple of OutputSlot
        In the order of their positions.
    output_targets : tuple of int
        Where each output begins in the arena.
    returns, return_bytes : tuple of int, int
        Where each output's values begin in a block of the return ring, and the block's bytes.
    """

    slots: tuple[InputSlot, ...]
    axes: tuple[str, ...]
    limits: tuple[int, ...]
    buckets: tuple[tuple[int, ...], ...]
    targets: tuple[int, ...]
    arena_bytes: int
    sources: tuple[int, ...]
    words_bytes: int
    block_bytes: int
    outputs: tuple[OutputSlot, ...] = ()
    output_targets: tuple[int, ...] = ()
    returns: tuple[int, ...] = ()
    return_bytes: int = 0

    @classmethod
    def of(
        cls, slots: Sequence[InputSlot], given: Mapping[str, tuple[int, ...]], max_tokens: int,
        outputs: Sequence[OutputSlot] = (),
    ) -> Layout:  # fmt: skip
        """Return the layout of `slots` and `outputs`, with the buckets `given` for some axes.

        Raises
        ------
        ValueError
            A bucket is larger than the slots, or is given for an axis that no slot follows.
        """
        every: tuple[Any, ...] = (*slots, *outputs)
        following = sorted(every, key=lambda slot: slot.axis_index)
        axes = tuple(dict.fromkeys(["tokens", *(slot.axis for slot in following if slot.axis is not None)]))
        limits = []
        for axis in axes:
            room = [max((slot.capacity - slot.extra for slot in slots if slot.axis == axis), default=max_tokens)]
            limits.append(min(room + [slot.capacity - slot.extra for slot in outputs if slot.axis == axis]))
        rows = max(1, len(slots))  # a launch has a row of thread blocks even without a slot, which finds zeros
        step_words = kernels.SIZES + len(axes)
        words_bytes = (rows * kernels.LIVE + step_words) * kernels.WORD
        table_words = kernels.HEAD + kernels.ROW * rows + step_words + kernels.SEND_ROW * len(outputs)
        places, arena_bytes = _places(table_words * kernels.WORD, [slot.spec.size_bytes for slot in every])
        staged = [slot.max_live * slot.source_dtype.itemsize for slot in slots]
        sources, block_bytes = _places(words_bytes, staged)
        returns, return_bytes = _places(0, [slot.max_live * slot.result_dtype.itemsize for slot in outputs])
        plain = cls(
            tuple(slots), axes, tuple(limits), tuple(bucket_lists_of.powers_of_two(limit) for limit in limits),
            places[: len(slots)], arena_bytes, sources, words_bytes, block_bytes,
            tuple(outputs), places[len(slots) :], returns, return_bytes,
        )  # fmt: skip
        return plain.with_buckets(given)

    def with_buckets(self, given: Mapping[str, tuple[int, ...]]) -> Layout:
        """Return this layout with other buckets for the axes that `given` names."""
        unknown = set(given) - set(self.axes)
        if unknown:
            raise ValueError(f"buckets are given for {', '.join(sorted(unknown))}; no slot follows such an axis")
        for axis, limit in zip(self.axes, self.limits, strict=True):
            if axis in given and given[axis][-1] > limit:
                raise ValueError(
                    f"bucket {given[axis][-1]} of axis {axis!r} is larger than its slots, which hold {limit}"
                )
        chosen = (given.get(axis) or before for axis, before in zip(self.axes, self.buckets, strict=True))
        return replace(self, buckets=tuple(chosen)) if given else self

    def ring_bytes(self, depth: int) -> int:
        """Return the bytes of a staging ring of `depth` blocks, its count of read blocks first."""
        return ALIGNMENT + depth * self.block_bytes

    def return_ring_bytes(self, depth: int) -> int:
        """Return the bytes of a return ring of `depth` blocks, the number of the last step first."""
        return ALIGNMENT + depth * self.return_bytes

    @property
    def step_at(self) -> int:
        """Which word of the table is the first of the step's."""
        return kernels.HEAD + kernels.ROW * max(1, len(self.slots))

    @property
    def step_words(self) -> int:
        """How many words the step has."""
        return kernels.SIZES + len(self.axes)

    @property
    def sends_at(self) -> int:
        """Which word of the table is the first of the outputs'."""
        return self.step_at + self.step_words

    @property
    def table_words(self) -> int:
        """Words of the table."""
        return self.sends_at + kernels.SEND_ROW * len(self.outputs)

    @property
    def nothing(self) -> tuple[int, ...]:
        """The sizes of a step without values."""
        return (0,) * len(self.axes)

    def live(self, num_tokens: Any, further: Mapping[str, Any]) -> tuple[int, ...]:
        """Check the sizes of a step and bring them into the order of the axes."""
        axes = self.axes
        if num_tokens.__class__ is int and num_tokens >= 0 and not further and len(axes) == 1:
            return (num_tokens,)
        if len(further) != len(axes) - 1 or any(axis not in further for axis in axes[1:]):
            asked = ", ".join(f"{axis}=..." for axis in axes[1:]) or "no further sizes"
            given = ", ".join(further) or "none"
            raise TypeError(f"the slots follow the axes {', '.join(axes)}: give {asked}; given were {given}")
        live = [num_tokens, *(further[axis] for axis in axes[1:])]
        return tuple(whole_number(axis, value) for axis, value in zip(axes, live, strict=True))

    def named(self, sizes: Sequence[int]) -> dict[str, int]:
        """Return sizes by the name of their axis."""
        return dict(zip(self.axes, sizes, strict=True))

    def round_up(self, live: Sequence[int]) -> tuple[tuple[int, ...], int | None]:
        """Return the bucket of `live`, and the first axis beyond its largest bucket (its size stays as it is)."""
        # Hot path of a fill, guarded by benchmarks/step.py.
        buckets = self.buckets
        if len(live) == 1:
            sizes_of, value = buckets[0], live[0]
            return ((sizes_of[bisect_left(sizes_of, value)],), None) if value <= sizes_of[-1] else ((value,), 0)
        sizes, over = [], None
        for at, value in enumerate(live):
            place = bisect_left(buckets[at], value)
            if place < len(buckets[at]):
                value = buckets[at][place]
            elif over is None:
                over = at
            sizes.append(value)
        return tuple(sizes), over

    def bucket_of(self, live: Sequence[int]) -> tuple[int, ...]:
        """Return the bucket of `live`; BucketOverflowError where it is beyond the largest."""
        sizes, over = self.round_up(live)
        if over is not None:
            raise self.too_large(over, live[over], self.buckets[over][-1])
        return sizes

    def rows(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Return the rows of each slot in a step padded to `sizes`."""
        return tuple(min(slot.capacity, slot.rows(sizes)) for slot in self.slots)

    def output_rows(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Return the rows of each output in a step padded to `sizes`."""
        return tuple(min(slot.capacity, slot.rows(sizes)) for slot in self.outputs)

    def holds(self, live: Sequence[int]) -> bool:
        """Return whether the slots hold a step of these sizes."""
        return all(size <= limit for size, limit in zip(live, self.limits, strict=True))

    def check(self, live: Sequence[int]) -> None:
        """Refuse a step that the slots cannot hold."""
        for axis, value in enumerate(live):
            if value > self.limits[axis]:
                raise self.too_large(axis, value, self.buckets[axis][-1])

    def too_large(
        self, axis: int, value: int, largest: int, policies: Sequence[str] = (), why: str = ""
    ) -> BucketOverflowError:
        """Return the error for a size beyond the `largest` bucket.

        `policies` are those that would run the step, "eager" if the slots hold it; `why` another would not.
        """
        limit = self.limits[axis]
        remedy = "add a bucket" if value <= limit else "make its slots larger"
        ways = " or ".join(repr(policy) for policy in policies if value <= limit or policy == "split")
        return BucketOverflowError(
            f"this step has {self.axes[axis]}={value}; the largest bucket is {largest} and the slots hold {limit}: "
            f"{remedy}{f', or make the manager with overflow={ways}' if ways else ''}{why}"
        )

    def wanted(self, sizes: Iterable[int | Mapping[str, int]] | None) -> set[tuple[int, ...]]:
        """Check the sizes that a capture was asked for; an axis that is left out is at its largest bucket."""
        if isinstance(sizes, (int, Mapping)):
            raise TypeError(f"sizes is {sizes!r}: give a list of sizes")
        found = {self.full(one) for one in (self.buckets[0] if sizes is None else sizes)}
        if not found:
            raise ValueError("sizes is empty: give at least one size to capture")
        return found

    def full(self, size: int | Mapping[str, int]) -> tuple[int, ...]:
        """Check one size to capture, and return it for every axis: one that is left out is at its largest bucket."""
        given = dict(size) if isinstance(size, Mapping) else {"tokens": size}
        unknown = set(given) - set(self.axes)
        if unknown:
            raise ValueError(f"size {size!r} names {', '.join(sorted(unknown))}; the axes are {', '.join(self.axes)}")
        largest = zip(self.axes, self.buckets, strict=True)
        sizes = tuple(whole_number(axis, given.get(axis, buckets[-1])) for axis, buckets in largest)
        for axis, value, limit in zip(self.axes, sizes, self.limits, strict=True):
            if not 1 <= value <= limit:
                raise ValueError(f"size {axis}={value} cannot be captured; the slots hold 1 to {limit}")
        return sizes


class SlotSet:
    """The slots of a manager by name, and the layout that the static ones make.

    Parameters
    ----------
    max_tokens : int
        The largest step of slots that follow no axis.
    buckets
        As the manager was given them.
    """

    def __init__(self, max_tokens: int, buckets: Any) -> None:
        self.by_name: dict[str, InputSlot] = {}
        self.buckets = bucket_lists(buckets, max_tokens)
        self._max_tokens = max_tokens
        self.outputs: dict[str, OutputSlot] = {}
        self._static: list[InputSlot] = []
        self._axes = ["tokens"]
        self._layout: Layout | None = None

    @property
    def layout(self) -> Layout:
        """The layout of the slots so far; ValueError where the buckets do not fit them."""
        if self._layout is None:
            outputs = tuple(self.outputs.values())
            self._layout = Layout.of(self._static, self.buckets, self._max_tokens, outputs)
        return self._layout

    def find(self, name: str) -> InputSlot | OutputSlot | None:
        """Return the slot or output of a name, if there is one."""
        return self.by_name.get(name) or self.outputs.get(name)

    def check(self, slot: InputSlot | OutputSlot) -> None:
        """Refuse a slot, or an output, that the others leave no room for."""
        name = slot.name
        other = self.find(name)
        if other is not None:
            raise ValueError(f"slot {name!r} is registered already, as {other!r}")
        if isinstance(slot, OutputSlot):
            if len(self.outputs) >= MAX_OUTPUTS:
                raise ValueError(
                    f"output {name!r} is one too many: a manager has at most {MAX_OUTPUTS}; put several into one"
                )
            return
        if slot.static and len(self._static) >= MAX_SLOTS:
            raise ValueError(
                f"slot {name!r} is one too many: a fill launches a row of thread blocks for each, of which a "
                f"grid has at most {MAX_SLOTS:,}; put several inputs into one slot"
            )
        if slot.static and slot.axis is not None and slot.extra >= slot.capacity:
            axis = f"{slot.axis}+{slot.extra}"
            raise ValueError(
                f"slot {name!r}: axis {axis!r} adds {slot.extra} rows to a size; the slot holds {slot.capacity}"
            )

    def add(self, slot: InputSlot, resolve: Any, set_data: Any) -> None:
        """Give `slot` its name, and a static one its position and its axis."""
        if slot.static:
            slot.bind(len(self._static), self._axis(slot.axis), resolve, set_data)
            self._static.append(slot)
            self._layout = None
        self.by_name[slot.name] = slot

    def add_output(self, slot: OutputSlot, resolve: Any) -> None:
        """Give an output its name, its position and its axis."""
        slot.bind(len(self.outputs), self._axis(slot.axis), resolve)
        self.outputs[slot.name] = slot
        self._layout = None

    def _axis(self, axis: str | None) -> int:
        if axis is None:
            return -1
        if axis not in self._axes:
            self._axes.append(axis)
        return self._axes.index(axis)


def _places(first: int, nbytes: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Return where parts of `nbytes` begin behind `first` bytes, each aligned, and where all of them end."""
    places, at = [], align(first)
    for part in nbytes:
        places.append(at)
        at += align(part)
    return tuple(places), at
