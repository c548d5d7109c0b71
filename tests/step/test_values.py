"""Python numbers and lists as inputs: their values decide what fits, and a slot may be one number."""

import kit
import numpy as np
import pytest
from numba import cuda

from numbabuf import BufferSpec, InputBufferManager


@cuda.jit
def scaled(source, factor, out):
    """out[i] = source[i] * factor, which is a number in memory"""
    for i in range(cuda.grid(1), source.size, cuda.gridsize(1)):
        out[i] = source[i] * factor[()]


@pytest.fixture
def manager():
    with InputBufferManager(max_batch_size=1, max_seq_len=8, buckets=[4, 8], default_slots=False) as m:
        yield m
        m.check()


def contents(manager, name="x"):
    return kit.to_host(manager.get_slot(name).array, manager.stream)


def ways(manager, name, data, tokens):
    """Stage `data` in every way that a user has."""
    manager.capture_buckets(lambda step: None)
    yield lambda: manager.replay({name: data}, tokens)
    yield lambda: manager.stage_inputs({name: data}, tokens)
    yield lambda: manager.get_slot(name).set_data(data)


def test_a_number_in_a_slot_of_no_dimension_reaches_the_kernel(manager):
    manager.register_slot("x", BufferSpec(8, "float32"))
    manager.register_slot("lr", BufferSpec((), "float32"), axis=None)
    out = kit.to_device(np.zeros(8, np.float32))
    manager.capture_buckets(lambda step: kit.run(scaled, step.stream, step["x"], step["lr"], out))
    for lr in (2, 0.05, np.float32(3), np.float64(0.1), np.array(7, np.float32), True):
        manager.replay({"x": [1, 2, 3], "lr": lr}, 3)
        assert kit.to_host(out, manager.stream)[:4].tolist() == (np.float32([1, 2, 3, 0]) * np.float32(lr)).tolist()
    manager.get_slot("lr").set_data(4)
    assert contents(manager, "lr").shape == () and contents(manager, "lr") == 4
    with manager.stage(2) as lease:
        lease["x"][:] = [5, 6]
        assert lease["lr"].shape == ()
        lease["lr"][...] = 0.5
        lease.replay()
    assert kit.to_host(out, manager.stream)[:2].tolist() == [2.5, 3]


@pytest.mark.parametrize("pad", [0, "repeat_last", "keep"])
@pytest.mark.parametrize("dtype, source", [("int32", "int64"), ("float64", None), ("complex64", None), ("uint8", None)])
def test_one_number_of_every_type(manager, dtype, source, pad):
    manager.register_slot("x", BufferSpec((), dtype), source_dtype=source, axis=None, pad=pad)
    for run in ways(manager, "x", 3, 2):
        run()
        assert contents(manager)[()] == 3
    manager.replay({}, 2)
    assert contents(manager)[()] in (0, 3)


@pytest.mark.parametrize("data", [0.05, [0.05], np.float64(0.05), (0.05,)])
def test_a_number_for_a_slot_of_one_element(manager, data):
    manager.register_slot("x", BufferSpec(1, "float32"), axis=None)
    for run in ways(manager, "x", data, 0):
        run()
        assert contents(manager).tolist() == [np.float32(0.05)]
        manager.get_slot("x").set_data(0)


@pytest.mark.parametrize(
    "dtype, data",
    [
        ("int32", [1, -(1 << 31), (1 << 31) - 1]),
        ("uint8", (0, 255, 7)),
        ("int8", range(-3, 0)),
        ("uint64", [(1 << 64) - 1, 0, 1 << 63]),
        ("int32", [np.int64(5), 6, True]),
        ("float32", [0.1, 1e-60, -3]),
        ("float32", [float("inf"), float("nan"), -1.5]),
        ("float32", [1 << 24, (1 << 24) + 2, -(1 << 100)]),
        ("float16", [65504, 2048, 0]),
        ("float64", [1 << 70, 1, 0]),
        ("complex64", [1 + 2j, 0.1, 3]),
        ("bfloat16", [1, 256, -2]),
        ("bfloat16", [0.5, 1.5, 3.0]),
    ],
)
def test_lists_of_values_that_fit(manager, dtype, data):
    slot = manager.register_slot("x", BufferSpec(8, dtype))
    wanted = np.array(data, slot.source_dtype)
    for run in ways(manager, "x", data, 3):
        run()
        assert contents(manager)[:3].tobytes() == wanted.tobytes()
        manager.get_slot("x").set_data([0, 0, 0])


def test_lists_of_rows(manager):
    manager.register_slot("x", BufferSpec((8, 3), "int32"))
    for run in ways(manager, "x", [[1, 2], [3, 4]], 2):
        run()
        assert contents(manager)[:3].tolist() == [[1, 2, 0], [3, 4, 0], [0, 0, 0]]


def test_a_list_is_split_as_an_array_is():
    seen = []
    with InputBufferManager(None, 1, 16, buckets=[4], default_slots=False, overflow="split") as m:
        m.register_slot("x", BufferSpec(16, "int16"))
        m.register_slot("lr", BufferSpec((), "float32"), axis=None)
        m.capture_buckets(lambda step: step)
        m.replay({"x": list(range(6)), "lr": 0.5}, 6, each=lambda *part: seen.append(part[1:]))
        assert contents(m)[:4].tolist() == [4, 5, 0, 0] and contents(m, "lr") == 0.5
        with pytest.raises(OverflowError):
            m.replay({"x": [0] * 5 + [1 << 15]}, 6)
    assert seen == [(0, 4), (4, 6)]


@pytest.mark.parametrize(
    "dtype, data, error, words",
    [
        ("int32", [0, 1 << 40], OverflowError, "1099511627776; the slot takes int32, from -2147483648 to 2147483647"),
        ("uint8", [-1], OverflowError, "-1"),
        ("int64", [1 << 63], OverflowError, "9223372036854775808"),
        ("int64", [1 << 63, -1], OverflowError, "9223372036854775808"),
        ("int64", [-(1 << 90)], OverflowError, "int64"),
        ("int32", [1.0], TypeError, "float64; the slot takes int32"),
        ("int32", [1, 2.5], TypeError, "float64; the slot takes int32"),
        ("float32", [0.5, 1e300], OverflowError, "1e+300, which is out of the range of float32"),
        ("float16", [65520.0], OverflowError, "float16"),
        ("float16", [1 << 17], OverflowError, "131072, which is out of the range of float16"),
        ("float32", [(1 << 24) + 1], ValueError, "the integer 16777217, which float32 can only round"),
        ("float32", [1 << 200], OverflowError, "float32"),
        ("bfloat16", [257], ValueError, "257"),
        ("bfloat16", [1e39], OverflowError, "bfloat16"),
        ("float32", [1j], TypeError, "complex128; the slot takes float32"),
        ("complex64", [1e300j], OverflowError, "complex64"),
        ("bool", [1], TypeError, "int64; the slot takes bool"),
        ("float32", [None], TypeError, "object; the slot takes float32"),
        ("int8", ["1"], TypeError, "the slot takes int8"),
        ("int8", [[1]], ValueError, "1 dimension"),
        ("int8", 1, ValueError, "1 dimension"),
        ("int8", np.array([1, 2]), TypeError, "int64; the slot takes int8"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_queued(manager, dtype, data, error, words):
    manager.register_slot("x", BufferSpec(8, dtype))
    tokens = len(data) if hasattr(data, "__len__") else 1
    for run in ways(manager, "x", data, tokens):
        before = manager.stats()
        with pytest.raises(error) as caught:
            run()
        assert words in str(caught.value) and "input 'x'" in str(caught.value)
        assert manager.stats() == before and not contents(manager).astype(complex).any()


def test_a_slot_of_no_dimension_follows_nothing(manager):
    with pytest.raises(ValueError, match=r"shape \(\) has no dimension to follow 'tokens': give axis=None"):
        manager.register_slot("lr", BufferSpec((), "float32"))
    manager.register_slot("lr", BufferSpec((), "float32"), axis=None)
    for data in ([0.5], [[1]], np.zeros(1, np.float32)):
        with pytest.raises(ValueError, match="0 dimension"):
            manager.stage_inputs({"lr": data}, 0)
