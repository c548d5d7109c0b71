"""Capture and replay by themselves: what a step shows, what a graph keeps, what a capture refuses."""

import threading
import weakref

import kit
import numpy as np
import pytest

from numbabuf import CaptureError, _cuda
from numbabuf.step.graph import CapturedStep, Step, recorded


@pytest.fixture
def stream():
    return _cuda.as_stream(None)


@pytest.fixture
def counter(stream):
    """A device counter, its kernel compiled and loaded."""
    array = kit.to_device(np.zeros(1, np.int64), stream)
    kit.run(kit.count_up, stream.numba, array)
    array.copy_to_device(np.zeros(1, np.int64), stream=stream.numba)
    stream.synchronize()
    return array


def new_step(stream):
    return CapturedStep(Step(stream.numba, {"tokens": 8}, {"x": "view of x"}), (8,), (8,), None)


def record(stream, counter):
    """A graph that counts once as its fill, and once as its body."""
    recording = recorded(stream, lambda on: kit.run(kit.count_up, on.numba, counter), new_step(stream))
    with recording as captured:
        kit.run(kit.count_up, captured.step.stream, counter)
    return captured


def value(counter, stream):
    return int(kit.to_host(counter, stream.numba)[0])


def test_a_step_is_a_mapping_of_views():
    step = Step("stream", {"tokens": 8, "seqs": 2}, {"a": 1, "b": 2})
    assert dict(step) == {"a": 1, "b": 2} and len(step) == 2 and "a" in step and step.result is None
    with pytest.raises(KeyError, match="'c' is not a static slot; there are a, b"):
        step["c"]
    views = step.views()
    views.clear()
    assert dict(step) == {"a": 1, "b": 2}
    assert repr(step) == "Step(tokens=8, seqs=2)"


def test_nothing_runs_while_it_is_captured_and_all_of_it_at_each_replay(stream, counter):
    captured = record(stream, counter)
    assert value(counter, stream) == 0
    for times in (1, 2, 3):
        captured.launch_on(stream.core)
        assert value(counter, stream) == 2 * times
    captured.close()
    captured.close()
    assert captured.launch_on is None


def test_a_graph_can_be_replayed_on_another_stream(stream, counter):
    captured, other = record(stream, counter), _cuda.as_stream(None)
    captured.launch_on(other.core)
    other.synchronize()
    assert value(counter, other) == 2


def test_an_exception_gives_the_capture_up(stream, counter):
    recording = recorded(stream, lambda on: None, new_step(stream))
    with pytest.raises(ZeroDivisionError), recording as captured:
        kit.run(kit.count_up, captured.step.stream, counter)
        raise ZeroDivisionError
    assert not _cuda.capturing() and captured.launch_on is None
    kit.run(kit.count_up, stream.numba, counter)
    assert value(counter, stream) == 1, "the stream is usable"
    record(stream, counter).launch_on(stream.core)
    assert value(counter, stream) == 3


def test_a_fill_that_raises_leaves_no_capture_open(stream, counter):
    def fill(on):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), recorded(stream, fill, new_step(stream)):
        raise AssertionError("not reached")
    assert not _cuda.capturing()
    assert record(stream, counter).launch_on is not None


def test_a_thread_has_one_capture_at_a_time(stream, counter):
    other = _cuda.as_stream(None)
    with recorded(stream, lambda on: None, new_step(stream)) as captured:
        with pytest.raises(CaptureError, match="already"), recorded(other, lambda on: None, new_step(other)):
            raise AssertionError("not reached")
        assert _cuda.capturing()
        kit.run(kit.count_up, captured.step.stream, counter)
    assert not _cuda.capturing()


def test_operands_live_as_long_as_the_graph(stream):
    source, out = kit.to_device(np.arange(4), stream), kit.to_device(np.zeros(4, np.int64), stream)
    weights = kit.to_device(np.array([2, 1]), stream)
    kit.run(kit.affine, stream.numba, source, weights, out)
    stream.synchronize()
    recording = recorded(stream, lambda on: None, new_step(stream))
    with recording as captured:
        kit.run(kit.affine, captured.step.stream, source, weights, out)
        out.copy_to_device(source, stream=captured.step.stream)
    watched = [weakref.ref(array) for array in (source, weights, out)]
    del source, weights, out
    kit.collect()
    assert all(ref() is not None for ref in watched)
    captured.launch_on(stream.core)
    assert kit.to_host(watched[2](), stream.numba).tolist() == [0, 1, 2, 3]
    captured.close()
    kit.collect()
    assert [ref() for ref in watched] == [None] * 3


def test_a_dropped_graph_lets_its_operands_go(stream):
    out = kit.to_device(np.zeros(1, np.int64), stream)
    kit.run(kit.count_up, stream.numba, out)
    stream.synchronize()
    captured = record(stream, out)
    watched = weakref.ref(out)
    del out
    kit.collect()
    assert watched() is not None
    del captured
    kit.collect()
    assert watched() is None


def test_host_arrays_are_refused_in_a_capture(stream, counter):
    refused = pytest.raises(Exception, match="NumPy|stream")
    with refused, recorded(stream, lambda on: None, new_step(stream)) as captured:
        kit.run(kit.count_up, captured.step.stream, np.zeros(1, np.int64))
    assert not _cuda.capturing()
    with (
        pytest.raises(CaptureError, match="pinned array"),
        recorded(stream, lambda on: None, new_step(stream)) as captured,
    ):
        counter.copy_to_host(stream=captured.step.stream)
    assert not _cuda.capturing()
    kit.run(kit.count_up, stream.numba, counter)
    assert value(counter, stream) == 1


def test_launches_of_other_threads_are_not_captured(stream, counter):
    other = _cuda.as_stream(None)

    def work():
        _cuda.require()
        kit.run(kit.count_up, other.numba, counter)
        other.synchronize()

    thread = threading.Thread(target=work)
    recording = recorded(stream, lambda on: None, new_step(stream))
    with recording as captured:
        thread.start()
        thread.join()
        kit.run(kit.count_up, captured.step.stream, counter)
    assert value(counter, stream) == 1, "it ran at once"
    captured.launch_on(stream.core)
    assert value(counter, stream) == 2


def test_launches_are_as_numba_made_them_after_the_capture(stream, counter):
    """The functions that a capture wraps are put back, also where it fails."""
    if _cuda.SIM:
        from numba.cuda.simulator.kernel import FakeCUDAKernel as Kernel

        name = "__getitem__"
    else:
        from numba.cuda.dispatcher import CUDADispatcher as Kernel

        name = "call"
    before = getattr(Kernel, name)
    record(stream, counter)
    with pytest.raises(ZeroDivisionError), recorded(stream, lambda on: None, new_step(stream)):
        raise ZeroDivisionError
    assert getattr(Kernel, name) is before
