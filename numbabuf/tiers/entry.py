"""TieredEntry: a leased buffer whose contents may move between tiers, and what its pool remembers of it.

Moves nothing: it says where the contents are, and sees to it that they stay there once somebody holds their address.
Sits above `moves`, below `hierarchy`.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import deque
from typing import Any

from .. import _cuda
from ..errors import BusyError, ClosedError
from ..pool.block import Ticket
from ..pool.entry import BufferEntry
from ..pool.spec import BufferSpec, Tier
from .mover import Mark

__all__ = ["Record", "TieredEntry", "refuse_ended"]


def refuse_ended(life: _cuda.Lifetime | None) -> None:
    """Raise ClosedError if the context with that life was closed or reset."""
    if life is not None and life.ended:
        raise ClosedError(
            "this pool's memory went when its context was closed (cuda.close(), or a reset of the context or device), "
            "and its entries with it: make a new pool"
        )


class Record:
    """What the pool knows of a buffer, but for its ticket: the entry alone holds that, so that its loss is noticed.

    Attributes
    ----------
    key : int
        What the policy knows it by.
    entry : weakref
        When the entry dies, `key` is left in the pool's deque.
    threads : list of int
        The thread of each open lease and each move under way; while there are any, nobody else may move or release the
        buffer.
    fixed : bool
        The caller has taken its address outside a lease.
    copy : Ticket or None
        The same contents further down; only while the buffer is in device memory.
    home : Ticket or None
        Memory under a live graph that the buffer was demoted from and must come back to.
    life : Lifetime or None
        That of the context that the buffer's memory is in.
    leases : int
        Number of open leases among `threads`.
    mark : Mark or None
        After which all queued work on the buffer is done. None: after the work of its block's users.
    """

    __slots__ = ("copy", "entry", "fixed", "home", "key", "leases", "life", "mark", "threads")

    def __init__(self, key: int, entry: TieredEntry, gone: deque[int], life: _cuda.Lifetime | None = None) -> None:
        self.key = key
        self.life = life
        self.entry = weakref.ref(entry, lambda _, append=gone.append: append(key))  # type: ignore[misc]
        self.threads: list[int] = []
        self.leases = 0
        self.fixed = False
        self.copy: Ticket | None = None
        self.home: Ticket | None = None
        self.mark: Mark | None = None

    @property
    def uses(self) -> int:
        """Number of open leases and moves under way."""
        return len(self.threads)


class TieredEntry(BufferEntry):
    """A leased buffer whose contents may move between tiers. Made by `HierarchicalBufferPool.allocate`.

    Within ``with pool.use([entry], stream=...)`` it stays where it is. Outside, which is also where all other threads
    are, the pool may move it, and whoever takes its `array`, `address`, `device_array` or ``__cuda_array_interface__``
    there, or names a stream of their own for it, fixes it: it is brought to the tier of its spec (BusyError where
    another thread's use keeps it from that), the host waits for the moves of it, and there it stays, until it is
    released or `HierarchicalBufferPool.unfix` is told that the address is not used any more. So a program that knows
    nothing of tiers finds addresses as constant as in any other pool, and orders its own work as there.

    Attributes
    ----------
    spec : BufferSpec
        As it was asked for. Its tier is the one preferred, `tier` the one the contents are in.
    """

    __slots__ = ("_record",)

    _record: Record

    def __init__(self, ticket: Ticket, spec: BufferSpec) -> None:
        super().__init__(ticket)
        self.spec = spec

    @property
    def array(self) -> Any:
        """The buffer where it is now. Outside a lease this fixes it there."""
        self._fix()
        return super().array

    def _fix(self) -> None:
        block = self._block("used")
        pool = block.pool()
        refuse_ended(self._record.life)
        if pool is not None and not self._record.fixed:
            pool._fix(self)

    @property
    def tier(self) -> Tier:
        """The tier the contents are in; after the release, that of the spec."""
        held = self._held
        return held[0].block.tier if held else self.spec.tier

    @property
    def movable(self) -> bool:
        """Whether the pool may move the buffer: no lease is open, and its address was not taken."""
        return bool(self._held) and not self._record.fixed and not self._record.uses

    @property
    def address(self) -> int:
        """Address of the first byte, as kernels see it. Outside a lease this fixes the buffer."""
        self._fix()
        return super().address

    @property
    def device_array(self) -> Any:
        """The buffer as a kernel argument, on any stream. Outside a lease this fixes the buffer."""
        self._fix()
        return super().device_array

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3 of the interface. Outside a lease this fixes the buffer."""
        self._fix()
        return super().__cuda_array_interface__

    def mark_in_use(self, *, stream: _cuda.StreamLike | None = None) -> None:
        """Say that work queued on `stream` uses the buffer. Outside a lease this fixes it."""
        self._fix()
        super().mark_in_use(stream=stream)

    def record_stream(self, stream: _cuda.StreamLike) -> None:
        """Name a further stream whose queued work uses the buffer. Outside a lease this fixes it."""
        self._fix()
        super().record_stream(stream)
        self._record.mark = None  # what is queued on that stream is behind no mark: ask the block for its users

    def __repr__(self) -> str:
        where = f" in {self.tier.value}" if self._held else ""
        return f"<TieredEntry {self.spec} {self.state.value}{where}>"

    def release(self, *, stream: _cuda.StreamLike | None = None) -> None:
        """End the lease, as in any pool; BusyError while a `use` of the buffer is open.

        Called in the middle of another call on the pool in the same thread, as a finaliser may, it ends the lease when
        that call returns.
        """
        pool, life = self._block("released").pool(), self._record.life
        self._refuse_leased()
        if life is not None and life.ended:  # the memory is gone, and the books of the pool with it
            self._held.clear()
            return
        if pool is None:
            self._end(None, None)
            return
        wrapped = None if stream is None else _cuda.as_stream(stream)
        record = self._record
        if pool._turns.mine():
            pool._turns.later(functools.partial(self._end_late, pool, wrapped))
            return
        if stream is None and self._held[0].block.plain and record.copy is None and record.home is None:
            pool._turns.run(self._end, pool, None)  # hot path: the driver is asked for nothing
            return
        with pool._step("release"):
            self._end(pool, wrapped)

    def _refuse_leased(self) -> None:
        if self._record.leases:
            raise BusyError(f"{self.spec} was released while a use of it is open: leave its with block first")

    def _end_late(self, pool: Any, stream: _cuda.Stream | None) -> None:
        with contextlib.suppress(Exception):  # released twice meanwhile, or the driver fails: then it counts as lost
            self._end(pool, stream)

    def _end(self, pool: Any, stream: _cuda.Stream | None) -> None:
        self._refuse_leased()
        super().release(stream=stream)
        if pool is not None:
            pool._forget(self._record)
