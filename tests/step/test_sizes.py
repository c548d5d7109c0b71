"""The sizes of a step, as pure functions: what is checked, rounded and refused. No device is needed."""

import numpy as np
import pytest

from numbabuf import BucketOverflowError, BufferSpec
from numbabuf.step import sizes
from numbabuf.step.slot import InputSlot

AXES, LIMITS, CHOICES = ("tokens", "seqs"), (32, 5), ((8, 16), (1, 2, 4))


def slot(axis, capacity):
    return InputSlot(
        "x", BufferSpec(capacity), static=True, pad=0, index=False, source_dtype=None, axis=axis, max_live=None,
        range_check=True,
    )  # fmt: skip


def test_limits_and_choices_come_from_the_slots():
    slots = [slot("tokens", 20), slot("tokens", 32), slot("seqs+1", 5), slot(None, 99)]
    assert sizes.settle(AXES, slots, {"tokens": (8, 32)}, 64) == ((32, 4), ((8, 32), (1, 2, 4)))
    assert sizes.settle(("tokens",), [], {}, 4) == ((4,), ((1, 2, 4),)), "no slot: the manager's own capacity"
    with pytest.raises(ValueError, match="bucket 33 of axis 'tokens' is larger than its slots, which hold 32"):
        sizes.settle(AXES, slots, {"tokens": (33,)}, 64)
    with pytest.raises(ValueError, match="no slot follows"):
        sizes.settle(("tokens",), slots, {"seqs": (1,)}, 64)


def test_bucket_lists_by_axis():
    assert sizes.bucket_lists(None, 8) == {}
    assert sizes.bucket_lists([4, 8], 8) == {"tokens": (4, 8)}
    assert sizes.bucket_lists({"seqs": [1, 99]}, 8) == {"seqs": (1, 99)}
    with pytest.raises(ValueError):
        sizes.bucket_lists([4, 9], 8)


@pytest.mark.parametrize("value, error", [(True, TypeError), (1.5, TypeError), ("3", TypeError), (-1, ValueError)])
def test_what_is_no_size(value, error):
    for tokens, seqs in ((value, 1), (1, value)):
        with pytest.raises(error):
            sizes.live_sizes(AXES, tokens, {"seqs": seqs})


def test_sizes_are_ordered_as_the_axes():
    assert sizes.live_sizes(("tokens", "b", "a"), np.int64(3), {"a": 1, "b": 2}) == (3, 2, 1)
    for further in ({}, {"other": 1}, {"seqs": 1, "other": 1}):
        with pytest.raises(TypeError, match="give seqs=..."):
            sizes.live_sizes(AXES, 3, further)


def test_rounding_up_names_the_first_axis_beyond():
    assert sizes.round_up(CHOICES, (0, 1)) == ((8, 1), None)
    assert sizes.round_up(CHOICES, (9, 3)) == ((16, 4), None)
    assert sizes.round_up(CHOICES, (17, 3)) == ((17, 4), 0)
    assert sizes.round_up(CHOICES, (17, 5)) == ((17, 5), 0)
    assert sizes.round_up(CHOICES, (16, 5)) == ((16, 5), 1)


def test_limits():
    sizes.check_limits(AXES, LIMITS, CHOICES, (32, 5))
    with pytest.raises(BucketOverflowError, match="seqs=6; the largest bucket is 4 and the slots hold 5"):
        sizes.check_limits(AXES, LIMITS, CHOICES, (32, 6))


def test_sizes_to_capture():
    assert sizes.wanted(AXES, LIMITS, CHOICES, None) == {(8, 4), (16, 4)}
    assert sizes.wanted(AXES, LIMITS, CHOICES, [3, {"seqs": 1}, 3]) == {(3, 4), (16, 1)}
    for bad in ([], [0], [33], [{"other": 1}]):
        with pytest.raises(ValueError):
            sizes.wanted(AXES, LIMITS, CHOICES, bad)
    for bad in (3, {"tokens": 3}):
        with pytest.raises(TypeError, match="list of sizes"):
            sizes.wanted(AXES, LIMITS, CHOICES, bad)
