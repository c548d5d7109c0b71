"""BufferSpec, Tier and BufferState: what is accepted, what is refused, and that a spec is a value."""

import copy
import pickle

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from numbabuf.pool.spec import BufferSpec, BufferState, Tier, is_bfloat16, resolve_dtype

shapes = st.one_of(st.integers(0, 100), st.lists(st.integers(0, 50), max_size=4).map(tuple))
dtypes = st.sampled_from(["uint8", "int64", "float32", np.float16, complex, "bool", [("a", "i4"), ("b", "f8")]])


@given(shapes, dtypes, st.sampled_from(Tier))
def test_a_spec_is_what_numpy_makes_of_it(shape, dtype, tier):
    spec = BufferSpec(shape, dtype, tier)
    array = np.empty(shape, dtype)
    assert (spec.shape, spec.dtype, spec.size_bytes, spec.tier) == (array.shape, array.dtype, array.nbytes, tier)


@given(shapes, shapes, dtypes, dtypes, st.sampled_from(Tier), st.sampled_from(Tier))
def test_equal_specs_are_equal_keys(shape, shape2, dtype, dtype2, tier, tier2):
    one, two = BufferSpec(shape, dtype, tier), BufferSpec(shape2, dtype2, tier2)
    same = (np.empty(shape).shape, np.dtype(dtype), tier) == (np.empty(shape2).shape, np.dtype(dtype2), tier2)
    assert (one == two) == same
    if same:
        assert hash(one) == hash(two)
    assert BufferSpec(shape, dtype, tier.value) == one
    assert len({one, copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))}) == 1


def test_defaults_and_forms_of_a_shape():
    assert BufferSpec(5) == BufferSpec((5,), "float32", Tier.DEVICE) == BufferSpec([5], np.float32, "device")
    assert BufferSpec(np.int64(5)) == BufferSpec(np.array(5)) == BufferSpec(5)
    assert BufferSpec(()).size_bytes == 4
    assert BufferSpec((3, 0)).size_bytes == 0


def test_a_spec_is_frozen():
    spec = BufferSpec(4)
    for name in ("shape", "dtype", "tier", "size_bytes", "other"):
        with pytest.raises(AttributeError):
            setattr(spec, name, 1)
    with pytest.raises(AttributeError):
        del spec.shape
    assert spec != 4 and spec != (4,) and spec is not None


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((-1,), ValueError, "-1"),
        (((3, -2),), ValueError, "-2"),
        ((2.5,), TypeError, r"2\.5"),
        ((True,), TypeError, "bool"),
        (((2, np.True_),), TypeError, "bool"),
        (("8",), TypeError, "'8'"),
        ((None,), TypeError, "None"),
        ((float("nan"),), TypeError, "nan"),
        ((1 << 63,), ValueError, "address space"),
        (((1 << 40, 1 << 40),), ValueError, "address space"),
        ((4, "float33"), TypeError, "float33"),
        ((4, object), TypeError, "object"),
        ((4, "O"), TypeError, "GPU memory"),
        ((4, None), TypeError, "None"),
        ((4, "S0"), TypeError, "fixed size"),
        ((4, ("i4", (2,))), TypeError, "fixed size"),
        ((4, ">f4"), TypeError, "byte order"),
        ((4, "float32", "gpu"), ValueError, "device, managed, pinned"),
        ((4, "float32", None), ValueError, "device, managed, pinned"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, error, text):
    with pytest.raises(error, match=text):
        BufferSpec(*arguments)


@given(hnp.scalar_dtypes())
def test_every_plain_dtype_is_taken_or_refused_clearly(dtype):
    try:
        assert resolve_dtype(dtype) == dtype
    except TypeError as error:
        assert "dtype" in str(error)
        assert not dtype.isnative or dtype.hasobject or dtype.itemsize == 0


def test_bfloat16_by_name():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    spec = BufferSpec(4, "bfloat16")
    assert spec == BufferSpec(4, ml_dtypes.bfloat16) != BufferSpec(4, "float16")
    assert spec.size_bytes == 8 and is_bfloat16(spec.dtype)
    assert not is_bfloat16(np.dtype("float16")) and not is_bfloat16(np.dtype("V2"))


def test_bfloat16_without_its_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ml_dtypes", None)
    with pytest.raises(TypeError, match="ml_dtypes"):
        BufferSpec(4, "bfloat16")


def test_reprs_read_as_what_was_asked():
    assert repr(BufferSpec(4)) == "BufferSpec(4, float32)"
    assert repr(BufferSpec((4, 2), "int8", Tier.PINNED)) == "BufferSpec((4, 2), int8, pinned)"
    assert [state.value for state in BufferState] == ["free", "allocated", "staged", "in_use"]


def test_an_empty_shape_has_strides_too():
    with pytest.raises(ValueError, match="beyond any address space"):
        BufferSpec((0, 1 << 40, 1 << 40))
    assert BufferSpec((0, 1 << 40)).size_bytes == 0
