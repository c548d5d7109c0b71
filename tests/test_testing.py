"""The fixtures for users' own tests, as a user's tests meet them: in a pytest run of its own."""

import gc
import os
import pathlib
import threading

import pytest

from numbabuf import _cuda, testing
from numbabuf.pool.pool import SimpleBufferPool
from numbabuf.pool.spec import BufferSpec, Tier
from numbabuf.predict.manager import PredictiveBufferManager
from numbabuf.step.manager import InputBufferManager

pytest_plugins = ["pytester"]
SPEC = BufferSpec(8, "int32", Tier.PINNED)


ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def users(pytester, monkeypatch):
    """A user's folder with numbabuf's fixtures switched on."""
    path = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{path}" if path else str(ROOT))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makeconftest('pytest_plugins = ["numbabuf.testing"]')
    return pytester


def run(users, *arguments):
    """With every warning an error, as a user may have it; pytest warns of fixtures that its next version refuses."""
    return users.runpytest_subprocess("-p", "no:cacheprovider", "-W", "error", *arguments)


def test_the_fixtures_serve_a_users_tests(users):
    users.makepyfile(
        """
        from numbabuf import BufferSpec, InputBufferManager, PredictiveBufferManager, SimpleBufferPool, Tier

        SPEC = BufferSpec(8, "int32", Tier.PINNED)
        kept = []
        pool = SimpleBufferPool()

        def test_backend(numbabuf_backend):
            assert numbabuf_backend == BACKEND

        def test_tidy(numbabuf_no_leaks, numbabuf_live_buffers):
            before = numbabuf_live_buffers()
            with pool.allocate(SPEC):
                assert numbabuf_live_buffers() == before + 1
            assert numbabuf_live_buffers() == before
            with InputBufferManager(max_batch_size=1, max_seq_len=4) as manager:
                manager.stage_inputs({}, 0)
            with PredictiveBufferManager(max_batch_size=1, max_seq_len=4) as manager:
                manager.start(60)

        def test_leased(numbabuf_no_leaks):
            kept.append(pool.allocate(SPEC))

        def test_dropped(numbabuf_no_leaks):
            pool.allocate(SPEC)

        def test_thread(numbabuf_no_leaks):
            kept.append(PredictiveBufferManager(max_batch_size=1, max_seq_len=4))
            kept[-1].start(60)

        def test_end():
            kept[-1].close()
            kept[0].release()
        """.replace("BACKEND", repr(testing.backend_id()))
    )
    result = run(users)
    result.assert_outcomes(passed=6, errors=3)
    result.stdout.fnmatch_lines_random(
        [
            "*1 buffer(s) leased and not released*",
            "*1 buffer(s) dropped without release*",
            "*thread numbabuf-prewarm goes on*",
        ]
    )


def test_the_fixtures_say_what_they_do(users):
    result = run(users, "--fixtures")
    result.stdout.fnmatch_lines(["numbabuf_backend*", "*What runs the kernels*"])
    result.stdout.fnmatch_lines(["numbabuf_no_leaks*", "*Fail a test that leaves a buffer leased*"])


def test_nobody_gets_them_unasked(pytester):
    pytester.makepyfile("def test_it(numbabuf_backend): pass")
    result = run(pytester)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*fixture 'numbabuf_backend' not found*"])


def test_the_guard_lets_an_error_of_the_block_pass():
    with SimpleBufferPool() as pool, pytest.raises(KeyError, match="mine"), testing.no_leaks():
        entry = pool.allocate(SPEC)
        raise KeyError("mine")
    entry.release()


def test_the_guard_finds_what_only_the_collector_does():
    with SimpleBufferPool() as pool:
        gc.disable()
        try:
            with pytest.raises(AssertionError, match="dropped without release"), testing.no_leaks():
                cycle = [pool.allocate(SPEC)]
                cycle.append(cycle)
                del cycle
        finally:
            gc.enable()


def test_the_guard_looks_at_changes_alone():
    with SimpleBufferPool() as pool:
        entry = pool.allocate(SPEC)
        with testing.no_leaks():
            entry.release()
            entry = pool.allocate(SPEC)
        with testing.no_leaks():
            entry.release()


def test_idle_memory_is_no_leak():
    with SimpleBufferPool() as pool, testing.no_leaks():
        pool.reserve([SPEC, SPEC])


def test_a_users_thread_is_none_of_its_business():
    end = threading.Event()
    with testing.no_leaks():
        thread = threading.Thread(target=end.wait)
        thread.start()
    end.set()
    thread.join()


def test_a_manager_is_two_buffers_once_it_has_memory():
    gc.collect()
    before = testing.live_buffers()
    with InputBufferManager(max_batch_size=1, max_seq_len=4) as manager:
        assert testing.live_buffers() == before
        manager.stage_inputs({}, 0)
        assert testing.live_buffers() == before + 2
    assert testing.live_buffers() == before


def test_the_backend_has_a_name():
    assert testing.backend_id() == ("simulator" if _cuda.SIM else "cuda:0")


def test_a_predictive_managers_thread_ends_with_it():
    with testing.no_leaks(), PredictiveBufferManager(max_batch_size=1, max_seq_len=4) as manager:
        manager.start(60)
