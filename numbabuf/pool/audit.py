"""What holds for all memory of a pool at any time, asserted; for `check` and tests. Sits above `store`."""

from __future__ import annotations

from .block import Block, Handle
from .spec import Tier
from .store import Store

__all__ = ["audit"]


def audit(store: Store, title: str) -> None:
    """Assert what holds for a store; the text of a failure begins with what fails and `title`. Lock held."""
    seen: dict[Block, str] = {}
    try:
        _places(store, seen)
        _account(store)
    except AssertionError as error:
        dump = "\n".join(f"  {block}: {seen.get(block, 'leased')}" for block in store.blocks)
        raise AssertionError(f"{error}\n{title}\n{dump}") from None


def _places(store: Store, seen: dict[Block, str]) -> None:
    """Assert that each block is in one place, and fit for it; note in `seen` where."""

    def place(handle: Handle, where: str) -> Block:
        block = handle.block
        assert block in store.blocks, f"{block}, {where}, is not the pool's"
        assert block not in seen, f"{block} is {seen[block]} and {where}"
        seen[block] = where
        return block

    for key, free in store.lists.by_key.items():
        for handle in list(free.ready):
            block = place(handle, "ready")
            assert block.line == key, f"{block} is on the free list {key}, not {block.line}"
            assert block.fence is None, f"{block} has a fence and is ready"
            assert not block.users, f"{block} has users and is ready"
            assert not block.pinned_by_graph, f"{block} is idle under a live graph"
        for line in free.fenced.values():
            for handle in line:
                assert place(handle, "fenced").fence is not None, f"{handle.block} has no fence to wait for"
    for handle in store.deferred.handles:
        place(handle, "deferred")


def _account(store: Store) -> None:
    """Assert that the ledger is the sum of the blocks, which do not overlap, and within its limits."""
    by_tier = dict.fromkeys(Tier, 0)
    end = 0
    for block in sorted(store.blocks, key=lambda block: block.address):
        by_tier[block.tier] += block.nbytes
        assert block.nbytes >= block.spec.size_bytes, f"{block} is smaller than its spec"
        assert block.address >= end, f"{block} overlaps the block before it"
        end = block.address + block.nbytes
    ledger = store.ledger
    assert by_tier == ledger.reserved, f"counted {by_tier}, account {ledger.reserved}"
    assert ledger.total == sum(by_tier.values()), f"total {ledger.total} of {by_tier}"
    for tier in Tier:
        room = ledger.room(tier)
        assert room is None or room >= 0, f"{tier.value} is {-(room or 0)} bytes over its limit"
