"""What a tiered pool holds and has done, as numbers.

Sits above the pool room's statistics.
"""

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
    """Buffers brought up to device memory."""
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
    """Bytes that moves copied."""
    settled: int = 0
    """Managed allocations whose pages the driver keeps on the host; others it migrates on access."""
    buffers_by_tier: Mapping[Tier, int] = field(default_factory=Frozen)
    """Movable buffers by the tier that their contents are in."""
