"""What a slot takes through its manager, and what it refuses before anything is queued."""

import array
import inspect
import queue
import traceback

import kit
import numpy as np
import pytest

from numbabuf import BufferSpec, InputBufferManager, PredictiveBufferManager

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
    "axis",
    ["inputs", "num_tokens", "each", "self", "at_least", "max_padding", "timeout", "fn", "sizes+1", "on_progress"],
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


class OnDevice:
    """What only DLPack tells of, in memory of a CUDA device."""

    def __dlpack_device__(self):
        return 2, 0

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("it was copied back")


def read_only(data):
    data.flags.writeable = False
    return data


@pytest.mark.parametrize(
    "data",
    [[1, 2, 3], (1, 2, 3), range(1, 4), array.array("q", [1, 2, 3]), memoryview(array.array("i", [1, 2, 3])),
     np.array([1, 2, 3], ">i8"), np.array([1, 2, 3], "u4"), np.array([3, 2, 1])[::-1], np.array([1, 9, 2, 9, 3])[::2],
     np.asfortranarray([[1, 7], [2, 7], [3, 7]])[:, 0], read_only(np.array([1, 2, 3])),
     np.array([1, 2, 3]).view(np.recarray), np.ma.masked_array([1, 2, 3])],
    ids=lambda data: type(data).__name__,
)  # fmt: skip
def test_any_host_array_of_whole_numbers_is_staged(data):
    with InputBufferManager(None, 1, 8, buckets=[4, 8], overflow="split") as m:
        m.capture_buckets(lambda step: None, [4])
        m.replay({"input_ids": data}, 3)
        assert kit.contents(m)["input_ids"][:4].tolist() == [1, 2, 3, 0]
        with m.stage(3) as lease:
            lease["positions"][:] = data
            lease.replay()
        assert kit.contents(m)["positions"][:4].tolist() == [1, 2, 3, 0]
        m.get_slot("input_ids").set_data(data)
        assert kit.contents(m)["input_ids"][:3].tolist() == [1, 2, 3]


@pytest.mark.parametrize("tokens", [3, 6])
@pytest.mark.parametrize(
    "data",
    [lambda n: np.zeros(n), lambda n: np.zeros(n, complex), lambda n: np.zeros(n, object), lambda n: ["1"] * n,
     lambda n: np.zeros(n, "M8[s]"), lambda n: np.zeros(n, "u8"), lambda n: [1 << 70] * n, lambda n: [[1], [1, 2]] * n,
     lambda n: (i for i in range(n)), lambda n: {*range(n)}, lambda n: "1" * n, lambda n: 7, lambda n: np.array(7),
     lambda n: np.zeros((n, 1), int), lambda n: np.zeros(n - 1, int),
     lambda n: np.ma.masked_equal(np.arange(n), 1), lambda n: OnDevice(), lambda n: kit.to_device(np.zeros(n, int)),
     lambda n: np.zeros(n, [("a", "i8")]), lambda n: object()],
)  # fmt: skip
def test_what_cannot_be_staged_is_refused_and_the_next_step_is_right(data, tokens):
    """In a replay, split or not, a fill, and `set_data`; nothing is queued."""
    with InputBufferManager(None, 1, 8, buckets=[4, 8], overflow="split") as m:
        m.capture_buckets(lambda step: None, [4])
        m.replay({"input_ids": [4, 5], "positions": [6, 7]}, 2)
        before, stats = kit.contents(m), m.stats()
        for run in (m.replay, m.stage_inputs):
            with pytest.raises((TypeError, ValueError, OverflowError), match="input 'input_ids'"):
                run({"positions": np.arange(tokens), "input_ids": data(tokens)}, tokens)
        assert m.stats() == stats
        for name, held in kit.contents(m).items():
            assert held.tolist() == before[name].tolist()
        m.replay({"input_ids": [8]}, 1)
        found = kit.contents(m)
        assert found["input_ids"][:4].tolist() == [8, 0, 0, 0] and found["positions"][:4].tolist() == [0] * 4
        m.check()


@pytest.mark.parametrize("data", [[[1], [1, 2]], 7, "11", object(), OnDevice(), np.zeros(2)])
def test_set_data_refuses_what_a_step_refuses(data):
    with InputBufferManager(None, 1, 8, buckets=[8]) as m:
        m.get_slot("positions").set_data([1, 2])
        with pytest.raises((TypeError, ValueError), match="input 'positions'"):
            m.get_slot("positions").set_data(data)
        assert kit.contents(m)["positions"][:3].tolist() == [1, 2, 0]


@pytest.mark.parametrize("tokens", [True, np.bool_(True), -1, np.int64(-1), 1.0, float("nan"), "3", None, 1j, [3]])
def test_sizes_that_are_none(tokens):
    with InputBufferManager(None, 1, 8, buckets=[8]) as m:
        m.capture_buckets(lambda step: None)
        for run in (lambda: m.replay({}, tokens), lambda: m.stage_inputs({}, tokens), lambda: m.stage(tokens)):
            with pytest.raises((TypeError, ValueError), match="tokens"):
                run()
        m.replay({}, np.int64(3))
        assert m.stats().steps == 1


def test_every_keyword_of_a_step_is_taken():
    """A parameter that comes later is no axis either."""
    named = {
        parameter.name
        for kind in (InputBufferManager, PredictiveBufferManager)
        for method in (kind.replay, kind.stage, kind.stage_inputs, kind.capture)
        for parameter in inspect.signature(method).parameters.values()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    with InputBufferManager(None, 1, 8) as m:
        for name in named:
            with pytest.raises(ValueError, match="is taken"):
                m.register_slot("x", BufferSpec(8), axis=name)


@pytest.mark.parametrize("dtype", ["S3", "U5", "V7", "M8[s]"])
def test_elements_that_are_no_numbers_are_padded_with_zero_bytes(dtype):
    random = np.random.default_rng(2)
    with InputBufferManager(None, 1, 8, buckets=[4, 8], default_slots=False) as m:
        m.register_slot("x", BufferSpec(8, dtype))
        item = np.dtype(dtype).itemsize
        for tokens in (8, 3, 5, 0, 1):
            raw = random.integers(1, 9, tokens * item, np.uint8)
            data = np.full(tokens, "abé", "U5")
            if dtype[0] != "U":
                data = np.frombuffer(raw.tobytes(), f"V{item}").view(dtype)
            m.stage_inputs({"x": data}, tokens)
            bucket = 4 if tokens <= 4 else 8
            held = kit.contents(m)["x"][:bucket].tobytes()
            assert held == data.tobytes() + bytes((bucket - tokens) * item)


def test_an_error_is_printed_alone():
    """Not under the KeyError, or another, that led to it."""
    with InputBufferManager(None, 1, 8, buckets=[8]) as m:
        m.capture_buckets(lambda step: None)
        steps = []
        with m.capture(8) as step:
            steps.append(step)
        lease = m.stage(2)
        for call in (
            lambda: m.get_slot("no"),
            lambda: lease["no"],
            lambda: steps[0]["no"],
            lambda: m.register_slot("y", BufferSpec(8, "int64"), pad="x"),
            lambda: m.register_slot("y", BufferSpec(8, "int64"), pad=1 << 70),
            lambda: m.register_slot("y", BufferSpec(8, "int64"), source_dtype="nothing"),
            lambda: m.get_slot("positions").set_data([[1], [1, 2]]),
            lambda: (lease.discard(), m.replay({"input_ids": [[1], [1, 2]]}, 2)),
            lambda: m.replay([], 2),
            lambda: m.replay({}, "2"),
            lambda: m.replay({}, 2, seqs=3),
        ):
            with pytest.raises(Exception) as caught:
                call()
            assert "During handling" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "dtype", ["int64", "int32", "uint8", "float64", "float32", "float16", "complex64", "M8[s]", "?"]
)
def test_types_of_one_size_are_told_apart(dtype):
    """The step's first look at an array is a memoryview's, which knows some types and not others."""
    dtype = np.dtype(dtype)
    with InputBufferManager(None, 1, 8, buckets=[4, 8], default_slots=False) as m:
        slot = m.register_slot("x", BufferSpec(8, dtype), pad="keep")
        good = np.array([1, 0, 1]).astype(dtype)
        m.stage_inputs({"x": good}, 3)
        for code in "bBhHiIlLqQefdFDM?":
            other = np.dtype("M8[s]" if code == "M" else code)
            data = np.zeros(3, other)
            fits = other == dtype or (np.can_cast(other, dtype) and "M" not in (other.kind, dtype.kind))
            if not fits:
                with pytest.raises(TypeError, match="convert it"):
                    m.stage_inputs({"x": data}, 3)
            for wrong in (np.zeros(2, other), np.zeros(4, other), np.zeros((3, 1), other), np.zeros(9, other)):
                with pytest.raises((TypeError, ValueError)):
                    m.stage_inputs({"x": wrong}, 3)
        m.synchronize()
        assert kit.to_host(slot.array, m.stream)[:3].tolist() == good.tolist()
        m.stage_inputs({"x": good[::-1]}, 3)
        m.synchronize()
        assert kit.to_host(slot.array, m.stream)[:3].tolist() == good[::-1].tolist()
