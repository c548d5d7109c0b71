"""A pool in a program with other threads' default streams, other devices and contexts that end."""

import contextlib
import subprocess
import sys
import threading

import numpy as np
import pytest
from numba import cuda

from numbabuf import BackendError, BufferSpec, CaptureError, HierarchicalBufferPool, SimpleBufferPool, Tier

SPEC = BufferSpec(256, "float32")


@cuda.jit
def fill(array, value):
    for i in range(cuda.grid(1), array.size, cuda.gridsize(1)):
        array[i] = value


@cuda.jit
def copy(source, target):
    for i in range(cuda.grid(1), source.size, cuda.gridsize(1)):
        target[i] = source[i]


@pytest.mark.real
def test_two_threads_per_thread_default_streams_are_two():
    """One thread's queued read of a buffer comes before the write of the next thread that leases it."""
    stream, out = cuda.per_thread_default_stream(), cuda.to_device(np.zeros(256, np.float32))
    with SimpleBufferPool() as pool:
        with pool.allocate(SPEC, stream=stream) as entry:
            fill[1, 32, stream](entry.array, np.float32(1))
            stream.synchronize()  # the read alone is queued
            copy[1, 32, stream](entry.array, out)

        def write():
            with pool.allocate(SPEC, stream=stream) as entry:
                fill[1, 32, stream](entry.array, np.float32(2))
                stream.synchronize()

        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
        stream.synchronize()
        assert pool.stats().misses == 1, "one buffer, or this shows nothing"
        assert (out.copy_to_host() == 1).all()


@pytest.mark.devices
@pytest.mark.real
@pytest.mark.parametrize("how", ["release", "drop", "thread"])
def test_what_is_released_elsewhere_serves_its_own_device(how):
    with cuda.gpus[0]:
        pool, stream = SimpleBufferPool(), cuda.stream()
        entry = pool.allocate(SPEC, stream=stream)
        fill[1, 32, stream](entry.array, np.float32(1))
    with cuda.gpus[1]:
        if how == "release":
            entry.release()
        elif how == "drop":
            del entry
            pool.stats()
        else:
            thread = threading.Thread(target=entry.release)
            thread.start()
            thread.join()
    with cuda.gpus[0]:
        for _ in range(3):
            for other in (cuda.stream(), cuda.stream()):
                with pool.allocate(SPEC, stream=other) as entry:
                    fill[1, 32, other](entry.array, np.float32(2))
        cuda.synchronize()
        pool.check()
        pool.close()


@pytest.mark.devices
@pytest.mark.real
@pytest.mark.parametrize("tier", list(Tier))
def test_a_stream_of_another_device_is_refused_and_changes_nothing(tier):
    with cuda.gpus[1]:
        foreign = cuda.stream()
    with cuda.gpus[0]:
        own = cuda.stream()
        with SimpleBufferPool() as pool, HierarchicalBufferPool(device_bytes=4096, pinned_bytes=4096) as tiers:
            spec = BufferSpec(256, "uint8", tier)
            entry, moving = pool.allocate(spec), tiers.allocate(BufferSpec(256, "uint8"))
            for call in (
                lambda: entry.record_stream(foreign),
                lambda: entry.mark_in_use(stream=foreign),
                lambda: entry.release(stream=foreign),
                lambda: pool.allocate(spec, stream=foreign),
                lambda: moving.record_stream(foreign),
                lambda: moving.mark_in_use(stream=foreign),
                lambda: moving.release(stream=foreign),
            ):
                with pytest.raises(BackendError, match="device 1"):
                    call()
            assert entry.use_count == moving.use_count == 0
            entry.mark_in_use(stream=own)
            moving.mark_in_use(stream=own)
            entry.release()
            moving.release(stream=own)
            pool.allocate(spec, stream=own).release()
            pool.check()
            tiers.check()


@pytest.mark.real
@pytest.mark.parametrize("call", ["device", "pinned", "clear", "clear pinned", "reserve", "limits"])
def test_what_a_foreign_capture_in_this_thread_forbids_is_a_capture_error(call):
    from cuda.core import Device

    cuda.current_context()
    stream = Device().create_stream()
    with SimpleBufferPool() as pool:
        idle = {"clear pinned": [BufferSpec(64, "uint8", Tier.PINNED)]}.get(call, [SPEC])
        pool.reserve(idle)
        calls = {
            "device": lambda: pool.allocate(BufferSpec(5000)),
            "pinned": lambda: pool.allocate(BufferSpec(5000, "uint8", Tier.PINNED)),
            "reserve": lambda: pool.reserve([BufferSpec(5000)]),
            "limits": lambda: pool.limits.__setitem__(Tier.DEVICE, 8),
        }
        builder = stream.create_graph_builder().begin_building("thread_local")
        with pytest.raises(CaptureError, match="another library captures"):
            calls.get(call, pool.clear)()
        with contextlib.suppress(Exception):  # the driver's refusal has ended that capture
            builder.end_building()
        with contextlib.suppress(Exception):
            builder.close()
        pool.check()
        assert pool.stats().idle_count == 1 and pool.limits[Tier.DEVICE] is None
        calls.get(call, pool.clear)()
        pool.check()


@pytest.mark.real
def test_a_stream_that_another_library_captures_leaves_the_pool_usable():
    from cuda.core import Device

    cuda.current_context()
    stream = Device().create_stream()
    with SimpleBufferPool() as pool:
        entry = pool.allocate(SPEC)
        builder = stream.create_graph_builder().begin_building("relaxed")
        for call in (lambda: entry.release(stream=stream), lambda: pool.allocate(SPEC, stream=stream)):
            with pytest.raises(CaptureError, match="keep it, unreleased"):
                call()
        builder.end_building().close()
        entry.release(stream=stream)
        pool.allocate(SPEC, stream=stream).release()
        pool.check()


def test_a_pool_whose_context_was_closed_says_so():
    program = """
from numba import cuda
from numbabuf import BufferSpec, ClosedError, SimpleBufferPool
pool, spec = SimpleBufferPool(), BufferSpec(64)
held = pool.allocate(spec)
pool.allocate(BufferSpec(100)).release()
try:
    cuda.close()
except Exception:
    pass
def refused(call):
    try:
        call()
    except ClosedError as error:
        assert "context" in str(error), error
    else:
        raise AssertionError("not refused")
for call in (lambda: pool.allocate(spec), lambda: pool.allocate(BufferSpec(100)), lambda: pool.reserve([spec])):
    refused(call)
for look in ("array", "address", "device_array", "__cuda_array_interface__"):
    refused(lambda: getattr(held, look))
refused(held.mark_in_use)
refused(pool.check)
held.release()
pool.close()
print("right")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "right\n", done.stdout + done.stderr
