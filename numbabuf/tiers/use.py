"""Use: what `HierarchicalBufferPool.use` returns; buffers stay where they are while it is open.

Sits above `traffic`, below `pool`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Any

from .. import _cuda
from ..errors import BusyError
from ..pool.fence import Fence
from ..pool.spec import BufferState, Tier
from .entry import MovableEntry
from .residents import Residents
from .store import TierStore
from .traffic import Traffic

__all__ = ["Use"]


class Use(contextlib.AbstractContextManager[list[Any]]):
    """One use of buffers, for work on one stream. Made by `HierarchicalBufferPool.use`; entered once."""

    # The hot path of the tiers: a class, as a generator costs 2 us more.
    __slots__ = (
        "_captured", "_entries", "_in_place", "_residents", "_seen", "_store", "_stream", "_thread", "_traffic",
        "_write",
    )  # fmt: skip

    def __init__(
        self, traffic: Traffic, residents: Residents, store: TierStore, entries: Sequence[MovableEntry],
        stream: _cuda.Stream, *, write: bool, in_place: bool,
    ) -> None:  # fmt: skip
        self._traffic, self._residents, self._store = traffic, residents, store
        self._entries, self._stream = entries, stream
        self._write, self._in_place = write, in_place
        self._captured = False
        self._thread = 0  # that entered it
        self._seen: list[tuple[int, tuple[_cuda.Stream, ...]]] = []  # of each buffer, as it began

    def __enter__(self) -> list[Any]:
        if self._thread:
            raise BusyError("a use was entered twice: call pool.use() for each")
        with self._store.turns.step("use"):
            self._store.refuse_closed()
            self._begin()
        return [entry.handle.block.device_view() for entry in self._entries]

    def _begin(self) -> None:
        chosen, residents, traffic = self._entries, self._residents, self._traffic
        self._captured = _cuda.capturing()
        residents.sweep()
        away = any(entry.handle.block.tier is not Tier.DEVICE for entry in chosen)  # or StaleBufferError
        for entry in chosen:
            residents.touch(entry, write=self._write)
        refused = 0
        if away:
            with residents.claimed(chosen):
                refused = traffic.bring_up(chosen, insist=not self._in_place, judge=self._in_place)
        if not self._captured:
            for entry in chosen:
                traffic.order_after(entry, self._stream)
        now = time.monotonic()
        self._thread = threading.get_ident()
        traffic.counts["refused"] += refused
        for entry in chosen:
            record = entry.record
            if self._write and record.copy is not None:
                residents.drop_copy(record)
            traffic.counts["in_place"] += entry.tier is not Tier.DEVICE
            entry.used(BufferState.IN_USE, now)
            record.users.append(self._thread)
        self._seen = [(entry.record.changes, entry.handle.block.users) for entry in chosen]

    def __exit__(self, *exc: object) -> None:
        store = self._store
        if store.life is not None and store.life.ended:
            self._leave()
        elif store.turns.mine():  # ended by a finaliser
            store.turns.later(self._end)
        else:
            with store.turns.there():
                store.turns.run(self._end)

    def _end(self) -> None:
        try:
            if not self._captured or not _cuda.capturing():
                self._put_fence()
        finally:
            self._leave()

    def _leave(self) -> None:
        for entry in self._entries:
            entry.record.users.remove(self._thread)

    def _put_fence(self) -> None:
        """Put one fence behind the work, and behind that of others that ended or were named meanwhile."""
        # Two streams, one buffer, and a move after both uses:
        #   use on A: begins; use on B: begins, ends, and puts its fence
        #   use on A: ends, and puts its own fence, which the buffer's next mover waits for instead
        # Were A not made to wait for B first, the move would run beside B's work.
        fence: Fence | None = None
        seen, self._seen = self._seen, []
        try:
            if not _cuda.capturing():  # a capture begun within the use takes no event
                for entry, (changes, users) in zip(self._entries, seen, strict=True):
                    if entry.record.changes != changes or entry.handle.block.users is not users:
                        self._traffic.order_after(entry, self._stream)
                fence = self._store.fences.behind((self._stream,))
        except Exception:  # no fence: the next to come asks the block for its users, and is put behind them
            fence = None
        for entry in self._entries:
            block = entry.handle.block
            entry.record.behind(fence)
            if fence is None:
                block.add_user(self._stream)
            else:
                block.users, block.plain = (self._stream,), False
