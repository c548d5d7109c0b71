"""The backend a test run uses, the marks that ask for one, and the fixtures that every test file may use.

The backend is decided here, before anything imports numba, because numba reads NUMBA_ENABLE_CUDASIM once, at
its import. It is "simulator", "stand-in" (a stand-in driver library: numba-cuda's host path on the CPU) or
"gpu". A run with none of them stops at once and says how to choose; it does not fail test by test.
"""

import ctypes
import gc
import importlib.util
import os
import threading

import hypothesis
import pytest

# Numba's advice about kernels as small as those of tests and examples; a filter of warnings would have to import numba
# to name its class, and one by message gives way to `pytest -W error`.
os.environ.setdefault("NUMBA_CUDA_LOW_OCCUPANCY_WARNINGS", "0")

HOW_TO_CHOOSE = """numbabuf's tests need a backend, and none was found: {found}.
  in the simulator (any machine):  NUMBA_ENABLE_CUDASIM=1 pytest
  on an NVIDIA GPU:                pip install -e .[cu13,test]   # or cu12, to match the driver
                                   pytest --require-gpu"""

hypothesis.settings.register_profile("numbabuf", deadline=None)  # no test depends on how long a step takes
hypothesis.settings.load_profile("numbabuf")


def _stand_in():
    """The stand-in driver's controls where that driver is the one loaded, else None."""
    if importlib.util.find_spec("cudastub") is None:
        return None
    import cudastub

    return cudastub if cudastub.active else None


def _device_count():
    """How many GPUs the driver library reports; 0 where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def find_backend():
    """The backend of this process, None where there is none, and what was found: (backend, found)."""
    if os.environ.get("NUMBA_ENABLE_CUDASIM", "0").strip() not in ("", "0"):
        return "simulator", "NUMBA_ENABLE_CUDASIM is set"
    if importlib.util.find_spec("numba_cuda") is None:
        return None, "NUMBA_ENABLE_CUDASIM is not set and numba-cuda is not installed"
    if _stand_in() is not None:
        return "stand-in", "the stand-in driver is loaded"
    if _device_count() > 0:
        return "gpu", "the CUDA driver reports a device"
    return None, "NUMBA_ENABLE_CUDASIM is not set and the CUDA driver reports no device"


def pytest_addoption(parser):
    parser.addoption(
        "--require-gpu", action="store_true", help="fail at once unless the tests run on a real GPU driver"
    )


def pytest_configure(config):
    if config.option.help or config.option.version:
        return
    config.numbabuf_backend, found = find_backend()
    if config.numbabuf_backend is None:
        raise pytest.UsageError(HOW_TO_CHOOSE.format(found=found))
    if config.option.require_gpu and config.numbabuf_backend != "gpu":
        raise pytest.UsageError(
            f"--require-gpu: the backend is the {config.numbabuf_backend} ({found}), not a GPU; "
            "unset NUMBA_ENABLE_CUDASIM and run without the stand-in driver on a machine with a GPU"
        )


def pytest_report_header(config):
    return f"numbabuf backend: {getattr(config, 'numbabuf_backend', None)}"


NEEDS = {"stub": ("stand-in",), "real": ("stand-in", "gpu"), "gpu": ("gpu",)}


def pytest_collection_modifyitems(config, items):
    backend = config.numbabuf_backend
    for item in items:
        for mark, backends in NEEDS.items():
            if item.get_closest_marker(mark) and backend not in backends:
                reason = f"needs the backend {' or '.join(backends)}; this run uses the {backend}"
                item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("devices") and (backend == "simulator" or _device_count() < 2):
            item.add_marker(pytest.mark.skip(reason="needs two devices (the stand-in: CUDASTUB_DEVICES=2)"))


@pytest.fixture(scope="session")
def backend(request):
    """The backend of this run: "simulator", "stand-in" or "gpu"."""
    return request.config.numbabuf_backend


@pytest.fixture
def stub(backend):
    """The stand-in driver's controls (cudastub), call counts at zero; injected faults end with the test."""
    if backend != "stand-in":
        pytest.skip(f"needs the stand-in driver; this run uses the {backend}")
    controls = _stand_in()
    controls.fail("")
    controls.reset_counts()
    yield controls
    controls.fail("")
    controls.clear_errors()


def _live_buffers():
    """What is allocated in the driver once all that is due was freed: {kind: (count, bytes)}."""
    gc.collect()
    controls = _stand_in()
    if controls is None:
        return {}
    from numba import cuda

    cuda.synchronize()
    # Numba puts frees off, in two queues: memory in one, streams and events in the other.
    context = cuda.current_context()
    context.memory_manager.deallocations.clear()
    context.deallocations.clear()
    live = controls.live()
    return {kind: live[kind] for kind in ("device", "managed", "pinned")}


@pytest.fixture
def no_leaks(backend):
    """Fail a test that leaves a thread running or, on the stand-in driver, a buffer allocated.

    Ask for it first: fixtures end in the reverse of the order in which they were asked for, so those named
    after this one have ended, and freed what they held, when it counts.
    """
    counts_buffers = backend == "stand-in"
    threads = set(threading.enumerate())
    before = _live_buffers() if counts_buffers else {}
    yield
    left = [thread for thread in threading.enumerate() if thread not in threads]
    after = _live_buffers() if counts_buffers else {}
    grown = {kind: (before[kind], amount) for kind, amount in after.items() if amount > before[kind]}
    assert not left, f"threads left running: {left}"
    assert not grown, f"buffers left allocated, kind: (before, after) as (count, bytes): {grown}"
