"""The door beside other devices, threads and contexts: what cuda.close() leaves usable, and whose streams are whose.

A context is the whole process's, so each story of its end is told in a process of its own.
"""

import gc
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import kit
import numpy as np
import pytest
from numba import cuda

from numbabuf import CaptureError, _cuda
from numbabuf._cuda.thread import once

CLOSED = """
import contextlib, itertools, threading, warnings
warnings.simplefilter("ignore")
import numpy as np
from numba import cuda
from numbabuf import BufferSpec, InputBufferManager, SimpleBufferPool, _cuda

@cuda.jit
def count_up(x):
    x[0] += 1

def use(device):
    '''A pool, a kernel of the user's and a manager with a graph, on a device or on the current one.'''
    with contextlib.nullcontext() if device is None else cuda.gpus[device]:
        with SimpleBufferPool() as pool, pool.allocate(BufferSpec(8, "int64"), stream=_cuda.as_stream(None)) as entry:
            entry.array.copy_to_device(np.arange(8))
            count_up[1, 1](entry.array)
            found = entry.array.copy_to_host().tolist()
        with InputBufferManager(max_batch_size=1, max_seq_len=8, buckets=[8]) as m:
            m.capture_buckets(lambda step: count_up[1, 1, step.stream](step["input_ids"]))
            m.replay({"input_ids": np.arange(4)}, 4)
            m.synchronize()
            found += m.get_slot("input_ids").array.copy_to_host()[:5].tolist()
    assert found == [1, 1, 2, 3, 4, 5, 6, 7, 1, 1, 2, 3, 0], found

def story(before, after):
    '''A thread uses devices; the main thread closes everything; both use devices again.'''
    ready, closed, wrong = threading.Event(), threading.Event(), []
    def work():
        try:
            for device in before:
                use(device)
            ready.set()
            closed.wait(60)
            for device in after:
                use(device)
        except BaseException as error:
            wrong.append(repr(error))
        finally:
            ready.set()
    thread = threading.Thread(target=work)
    thread.start()
    ready.wait(60)
    life = _cuda.lifetime()
    cuda.close()
    assert life.ended and not _cuda.lifetime().ended
    closed.set()
    thread.join()
    assert not wrong, (before, after, wrong)
    for device in after:
        use(device)

for before, after in itertools.product(BEFORE, AFTER):
    story(before, after)
print("right")
"""


def tell(before, after):
    program = CLOSED.replace("BEFORE", repr(before)).replace("AFTER", repr(after))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert done.stdout == "right\n", done.stdout + done.stderr


@pytest.mark.real
def test_threads_and_kernels_outlive_the_end_of_a_context():
    tell([[None], [0]], [[None], [0, None]])


@pytest.mark.devices
def test_threads_and_kernels_outlive_the_end_of_the_contexts_of_two_devices():
    tell([[1], [0, 1], [1, None]], [[None], [1, 0]])


# --------------------------------------------------------------------------------------------------------- whose stream


def in_another_thread(act):
    found = []

    def work():
        try:
            found.append(act())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.real
def test_another_threads_default_stream_takes_no_work_from_here(stub):
    """The handle is the same in every thread and means another stream in each."""
    theirs = in_another_thread(lambda: _cuda.as_stream(cuda.per_thread_default_stream()))
    mine = _cuda.as_stream(cuda.per_thread_default_stream())
    assert theirs.handle == mine.handle and theirs.elsewhere and not mine.elsewhere
    assert _cuda.as_stream(cuda.per_thread_default_stream()) is mine
    event = _cuda.Event()
    for act in (event.record, event.wait):
        with pytest.raises(RuntimeError, match="by its own thread alone"):
            act(theirs)
    event.record(mine)
    event.wait(mine)
    event.synchronize()
    assert event.query()
    assert not _cuda.is_capturing(theirs) and not _cuda.is_capturing(mine)


@pytest.mark.stub
def test_waiting_for_another_threads_default_stream_waits_for_its_work(stub):
    """All that can be done from here is to wait for the device."""
    stub.set_async(1)
    try:
        counter = kit.to_device(np.zeros(1, np.int64))
        _cuda.synchronize()

        def queue():
            stream = _cuda.as_stream(cuda.per_thread_default_stream())
            _cuda.launch(kit.count_up, 1, 1, stream, counter)
            return stream

        for wait in (lambda stream: stream.synchronize(), lambda stream: stream.query()):
            theirs, before = in_another_thread(queue), stub.pending()
            assert before
            assert wait(theirs) in (None, True)
            assert stub.pending() < before
    finally:
        stub.set_async(kit.lazy_by_environment())
    assert kit.to_host(counter, cuda.default_stream()).tolist() == [2]


@pytest.mark.devices
def test_an_event_is_recorded_on_streams_of_its_own_device():
    with cuda.gpus[1]:
        stream = _cuda.as_stream(None)
    assert stream.device == 1 and _cuda.device_id() == 0
    event = _cuda.Event(stream.device)
    event.record(stream)
    event.wait(_cuda.as_stream(None))  # of device 0
    event.synchronize()
    assert event.query() and stream.query()


def test_an_event_orders_streams_whichever_waits():
    first, second, event = _cuda.as_stream(None), _cuda.as_stream(None), _cuda.Event()
    counter = kit.to_device(np.zeros(1, np.int64), first)
    for one, other in ((first, second), (second, first), (first, first)):
        kit.run(kit.count_up, one.numba, counter)
        event.record(one)
        event.wait(other)
        kit.run(kit.count_up, other.numba, counter)
        other.synchronize()
        assert event.query() and one.query() and other.query()
    assert kit.to_host(counter, first.numba).tolist() == [6]


def test_what_is_done_once_is_done_once_by_many_threads():
    done, barrier = [], threading.Barrier(4)

    @once
    def act():
        done.append(threading.get_ident())
        kit.collect()  # time for the others to come

    def work():
        barrier.wait()
        act()
        return len(done)

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda _: work(), range(4))) == [1] * 4


# ------------------------------------------------------------------------------------------------------- open captures


def test_a_capture_that_is_dropped_is_given_up():
    """Without leaving it: nothing stays in the table, the stream records no more, Numba is as it was."""
    stream = _cuda.as_stream(None)
    counter = kit.to_device(np.zeros(1, np.int64), stream)
    kit.run(kit.count_up, stream.numba, counter)
    stream.synchronize()
    capture = _cuda.Capture(stream)
    capture.begin()
    kit.run(kit.count_up, stream.numba, counter)
    assert _cuda.capturing() and _cuda.is_capturing(stream)
    with pytest.raises(CaptureError, match="already has a capture open"):
        _cuda.Capture(_cuda.as_stream(None)).begin()
    del capture
    kit.collect()
    assert not _cuda.captures and not _cuda.capturing() and not _cuda.is_capturing(stream)
    kit.run(kit.count_up, stream.numba, counter)
    assert kit.to_host(counter, stream.numba).tolist() == [2], "the launch in the capture never ran"
    assert _cuda.empty_device(8) is not None
    again = _cuda.Capture(stream)
    again.begin()
    kit.run(kit.count_up, stream.numba, counter)
    graph = again.end()
    graph.launch_on(stream.core)
    assert kit.to_host(counter, stream.numba).tolist() == [3]
    graph.close()


def test_a_capture_that_its_thread_left_open_is_given_up():
    kept = []

    def begin():
        stream = _cuda.as_stream(None)
        capture = _cuda.Capture(stream)
        capture.begin()
        kept.append(capture)

    in_another_thread(begin)
    assert len(_cuda.captures) == 1 and not _cuda.capturing()
    kept.clear()
    kit.collect()
    assert not _cuda.captures


def test_a_capture_is_ended_once():
    capture = _cuda.Capture(_cuda.as_stream(None))
    with pytest.raises(CaptureError, match="begin"):
        capture.end()
    capture.begin()
    with pytest.raises(CaptureError, match="already"):
        capture.begin()
    capture.end().close()
    capture.abort()
    with pytest.raises(CaptureError, match="begin"):
        capture.end()


def test_a_capture_dropped_while_another_begins_is_struck_off():
    """The collector may run a finaliser in the middle of `begin`, which holds the table's lock: it must not wait."""
    dropped = _cuda.Capture(_cuda.as_stream(None))
    dropped_thread = threading.Thread(target=dropped.begin)
    dropped_thread.start()
    dropped_thread.join()
    cell = [dropped]
    cell.append(cell)
    del dropped, cell
    gc.set_threshold(1)
    try:
        for _ in range(50):
            capture = _cuda.Capture(_cuda.as_stream(None))
            capture.begin()
            capture.abort()
    finally:
        gc.set_threshold(700, 10, 10)
    kit.collect()
    assert not _cuda.captures


# -------------------------------------------------------------------------------------------------------------- forks

FORKED = """
import os, warnings
warnings.simplefilter("ignore")
from numbabuf import BufferSpec, ClosedError, InputBufferManager, SimpleBufferPool, _cuda
pool, manager = SimpleBufferPool(), InputBufferManager(max_batch_size=1, max_seq_len=8)
pool.allocate(BufferSpec(8)).release()
capture = _cuda.Capture(_cuda.as_stream(None))
capture.begin()
child = os.fork()
if not child:
    right = pool.closed and manager.closed and not _cuda.captures and not _cuda.capturing()
    os._exit(0 if right else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert _cuda.capturing() and not pool.closed and not manager.closed
capture.abort()
pool.close()
manager.close()
print("right")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_nothing_open():
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=120)
    assert done.stdout == "right\n", done.stdout + done.stderr
