"""What makes room in the tiers and moves buffers between them: it carries plans out, all of one or nothing.

Every method is called with the store's lock held. Sits above `plan`, `mover`, `store` and `residents`, below `pool`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import NamedTuple

from .. import _cuda
from ..errors import CaptureError, TierFullError
from ..pool.block import Handle
from ..pool.fence import Fence
from ..pool.spec import BufferSpec, Tier, as_code
from .entry import MovableEntry
from .mover import Move, Mover
from .plan import plan
from .residents import Residents, refuse_bound, refuse_used
from .store import TierStore

__all__ = ["ORDER", "Traffic", "below", "placed"]

ORDER = (Tier.DEVICE, Tier.MANAGED, Tier.PINNED)
"""The tiers from the top down."""


def below(tier: Tier) -> tuple[Tier, ...]:
    """Return the tiers below one."""
    return ORDER[ORDER.index(tier) + 1 :]


@functools.lru_cache(maxsize=4096)
def placed(spec: BufferSpec, tier: Tier) -> BufferSpec:
    """Return `spec` in another tier."""
    return BufferSpec(spec.shape, spec.dtype, tier)


class _Step(NamedTuple):
    """One buffer of a transfer: its next memory, and whether that was taken from the pool for it."""

    entry: MovableEntry
    handle: Handle
    made: bool


class Traffic:
    """Makes room, and moves.

    Parameters
    ----------
    store : TierStore
    residents : Residents
    blocks, engine_bytes
        As in `Mover`.

    Attributes
    ----------
    counts : dict of str to int
        Of `stats.HierarchyStats`, what is counted here.
    """

    def __init__(
        self, store: TierStore, residents: Residents, *, blocks: int | None = None, engine_bytes: int | None = None
    ) -> None:
        self._store = store
        self._residents = residents
        self._blocks, self._engine_bytes = blocks, engine_bytes
        self._made: Mover | None = None
        self.counts = dict.fromkeys(("promotions", "demotions", "clean_demotions", "in_place", "refused"), 0)

    @property
    def mover(self) -> Mover:
        """What moves, made at the first need."""
        if self._made is None:
            with self._store.lock, _cuda.on_device(self._store.turns.device):
                if self._made is None:
                    self._made = Mover(blocks=self._blocks, engine_bytes=self._engine_bytes, fences=self._store.fences)
        return self._made

    @property
    def launches(self) -> int:
        """Batches of copies so far, one kernel launch each."""
        return 0 if self._made is None else self._made.launches

    @property
    def moved_bytes(self) -> int:
        """Bytes that moves copied."""
        return 0 if self._made is None else self._made.moved_bytes

    def close(self) -> None:
        """Let go of what moves."""
        if self._made is not None:
            self._made.close()

    def disown(self) -> None:
        """Forget what moves, which is a parent process's, or gone."""
        self._made = None

    # ------------------------------------------------------------------------------------------------------ room

    def find_room(self, spec: BufferSpec, stream: _cuda.Stream | None) -> tuple[Handle, str]:
        """Take memory in the tier of `spec`, for work on `stream`, and say how it was found.

        Pressure here may move what is not claimed. The memory error says why there is none.
        """
        store = self._store
        handle, kind = store.find(spec, stream, 1)
        if handle is None:
            if _cuda.capturing():
                raise CaptureError(
                    f"{spec} has no idle buffer, and none can be allocated while a graph is captured: call "
                    f"reserve([{as_code(spec)}]) before the capture"
                )
            if not self.make_room(spec.tier, spec.size_bytes):
                raise TierFullError(
                    f"no room for {spec}: {store.room_in(spec.tier)} of {store.ledger.limit(spec.tier)} bytes are "
                    f"free, and not enough of the rest can move. Release buffers, or raise limits[{spec.tier}]"
                )
            handle, kind = store.find(spec, stream, 1)
        if handle is None:
            return store.grow_or_free(spec), "miss"
        return handle, kind

    def make_room(self, tier: Tier, nbytes: int) -> bool:
        """Demote until `nbytes` more fit the budget of a tier; whether they do. No capture is open."""
        store, need = self._store, max(1, nbytes)
        room = store.ledger.room(tier)
        if room is not None and room >= need:
            return True
        self._residents.sweep()
        store.reap()
        missing = need - store.room_in(tier)
        if missing <= 0:
            return True
        self._give_way(tier, missing)
        if store.room_in(tier) < need <= store.room_in(tier, pending=True):
            store.finish_pending()
        return store.room_in(tier) >= need

    def relieve(self, tier: Tier, nbytes: int) -> int:
        """Demote buffers where the driver has less than the budget; return how many."""
        victims = [] if _cuda.capturing() else self._victims(tier, nbytes)
        if not victims or not self._evict(victims):
            return 0
        self._store.make_room(tier, nbytes)
        return len(victims)

    def shrink(self, tier: Tier, nbytes: int) -> None:
        """Bring what is reserved in a tier down to `nbytes`; TierFullError where it cannot come so low."""
        store = self._store
        self._residents.sweep()
        store.reap()
        pending = sum(block.nbytes for block in store.deferred.pending() if block.tier is tier)
        missing = store.ledger.reserved[tier] - nbytes - store.lists.idle_bytes(tier) - pending
        if missing > 0:
            self._give_way(tier, missing)
        if pending or missing > 0:
            store.finish_pending()
        store.free_idle(store.ledger.reserved[tier] - nbytes, (tier,))
        _cuda.flush_pending_frees()
        if store.ledger.reserved[tier] > nbytes:
            raise TierFullError(
                f"{nbytes} bytes are too few for {tier.value} memory: {store.ledger.reserved[tier]} are leased and not "
                f"movable, in use or under graphs, or have no room below; the limit stays at "
                f"{store.ledger.limit(tier)}. Release buffers, or raise the limit of a tier below, first"
            )

    def _give_way(self, tier: Tier, missing: int) -> None:
        """Demote the coldest, or give up copies, to free `missing` bytes of a tier; no error where that is refused."""
        if tier is Tier.PINNED:
            self._residents.drop_copies(missing)
        elif victims := self._victims(tier, missing):
            self._evict(victims)

    def _victims(self, tier: Tier, missing: int) -> list[MovableEntry]:
        """Return the coldest buffers of a tier that have `missing` bytes together; none if all of them have not."""
        victims: list[MovableEntry] = []
        if not below(tier):
            return victims
        with contextlib.closing(self._residents.cold(tier)) as cold:  # type: ignore[type-var]
            for entry in cold:
                victims.append(entry)
                missing -= entry.handle.block.nbytes
                if missing <= 0:
                    return victims
        return []

    def _evict(self, victims: Sequence[MovableEntry]) -> bool:
        """Demote buffers; False, with nothing changed, where the tiers below have no room for them."""
        try:
            self.transfer([(victim, None) for victim in victims])
        except Exception as error:
            if not _cuda.is_out_of_memory(error):
                raise
            return False
        return True

    # ------------------------------------------------------------------------------------------------------ promotion

    def bring_up(self, entries: Sequence[MovableEntry], *, insist: bool, judge: bool) -> int:
        """Promote claimed buffers: all of them, or (not `insist`) those that there is room for.

        Returns how many the policy kept out for which there would have been room.
        `judge`: they will be used; ask the policy whether a buffer is worth its victims.
        """
        wanted = [entry for entry in entries if self._may_come(entry, must=insist)]
        if not wanted:
            return 0
        policy = self._residents.policy

        def admits(entry: MovableEntry, victims: Sequence[MovableEntry]) -> bool:
            return policy.admits(entry.record.key, [victim.record.key for victim in victims])

        with contextlib.closing(self._residents.cold(Tier.DEVICE)) as cold:  # type: ignore[type-var]
            made = plan(
                [(entry, max(1, entry.nbytes)) for entry in wanted],
                self._store.room_in(Tier.DEVICE),
                ((victim, victim.handle.block.nbytes) for victim in cold),
                admits if judge else None,
            )
        if insist and made.full:
            raise TierFullError(
                f"{made.full[0]!r} does not fit device memory: its {made.full[0].nbytes} bytes, the budget of "
                f"{self._store.ledger.limit(Tier.DEVICE)} and what cannot be moved leave {made.room}. Leave other uses "
                "first, ask for fewer buffers at once, or raise limits[Tier.DEVICE]"
            )
        try:
            self.transfer([(victim, None) for victim in made.evict])
            self.transfer([(entry, Tier.DEVICE) for entry in made.bring])
        except Exception as error:
            if insist or not _cuda.is_out_of_memory(error):
                raise
        return len(made.refuse)

    @staticmethod
    def _may_come(entry: MovableEntry, *, must: bool) -> bool:
        """Whether a buffer can be promoted; where it `must` be and cannot, the error says why."""
        if entry.tier is Tier.DEVICE:
            return False
        if must:
            refuse_used(entry)
            refuse_bound(entry)
            if _cuda.capturing():
                raise CaptureError(f"{entry!r} must move to device memory: promote() it before the capture")
        return not (entry.record.users or entry.handle.block.pinned_by_graph or _cuda.capturing())

    # ------------------------------------------------------------------------------------------------- one transaction

    def transfer(self, wanted: Sequence[tuple[MovableEntry, Tier | None]]) -> None:
        """Move buffers, each to a tier or (None) to the next one below with room: all of them or none.

        Reserve, launch, fence, swap, release. What fails before the swap leaves every buffer where it was: the targets
        go back, and the mover has waited for whatever it had queued into them. From the swap on nothing fails.
        """
        if not wanted:
            return
        if _cuda.capturing():
            raise CaptureError("buffers cannot move while a graph is captured: promote() or demote() them before it")
        steps: list[_Step] = []
        with self._residents.claimed([entry for entry, _ in wanted]):
            try:
                for entry, tier in wanted:
                    steps.append(self._target(entry, tier))
                fence = self._copy([step for step in steps if step.handle is not step.entry.record.copy])
            except BaseException:
                for step in steps:
                    if step.made:
                        self._store.retire(step.handle)
                raise
            for step in steps:
                self._swap(step.entry, step.handle, fence)

    def _copy(self, steps: Sequence[_Step]) -> Fence | None:
        """Queue the copies of a transfer, behind all work on their sources; return the fence behind them."""
        if not steps:
            return None
        mover = self.mover
        for step in steps:
            self.order_after(step.entry, mover.stream)
        return mover.run([Move(step.entry.handle.block, step.handle.block, step.entry.nbytes) for step in steps])

    def _target(self, entry: MovableEntry, tier: Tier | None) -> _Step:
        """Find the memory that a buffer is to move to."""
        copy = entry.record.copy
        if copy is not None and (tier is None or tier is copy.block.tier):
            return _Step(entry, copy, False)
        *others, last = below(entry.tier) if tier is None else (tier,)
        for other in others:
            if self._store.room_in(other) >= max(1, entry.nbytes):
                try:
                    return _Step(entry, self._obtain(placed(entry.spec, other)), True)
                except Exception as error:  # its budget has room, and the card may have none
                    if not _cuda.is_out_of_memory(error):
                        raise
        return _Step(entry, self._obtain(placed(entry.spec, last)), True)

    def _obtain(self, spec: BufferSpec) -> Handle:
        """Take memory for a move, which is work on the mover's stream."""
        handle, kind = self.find_room(spec, self.mover.stream)
        self._store.take(handle, kind, self.mover.stream)
        return handle

    def _swap(self, entry: MovableEntry, new: Handle, fence: Fence | None) -> None:
        record, old = entry.record, entry.handle
        up = ORDER.index(new.block.tier) < ORDER.index(old.block.tier)
        clean = new is record.copy
        if not clean:
            record.behind(fence)
            new.block.users = old.block.users = (self.mover.stream,)
        new.block.plain = old.block.plain = False
        entry.handle = new
        self._store.watch.moved(old.block, new.block)
        self._residents.moved(entry, old.block.tier, new.block.tier)
        self.counts["promotions" if up else "demotions"] += 1
        self.counts["clean_demotions"] += clean
        if clean:
            record.copy = None
        if up and new.block.tier is Tier.DEVICE:
            record.copy = old
        else:
            self._residents.drop_copy(record)
            self._store.retire(old)

    def order_after(self, entry: MovableEntry, stream: _cuda.Stream) -> None:
        """Put later work on `stream` behind all queued work on the buffer."""
        fence, block, fences = entry.record.fence, entry.handle.block, self._store.fences
        if fence is not None:
            fence.wait(stream)
            return
        users = block.users or ((fences.default,) if block.tier is Tier.DEVICE else ())
        try:
            fences.wait_for(users, stream)
        except Exception:  # a stream that takes no mark any more: wait for everything, as a release does
            _cuda.synchronize()
