"""The books of a tiered pool: its movable buffers, the tier that each is in, and the copies that they keep below.

Moves nothing and allocates nothing. Every method is called with the store's lock held. Sits above `entry`, below
`traffic`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import deque
from collections.abc import Iterable, Iterator

from .. import _cuda
from ..errors import BusyError
from ..pool.block import Handle
from ..pool.spec import BufferSpec, Tier
from ..pool.stats import caller
from .entry import MovableEntry, Record
from .policies import Line, Policy
from .store import TierStore

__all__ = ["Residents"]


class Residents:
    """All movable buffers of one pool.

    Parameters
    ----------
    store : TierStore
    policy : Policy
        Says which goes first.
    """

    def __init__(self, store: TierStore, policy: Policy) -> None:
        self.policy = policy
        self._store = store
        self._keys = itertools.count(1)
        self._records: dict[int, Record] = {}
        self._gone: deque[int] = deque()  # keys of entries that died
        self._lines = {tier: Line(policy) for tier in Tier}

    def counts(self) -> dict[Tier, int]:
        """Return the number of buffers in each tier."""
        return {tier: len(line) for tier, line in self._lines.items()}

    def enlist(self, handle: Handle, spec: BufferSpec) -> MovableEntry:
        """Make the entry of a lease."""
        entry = MovableEntry(handle, spec)
        entry.record = record = Record(next(self._keys), entry, self, self._gone)
        self._records[record.key] = record
        self._lines[entry.tier].add(record.key)
        return entry

    def touch(self, entry: MovableEntry, *, write: bool) -> None:
        """Tell the policy of a use."""
        key = entry.record.key
        self.policy.touch(key, entry.nbytes, write=write)
        self._lines[entry.tier].touched(key)

    def moved(self, entry: MovableEntry, source: Tier, target: Tier) -> None:
        """Take note of a move."""
        self._lines[source].discard(entry.record.key)
        self._lines[target].add(entry.record.key)

    @contextlib.contextmanager
    def claimed(self, entries: Iterable[MovableEntry]) -> Iterator[None]:
        """Keep buffers from being moved by what arises within: pressure inside a move picks its victims here too."""
        self.sweep()
        claimed: list[Record] = []
        try:
            for entry in entries:
                entry.handle  # noqa: B018  # StaleBufferError where it was released
                entry.record.moving += 1
                claimed.append(entry.record)
            yield
        finally:
            for record in claimed:
                record.moving -= 1

    # ------------------------------------------------------------------------------------------------ what may go

    def cold(self, tier: Tier) -> Iterator[MovableEntry]:
        """Yield the buffers of a tier that may move and whose going frees memory, coldest first."""
        with contextlib.closing(self._lines[tier].coldest()) as keys:  # type: ignore[type-var]
            for key in keys:
                record = self._records.get(key)  # a finaliser may release an entry at any time, on this thread too
                entry = None if record is None else record.entry()
                if entry is not None and entry.movable and not entry.handle.block.pinned_by_graph:
                    yield entry

    def drop_copies(self, nbytes: int) -> None:
        """Give up clean copies until `nbytes` of pinned memory are on their way back."""
        for record in list(self._records.values()):
            if nbytes <= 0:
                return
            copy = record.copy
            if copy is not None and copy.block.tier is Tier.PINNED and not record.moving:
                nbytes -= copy.block.nbytes
                self.drop_copy(record)

    def drop_copy(self, record: Record) -> None:
        """Give up the copy that a buffer keeps below, if any."""
        copy, record.copy = record.copy, None
        if copy is not None:
            self._store.retire(copy)

    # ------------------------------------------------------------------------------------------------ leases that end

    def release(self, entry: MovableEntry, stream: _cuda.Stream | None) -> str:
        """End a lease, for its entry; returns where, in debug mode. Takes the lock by itself."""
        store = self._store
        if store.turns.mine():
            store.turns.later(functools.partial(self._end, entry, stream))
        elif stream is None and entry.handle.block.plain and entry.record.copy is None:
            store.turns.run(self._end, entry, None)  # the driver is asked for nothing
        else:
            with store.turns.step("release"):
                self._end(entry, stream)
        return caller() if store.watch.debug else ""

    def _end(self, entry: MovableEntry, stream: _cuda.Stream | None) -> None:
        handle = entry.give_up()
        try:
            self._store.release(handle, stream)
        except Exception:
            entry.take_back(handle)
            raise
        self._forget(entry.record)

    def sweep(self) -> None:
        """See to the buffers that were lost."""
        while self._gone:
            record = self._records.get(self._gone.popleft())
            if record is not None:
                self._forget(record)

    def _forget(self, record: Record) -> None:
        if self._records.pop(record.key, None) is None:
            return
        self.policy.forget(record.key)
        for line in self._lines.values():
            line.discard(record.key)
        self.drop_copy(record)

    def close(self) -> None:
        """Give up all copies."""
        for record in list(self._records.values()):
            self.drop_copy(record)

    def clear(self) -> None:
        """Forget everything: the memory is a parent process's, or gone."""
        self._records.clear()
        self._gone.clear()
        self._lines = {tier: Line(self.policy) for tier in Tier}

    def check(self) -> None:
        """Assert that the books are those of the store."""
        store = self._store
        seen: set[int] = set()
        for record in self._records.values():
            entry = record.entry()
            held = [] if record.copy is None else [record.copy]
            if entry is not None and entry.alive:
                assert entry.record is record, f"{entry!r} has another entry's record"
                assert record.copy is None or entry.tier is Tier.DEVICE, f"{entry!r} has a copy below {entry.tier}"
                assert record.key in self._lines[entry.tier], f"{entry!r} is noted in another tier"
                held.append(entry.handle)
            assert record.moving == 0, f"{entry!r} is moving between steps"
            for handle in held:
                assert handle.block in store.blocks, f"{handle.block} of {entry!r} is not the pool's"
                assert id(handle.block) not in seen, f"{handle.block} is held twice"
                seen.add(id(handle.block))
        assert sum(self.counts().values()) == len(self._records), f"{self.counts()} of {len(self._records)}"
        for block in (*(handle.block for handle in store.idle()), *store.deferred.all()):
            assert id(block) not in seen, f"{block} is idle and held"


def refuse_used(entry: MovableEntry) -> None:
    """Raise BusyError for a buffer that a use keeps where it is."""
    if entry.record.users:
        raise BusyError(f"{entry!r} cannot move: a use of it is open; leave its with block first")


def refuse_bound(entry: MovableEntry) -> None:
    """Raise BusyError for a buffer that a live graph keeps where it is."""
    if entry.handle.block.pinned_by_graph:
        raise BusyError(f"{entry!r} cannot move: a live graph uses it where it is; close the graph first")
