"""Free lists: the idle blocks of a pool by capacity, and which of them may be handed to whom.

A request takes the newest block of its own capacity, then one of the next larger capacities within a bound, in the
order of the work that is queued on it. Sits above `fence`, below `store`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from .. import _cuda
from .block import Handle, line_of, same_stream
from .fence import Fences
from .spec import BufferSpec, Tier, line_key

__all__ = ["FreeList", "FreeLists"]

Line = deque[Handle]
_TIERS = len(Tier)  # which an enumeration counts in Python, each time


class FreeList:
    """The idle blocks of one capacity in one tier.

    Attributes
    ----------
    blocks : int
        Blocks of this capacity, idle or not.
    ready : deque of Handle
        Those with no work queued on them but the default stream's, newest right. A hit pops here and a plain release
        appends, both without a lock: each is one step for all threads.
    fenced : dict to deque of Handle
        Those that other streams may still use, by the stream that released them (`block.line_of`), newest right.
    """

    __slots__ = ("blocks", "fenced", "ready")

    def __init__(self) -> None:
        self.blocks = 0
        self.ready: Line = deque()
        self.fenced: dict[Any, Line] = {}

    def lines(self) -> list[Line]:
        """Return every line, the ready one first."""
        return [self.ready, *self.fenced.values()]


class FreeLists:
    """All free lists of a pool.

    Attributes
    ----------
    by_key : dict of int to FreeList
        By `BufferSpec.line` of what they serve first.
    hot : dict of int to deque of Handle
        The `ready` lines, for hits that take no lock. Always this one dictionary, empty while `serve` is off: a hit
        that finds nothing here comes by the locked way.

    Notes
    -----
    Threads: the caller holds the pool's lock, but for the ends of `ready` lines, look-ups in `hot` and `pop_larger`.
    Capture: in a thread that captures, blocks that need an event are passed over. Other threads go on.
    """

    def __init__(self, fences: Fences) -> None:
        self.by_key: dict[int, FreeList] = {}
        self.hot: dict[int, Line] = {}
        self._keys: list[int] = []  # sorted; replaced, never changed, as hits look at it without the lock
        self._fences = fences
        self._serving = True

    def __len__(self) -> int:
        return len(self.by_key)

    # -------------------------------------------------------------------------------------------------- coming, going

    def enter(self, key: int) -> FreeList:
        """Return the list of a capacity, of which there is a block more."""
        found = self.by_key.get(key)
        if found is None:
            found = self.by_key[key] = FreeList()
            self._keys = sorted(self.by_key)
            if self._serving:
                self.hot[key] = found.ready
        found.blocks += 1
        return found

    def leave(self, key: int) -> None:
        """Count a block less of a capacity, and drop its list behind the last: sizes come and go by the thousand."""
        found = self.by_key[key]
        found.blocks -= 1
        if not found.blocks:
            del self.by_key[key]
            self._keys = sorted(self.by_key)
            self.hot.pop(key, None)

    def serve(self, hot: bool) -> None:
        """Let hits be served from `hot`, or send them all by the locked way."""
        self._serving = hot
        if hot:
            self.hot.update({key: each.ready for key, each in self.by_key.items()})
        else:
            self.hot.clear()

    # --------------------------------------------------------------------------------------------------------- taking

    def _within(self, spec: BufferSpec, bound: int) -> Iterator[int]:
        """Yield the keys of the capacities that hold `spec`, below `bound` times its own, smallest first."""
        keys, beyond = self._keys, bound * (spec.line // _TIERS) * _TIERS
        lowest = line_key(spec.tier, max(1, spec.size_bytes))
        for at in range(bisect_left(keys, lowest), len(keys)):
            key = keys[at]
            if key >= beyond:
                return
            if (key - lowest) % _TIERS == 0:  # of the same tier
                yield key

    def pop_larger(self, spec: BufferSpec) -> Handle | None:
        """Pop a ready block that holds `spec`, of less than twice its capacity; takes no lock."""
        for key in self._within(spec, 2):
            line = self.hot.get(key)
            if line and (handle := _pop(line)) is not None:
                return handle
        return None

    def pop_ready(self, spec: BufferSpec) -> Handle | None:
        """Pop a ready block of the capacity of `spec`."""
        found = self.by_key.get(spec.line)
        return None if found is None else _pop(found.ready)

    def take(self, spec: BufferSpec, stream: Any, bound: int) -> Handle | None:
        """Take a block for `spec` in order for `stream` (None: the default one, or the CPU).

        `bound`: the block has less than so many times the capacity of `spec`; 1: that capacity itself.
        """
        for key in (spec.line,) if bound == 1 else self._within(spec, bound):
            found = self.by_key.get(key)
            if found is not None and (handle := self._from(found, spec.tier, stream)) is not None:
                return handle
        return None

    def _from(self, own: FreeList, tier: Tier, stream: Any) -> Handle | None:
        host = tier is not Tier.DEVICE
        if stream is None or host:
            handle = _pop(own.ready)
        else:
            handle = self._same_stream(own, stream) or self._ready(own, stream)
        if handle is None and not host and own.fenced and not _cuda.capturing():
            return self._other_stream(own, stream or self._fences.default)
        return handle

    def _same_stream(self, own: FreeList, stream: Any) -> Handle | None:
        """Take the newest block that was released on `stream` itself; only its further users need a wait."""
        line = own.fenced.get(line_of(stream))
        for _ in range(len(line or ())):
            handle: Handle = line.pop()  # type: ignore[union-attr]
            fence = handle.block.fence
            last = fence.events[-1][0]
            if last is stream or same_stream(last, stream):
                if len(fence.events) == 1:
                    handle.block.fence = None
                    return handle
                if not _cuda.capturing():
                    return self._behind(handle, stream, line)
            line.appendleft(handle)  # type: ignore[union-attr]
        return None

    def _ready(self, own: FreeList, stream: Any) -> Handle | None:
        """Take a block without queued work, or one that only the default stream may still use."""
        capturing = _cuda.capturing()
        aside: list[Handle] = []
        try:
            while (handle := _pop(own.ready)) is not None:
                aside.append(handle)
                if not handle.block.clean:
                    if capturing:
                        continue
                    self._fences.wait_for((self._fences.default,), stream)
                return aside.pop()
        finally:
            own.ready.extend(reversed(aside))
        return None

    def _other_stream(self, own: FreeList, stream: Any) -> Handle | None:
        """Take the oldest block of another stream's, the most likely to be done, and make `stream` wait for it."""
        for key, line in list(own.fenced.items()):
            if line:
                return self._behind(line.popleft(), stream, line)
            del own.fenced[key]  # streams come and go
        return None

    def _behind(self, handle: Handle, stream: Any, line: Any) -> Handle:
        """Put `stream` behind the fence of a block that was taken from `line`."""
        try:
            self._fences.wait(handle.block.fence, stream)
        except BaseException:
            line.append(handle)
            raise
        handle.block.fence = None
        return handle

    # ------------------------------------------------------------------------------------------------- looking, freeing

    def idle(self) -> list[Handle]:
        """Return all idle blocks, as of one moment: the lines are copied in one step, in which no hit can move."""
        lines = [line for each in self.by_key.values() for line in each.lines()]
        return [handle for line in list(map(list, lines)) for handle in line]

    def idle_bytes(self, tier: Tier) -> int:
        """Return the bytes of the idle blocks of a tier: O(capacities), as all blocks of a list have the same."""
        kind = line_key(tier, 0)
        sizes = [(key // len(Tier), each) for key, each in self.by_key.items() if key % len(Tier) == kind]
        return sum(nbytes * sum(map(len, each.lines())) for nbytes, each in sizes)

    def largest(self, tiers: Iterable[Tier]) -> Iterator[tuple[Handle, Line]]:
        """Take blocks of some tiers out, the largest first, the longest idle first of each capacity.

        Yields each with the line that it was in, to which it goes back if it cannot be freed.
        """
        kinds = {line_key(tier, 0) for tier in tiers}
        for key in reversed(self._keys):
            for line in self.by_key[key].lines() if key % _TIERS in kinds else ():
                while line:
                    try:
                        handle = line.popleft()
                    except IndexError:  # a hit was faster
                        break
                    yield handle, line


def _pop(line: Line) -> Handle | None:
    try:
        return line.pop()
    except IndexError:
        return None
