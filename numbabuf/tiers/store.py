"""The memory of a tiered pool: a budget for each tier, and no more managed memory than the card has free.

Knows nothing of movable buffers but that a move takes memory, too. Sits above the pool room's store.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import _cuda
from ..errors import TierFullError
from ..pool.block import Handle
from ..pool.budget import Ledger
from ..pool.spec import BufferSpec, Tier
from ..pool.store import Store

__all__ = ["TierStore"]


class _TierLedger(Ledger):
    """A budget for each tier by itself."""

    def __init__(self, budgets: dict[Tier, int]) -> None:
        super().__init__()
        self._budgets = budgets

    def limit(self, tier: Tier) -> int:
        return self._budgets[tier]

    def set_limit(self, tier: Tier, nbytes: int | None) -> None:
        """Change the budget of a tier; what is reserved fits it already."""
        self._budgets[tier] = nbytes or 0

    def sharing(self, tier: Tier) -> tuple[Tier, ...]:
        return (tier,)


class TierStore(Store):
    """The blocks of a tiered pool.

    Attributes
    ----------
    settled : int
        Managed allocations whose pages the driver keeps on the host.
    trims : int
        Times that idle memory was freed to grow.
    moves, moves_bytes : int
        Times that memory was taken for a move, and its capacity in bytes: no leases of a user's.
    """

    def __init__(self, budgets: dict[Tier, int], owner: Callable[[], Any], events: int) -> None:
        super().__init__(_TierLedger(budgets), owner, events=events)
        self.settled = self.trims = self.moves = self.moves_bytes = 0

    def take(self, handle: Handle, kind: str, stream: _cuda.Stream) -> None:
        """Begin to use a buffer in hand, found as `kind`, as a move's target on `stream`. Lock held."""
        block = handle.block
        block.generation += 1
        block.users, block.plain = (stream,), False
        self.moves += 1
        self.moves_bytes += block.nbytes
        if self.watch.active:
            self.watch.tell(kind, block, lease=False)

    def grow_or_free(self, spec: BufferSpec) -> Handle:
        """Grow; where there is no room, free idle memory, which is worth less than what is asked for, and try again."""
        try:
            return self.grow(spec)
        except Exception as error:  # it ends here: kept, its traceback would keep what the frames below it hold
            if not _cuda.is_out_of_memory(error):
                raise
        self.trims += self.make_room(spec.tier, max(1, spec.size_bytes)) > 0
        _cuda.flush_pending_frees()
        return self.grow(spec)

    def grow(self, spec: BufferSpec) -> Handle:
        """Take one block from the driver, within the budget of its tier and what the card has free."""
        with self.lock:  # from the look at what is free to the promise, no other thread may ask for managed memory
            managed = self.ledger.reserved[Tier.MANAGED]
            if spec.tier is Tier.MANAGED or (managed and spec.tier is Tier.DEVICE):
                self._refuse_oversubscribed(spec, managed)
            handle = super().grow(spec)
            if spec.tier is Tier.MANAGED:
                try:
                    self.settled += _cuda.settle_on_host(handle.block.memory.base, self.fences.default)
                except BaseException:
                    self.free(handle)
                    raise
            return handle

    @staticmethod
    def _refuse_oversubscribed(spec: BufferSpec, managed: int) -> None:
        info = _cuda.memory_info()
        if info is not None and info[0] < managed + spec.size_bytes:
            raise TierFullError(
                f"{spec} asks for {spec.size_bytes} bytes of {spec.tier.value} memory; the card has {info[0]} bytes "
                f"free and {managed} of managed memory may need them"
            )

    def make_room(self, tier: Tier, nbytes: int) -> int:
        """Free idle memory as in `Store`, and what moves have left behind, which the host waits for."""
        with self.lock:
            if tier is not Tier.DEVICE and any(block.tier is tier for block in self.deferred.pending()):
                self.finish_pending()
        return super().make_room(tier, nbytes)

    def room_in(self, tier: Tier, *, pending: bool = False) -> int:
        """Return the bytes that can be had in a tier without moving anything, or by waiting for what is `pending`."""
        room = self.ledger.room(tier)
        assert room is not None
        coming = self.deferred.pending() if pending else []
        return room + self.lists.idle_bytes(tier) + sum(block.nbytes for block in coming if block.tier is tier)
