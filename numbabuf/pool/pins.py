"""Which block an address lies in, and which blocks a graph reads or writes, so that none is recycled under it.

Sits above `_cuda`, below `block`, which registers itself here.
"""

from __future__ import annotations

import threading
import weakref
from bisect import bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _cuda

if TYPE_CHECKING:
    from .block import Block

__all__ = ["Pin", "pin_operand", "register", "registry"]


class Pin:
    """What a graph holds on to while it reads or writes a block; the block cannot be recycled before it is gone."""

    __slots__ = ("__weakref__",)


# No lock here: a capture looks up its operands, and a finaliser that the collector runs in the middle of that may wait
# for a pool's lock, whose holder may be registering a block.
registry: weakref.WeakValueDictionary[int, Block] = weakref.WeakValueDictionary()  # address -> block
_sorted: list[list[int]] = []  # the addresses in order, once they were asked for; each block that comes begins another


def register(block: Block) -> None:
    """Have the addresses of a block found as its own as long as it lives."""
    global _sorted
    registry[block.address] = block
    _sorted = []  # not emptied: a thread that sorts the addresses just now, without this one, has the list before


def _block_at(address: int) -> Block | None:
    """Return the block that an address lies in."""
    known = _sorted
    if not known:
        known.append(sorted(ref.key for ref in registry.valuerefs()))  # type: ignore[attr-defined]
    place = bisect_right(known[0], address)
    block = registry.get(known[0][place - 1]) if place else None
    return block if block is not None and address < block.address + block.nbytes else None


def _blocks_of(operand: Any) -> Iterator[Block]:
    """Yield the blocks that an operand of a capture lies in; the operand is an array or a tuple of arguments."""
    if isinstance(operand, (tuple, list)):
        for part in operand:
            yield from _blocks_of(part)
        return
    if isinstance(operand, np.generic):  # a scalar goes by value, for all that it offers __array_interface__
        return
    if hasattr(type(operand), "address"):  # a BufferEntry
        address = operand.address
    elif hasattr(operand, "__cuda_array_interface__") or hasattr(operand, "__array_interface__"):
        address = _cuda.address(operand)
    else:
        return
    block = _block_at(address)
    if block is not None:
        yield block


def pin_operand(operand: Any) -> list[Pin]:
    """Pin the blocks under an operand; a graph keeps the pins, and with them the blocks, until it is closed."""
    pins, thread = [], threading.get_ident()
    for block in _blocks_of(operand):
        known = block.pins.get(thread)
        pin = None if known is None else known()
        if pin is None:
            pin = Pin()
            block.pins[thread] = weakref.ref(pin)
        block.plain = False  # from here on a release takes the way that looks at the pin
        pins.append(pin)
    return pins


_cuda.watch_operands(pin_operand)
