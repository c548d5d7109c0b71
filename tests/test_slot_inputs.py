"""What a slot takes through its manager, and what it refuses before anything is queued."""

import queue

import numpy as np
import pytest

from numbabuf import BufferSpec, InputBufferManager

RECORDS = [
    np.dtype([("x", "f4"), ("k", "i4")]),
    np.dtype([("x", "f8"), ("y", "f8"), ("k", "i4")]),  # 20 bytes
    np.dtype([("a", "u1"), ("b", "u2")]),  # 3 bytes
]


@pytest.mark.parametrize("pad", [0, "keep"])
@pytest.mark.parametrize("shape", [(8,), (8, 3)])
@pytest.mark.parametrize("dtype", RECORDS)
def test_records_of_any_size_are_staged_and_padded(dtype, shape, pad):
    random = np.random.default_rng(1)
    with InputBufferManager(None, 1, 8, buckets=[4, 8], default_slots=False) as m:
        slot = m.register_slot("r", BufferSpec(shape, dtype), pad=pad)
        assert slot.array.dtype == dtype
        wanted = np.zeros(shape, dtype)
        for tokens in (8, 3, 5, 0, 1, 4):
            data = np.frombuffer(random.bytes(tokens * wanted[0].nbytes), dtype).reshape(tokens, *shape[1:])
            m.stage_inputs({"r": data}, tokens)
            wanted[:tokens] = data
            if pad == 0:
                wanted[tokens : 4 if tokens <= 4 else 8] = np.zeros((), dtype)
            m.synchronize()
            assert m.get_slot("r").array.copy_to_host().tobytes() == wanted.tobytes()
        if len(shape) == 2:  # rows that are shorter than the slot's
            data = np.frombuffer(random.bytes(2 * 2 * dtype.itemsize), dtype).reshape(2, 2)
            m.stage_inputs({"r": data}, 2)
            m.synchronize()
            assert m.get_slot("r").array.copy_to_host()[:2, :2].tobytes() == data.tobytes()


@pytest.mark.parametrize("pad", ["repeat_last", np.array((1, 2, 3), RECORDS[1])[()]])
def test_what_records_of_odd_sizes_cannot_be_padded_with(pad):
    with InputBufferManager(None, 1, 8, default_slots=False) as m, pytest.raises(ValueError, match="use pad=0"):
        m.register_slot("r", BufferSpec(8, RECORDS[1]), pad=pad)


@pytest.mark.parametrize("pad", [-1, np.int64(-1), -1.0, np.float32(-3)])
@pytest.mark.parametrize("dtype", ["int64", "int32", "int8"])
def test_an_index_is_not_padded_with_a_negative_one(pad, dtype):
    with InputBufferManager(None, 1, 8, default_slots=False) as m, pytest.raises(ValueError, match="valid index"):
        m.register_slot("i", BufferSpec(8, dtype), pad=pad, index=True)


@pytest.mark.parametrize(
    "axis", ["inputs", "num_tokens", "each", "self", "at_least", "max_padding", "timeout", "fn", "sizes+1", "progress"]
)
def test_an_axis_is_not_called_as_an_argument(axis):
    with InputBufferManager(None, 1, 8, default_slots=False) as m, pytest.raises(ValueError, match="is taken"):
        m.register_slot("i", BufferSpec(8), axis=axis)


def test_a_masked_array_is_refused_with_its_remedy():
    with InputBufferManager(None, 1, 8, default_slots=False) as m:
        m.register_slot("x", BufferSpec(8, "float64"))
        masked = np.ma.masked_array(np.arange(4.0), mask=[0, 1, 0, 0])
        with pytest.raises(TypeError, match="filled"):
            m.stage_inputs({"x": masked}, 4)
        for data in (masked.filled(7), np.ma.masked_array(np.arange(4.0))):
            m.stage_inputs({"x": data}, 4)
        m.synchronize()
        assert m.get_slot("x").array.copy_to_host()[:4].tolist() == [0, 1, 2, 3]


class Get:
    def get(self, name, default=None):
        return default


@pytest.mark.parametrize("inputs", [queue.Queue(), Get(), [1], None, {"x"}, iter({})])
def test_what_is_no_mapping_is_refused_before_anything_is_queued(inputs):
    with InputBufferManager(None, 1, 8, buckets=[8], default_slots=False) as m:
        m.register_slot("x", BufferSpec(8))
        m.capture_buckets(lambda step: None)
        for step in (m.replay, m.stage_inputs):
            with pytest.raises(TypeError, match="give a mapping"):
                step(inputs, 2)
        assert m.stats().steps == 0
