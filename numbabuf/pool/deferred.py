"""Blocks that were given back, or lost, and may not be handed out yet: behind a fence, a capture or a live graph.

Knows when such a block is free, and not where it goes then: the store does. Sits above `fence`, below `store`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from .. import _cuda
from .block import Alarm, Block, Handle, line_of
from .spec import BufferSpec, size_class

__all__ = ["Deferred", "bound"]


def bound(block: Block, *, asked: bool = False) -> bool:
    """Return whether a graph or an open capture, of whatever thread, may still use a released block.

    `asked`: its users are known to be captured by no thread but this one.
    """
    if block.pins and block.pinned_by_graph:
        return True
    if asked and block.captured is None and not _cuda.captures:
        return False
    users = block.users if block.captured is None else (*block.users, block.captured)
    if not users:
        return False
    return any(_cuda.is_capturing(stream) for stream in users)


class Deferred:
    """The deferred blocks of one pool.

    Attributes
    ----------
    handles : deque of Handle
        Those that were released, the oldest left.
    lost : deque of Alarm
        Those whose handles died, and that are not reported yet.

    Notes
    -----
    Threads: the caller holds the pool's lock; `lost.append` alone is called without, by the collector.
    """

    def __init__(self) -> None:
        self.handles: deque[Handle] = deque()
        self.lost: deque[Alarm] = deque()
        self.add = self.handles.append

    def __bool__(self) -> bool:
        return bool(self.handles or self.lost)

    def take_captured(self, spec: BufferSpec, stream: _cuda.Stream | None, captured: Any) -> Handle | None:
        """Take what was leased and released in captures of one stream, for another lease in such a capture.

        The graphs of one stream never run at once, so they share their temporaries; no other lease gets one while any
        of those graphs lives.
        """
        if stream is not None and stream is not captured:
            return None
        for handle in self.handles:
            block = handle.block
            if (
                block.captured is captured and block.tier is spec.tier
                and spec.size_bytes <= block.nbytes < 2 * size_class(max(1, spec.size_bytes))
                and all(user is captured for user in block.users)
            ):  # fmt: skip
                self.handles.remove(handle)
                block.users = ()
                return handle
        return None

    def free(self) -> Iterator[Handle]:
        """Take out, one after the other, what nothing uses any more; the caller puts each where it belongs."""
        busy: set[Any] = set()  # streams whose work comes to its fences in order, and is not there yet
        for _ in range(len(self.handles)):
            handle = self.handles.popleft()
            try:
                free = self._is_free(handle.block, busy)
            except BaseException:
                self.add(handle)
                raise
            if free:
                yield handle
            else:
                self.add(handle)

    @staticmethod
    def _is_free(block: Block, busy: set[Any]) -> bool:
        if block.fence is None:
            return not bound(block)
        line = line_of(block.fence.last)
        if line in busy or not block.fence.done():
            busy.add(line)
            return False
        block.clean_at, block.fence = block.generation, None
        return True

    def synchronize(self) -> None:
        """Block the host until every fence is reached."""
        for handle in self.handles:
            if handle.block.fence is not None:
                handle.block.fence.synchronize()

    def pending(self) -> list[Block]:
        """Return what is waiting for the work on it."""
        return [handle.block for handle in self.handles if handle.block.fence is not None]

    def all(self) -> list[Block]:
        """Return all that is released or lost and not idle yet."""
        return [handle.block for handle in self.handles] + [alarm.block for alarm in self.lost]
