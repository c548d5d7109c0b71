"""What a capture refuses, keeps and leaves behind: the same on a driver and in the simulator."""

import threading
from collections import namedtuple

import numpy as np
import pytest
from numba import cuda

from numbabuf import BufferSpec, CaptureError, InputBufferManager, SimpleBufferPool, _cuda

pytestmark = pytest.mark.usefixtures("no_leaks")


@cuda.jit
def scale(x, factor, out):
    for i in range(cuda.grid(1), x.size, cuda.gridsize(1)):
        out[i] = x[i] * factor


@cuda.jit
def scale_by_first(x, factors, out):
    for i in range(cuda.grid(1), x.size, cuda.gridsize(1)):
        out[i] = x[i] * factors[0]


@cuda.jit
def scale_by_all(x, factors, out):
    for i in range(cuda.grid(1), x.size, cuda.gridsize(1)):
        out[i] = x[i] * factors.w[0][i]


@cuda.jit
def add_one(counter):
    if cuda.grid(1) == 0:
        counter[0] += 1


Net = namedtuple("Net", "w b")


@pytest.fixture
def manager():
    with InputBufferManager(None, 1, 4, default_slots=False, buckets=[4]) as made:
        made.register_slot("x", BufferSpec(4, "float32"))
        made.stage_inputs({}, 0)
        yield made


def run(manager, kernel, argument):
    out = cuda.to_device(np.zeros(4, np.float32))
    cuda.synchronize()
    with manager.capture(4) as step:
        kernel[1, 4, step.stream](step["x"], argument, out)
    manager.replay({"x": np.arange(4, dtype=np.float32)}, 4)
    manager.synchronize()
    return out.copy_to_host().tolist()


@pytest.mark.parametrize(
    ("kernel", "argument"),
    [
        (scale, np.float32(3)),
        (scale, np.arange(4, dtype=np.float64)[3]),
        (scale_by_first, (np.float32(3), np.float32(4))),
        (scale_by_first, (3, 4)),
    ],
)
def test_scalars_are_arguments_of_captured_kernels(manager, kernel, argument):
    kernel[1, 4](cuda.to_device(np.zeros(4, np.float32)), argument, cuda.to_device(np.zeros(4, np.float32)))
    assert run(manager, kernel, argument) == [0, 3, 6, 9]


def test_tuples_of_arrays_and_entries_are_arguments_of_captured_kernels(manager):
    three = cuda.to_device(np.full(4, 3, np.float32))
    net = Net((three, three), three)
    scale_by_all[1, 4](three, net, cuda.to_device(np.zeros(4, np.float32)))
    assert run(manager, scale_by_all, net) == [0, 3, 6, 9]
    with SimpleBufferPool() as pool, pool.allocate(BufferSpec(4)) as entry:
        entry.array.copy_to_device(np.full(4, 3, np.float32))
        scale_by_first[1, 4](three, entry, cuda.to_device(np.zeros(4, np.float32)))
        assert run(manager, scale_by_first, entry) == [0, 3, 6, 9]
        manager.close_graphs()


REFUSED = {
    "device_array": lambda: cuda.device_array(4, np.float32),
    "to_device": lambda: cuda.to_device(np.zeros(4, np.float32)),
    "pinned_array": lambda: cuda.pinned_array(4, np.float32),
    "synchronize": lambda: cuda.synchronize(),
    "pinned": lambda: cuda.pinned(np.zeros(4, np.float32)).__enter__(),
}


@pytest.mark.parametrize("what", [*REFUSED, "array[...] = value", "stream.synchronize", "event.synchronize"])
def test_what_no_graph_can_hold_is_refused_with_its_remedy(manager, what):
    array, event = cuda.to_device(np.full(4, 7, np.float32)), cuda.event()
    event.record()

    def assign(step):
        array[:] = 0

    acts = {
        "array[...] = value": assign,
        "stream.synchronize": lambda step: step.stream.synchronize(),
        "event.synchronize": lambda step: event.synchronize(),
    }
    with pytest.raises(CaptureError, match="inside a captured function") as caught, manager.capture(4) as step:
        if what in acts:
            acts[what](step)
        else:
            REFUSED[what]()
    if what == "array[...] = value":
        assert "written from the host" in str(caught.value)
    assert array.copy_to_host().tolist() == [7] * 4
    manager.stage_inputs({"x": np.ones(4, np.float32)}, 4)
    manager.synchronize()


def test_a_dry_capture_drops_what_is_queued():
    counter = cuda.to_device(np.full(1, 100))
    stream = _cuda.as_stream(None)
    capture = _cuda.Capture(stream, dry=True)
    capture.begin()
    try:
        add_one[1, 1, stream.numba](counter)  # compiles and loads here
    finally:
        capture.abort()
    assert not _cuda.captures
    stream.synchronize()
    assert counter.copy_to_host()[0] == 100
    add_one[1, 1, stream.numba](counter)
    stream.synchronize()
    assert counter.copy_to_host()[0] == 101


def test_another_thread_is_not_capturing(manager):
    found = {}

    def look():
        found["capturing"] = _cuda.capturing()
        found["array"] = cuda.to_device(np.ones(3)).copy_to_host().tolist()
        cuda.synchronize()

    with manager.capture(4):
        assert _cuda.capturing()
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert found == {"capturing": False, "array": [1, 1, 1]}


def test_a_foreign_version_of_the_stream_protocol_is_refused():
    class Newer:
        def __cuda_stream__(self):
            return 1, 0

    with pytest.raises(TypeError, match="version 1"):
        _cuda.as_stream(Newer())


def test_nothing_can_be_copied_to_nothing():
    empty = cuda.device_array(0, np.float32)
    empty.copy_to_device(np.zeros(0, np.float32))
    assert empty.copy_to_host().size == 0


def test_fills_and_copies_by_numbas_own_functions_are_captured_and_kept(manager):
    from numba.cuda.cudadrv import driver

    target, source = cuda.to_device(np.full(4, 7, np.float32)), cuda.to_device(np.full(4, 5, np.float32))
    with SimpleBufferPool() as pool:
        filled = pool.allocate(BufferSpec(16, "uint8"))
        filled.array.copy_to_device(np.full(16, 9, np.uint8))
        array, address = filled.array, filled.address
        with manager.capture(4) as step:
            driver.device_memset(array, 1, 16, stream=step.stream)
            driver.device_to_device(target, source, 16, stream=step.stream)
        manager.synchronize()
        assert target.copy_to_host().tolist() == [7] * 4 and array.copy_to_host().tolist() == [9] * 16
        filled.release()
        with pool.allocate(BufferSpec(16, "uint8")) as other:  # the graph still writes the first one
            assert other.address != address
        manager.replay({}, 0)
        manager.synchronize()
        assert target.copy_to_host().tolist() == [5] * 4 and array.copy_to_host().tolist() == [1] * 16
        manager.close_graphs()
        del array


def test_a_driver_that_loads_nothing_in_a_capture_loads_before_a_dry_one(stub):
    @cuda.jit
    def fresh(counter):
        if cuda.grid(1) == 0:
            counter[0] += 1

    counter = cuda.to_device(np.full(1, 100))
    stream = _cuda.as_stream(None)
    capture = _cuda.Capture(stream, dry=True)
    capture.begin()
    try:
        stub.fail("cuLibraryLoadData:1:900")
        fresh[1, 1, stream.numba](counter)
    finally:
        stub.fail("")
        capture.abort()
    stream.synchronize()
    assert counter.copy_to_host()[0] == 100
    fresh[1, 1, stream.numba](counter)
    stream.synchronize()
    assert counter.copy_to_host()[0] == 101
