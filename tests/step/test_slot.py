"""InputSlot by itself: what it refuses, and the words it writes for the kernel. No device is needed."""

import ml_dtypes
import numpy as np
import pytest

from numbabuf import BufferSpec
from numbabuf._cuda import kernels
from numbabuf.step.conversion import CONVERSIONS
from numbabuf.step.slot import InputSlot


def make(spec=None, **options):
    options = {"pad": 0, "axis": "tokens", "source_dtype": None, "max_live": None} | options
    options = {"static": True, "index": False, "range_check": True} | options
    slot = InputSlot("x", spec or BufferSpec(8, "int64"), **options)
    slot.position, slot.columns_word = 0, kernels.COLUMNS
    return slot


# ------------------------------------------------------------------------------------------------------- registration


@pytest.mark.parametrize(
    "spec, options, error, words",
    [
        ((8, "int64"), {"pad": "repeat"}, ValueError, "'repeat_last' or 'keep'"),
        ((8, "int64"), {"pad": "keep", "index": True}, ValueError, "stale"),
        ((8, "int32"), {"pad": 1 << 31}, ValueError, "does not fit"),
        ((8, "uint8"), {"pad": -1}, ValueError, "does not fit"),
        ((8, "float16"), {"pad": 70000}, ValueError, "does not fit"),
        ((8, "int64"), {"pad": 0.5}, ValueError, "no value of int64"),
        ((8, "int64"), {"pad": [1, 2]}, ValueError, "scalar"),
        ((8, "float32"), {"pad": object()}, ValueError, "no value of float32"),
        ((8, "int64"), {"axis": "seqs+x"}, ValueError, "seqs+1"),
        ((8, "int64"), {"axis": ""}, ValueError, "axis"),
        ((8, "int64"), {"axis": 3}, ValueError, "axis"),
        ((8, "int64"), {"max_live": 9}, ValueError, "1 to 8"),
        ((8, "int64"), {"max_live": 0}, ValueError, "1 to 8"),
        ((8, "int64"), {"source_dtype": "float32"}, TypeError, "no conversion from float32 to int64"),
        ((8, "float32"), {"source_dtype": "float128"}, TypeError, "no conversion"),
        ((8, "S3"), {"pad": 7}, ValueError, "not a string"),
        ((8, "S3"), {"source_dtype": "S4"}, TypeError, "no conversion"),
        ((8, "int64"), {"pad": np.array(-1), "index": True}, ValueError, "valid index"),
        ((8, "uint32"), {"pad": -1, "index": True}, ValueError, "valid index"),
        ((8, "float32"), {"index": True}, TypeError, "integer type"),
        ((8, "bool"), {"index": True}, TypeError, "integer type"),
        ((8, "int64"), {"axis": "verify+1"}, ValueError, "is taken"),
        ((0, "int64"), {}, ValueError, "no elements"),
        (((), "int64"), {}, ValueError, "dimension"),
        (((4, 0), "int64"), {}, ValueError, "no elements"),
    ],
)
def test_what_a_slot_cannot_be(spec, options, error, words):
    with pytest.raises(error) as caught:
        make(BufferSpec(*spec), **options)
    assert words in str(caught.value) and "'x'" in str(caught.value)


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_name_is_a_string(name):
    with pytest.raises(TypeError, match="non-empty string"):
        InputSlot(name, BufferSpec(8), static=True, pad=0, index=False, source_dtype=None, axis=None, max_live=None,
                  range_check=True)  # fmt: skip


def test_a_spec_is_a_spec():
    with pytest.raises(TypeError, match="give a BufferSpec"):
        make((8, "int64"))


@pytest.mark.parametrize(
    "axis, parsed", [("tokens", ("tokens", 0)), ("seqs+1", ("seqs", 1)), (None, (None, 0)), ("a_1+20", ("a_1", 20))]
)
def test_axes(axis, parsed):
    slot = make(axis=axis)
    assert (slot.axis, slot.extra) == parsed


@pytest.mark.parametrize(
    "dtype, pad",
    [("int64", -1), ("int32", 2**31 - 1), ("uint8", 255), ("int8", -128), ("float32", np.nan), ("float16", -0.0),
     ("complex128", 1 + 2j), ("bool", True), ("bfloat16", 1.5), ("float64", np.float32(0.1)), ("int16", np.int64(7))],
)  # fmt: skip
def test_the_pad_pattern_is_the_pad_over_and_over(dtype, pad):
    slot = make(BufferSpec(8, dtype), pad=pad)
    row = slot.table_row(0, 0)
    pattern = np.array(row[kernels.PAD_LOW : kernels.PAD_HIGH + 1], np.int64).tobytes()
    itemsize = slot.spec.dtype.itemsize
    assert pattern == np.asarray(pad).astype(slot.spec.dtype).tobytes() * (16 // itemsize)


# ---------------------------------------------------------------------------------------------------------- one input


@pytest.mark.parametrize(
    "spec, options, data, live, error, words",
    [
        ((8, "int64"), {}, np.zeros(3, np.float64), 3, TypeError, "float64; the slot takes int64"),
        ((8, "int32"), {}, np.zeros(3, np.int64), 3, TypeError, "another source_dtype"),
        ((8, "int64"), {}, np.zeros(3, np.uint64), 3, TypeError, "uint64"),
        ((8, "int64"), {}, np.zeros(3, object), 3, TypeError, "object"),
        ((8, "int64"), {}, ["a"], 1, TypeError, "dtype"),
        ((8, "int64"), {}, np.zeros(3, "M8[s]"), 3, TypeError, "dtype"),
        ((8, "bfloat16"), {}, np.zeros(3, np.float32), 3, TypeError, "bfloat16"),
        ((8, "int64"), {}, np.zeros((3, 1), np.int64), 3, ValueError, "1 dimension"),
        ((8, "int64"), {}, np.int64(3), 1, ValueError, "1 dimension"),
        (((8, 4), "int64"), {}, np.zeros(3, np.int64), 3, ValueError, "2 dimension"),
        ((8, "int64"), {}, np.zeros(3, np.int64), 4, ValueError, "3 rows; this step has 4"),
        ((8, "int64"), {"axis": "seqs+1"}, np.zeros(3, np.int64), 4, ValueError, "axis seqs"),
        ((8, "int64"), {}, np.zeros(9, np.int64), 9, ValueError, "holds 8"),
        (((8, 4), "int64"), {}, np.zeros((3, 5), np.int64), 3, ValueError, "rows of 5"),
        (((8, 4, 2), "int64"), {}, np.zeros((3, 3, 2), np.int64), 3, ValueError, "must be (4, 2)"),
        ((8, "int64"), {"max_live": 4}, np.zeros(5, np.int64), 5, ValueError, "max_live=4"),
        ((8, "int32"), {"source_dtype": "int64"}, np.array([0, 1 << 31]), 2, OverflowError, "2147483648"),
        ((8, "int32"), {"source_dtype": "int64"}, np.array([-(1 << 31) - 1, 0]), 2, OverflowError, "-2147483649"),
    ],
)
def test_what_cannot_be_staged(spec, options, data, live, error, words):
    slot = make(BufferSpec(*spec), **options)
    before = memoryview(np.arange(4)), np.full(slot.max_live, 77, slot.source_dtype)
    with pytest.raises(error) as caught:
        slot.write(before[0], before[1], data, live, 8)
    assert words in str(caught.value) and "'x'" in str(caught.value)
    assert before[0].tolist() == [0, 1, 2, 3] and (before[1] == np.full((), 77, slot.source_dtype)).all(), (
        "nothing is written"
    )


@pytest.mark.parametrize("edge", [-(1 << 31), (1 << 31) - 1])
def test_the_edges_of_int32_fit(edge):
    make(BufferSpec(8, "int32"), source_dtype="int64").coerce(np.array([edge]), 1)


def test_the_range_check_can_be_switched_off():
    make(BufferSpec(8, "int32"), source_dtype="int64", range_check=False).coerce(np.array([1 << 40]), 1)


class DeviceArray:
    __cuda_array_interface__ = {"shape": (3,), "typestr": "<i8", "data": (0, False), "version": 3}


def test_a_device_array_is_told_the_way_to_go():
    with pytest.raises(TypeError, match="copy_to_host"):
        make().coerce(DeviceArray(), 3)


@pytest.mark.parametrize(
    "data",
    [[1, 2, 3], (1, 2, 3), np.array([1, 2, 3], np.int8), np.array([1, 9, 2, 9, 3])[::2], np.array([3, 2, 1])[::-1],
     np.array([True, True, True]), np.array([1, 2, 3]).astype(">i8"), np.ma.masked_array([1, 2, 3])],
    ids=lambda data: type(data).__name__,
)  # fmt: skip
def test_what_casts_safely_is_staged(data):
    slot = make()
    words, staged = memoryview(np.zeros(4, np.int64)), np.zeros(8, np.int64)
    slot.write(words, staged, data, 3, 8)
    assert staged[:3].tolist() == np.asarray(data).tolist() and words.tolist() == [1, 3, 1, 8]


@pytest.mark.parametrize("options", [{}, {"spec": BufferSpec(8, "int32"), "source_dtype": "int64"}])
def test_an_empty_list_is_no_float_array(options):
    """Though NumPy makes one of it; and an empty one has no value out of range."""
    make(**options).coerce([], 0)


def test_what_is_no_array_is_named():
    with pytest.raises(ValueError, match="input 'x' is not an array.*inhomogeneous"):
        make().coerce([[1], [1, 2]], 2)


def test_every_conversion_can_be_registered():
    for source, target in CONVERSIONS:
        slot = make(BufferSpec(8, target), source_dtype=source)
        assert slot.conversion.operation != kernels.RAW
        assert slot.coerce(np.zeros(2, ml_dtypes.bfloat16 if source == "bfloat16" else source), 2).size == 2


@pytest.mark.parametrize("pad", [0, "repeat_last", "keep"])
@pytest.mark.parametrize(
    "shape, live, columns", [((8,), 3, 1), ((8, 4), 3, 2), ((8, 4), 3, 4), ((8, 4), 0, 4), ((8, 2, 3), 5, 6)]
)
def test_the_words_that_describe_a_step(shape, live, columns, pad):
    """Rows that lie end to end may be one long row: what counts is the elements that they name."""
    slot = make(BufferSpec(shape, "int64"), pad=pad)
    words = memoryview(np.full(4, -1))
    slot.describe(words, live, columns, 6)
    rows, cols, padded_rows, padded_cols = words.tolist()
    assert rows * cols == live * columns and padded_rows * padded_cols == 6 * slot.width
    if columns < slot.width:
        assert (rows, cols, padded_rows, padded_cols) == (live, columns, 6, slot.width)
    if pad == "repeat_last" and len(shape) > 1:
        assert (rows, padded_rows) == (live, 6), "whole rows are repeated, so the kernel must see where they begin"


def test_a_slot_that_is_not_static_has_no_array():
    slot = make(static=False)
    assert slot.array is None
    with pytest.raises(TypeError, match="pass through"):
        slot.set_data([1])


def test_repr_is_one_line():
    assert repr(make(axis="seqs+1")) == "InputSlot('x', BufferSpec(8, int64), axis=seqs+1, pad=0)"
