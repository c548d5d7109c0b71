"""SimpleBufferPool: memory that is reused in stream order, then taken from the driver, under limits.

It moves nothing between tiers and predicts nothing. Sits above `base`, below `step`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from .. import _cuda
from ..checks import whole_number
from ..errors import CaptureError
from .base import BufferPool, ReusingPool
from .block import refuse_captured
from .budget import SharedLedger
from .entry import BufferEntry, FixedEntry
from .oom import Ladder
from .spec import BufferSpec, Tier, as_code
from .store import SimpleStore, Store, known_stream
from .turns import refuse_foreign_capture

__all__ = ["BufferPool", "SimpleBufferPool"]


class SimpleBufferPool(ReusingPool):
    """A pool that reuses memory of the same capacity, then of less than twice that, then asks the driver.

    Parameters
    ----------
    max_bytes
        Limit of device and managed memory together, in bytes; None for what the driver gives.
    max_pinned_bytes
        Limit of pinned memory, in bytes.
    on_oom
        Called with the number of bytes asked for when nothing else has made room, at most once per request; it may
        release buffers, of this pool too. The request is tried once more after it.
    events
        Number of events (leases, releases, driver calls) to remember for `events`; 0 remembers none and costs nothing.

    Raises
    ------
    ValueError
        A limit is negative.

    Notes
    -----
    Threads: every method may be called from any thread. A hit and its release take no lock.
    Streams: the order of work is known from the streams that `allocate`, `release`, `BufferEntry.mark_in_use` and
    `record_stream` were given; None is the default stream for device memory, and the CPU alone for the other tiers.
    Device memory that was released on one stream serves every other, which is made to wait by an event; the host never
    waits. Memory that the CPU reads (pinned, managed) is handed out once the work on it is done, because the next to
    write it is the CPU. A wait costs one driver call; a release with a stream one event.
    Capture: a thread that captures a graph frees, queries and allocates nothing; its releases are put aside until the
    end of the capture, and an allocation that no idle buffer can serve raises CaptureError. Other threads go on. Memory
    that a live graph reads or writes is not handed out again before the graph is closed, even if it is released, but
    to captures on the same stream: their graphs share what is leased and released within them. Of a graph that another
    library captures a pool knows nothing: keep what it uses leased as long as it lives.
    Devices: all memory is on one device, the one that was current when the first of it was allocated; what the pool
    does by itself runs there, whichever is current. More is refused (BackendError) while another device is current,
    and so is a stream of another device; idle memory is not.
    Contexts: a pool whose context was closed (``cuda.close()``) raises ClosedError; `close` and releases are quiet.
    Processes: after a fork the child's copy of the pool is closed, and neither frees nor reports anything.

    Examples
    --------
    >>> pool = SimpleBufferPool(max_pinned_bytes=1 << 20)
    >>> spec = BufferSpec((8, 16), "float32", Tier.PINNED)
    >>> entry = pool.allocate(spec)
    >>> entry.array.shape
    (8, 16)
    >>> entry.release()
    >>> again = pool.allocate(spec)
    >>> again.generation, pool.stats().exact_hits
    (2, 1)
    >>> again.release()
    >>> pool.close()
    """

    _store: Store
    _ladder: Ladder

    def __init__(
        self,
        *,
        max_bytes: int | None = None,
        max_pinned_bytes: int | None = None,
        on_oom: Callable[[int], Any] | None = None,
        events: int = 0,
    ) -> None:
        max_bytes = None if max_bytes is None else whole_number("max_bytes", max_bytes)
        max_pinned_bytes = None if max_pinned_bytes is None else whole_number("max_pinned_bytes", max_pinned_bytes)
        ledger = SharedLedger(max_bytes, max_pinned_bytes)
        super().__init__(SimpleStore(ledger, weakref.ref(self), events=events), on_oom)

    def _allocate_larger(self, spec: BufferSpec) -> BufferEntry:
        """Lease a block of less than twice the capacity, still without the lock."""
        handle = self._store.lists.pop_larger(spec) if isinstance(spec, BufferSpec) else None
        if handle is None:
            return self._allocate_slowly(spec, None)
        self._cast(handle, spec)
        return FixedEntry(handle)

    def _allocate_slowly(self, spec: BufferSpec, stream: _cuda.StreamLike | None) -> BufferEntry:
        if not isinstance(spec, BufferSpec):
            raise TypeError(f"allocate was given {spec!r}: give a BufferSpec(shape, dtype, tier)")
        store = self._store
        if stream is not None:
            wrapped: _cuda.Stream | None = known_stream(stream)
        else:  # the default stream, which goes without saying where all threads have one
            wrapped = _cuda.default_stream() if _cuda.PER_THREAD and spec.tier is Tier.DEVICE else None
        entry = self._hit(spec, wrapped)
        if entry is not None:
            return entry
        if _cuda.capturing():
            raise CaptureError(
                f"{spec} has no idle buffer, and none can be allocated while a graph is captured: call "
                f"reserve([{as_code(spec)}]) before the capture"
            )

        def serve() -> BufferEntry:
            with self._step("allocate"):
                handle, kind = store.find(spec, wrapped)
            if handle is None:
                handle, kind = store.grow(spec), "miss"
            with store.lock:
                store.lease(handle, kind, wrapped)
                return FixedEntry(handle)

        return self._ladder.climb(spec, serve, self._demote)

    def _hit(self, spec: BufferSpec, stream: _cuda.Stream | None) -> BufferEntry | None:
        """Lease an idle buffer in the order of `stream`; None if there is none."""
        # Guarded by benchmarks/pool.py: `_step` in its parts.
        store = self._store
        store.turns.refuse_mine(self, "allocate")
        try:
            with store.turns.held():
                store.turns.do_late()
                store.refuse_closed()
                if stream is not None:
                    store.turns.refuse_elsewhere(stream)
                    refuse_captured(stream)
                handle, kind = store.find(spec, stream)
                if handle is None:
                    return None
                store.lease(handle, kind, stream)
                return FixedEntry(handle)
        except Exception as error:
            refuse_foreign_capture(error, "allocate")
            raise

    def _demote(self, tier: Tier, nbytes: int) -> str | None:
        """The rung of the ladder that is the pool's own: this one has nothing to move."""
        return None
