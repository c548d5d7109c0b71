"""The memory of one pool: taken from the driver within limits, leased, deferred, idle, and given back.

What both pools are made of. It hands out handles, not leases, and makes no room by itself: a request that does not fit
raises, and `oom` decides what to free. Sits above `freelists`, below `oom` and `pool`.
"""

from __future__ import annotations

import functools
import logging
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any

from .. import _cuda
from ..errors import CaptureError, ClosedError
from .block import Alarm, Block, Handle, line_of, refuse_captured
from .budget import Ledger, SharedLedger, same_memory
from .deferred import Deferred, bound
from .fence import Fence, Fences
from .freelists import FreeLists
from .spec import BufferSpec, Tier, size_class
from .stats import Watch, caller
from .turns import Turns, refuse_foreign_capture

__all__ = ["SimpleStore", "Store", "known_stream", "refuse_capture"]

_log = logging.getLogger("numbabuf")


class Store(ABC):
    """All blocks of one pool and what becomes of them. Abstract: what growth is subject to is for its kinds to say.

    Parameters
    ----------
    ledger
        The account, with the limits.
    owner
        Returns the pool, or None when that is gone; entries find their pool by it.
    events
        Capacity of the event ring, 0 for none.

    Attributes
    ----------
    turns : Turns
        The guard of the pool: `step` holds it, and refuses what runs in the middle of its holder.
    lock : threading.RLock
        That of `turns`; guards everything here but the ends of the free lists' `ready` lines.
    closed : str
        Why there are no leases any more; empty while there are.
    blocks : dict of Block to Alarm
        All there are.
    life : Lifetime or None
        That of the context they are in.
    counts : dict of str to int
        Of `stats.PoolStats`, what is counted here.

    Notes
    -----
    A block is in one place at a time: its handle is with a leaseholder, on a free list, or deferred: released, and not
    to be handed out before a fence is reached, a capture has ended or a graph is closed. Or its handle died, and its
    alarm is among the lost.
    Threads: a method takes the lock by itself, but where it says "Lock held" its caller has it. Nothing here is undone
    for an interrupt; a handle that one loses is reclaimed as lost.
    """

    def __init__(self, ledger: Ledger, owner: Callable[[], Any], *, events: int = 0) -> None:
        self.closed = ""
        self.watch = Watch(events)
        self.owner = owner
        self.life: _cuda.Lifetime | None = None
        self._begin(ledger)

    def _begin(self, ledger: Ledger) -> None:
        """Start without any memory."""
        self.turns = Turns(self.owner)
        self.lock = self.turns.lock
        self.ledger = ledger
        self.fences = Fences()
        self.lists = FreeLists(self.fences)
        self.blocks: dict[Block, Alarm] = {}
        self.counts = dict.fromkeys(("misses", "lost", "freed"), 0)
        self.past = dict.fromkeys(("leases", "bytes", "recasts"), 0)  # of blocks that were freed
        self.peak_count = 0
        self.deferred = Deferred()
        self.set_hot()

    # ---------------------------------------------------------------------------------------------------- out and back

    def find(self, spec: BufferSpec, stream: Any, bound: int = 2) -> tuple[Handle | None, str]:
        """Take an idle block that serves `spec` on `stream`, and say how it was found. Lock held.

        `bound`: a larger block has less than so many times the capacity of `spec`.
        """
        here = _cuda.open_capture()
        handle = None if here is None else self.deferred.take_captured(spec, stream, here.stream)
        if handle is None:
            handle = self.lists.take(spec, stream, 1)
        if handle is None:
            self.reap()
            handle = self.lists.take(spec, stream, bound)
        if handle is None:
            return None, "miss"
        if handle.block.spec is spec or handle.block.spec == spec:
            return handle, "exact_hit"
        try:
            handle.block.become(spec)
        except BaseException:
            handle.block.users = () if stream is None else (stream,)
            self.deferred.add(handle)
            raise
        return handle, "class_hit"

    def lease(self, handle: Handle, kind: str, stream: _cuda.Stream | None) -> None:
        """Begin the lease of a buffer in hand, for work on `stream`. Lock held."""
        block = handle.block
        block.generation += 1
        here = _cuda.open_capture()
        block.captured = None if here is None else here.stream
        if here is not None:
            block.plain = False  # its release must find out whether it is in the capture
            if stream is None and block.tier is Tier.DEVICE:
                stream = here.stream  # nothing can be launched on another there
        if stream is not None:
            block.users = (stream,)
            block.plain = False
        if kind == "miss":
            self.counts["misses"] += 1
        elif kind == "class_hit":
            block.recasts += 1
        if not self._hot:
            block.plain = False
            self.watch.tell(kind, block)

    def release(self, handle: Handle, stream: Any) -> None:
        """End a lease, whose last work is on `stream`; on an error it goes on as before."""
        block = handle.block
        with self.turns.held():
            self.turns.do_late()
            users = block.users
            if stream is not None:
                self.turns.refuse_elsewhere(stream)
                if users != (stream,):
                    block.add_user(stream)
            try:
                for user in block.users:  # asked once: `put_back` takes it for known
                    if user is stream or not _cuda.captures or not _captured_by_us(user):
                        refuse_captured(user)
                self.put_back(handle, asked=True)
            except BaseException:
                block.users = users
                raise
            if not self._hot:
                self.watch.tell("release", block)

    def take_back(self, handle: Handle, stream: _cuda.StreamLike | None) -> str:
        """End a lease that is not plain, for its entry; return where, in debug mode."""
        wrapped = None if stream is None else known_stream(stream)
        # One thread, a finaliser in the middle of its pool's close:
        #   close: waits for one released buffer after the other
        #   collector: runs a finaliser, which releases an entry
        #   release: would add to what the close goes through. It is put off to the end of the close.
        if self.turns.mine():
            self.turns.later(functools.partial(self.retire, handle, lease=True, stream=wrapped))
        else:
            self.release(handle, wrapped)
        return caller() if self.watch.debug else ""

    def look_again(self) -> None:
        """A plain release may have met with the close of the pool, and then its block is idle in a closed pool."""
        self.turns.later(self.reap)
        if not self.turns.mine():
            with self.turns.held():
                self.turns.do_late()

    def retire(self, handle: Handle, *, lease: bool = False, stream: _cuda.Stream | None = None) -> None:
        """Give up memory without fail: what takes no fence now is tried again later. Lock held.

        Parameters
        ----------
        lease
            Whether it was a user's, not what a move took.
        stream
            A further user.
        """
        block = handle.block
        block.plain = False
        with self.turns.there():
            if stream is not None:
                block.add_user(stream)
            try:
                self.put_back(handle)
            except Exception:
                self.deferred.add(handle)
        if not self._hot:
            self.watch.tell("release", block, lease=lease)

    def put_back(self, handle: Handle, *, asked: bool = False) -> None:
        """Put a released block where its users and the captures allow; on an error it is nowhere. Lock held."""
        block = handle.block
        here = _cuda.open_capture()
        held = here is not None or bound(block, asked=asked)
        if here is None or block.captured is not here.stream:
            block.captured = None
        if held:
            self.deferred.add(handle)
            return
        fence = self._fence(block)
        if fence is not None and self.closed:
            fence.synchronize()  # no later call would look whether it is done
            fence = None
        block.users, block.fence, block.plain = (), fence, self._hot
        if fence is None:
            self.go_home(handle)
        elif block.tier is not Tier.DEVICE:  # the CPU writes it next, and no event can make that wait
            self.deferred.add(handle)
        else:
            self.lists.by_key[block.line].fenced.setdefault(line_of(fence.last), deque()).append(handle)

    def _fence(self, block: Block) -> Fence | None:
        """Return a fence behind the users of a released block, None if it needs none.

        The default stream alone gets none: that work is fenced when another stream takes the block.
        """
        users = block.users
        # The last is looked at by itself: usually there is one, and it has a handle.
        if not users or (
            block.tier is Tier.DEVICE and users[-1].handle == 0 and all(user.handle == 0 for user in users)
        ):
            return None
        fence = self.fences.behind(users)
        if fence is None:
            block.clean_at = block.generation
        return fence

    def go_home(self, handle: Handle) -> None:
        """Put a block that needs no fence on its free list, or free it if the pool is closed. Lock held."""
        if self.closed:
            self.free(handle)
            self.fences.spare.clear()  # as in `close`
        else:
            handle.block.home(handle)

    def reap(self) -> bool:
        """Bring home what was lost or deferred and is free by now; whether anything was. Lock held.

        In a closed pool, home is the driver.
        """
        if _cuda.capturing() or not (self.deferred or self.closed):
            return False
        with self.turns.there():
            moved = self._reclaim()
            for handle in self.deferred.free():
                try:
                    self.put_back(handle)
                except BaseException:
                    self.deferred.add(handle)
                    raise
                moved = True
            if self.closed:  # a plain release takes no lock, and may have ended behind the close
                self.free_idle(self.ledger.total, tuple(Tier))
            return moved

    def _reclaim(self) -> bool:
        """Take back the blocks whose handles died, and report each."""
        found = False
        while self.deferred.lost:
            block = self.deferred.lost.popleft().block
            self.deferred.add(self._issue(block))  # first: the log runs code of users; `reap` puts it back
            found = True
            self.counts["lost"] += 1
            _log.warning(
                "%s was dropped without release%s; it was reclaimed. Release each entry, or use it in a with statement",
                block.spec, f" (allocated at {block.site})" if block.site else "",
            )  # fmt: skip
            self.tell("lost", block)
        return found

    def finish_pending(self) -> None:
        """Wait for the work on released memory that only the end of that work brings home, and bring it home."""
        with self.turns.held():
            self.deferred.synchronize()
            self.reap()

    # ------------------------------------------------------------------------------------------- the driver and back

    @abstractmethod
    def grow(self, spec: BufferSpec) -> Handle:
        """Take one block from the driver: reserved before the call, and given back if it fails.

        Raises
        ------
        ClosedError, BackendError, TierFullError
            The pool is closed; another device is current than that of its memory; the block does not fit the limit.
        Exception
            What the driver says.
        """
        exact = max(1, spec.size_bytes)
        nbytes = size_class(exact)
        with self.lock:
            self.refuse_closed()
            self.turns.device = _cuda.one_device(self.turns.device, self.owner())
            self.life = _cuda.lifetime()
            self.life.holders.add(self)
            room = self.ledger.room(spec.tier)
            if room is not None and exact <= room < nbytes:
                nbytes = exact  # rounding is not worth a refusal
            self.ledger.promise(spec.tier, nbytes)
        try:
            block = Block(spec, nbytes)
        except BaseException as error:
            with self.lock:
                self.ledger.withdraw(spec.tier, nbytes)
            refuse_foreign_capture(error, f"a request for {spec}")
            raise
        with self.lock:
            self.ledger.keep(spec.tier, nbytes)
            handle = self._issue(block)
            self.peak_count = max(self.peak_count, len(self.blocks))
            block.store = weakref.ref(self)
            block.home = self.lists.enter(block.line).ready.append
            self.tell("grow", block)
            return handle

    def grow_or_trim(self, spec: BufferSpec) -> Handle | None:
        """Grow; where there is no room, free idle memory and try again. None where there is no room even so.

        Idle memory is worth less than what is asked for.
        """
        for again in (True, False):
            try:
                return self.grow(spec)
            # The error ends here. One that is kept in a local of a frame that it passed through makes a cycle,
            # error -> traceback -> frame, and the memory of freed blocks then lives until the collector runs.
            except Exception as error:
                if not _cuda.is_out_of_memory(error):
                    raise
            if again:
                self.make_room(spec.tier, max(1, spec.size_bytes))
                self.turns.flush()
        return None

    def reserve(self, specs: list[BufferSpec]) -> list[BufferSpec]:
        """Have an idle buffer for each of `specs`, free for any stream; return those that do not fit.

        If there are any, or on an error, what was taken from the driver for this is freed again.
        """
        held: list[Handle] = []
        made: list[Handle] = []
        whole = False
        try:
            with self.lock:
                self.reap()
                missing = [spec for spec in specs if not _add(held, self.lists.pop_ready(spec))]
            with self.turns.there():
                self.fences.clean([handle.block for handle in held])
            refused = [spec for spec in missing if not _add(made, self.grow_or_trim(spec))]
            whole = not refused
        finally:
            with self.turns.held():
                for handle in held + made * whole:
                    self.go_home(handle)
                for handle in made * (not whole):
                    self.free(handle)
        return refused

    def make_room(self, tier: Tier, nbytes: int) -> int:
        """Free idle memory to make room in a tier: what its limit lacks, or all there if it is the driver that is full.

        Returns the bytes freed.
        """
        with self.lock:
            room = self.ledger.room(tier)
            if room is not None and room < nbytes:
                freed = self.free_idle(nbytes - room, self.ledger.sharing(tier))
            else:
                freed = self.free_idle(self.ledger.total, same_memory(tier))
        if freed:
            self.turns.flush()
        return freed

    def free_idle(self, nbytes: int, tiers: tuple[Tier, ...]) -> int:
        """Free idle blocks until `nbytes` are freed or none is left. Lock held; no capture is open."""
        with self.turns.there():
            freed, synchronised = 0, False
            if self.blocks:
                _cuda.require()
                # Asked before anything is given up: where another library captures in this thread, the driver refuses
                # this, and it would refuse the free as well, when Numba has forgotten the address already.
                self.fences.default.query()
            idle = self.lists.largest(tiers)
            while freed < nbytes and (found := next(idle, None)) is not None:
                handle, line = found
                block = handle.block
                try:
                    if block.fence is not None:
                        block.fence.synchronize()
                    elif block.tier is Tier.DEVICE and not synchronised:
                        self.fences.default.synchronize()
                        synchronised = True
                except BaseException:
                    line.appendleft(handle)
                    raise
                freed += block.nbytes
                self.free(handle)
            return freed

    def free(self, handle: Handle) -> None:
        """Give a block back to the driver. Lock held."""
        block = handle.block
        _cuda.require()  # Numba frees in the thread that drops the last reference
        block.fence = None
        del self.blocks[block]
        self.ledger.give_back(block.tier, block.nbytes)
        self.past["leases"] += block.generation
        self.past["bytes"] += block.generation * block.nbytes
        self.counts["freed"] += 1
        self.past["recasts"] += block.recasts
        self.lists.leave(block.line)
        self.tell("free", block)

    def _issue(self, block: Block) -> Handle:
        """Make the one handle of a block, and see to it that its loss is noticed."""
        handle = Handle(block)
        self.blocks[block] = Alarm.watch(handle, self.deferred.lost.append)
        return handle

    # ------------------------------------------------------------------------------------------- open, watched, closed

    def set_hot(self) -> None:
        """Send every lease by the locked way while a scope watches or the pool is closed, else let hits go past it."""
        with self.lock:
            # Where each thread has a default stream of its own, a lease without a stream is on that: never plain.
            self._hot = not self.watch.active and not self.closed and not _cuda.PER_THREAD
            self.lists.serve(self._hot)
            if not self._hot:
                for block in list(self.blocks):
                    block.plain = False
            # else: a block becomes plain at its next release, which looks at its users and its graphs

    def tell(self, kind: str, block: Block) -> None:
        """Tell the scopes and the event ring what happened to a block. Lock held."""
        if not self._hot:
            self.watch.tell(kind, block)

    def close(self, reason: str) -> int:
        """Finish what is pending and free what is idle, from here on at each release too; return the bytes freed."""
        with self.turns.held():
            self.reap()
            before = self.ledger.total
            self.closed = self.closed or reason
            self.set_hot()
            self.finish_pending()
            # Here and now: what dies in a cycle Numba destroys in whatever thread the collector runs, context or none.
            self.fences.spare.clear()
            return before - self.ledger.total

    def refuse_closed(self) -> None:
        """Raise ClosedError if the pool is closed."""
        if self.closed:
            raise ClosedError(self.closed)

    # ------------------------------------------------------------------------------------------------------- looking on

    def idle(self) -> list[Handle]:
        """Return all idle buffers. Lock held."""
        return self.lists.idle()

    def abandon(self) -> None:
        """Cut the blocks' ties to this store; leased ones stay memory, and they are never leased again.

        The free lists refer to themselves through each block's `home`, which would keep the memory until the
        collector's next run.
        """
        for block in getattr(self, "blocks", ()):  # none where `__init__` failed
            block.plain, block.home, block.store = False, _discard, _no_store

    __del__ = abandon

    def context_ended(self) -> None:
        """Be closed, as the context of the memory is: free nothing, for the driver may give its addresses to others."""
        self.disown(
            "the CUDA context of this pool was closed (cuda.close, or a reset of the context or device), and its "
            "memory is gone with it: make a new pool"
        )

    def disown(self, reason: str) -> None:
        """Leave all memory as it is, freeing and reporting nothing, and be closed: it is a parent's, or gone.

        Takes no lock: another thread of the parent may have held it, and will never let it go here.
        """
        self.closed = reason
        self.abandon()
        self.lists.serve(False)
        _inherited.append(dict(vars(self)))
        self._begin(SharedLedger(None, None))


class SimpleStore(Store):
    """A store that grows within the limits of its ledger, and by what the driver gives."""

    def grow(self, spec: BufferSpec) -> Handle:
        """Take one block from the driver, as any store."""
        return super().grow(spec)


_inherited: list[Any] = []  # memory of a parent or a closed context: kept to the end, so that nothing frees it


def _captured_by_us(stream: _cuda.Stream) -> bool:
    """Whether numbabuf captures a stream, in whatever thread: what that graph reads is known, and stays."""
    return any(capture.stream.handle == stream.handle for capture in list(_cuda.captures.values()))


def _add(handles: list[Handle], handle: Handle | None) -> bool:
    """Add a handle, if there is one; return whether there was."""
    if handle is not None:
        handles.append(handle)
    return handle is not None


def refuse_capture(what: str) -> None:
    """Raise CaptureError if this thread has a capture open."""
    if _cuda.capturing():
        raise CaptureError(f"{what} frees memory, which a capture forbids: call it before or after the capture")


def known_stream(stream: _cuda.StreamLike) -> _cuda.Stream:
    """Wrap what a user calls a stream; that of this thread's own capture is known by one object."""
    wrapped = _cuda.as_stream(stream)
    here = _cuda.open_capture() if _cuda.captures else None
    if here is not None and here.stream.handle == wrapped.handle and here.stream.thread is wrapped.thread:
        return here.stream
    return wrapped


def _no_store() -> None:
    """Stand where a block's references to its pool and store stood."""


def _discard(handle: Handle) -> None:
    """Stand where a block's way home stood."""
