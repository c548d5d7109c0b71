"""Blocks, size classes, handles and the byte account."""

import bisect
import gc
import threading
import weakref

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from numbabuf import _cuda
from numbabuf.errors import TierFullError
from numbabuf.pool import pins as graph_pins
from numbabuf.pool.block import Alarm, Block, Handle
from numbabuf.pool.budget import SharedLedger
from numbabuf.pool.spec import EXACT_ABOVE, BufferSpec, Tier, size_class


@given(st.integers(1, EXACT_ABOVE))
def test_a_class_wastes_at_most_an_eighth_and_is_its_own(nbytes):
    rounded = size_class(nbytes)
    assert nbytes <= rounded and (rounded - nbytes) * 8 <= nbytes
    assert size_class(rounded) == rounded


@given(st.integers(1, EXACT_ABOVE - 1))
def test_classes_grow_with_the_request(nbytes):
    assert size_class(nbytes) <= size_class(nbytes + 1)


def test_there_are_eight_classes_per_power_of_two():
    for power in range(4, 24):
        assert len({size_class(n) for n in range((1 << power) + 1, (2 << power) + 1, 1 << max(0, power - 8))}) == 8


@given(st.integers(EXACT_ABOVE + 1, 1 << 60))
def test_large_requests_are_exact(nbytes):
    assert size_class(nbytes) == nbytes


@pytest.mark.parametrize("tier", list(Tier))
def test_a_block_is_bytes_with_typed_views(tier):
    block = Block(BufferSpec((4, 2), "float64", tier), 100)
    assert (block.tier, block.nbytes, block.generation) == (tier, 100, 0)
    assert block.address == _cuda.address(block.memory.base) == _cuda.address(block.array)
    first = block.array
    block.become(BufferSpec(25, "float32", tier))
    assert block.array.shape == (25,) and block.array.dtype == np.float32
    assert block.device_view() is block.device_view()
    assert block.device_view().shape == (25,)
    block.become(BufferSpec((4, 2), "float64", tier))
    assert block.array is first
    assert "100 bytes" in repr(block)


def test_the_views_of_a_block_keep_its_memory():
    block = Block(BufferSpec(64, "uint8", Tier.PINNED), 64)
    base = weakref.ref(block.memory.base)
    array = block.array
    del block
    gc.collect()
    assert base() is not None
    array[:] = 3
    del array
    gc.collect()
    assert base() is None


def test_a_lost_handle_raises_the_alarm_once_and_only_when_it_is_gone():
    block = Block(BufferSpec(8, "uint8", Tier.PINNED), 8)
    lost = []
    handle = Handle(block)
    alarm = Alarm.watch(handle, lost.append)
    kept = [handle]
    del handle
    assert not lost
    kept.clear()
    assert lost == [alarm] and lost[0].block is block


def test_an_alarm_that_nobody_keeps_is_silent():
    block = Block(BufferSpec(8, "uint8", Tier.PINNED), 8)
    lost = []
    handle = Handle(block)
    alarm = Alarm.watch(handle, lost.append)
    del alarm
    del handle
    assert not lost


def test_a_finaliser_in_the_same_dead_cycle_may_still_save_the_handle():
    """The collector finalises a whole cycle before it drops any of it, in no order to rely on."""
    saved, lost = [], []

    class Owner:
        def __init__(self, handle):
            self.handle, self.me = handle, self

        def __del__(self):
            saved.append(self.handle)

    alarms = []
    for _ in range(20):
        handle = Handle(Block(BufferSpec(8, "uint8", Tier.PINNED), 8))
        alarms.append(Alarm.watch(handle, lost.append))
        Owner(handle)
    del handle
    gc.collect()
    assert len(saved) == 20 and not lost
    saved.clear()
    assert len(lost) == 20


def test_what_the_alarm_watches_is_none_of_the_collectors_business():
    assert not gc.is_tracked(Handle(Block(BufferSpec(1, "uint8", Tier.PINNED), 1)).token)


# -------------------------------------------------------------------------------------------------------- the account


def test_a_promise_counts_against_the_limit_and_is_kept_or_withdrawn():
    ledger = SharedLedger(100, 50)
    ledger.promise(Tier.DEVICE, 60)
    assert ledger.room(Tier.DEVICE) == ledger.room(Tier.MANAGED) == 40
    with pytest.raises(TierFullError, match="41 bytes of managed"):
        ledger.promise(Tier.MANAGED, 41)
    ledger.promise(Tier.MANAGED, 40)
    ledger.promise(Tier.PINNED, 50)
    assert [ledger.room(tier) for tier in Tier] == [0, 0, 0]
    ledger.withdraw(Tier.MANAGED, 40)
    ledger.keep(Tier.DEVICE, 60)
    ledger.keep(Tier.PINNED, 50)
    assert (ledger.total, ledger.peak, ledger.room(Tier.DEVICE)) == (110, 110, 40)
    ledger.give_back(Tier.DEVICE, 60)
    assert (ledger.total, ledger.peak, ledger.room(Tier.DEVICE)) == (50, 110, 100)
    assert ledger.promised == dict.fromkeys(Tier, 0)


def test_without_limits_there_is_always_room():
    ledger = SharedLedger(None, None)
    ledger.promise(Tier.PINNED, 1 << 60)
    assert [ledger.room(tier) for tier in Tier] == [None] * 3


# ------------------------------------------------------------------------------------------------- who is under a graph


@pytest.mark.parametrize("tier", list(Tier))
def test_an_operand_pins_the_block_it_lies_in(tier):
    blocks = [Block(BufferSpec(64, "uint8", tier), 64) for _ in range(5)]
    nested = (3, [blocks[2].device_view()[60:], None], "text", blocks[4].device_view())
    pins = graph_pins.pin_operand(nested)
    assert [block.pinned_by_graph for block in blocks] == [False, False, True, False, True]
    assert [block.plain for block in blocks] == [True, True, False, True, False]
    again = graph_pins.pin_operand(blocks[2].array)
    assert again == [pins[0]]
    del again, pins
    assert not any(block.pinned_by_graph for block in blocks)


def test_foreign_arrays_pin_nothing():
    block = Block(BufferSpec(64, "uint8", Tier.PINNED), 64)
    assert graph_pins.pin_operand((np.zeros(4), _cuda.empty_device(16), object(), 7)) == []
    assert not block.pinned_by_graph


def test_dead_blocks_are_forgotten():
    block = Block(BufferSpec(64, "uint8", Tier.PINNED), 64)
    array, address = block.array, block.address
    graph_pins.pin_operand(array)
    assert address in graph_pins.registry
    del block
    assert address not in graph_pins.registry
    assert graph_pins.pin_operand(array) == []


def test_blocks_made_by_many_threads_are_all_known():
    blocks = []

    def make():
        blocks.extend(Block(BufferSpec(16, "uint8", Tier.PINNED), 16) for _ in range(100))

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(graph_pins.pin_operand(block.array)) == 1 for block in blocks)


def test_a_finaliser_may_wait_for_a_pool_in_the_middle_of_a_look_up(monkeypatch):
    """The collector runs it in a capture; the pool's lock is with a thread that is registering a block meanwhile."""
    block = Block(BufferSpec(64, "uint8", Tier.PINNED), 64)
    pools_lock, taken, looking, came = threading.RLock(), threading.Event(), threading.Event(), []

    def grow():
        with pools_lock:
            taken.set()
            assert looking.wait(60)
            Block(BufferSpec(16, "uint8", Tier.PINNED), 16)

    def collected(addresses, address):
        looking.set()
        came.append(pools_lock.acquire(timeout=10))
        return bisect.bisect_right(addresses, address)

    other = threading.Thread(target=grow)
    other.start()
    assert taken.wait(60)
    monkeypatch.setattr(graph_pins, "bisect_right", collected)
    pins = graph_pins.pin_operand(block.array)
    other.join(60)
    assert came == [True] and len(pins) == 1


def test_a_block_registered_while_the_addresses_are_sorted_is_known(monkeypatch):
    made = []

    def sorted_late(addresses):
        found = sorted(addresses)
        if not made:
            made.append(Block(BufferSpec(64, "uint8", Tier.PINNED), 64))
        return found

    block = Block(BufferSpec(64, "uint8", Tier.PINNED), 64)
    monkeypatch.setattr(graph_pins, "sorted", sorted_late, raising=False)
    assert len(graph_pins.pin_operand(block.array)) == len(graph_pins.pin_operand(made[0].array)) == 1


@pytest.mark.parametrize("last", ["mine", "others"])
def test_a_block_that_two_captures_pin_at_once_stays_pinned_by_both(monkeypatch, last):
    block = Block(BufferSpec(64, "uint8", Tier.PINNED), 64)
    others, Pin = [], graph_pins.Pin

    def between():
        if threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=lambda: others.extend(graph_pins.pin_operand(block.array)))
            other.start()
            other.join()
        return Pin()

    monkeypatch.setattr(graph_pins, "Pin", between)
    mine = graph_pins.pin_operand(block.array)
    first, second = (mine, others) if last == "others" else (others, mine)
    first.clear()
    assert block.pinned_by_graph
    second.clear()
    assert not block.pinned_by_graph
