"""The account of a pool's bytes, by tier, within its limits. Calls no driver. Sits above `spec`, below `store`."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ..errors import TierFullError
from .spec import Tier

__all__ = ["Ledger", "SharedLedger", "same_memory"]


def same_memory(tier: Tier) -> tuple[Tier, ...]:
    """Return the tiers that take room in one physical memory with `tier`: managed pages migrate to the card."""
    return (Tier.PINNED,) if tier is Tier.PINNED else (Tier.DEVICE, Tier.MANAGED)


class Ledger(ABC):
    """Bytes reserved by tier, within limits. The caller holds a lock; nothing here calls the driver.

    Abstract: which tiers share a limit is for its kinds to say.
    """

    def __init__(self) -> None:
        self.reserved = dict.fromkeys(Tier, 0)
        """Bytes that the driver has given."""
        self.promised = dict.fromkeys(Tier, 0)
        """Bytes that the driver is being asked for; they count against the limit too."""
        self.total = 0
        """Sum of `reserved`."""
        self.peak = 0

    @abstractmethod
    def limit(self, tier: Tier) -> int | None:
        """Return the limit that `tier` counts against."""

    @abstractmethod
    def set_limit(self, tier: Tier, nbytes: int | None) -> None:
        """Change the limit that `tier` counts against; the caller has seen to it that what is reserved fits."""

    @abstractmethod
    def sharing(self, tier: Tier) -> tuple[Tier, ...]:
        """Return the tiers that count against one limit with `tier`, itself included."""

    def taken(self, tier: Tier) -> int:
        """Return the bytes reserved and promised that count against the limit of `tier`."""
        return sum(self.reserved[each] + self.promised[each] for each in self.sharing(tier))

    def room(self, tier: Tier) -> int | None:
        """Return the bytes that may still be asked for, None where there is no limit."""
        limit = self.limit(tier)
        if limit is None:
            return None
        return limit - self.taken(tier)

    def promise(self, tier: Tier, nbytes: int) -> None:
        """Set `nbytes` aside before the driver is asked; raise TierFullError, with nothing changed, without room."""
        room = self.room(tier)
        if room is not None and nbytes > room:
            raise TierFullError(f"{nbytes} bytes of {tier.value} memory do not fit the limit of {self.limit(tier)}")
        self.promised[tier] += nbytes

    def withdraw(self, tier: Tier, nbytes: int) -> None:
        """Take a promise back: the driver refused."""
        self.promised[tier] -= nbytes

    def keep(self, tier: Tier, nbytes: int) -> None:
        """Turn a promise into bytes reserved: the driver gave them."""
        self.promised[tier] -= nbytes
        self.reserved[tier] += nbytes
        self.total += nbytes
        self.peak = max(self.peak, self.total)

    def give_back(self, tier: Tier, nbytes: int) -> None:
        """Count bytes as returned to the driver."""
        self.reserved[tier] -= nbytes
        self.total -= nbytes


class SharedLedger(Ledger):
    """One limit for device and managed memory together, whose pages take room on the card too; one for pinned memory.

    Parameters
    ----------
    max_bytes
        Limit of device and managed memory, or None.
    max_pinned_bytes
        Limit of pinned memory, or None.
    """

    def __init__(self, max_bytes: int | None, max_pinned_bytes: int | None) -> None:
        super().__init__()
        self._max_bytes, self._max_pinned_bytes = max_bytes, max_pinned_bytes

    def limit(self, tier: Tier) -> int | None:
        """Return the limit that `tier` counts against."""
        return self._max_pinned_bytes if tier is Tier.PINNED else self._max_bytes

    def set_limit(self, tier: Tier, nbytes: int | None) -> None:
        """Change one of the two limits; what is reserved fits it already."""
        if tier is Tier.PINNED:
            self._max_pinned_bytes = nbytes
        else:
            self._max_bytes = nbytes

    def sharing(self, tier: Tier) -> tuple[Tier, ...]:
        """Return the tiers in one physical memory with `tier`."""
        return same_memory(tier)
