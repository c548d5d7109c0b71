"""The door to numba.cuda: memory, views, streams, events, launches, and what it says where there is no device."""

import logging
import os
import subprocess
import sys
import threading

import kit
import ml_dtypes
import numpy as np
import pytest
from numba import cuda

from numbabuf import InputBufferManager, _cuda
from numbabuf._cuda import access

MAKERS = {"device": _cuda.empty_device, "pinned": _cuda.empty_pinned, "managed": _cuda.empty_managed}


@pytest.fixture
def stream():
    return _cuda.as_stream(None)


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("tier", MAKERS)
def test_memory_of_each_tier_can_be_written_and_viewed(tier, stream):
    base = MAKERS[tier](256)
    assert _cuda.device_bytes(base) == 256 and _cuda.address(base) % 16 == 0
    view = _cuda.device_view(base, 16, (4, 3), np.dtype("float32"))
    assert view.shape == (4, 3) and view.dtype == np.float32 and _cuda.address(view) == _cuda.address(base) + 16
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    view.copy_to_device(values, stream=stream.numba)
    assert (kit.to_host(view, stream.numba) == values).all()
    if tier != "device":
        assert (_cuda.host_view(base, 16, (4, 3), np.dtype("float32")) == values).all()


@pytest.mark.parametrize("tier", ["pinned", "managed"])
def test_kernels_read_host_memory_in_place_through_a_view(tier, stream):
    """Numba refuses the NumPy array itself on a stream of one's own."""
    base = MAKERS[tier](64)
    host = _cuda.host_view(base, 0, (8,), np.dtype("int64"))
    view = _cuda.device_view(base, 0, (8,), np.dtype("int64"))
    total = kit.to_device(np.zeros(1, np.int64), stream)
    for start in (0, 100):
        host[:] = np.arange(start, start + 8)
        kit.run(kit.add_up, stream.numba, view, total)
        stream.synchronize()
    assert kit.to_host(total, stream.numba).tolist() == [28 + 828]


@pytest.mark.parametrize("tier", MAKERS)
def test_a_view_keeps_its_memory_alive(tier, stream):
    base = MAKERS[tier](64)
    view = _cuda.device_view(base, 0, (8,), np.dtype("int64"))
    view.copy_to_device(np.arange(8), stream=stream.numba)
    stream.synchronize()
    del base
    kit.collect()
    noise = [kit.to_device(np.full(8, 99), stream) for _ in range(4)]
    assert kit.to_host(view, stream.numba).tolist() == list(range(8))
    del noise


def test_bfloat16_is_shown_as_uint16():
    base = _cuda.empty_device(8)
    assert _cuda.device_view(base, 0, (4,), np.dtype(ml_dtypes.bfloat16)).dtype == np.uint16


def test_zero_and_copy(stream):
    base, other = _cuda.empty_device(32), _cuda.empty_device(32)
    base.copy_to_device(np.full(32, 7, np.uint8), stream=stream.numba)
    _cuda.zero(other, stream)
    assert kit.to_host(other, stream.numba).tolist() == [0] * 32
    _cuda.copy(other, base, stream)
    assert kit.to_host(other, stream.numba).tolist() == [7] * 32


def test_what_counts_as_out_of_memory():
    assert _cuda.is_out_of_memory(MemoryError())
    assert not _cuda.is_out_of_memory(ValueError())


def test_a_full_device_is_out_of_memory(stub):
    with pytest.raises(Exception) as caught:
        _cuda.empty_device(1 << 50)
    assert _cuda.is_out_of_memory(caught.value) and not _cuda.is_capture_error(caught.value)


def test_memory_info_and_names(backend):
    info = _cuda.memory_info()
    assert _cuda.backend() == ("simulator" if backend == "simulator" else "cuda")
    assert isinstance(_cuda.device_name(), str) and _cuda.device_id() == 0
    if backend == "simulator":
        assert info is None and _cuda.device_name() == "simulator"
    else:
        assert 0 < info[0] <= info[1]


# ---------------------------------------------------------------------------------------------------- streams, events


class Foreign:
    """What another library calls a stream."""

    def __init__(self, handle):
        self.handle = handle

    def __cuda_stream__(self):
        return 0, self.handle


def test_streams_of_each_kind_are_taken(stream, backend):
    assert _cuda.as_stream(stream) is stream
    counter = kit.to_device(np.zeros(1, np.int64), stream)
    kinds = [cuda.stream(), stream.numba, Foreign(stream.handle)]
    if backend != "simulator":
        kinds.append(stream.core)
    for kind in kinds:
        wrapped = _cuda.as_stream(kind)
        _cuda.launch(kit.count_up, 1, 1, wrapped, counter)
        wrapped.synchronize()
        assert wrapped.query() is True
    assert kit.to_host(counter, stream.numba).tolist() == [len(kinds)]


@pytest.mark.parametrize("no_stream", ["mine", 1.5, object()])
def test_what_is_no_stream(no_stream):
    with pytest.raises(TypeError, match="no stream"):
        _cuda.as_stream(no_stream)


def test_a_managers_stream_may_be_foreign(stream):
    with InputBufferManager(max_batch_size=1, max_seq_len=8, buckets=[8], stream=Foreign(stream.handle)) as m:
        m.capture_buckets(lambda step: None)
        m.replay({"input_ids": np.arange(4)}, 4)
        assert kit.contents(m)["input_ids"][:5].tolist() == [0, 1, 2, 3, 0]


def test_an_event_is_done_when_the_work_before_it_is(stream):
    event = _cuda.Event()
    counter = kit.to_device(np.zeros(1, np.int64), stream)
    for _ in range(2):
        kit.run(kit.count_up, stream.numba, counter)
        event.record(stream)
        event.synchronize()
        assert event.query() is True
    assert kit.to_host(counter, stream.numba).tolist() == [2]


def test_queries_say_no_without_logging(stub, caplog):
    """Numba's own query logs an error for each answer that is "not yet"; here a full ring asks thousands of times."""
    stream, event = _cuda.as_stream(None), _cuda.Event()
    counter = kit.to_device(np.zeros(1, np.int64), stream)
    kit.run(kit.count_up, stream.numba, counter)
    stream.synchronize()
    stub.set_async(1)
    try:
        for _ in range(20):
            kit.run(kit.count_up, stream.numba, counter)
        event.record(stream)
        with caplog.at_level(logging.DEBUG):
            answers = {event.query(), stream.query()}
        assert answers == {False} and not caplog.records
    finally:
        stub.set_async(kit.lazy_by_environment())
    stream.synchronize()
    assert event.query() and stream.query()


def test_waiting_orders_two_streams(stub):
    """In lazy mode the second stream runs first unless it is told to wait."""
    stub.set_async(1)
    try:
        for seed in range(1, 6):
            stub.set_seed(seed)
            first, second, event = _cuda.as_stream(None), _cuda.as_stream(None), _cuda.Event()
            source, out = kit.to_device(np.zeros(4, np.int64), first), kit.to_device(np.zeros(4, np.int64), first)
            weights = kit.to_device(np.array([1, 5]), first)
            kit.run(kit.affine, first.numba, source, weights, source)
            event.record(first)
            event.wait(second)
            kit.run(kit.affine, second.numba, source, weights, out)
            assert kit.to_host(out, second.numba).tolist() == [10] * 4
    finally:
        stub.set_seed(0)
        stub.set_async(kit.lazy_by_environment())


# ------------------------------------------------------------------------------------------------------------ launches


@pytest.mark.parametrize("work", [0, 1, 2, 255, 257, 10**9])
def test_launch_shapes_are_in_range(work, backend):
    blocks, threads = _cuda.launch_shape(work, threads=128, max_blocks=7)
    assert 1 <= blocks <= 7 and 1 <= threads <= 128
    if backend == "simulator":
        assert blocks * threads <= 4, "the simulator starts an operating system thread for each"
    elif 0 < work < 7 * 128:
        assert (blocks - 1) * threads < work <= blocks * threads


def test_threads_may_launch_at_once(stream):
    """The stock simulator keeps a launch's shape on the kernel, and runs one kernel at a time."""
    counters = [kit.to_device(np.zeros(1, np.int64), stream) for _ in range(4)]
    barrier, failures = threading.Barrier(4), []

    def work(counter):
        try:
            _cuda.require()
            own = _cuda.as_stream(None)
            barrier.wait()
            for _ in range(25):
                kit.run(kit.count_up, own.numba, counter)
            own.synchronize()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(counter,)) for counter in counters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [int(kit.to_host(counter, stream.numba)[0]) for counter in counters] == [25] * 4


def test_loads_and_stores_of_each_width_on_the_host():
    """In the simulator, and where numba has no CUDA target, the accesses of kernels work on host memory."""
    operations = access.on_host()
    memory = np.zeros(64, np.uint8)
    at = memory.ctypes.data + (-memory.ctypes.data % 16)
    for width in (1, 2, 4, 8):
        operations[f"store{width}"](at, -2)
        expected = -2 if width == 8 else (1 << 8 * width) - 2
        assert operations[f"load{width}"](at) == expected, "narrow values are zero-extended"
    operations["store16"](at, -1, 5)
    assert operations["load16"](at) == (-1, 5)
    operations["store8"](at, 40)
    assert operations["add8"](at, 2) == 40 and operations["load8"](at) == 42


# ----------------------------------------------------------------------------------------------------------- no device


def run_without_a_device(program):
    names = ("NUMBA_ENABLE_CUDASIM", "LD_LIBRARY_PATH", "LD_PRELOAD")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)


def test_without_a_device_the_import_works_and_the_first_use_says_what_to_do(backend):
    program = """
import numbabuf
from numbabuf import BackendError, BufferSpec, InputBufferManager, SimpleBufferPool
spec = BufferSpec(4)
for first_use in (lambda: InputBufferManager(), lambda: SimpleBufferPool().allocate(spec)):
    for _ in range(2):
        try:
            first_use()
        except BackendError as error:
            print(repr(str(error)))
        else:
            raise SystemExit("no error")
"""
    done = run_without_a_device(program)
    assert done.returncode == 0, done.stderr
    messages = done.stdout.splitlines()
    assert len(messages) == 4
    assert all("NUMBA_ENABLE_CUDASIM=1" in message and "numbabuf[cu13]" in message for message in messages)


def test_the_import_touches_no_device_and_no_optional_package():
    program = """
import sys, numba.cuda
before = set(sys.modules)
import numbabuf
optional = {"tqdm", "ml_dtypes", "matplotlib", "cupy", "torch", "dask", "prometheus_client", "cuda.core"}
print(sorted(optional & (set(sys.modules) - before)))
"""
    done = run_without_a_device(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
