"""MovableEntry: a leased buffer whose contents may move between tiers, and what its pool remembers of it.

Moves nothing: it says where the contents are, and gives an address only while they stay there. Sits above `mover`.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

from .. import _cuda
from ..errors import BusyError
from ..pool.block import Block, Handle
from ..pool.entry import BufferEntry
from ..pool.fence import Fence
from ..pool.spec import BufferSpec, Tier

if TYPE_CHECKING:
    from .residents import Residents

__all__ = ["MovableEntry", "Record"]


class Record:
    """What the pool knows of a buffer, but for its handle: the entry alone holds that, so that its loss is noticed.

    Attributes
    ----------
    key : int
        What the policy knows it by.
    entry : weakref
        When the entry dies, `key` is left in the pool's deque.
    books : weakref of Residents
        Where the record is kept.
    users : list of int
        The thread of each open use; while there are any, the buffer is neither moved nor released.
    moving : int
        Steps under way that may move the buffer; while there are any, no other step of their thread moves it.
    copy : Handle or None
        The same contents further down; only while the buffer is in device memory.
    fence : Fence or None
        Behind all queued work on the buffer. None: ask the block for its users.
    changes : int
        Times that `fence` was set.
    """

    __slots__ = ("__weakref__", "books", "changes", "copy", "entry", "key", "fence", "moving", "users")

    def __init__(self, key: int, entry: MovableEntry, books: Residents, gone: deque[int]) -> None:
        self.key = key
        self.entry = weakref.ref(entry, lambda _, append=gone.append: append(key))  # type: ignore[misc]
        self.books = weakref.ref(books)
        self.users: list[int] = []
        self.moving = 0
        self.copy: Handle | None = None
        self.fence: Fence | None = None
        self.changes = 0

    def behind(self, fence: Fence | None) -> None:
        """Take note of the fence behind all queued work on the buffer."""
        self.fence = fence
        self.changes += 1


class MovableEntry(BufferEntry):
    """A leased buffer that its pool may move. Made by ``HierarchicalBufferPool.allocate(spec, movable=True)``.

    It has an address only inside ``with pool.use([entry]) as (array,):``, in the thread that entered it: there it stays
    where it is. Outside, reading `array`, `address`, `device_array`, `__cuda_array_interface__` or DLPack, or naming a
    stream, raises BusyError.

    Attributes
    ----------
    spec : BufferSpec
        As it was asked for. Its tier is the one preferred, `tier` the one the contents are in.
    """

    __slots__ = ("_record",)

    _record: Record

    def __init__(self, handle: Handle, spec: BufferSpec) -> None:
        super().__init__(handle)
        self.spec = spec

    @property
    def record(self) -> Record:
        """What the pool knows of the buffer; not for users."""
        return self._record

    @record.setter
    def record(self, record: Record) -> None:
        self._record = record

    @property
    def handle(self) -> Handle:
        """The right to the memory that the contents are in, which a move exchanges; not for users."""
        try:
            return self._held[0]
        except IndexError:
            self._alive("used")  # which says so
            raise

    @handle.setter
    def handle(self, handle: Handle) -> None:
        self._held[0] = handle

    @property
    def alive(self) -> bool:
        """Whether the lease has not ended."""
        return bool(self._held)

    @property
    def tier(self) -> Tier:
        """The tier the contents are in; after the release, that of the spec."""
        held = self._held
        return held[0].block.tier if held else self.spec.tier

    @property
    def movable(self) -> bool:
        """Whether the pool may move the buffer: no use of it is open."""
        return bool(self._held) and not self._record.users and not self._record.moving

    @property
    def generation(self) -> int:
        """Number of leases that the memory it is in has had, this one included."""
        return self._alive("used").generation

    def record_stream(self, stream: _cuda.StreamLike) -> None:
        """Name a further stream whose queued work uses the buffer, within a use of it."""
        super().record_stream(stream)
        self._record.behind(None)  # what will be queued on that stream is behind no fence yet

    def used(self, state: Any, now: float) -> None:
        """Take note of a use that begins; not for users."""
        self._state = state
        self.last_used = now
        self.use_count += 1

    def _alive(self, what: str) -> Block:
        return super()._block(what)

    def _block(self, what: str) -> Block:
        block = super()._block(what)
        if what == "used" and threading.get_ident() not in self._record.users:
            raise BusyError(
                f"{self.spec} may move, and has an address only inside a use of it in this thread: read it within "
                "`with pool.use([entry]) as (array,):`, or allocate the buffer without movable=True"
            )
        return block

    def __enter__(self) -> MovableEntry:
        self._alive("used")
        return self

    def __repr__(self) -> str:
        where = f" in {self.tier.value}" if self._held else ""
        return f"<MovableEntry {self.spec} {self.state.value}{where}>"

    def release(self, *, stream: _cuda.StreamLike | None = None) -> None:
        """End the lease, as in any pool; BusyError while a `use` of the buffer is open.

        Called in the middle of another call on the pool in the same thread, as a finaliser may, it ends the lease when
        that call returns.
        """
        block = self._alive("released")
        self.refuse_used()
        books = self._record.books()
        if block.memory.life.ended:  # the memory is gone, and the books of the pool with it
            self._held.clear()
        elif books is None or block.store() is None:
            super().release(stream=stream)
        else:
            self._site = books.release(self, None if stream is None else _cuda.as_stream(stream))

    def refuse_used(self) -> None:
        """Raise BusyError if a use of the buffer is open."""
        if self._record.users:
            raise BusyError(f"{self.spec} was released while a use of it is open: leave its with block first")

    def give_up(self) -> Handle:
        """End the lease and return what it held; StaleBufferError if it has ended before. Not for users."""
        self.refuse_used()
        try:
            return self._held.pop()
        except IndexError:
            self._alive("released")
            raise

    def take_back(self, handle: Handle) -> None:
        """Go on with a lease whose end failed; not for users."""
        self._held.append(handle)
