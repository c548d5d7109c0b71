"""The frozen snapshot of a hierarchical pool. Values only: what a pool counts, and its moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..pool.spec import Tier
from ..pool.stats import Frozen, PoolStats

__all__ = ["HierarchyStats"]


@dataclass(frozen=True)
class HierarchyStats(PoolStats):
    """What a hierarchical pool holds and has done, at one moment; what its entries keep below counts as in use."""

    promotions: int = 0
    """Buffers brought up: to device memory, or to managed memory where an address there was taken."""
    demotions: int = 0
    """Buffers sent from it, or from managed memory, downwards."""
    clean_demotions: int = 0
    """Those of them that had a copy below already, so that nothing had to be copied."""
    in_place: int = 0
    """Uses of a buffer that stayed outside device memory."""
    refused: int = 0
    """Those of them that the policy would not have evict others."""
    launches: int = 0
    """Batches of copies, one kernel launch each."""
    moved_bytes: int = 0
    settled: int = 0
    """Managed allocations whose pages the driver keeps on the host; others it migrates on access."""
    buffers_by_tier: Mapping[Tier, int] = field(default_factory=Frozen)
    """Leased buffers by the tier that their contents are in."""
