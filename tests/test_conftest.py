"""The test run itself: how it chooses its backend, what its marks skip, what its leak fixture finds."""

import pathlib

import pytest

pytest_plugins = ["pytester"]

CONFTEST = pathlib.Path(__file__).with_name("conftest.py").read_text()


@pytest.fixture
def outer(pytester, monkeypatch):
    """A folder with this suite's conftest, where pytest runs in a process of its own, no simulator chosen."""
    pytester.makeconftest(CONFTEST)
    for name in ("PYTEST_ADDOPTS", "NUMBA_ENABLE_CUDASIM"):
        monkeypatch.delenv(name, raising=False)
    return pytester


@pytest.fixture
def simulator(outer, monkeypatch):
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    return outer


def run(outer, *arguments):
    return outer.runpytest_subprocess("-p", "no:cacheprovider", *arguments)


def test_without_a_backend_it_says_how_to_choose_one(outer, monkeypatch):
    outer.makepyfile("def test(): pass")
    for name in ("LD_LIBRARY_PATH", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = run(outer)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*NUMBA_ENABLE_CUDASIM=1 pytest*"])


def test_require_gpu_refuses_the_simulator(simulator):
    simulator.makepyfile("def test(): pass")
    result = run(simulator, "--require-gpu")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--require-gpu: the backend is the simulator*"])


def test_marks_skip_with_a_reason(simulator):
    simulator.makepyfile(
        """
        import pytest

        @pytest.mark.stub
        def test_stub(): pass

        @pytest.mark.real
        def test_real(): pass

        @pytest.mark.gpu
        def test_gpu(): pass

        @pytest.mark.devices
        def test_devices(): pass

        def test_any(backend):
            assert backend == "simulator"
        """
    )
    result = run(simulator, "-rs", "-W", "ignore")
    result.assert_outcomes(passed=1, skipped=4)
    result.stdout.fnmatch_lines(["*needs the backend stand-in or gpu; this run uses the simulator"])


def test_a_thread_left_running_is_a_leak(simulator):
    simulator.makepyfile(
        """
        import threading

        def test_tidy(no_leaks):
            thread = threading.Thread(target=int)
            thread.start()
            thread.join()

        def test_untidy(no_leaks):
            threading.Thread(target=threading.Event().wait, daemon=True).start()
        """
    )
    result = run(simulator)
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*threads left running*"])


@pytest.mark.stub
def test_a_buffer_left_allocated_is_a_leak(outer):
    outer.makepyfile(
        """
        from numba import cuda

        kept = []

        def test_tidy(no_leaks):
            cuda.pinned_array(10)

        def test_untidy(no_leaks):
            kept.append(cuda.device_array(10))
        """
    )
    result = run(outer)
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*buffers left allocated*'device': ((0, 0), (1, 80))*"])
