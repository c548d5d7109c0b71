"""A layout, a frozen value: what it checks, rounds and refuses, and where it puts the slots. No device is needed."""

import numpy as np
import pytest

from numbabuf import BucketOverflowError, BufferSpec
from numbabuf.step.layout import ALIGNMENT, Layout, bucket_lists
from numbabuf.step.slot import InputSlot


def slot(axis, capacity):
    return InputSlot(
        "x", BufferSpec(capacity), static=True, pad=0, index=False, source_dtype=None, axis=axis, max_live=None,
        range_check=True,
    )  # fmt: skip


LAYOUT = Layout.of([slot("tokens", 32), slot("seqs+1", 6)], {"tokens": (8, 16), "seqs": (1, 2, 4)}, 64)


def test_limits_and_buckets_come_from_the_slots():
    slots = [slot("tokens", 20), slot("tokens", 32), slot("seqs+1", 5), slot(None, 99)]
    layout = Layout.of(slots, {"tokens": (8, 32)}, 64)
    assert (layout.axes, layout.limits, layout.buckets) == (("tokens", "seqs"), (32, 4), ((8, 32), (1, 2, 4)))
    bare = Layout.of([], {}, 4)
    assert (bare.limits, bare.buckets) == ((4,), ((1, 2, 4),)), "no slot: the manager's own capacity"
    with pytest.raises(ValueError, match="bucket 33 of axis 'tokens' is larger than its slots, which hold 32"):
        Layout.of(slots, {"tokens": (33,)}, 64)
    with pytest.raises(ValueError, match="no slot follows"):
        Layout.of(slots[:1], {"seqs": (1,)}, 64)


def test_other_buckets_make_another_layout():
    other = LAYOUT.with_buckets({"tokens": (4,)})
    assert other.buckets == ((4,), (1, 2, 4)) and LAYOUT.buckets == ((8, 16), (1, 2, 4))
    assert other.targets is LAYOUT.targets and LAYOUT.with_buckets({}) is LAYOUT
    with pytest.raises(AttributeError):
        LAYOUT.buckets = ()


def test_no_slot_overlaps_another():
    layout = Layout.of([slot("tokens", 100), slot("tokens", 1), slot(None, 300)], {}, 64)
    ends = [at + one.spec.size_bytes for one, at in zip(layout.slots, layout.targets)]
    assert all(end <= begin for end, begin in zip(ends, [*layout.targets[1:], layout.arena_bytes]))
    assert all(at % ALIGNMENT == 0 for at in (*layout.targets, *layout.sources, layout.block_bytes))


def test_bucket_lists_by_axis():
    assert bucket_lists(None, 8) == {}
    assert bucket_lists([4, 8], 8) == {"tokens": (4, 8)}
    assert bucket_lists({"seqs": [1, 99]}, 8) == {"seqs": (1, 99)}
    with pytest.raises(ValueError):
        bucket_lists([4, 9], 8)


@pytest.mark.parametrize("value, error", [(True, TypeError), (1.5, TypeError), ("3", TypeError), (-1, ValueError)])
def test_what_is_no_size(value, error):
    for tokens, seqs in ((value, 1), (1, value)):
        with pytest.raises(error):
            LAYOUT.live(tokens, {"seqs": seqs})


def test_sizes_are_ordered_as_the_axes():
    three = Layout.of([slot("tokens", 9), slot("b", 9), slot("a", 9)], {}, 9)
    assert three.live(np.int64(3), {"a": 1, "b": 2}) == (3, 2, 1)
    for further in ({}, {"other": 1}, {"seqs": 1, "other": 1}):
        with pytest.raises(TypeError, match="give seqs=..."):
            LAYOUT.live(3, further)


def test_rounding_up_names_the_first_axis_beyond():
    assert LAYOUT.round_up((0, 1)) == ((8, 1), None)
    assert LAYOUT.round_up((9, 3)) == ((16, 4), None)
    assert LAYOUT.round_up((17, 3)) == ((17, 4), 0)
    assert LAYOUT.round_up((17, 5)) == ((17, 5), 0)
    assert LAYOUT.round_up((16, 5)) == ((16, 5), 1)
    one = Layout.of([slot("tokens", 32)], {"tokens": (8, 16)}, 32)
    assert [one.round_up((size,)) for size in (0, 8, 9, 17)] == [((8,), None), ((8,), None), ((16,), None), ((17,), 0)]


def test_limits():
    LAYOUT.check((32, 5))
    assert LAYOUT.holds((32, 5)) and not LAYOUT.holds((33, 5))
    with pytest.raises(BucketOverflowError, match="seqs=6; the largest bucket is 4 and the slots hold 5"):
        LAYOUT.check((32, 6))


def test_sizes_to_capture():
    assert LAYOUT.wanted(None) == {(8, 4), (16, 4)}
    assert LAYOUT.wanted([3, {"seqs": 1}, 3]) == {(3, 4), (16, 1)}
    for bad in ([], [0], [33], [{"other": 1}]):
        with pytest.raises(ValueError):
            LAYOUT.wanted(bad)
    for bad in (3, {"tokens": 3}):
        with pytest.raises(TypeError, match="list of sizes"):
            LAYOUT.wanted(bad)
