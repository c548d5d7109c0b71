"""Two managers, or a manager and a stream, in order: an event and a wait, never the host's."""

import kit
import numpy as np
import pytest
from numba import cuda

from numbabuf import BackendError, BusyError, CaptureError, ClosedError, InputBufferManager

QUESTIONS = {"cuCtxGetDevice", "cuStreamIsCapturing"}
"""What the driver answers without queueing anything."""

WEIGHTS = np.array([2, 1], np.int64)


def make(**options):
    return InputBufferManager(max_batch_size=1, max_seq_len=8, buckets=[8], **options)


@pytest.fixture
def first():
    with make() as m:
        yield m


@pytest.fixture
def second():
    with make() as m:
        yield m


def test_what_one_manager_writes_another_reads(first, second):
    """A pipeline of two, in turns: the second reads what the first wrote, before the first writes over it."""
    middle, total = kit.to_device(np.zeros(8, np.int64)), kit.to_device(np.zeros(1, np.int64))
    weights = kit.to_device(WEIGHTS)
    first.capture_buckets(lambda step: kit.run(kit.affine, step.stream, step["input_ids"], weights, middle))
    second.capture_buckets(lambda step: kit.run(kit.add_up, step.stream, middle, total))
    expected = 0
    for n in range(1, 21):
        first.wait_for(second)
        first.replay({"input_ids": np.full(8, n)}, 8)
        second.wait_for(first)
        second.replay({}, 0)
        expected += 8 * (2 * n + 1)
    assert kit.to_host(total, second.stream).tolist() == [expected]


def test_a_stream_before_a_manager(first):
    stream, counter = cuda.stream(), kit.to_device(np.zeros(1, np.int64))
    total = kit.to_device(np.zeros(1, np.int64))
    first.capture_buckets(lambda step: kit.run(kit.add_up, step.stream, counter, total))
    for _ in range(10):
        kit.run(kit.count_up, stream, counter)
        first.wait_for(stream)
        first.replay({}, 0)
        first.synchronize()
    assert kit.to_host(total, first.stream).tolist() == [55]
    for other in (first.stream, 0, None, first):
        first.wait_for(other)


@pytest.mark.stub
def test_it_is_an_event_and_a_wait(first, second, stub):
    first.wait_for(second)
    stub.reset_counts()
    first.wait_for(second)
    counts = {name: count for name, count in stub.counts().items() if count and name not in QUESTIONS}
    assert counts == {"cuEventRecord": 1, "cuStreamWaitEvent": 1}
    stub.reset_counts()
    first.wait_for(first)
    assert not {name for name, count in stub.counts().items() if count} - QUESTIONS


def test_a_closed_manager_is_refused(first, second):
    second.close()
    with pytest.raises(ClosedError):
        first.wait_for(second)
    with pytest.raises(ClosedError):
        second.wait_for(first)
    first.stage_inputs({}, 0)


@pytest.mark.parametrize("other", ["stream", 1.5, True, object()])
def test_what_is_no_stream_is_refused(first, other):
    with pytest.raises(TypeError, match="is no stream"):
        first.wait_for(other)


def test_a_capture_is_refused(first, second):
    def fn(step):
        with pytest.raises(CaptureError):
            first.wait_for(second)
        with pytest.raises(CaptureError, match="wait_for was called inside a capture"):
            second.wait_for(first)

    first.capture_buckets(fn)
    first.wait_for(second)
    first.replay({}, 0)


def test_from_within_a_call_it_is_refused(second):
    ran = []

    def each(result, start, stop):
        with pytest.raises(BusyError, match="wait_for"):
            m.wait_for(second)
        second.wait_for(m)  # what reads the piece waits for it
        ran.append(start)

    with InputBufferManager(max_batch_size=1, max_seq_len=16, buckets=[8, 16], overflow="split") as m:
        m.capture_buckets(lambda step: None, [8])
        m.replay({"input_ids": np.arange(12)}, 12, each=each)
    assert ran == [0, 8]


@pytest.mark.real
def test_a_stream_that_another_captures_is_refused(first):
    from cuda.core import Device

    first.stage_inputs({}, 0)
    stream = Device().create_stream()
    builder = stream.create_graph_builder()
    builder.begin_building("thread_local")
    try:
        with pytest.raises(CaptureError, match="call wait_for before the capture or after it"):
            first.wait_for(stream)
    finally:
        builder.end_building()
        builder.close()
    first.wait_for(stream)


@pytest.mark.devices
def test_another_device_is_refused():
    with cuda.gpus[1]:
        stream, second = cuda.stream(), make()
    with cuda.gpus[0], make() as first:
        for other in (stream, second):
            with pytest.raises(BackendError, match="stream of device 1"):
                first.wait_for(other)
    with cuda.gpus[1]:
        second.close()
