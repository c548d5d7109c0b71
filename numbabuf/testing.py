"""What a user's own tests need of numbabuf: which backend runs, how many buffers are live, and a guard against leaks.

Opt in by ``pytest_plugins = ["numbabuf.testing"]`` in the top conftest.py, or ``pytest -p numbabuf.testing``; the
fixtures are then `numbabuf_backend`, `numbabuf_live_buffers` and `numbabuf_no_leaks`. The functions need no pytest.
Sits above the library; nothing imports it.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from . import _cuda
from .pool.base import pools

if TYPE_CHECKING:
    import pytest

__all__ = ["backend_id", "live_buffers", "no_leaks"]


def backend_id() -> str:
    """Return what runs the kernels: "simulator", or "cuda" and the number of the device, as in "cuda:0".

    Raises
    ------
    BackendError
        There is neither a usable device nor the simulator.
    """
    return "simulator" if _cuda.SIM else f"cuda:{_cuda.device_id()}"


def _leased() -> dict[Any, tuple[int, int, str]]:
    """Each pool: (leased buffers, buffers lost so far, what the pool says of itself)."""
    gc.collect()
    counts = {}
    for pool in list(pools):
        stats = pool.stats()
        counts[pool] = (stats.in_use_count, stats.lost, repr(pool))
    return counts


def live_buffers() -> int:
    """Return how many buffers are leased now, from all pools of this process together.

    A manager that has taken memory leases two: its slots and its staging ring. Runs the garbage collector first, so
    that an unreachable buffer is not counted.

    Examples
    --------
    >>> from numbabuf.pool import SimpleBufferPool
    >>> from numbabuf import BufferSpec, Tier
    >>> before = live_buffers()
    >>> with SimpleBufferPool() as pool, pool.allocate(BufferSpec(8, "int32", Tier.PINNED)):
    ...     live_buffers() - before
    1
    """
    return sum(leased for leased, _, _ in _leased().values())


@contextlib.contextmanager
def no_leaks() -> Iterator[None]:
    """Fail if the ``with`` block leaves behind more than it found.

    Raises
    ------
    AssertionError
        At the end, where the block itself raised nothing: a pool has more leased buffers than before, or lost one that
        was dropped without release, or a thread of numbabuf's (`PredictiveBufferManager.start`) goes on.

    Notes
    -----
    Threads: what other threads lease meanwhile counts too. Idle memory in a pool is no leak; a pool that was dropped
    with everything in it is gone, and none either.

    Examples
    --------
    >>> from numbabuf.pool import SimpleBufferPool
    >>> from numbabuf import BufferSpec, Tier
    >>> pool = SimpleBufferPool()
    >>> with no_leaks():
    ...     entry = pool.allocate(BufferSpec(8, "int32", Tier.PINNED))
    Traceback (most recent call last):
    AssertionError: <SimpleBufferPool 1 buffers, 32 bytes>: 1 buffer(s) leased and not released
    >>> entry.release()
    >>> pool.close()
    """
    before = _leased()
    threads = set(threading.enumerate())
    yield
    found = []
    for pool, (leased, lost, text) in _leased().items():
        leased_before, lost_before, _ = before.get(pool, (0, 0, ""))
        if leased > leased_before:
            found.append(f"{text}: {leased - leased_before} buffer(s) leased and not released")
        if lost > lost_before:
            found.append(f"{text}: {lost - lost_before} buffer(s) dropped without release")
    found += [
        f"thread {thread.name} goes on: stop() or close() its manager"
        for thread in threading.enumerate()
        if thread not in threads and thread.name.startswith("numbabuf")
    ]
    assert not found, "\n".join(found)


def pytest_configure(config: pytest.Config) -> None:
    """Make the fixtures known: pytest calls this when it loads the module as a plugin."""
    import types

    import pytest

    @pytest.fixture(scope="session")
    def numbabuf_backend() -> str:
        """What runs the kernels: "simulator", or "cuda:0" for device 0."""
        return backend_id()

    @pytest.fixture
    def numbabuf_live_buffers() -> Callable[[], int]:
        """A function that returns how many buffers are leased now, from all pools together."""
        return live_buffers

    @pytest.fixture
    def numbabuf_no_leaks() -> Iterator[None]:
        """Fail a test that leaves a buffer leased, drops one without release, or leaves a thread running.

        Ask for it first: fixtures end in the reverse of the order in which they were asked for.
        """
        with no_leaks():
            yield

    # A module made here, since this one imports no pytest at its top. In a class a fixture of the session is a method,
    # which pytest 9.2 warns of.
    fixtures = types.ModuleType("numbabuf_fixtures", __doc__)
    for fixture in (numbabuf_backend, numbabuf_live_buffers, numbabuf_no_leaks):
        setattr(fixtures, fixture.__name__, fixture)
    config.pluginmanager.register(fixtures, "numbabuf-fixtures")
