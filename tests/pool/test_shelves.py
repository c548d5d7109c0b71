"""Shelves by themselves: what is found where, and what a watched pool hides from its hits."""

from collections import deque

from numbabuf.pool.block import Block, Ticket
from numbabuf.pool.shelves import Shelves, pop_fitting, pop_oldest
from numbabuf.pool.spec import BufferSpec, Tier


def spec(nbytes, tier=Tier.PINNED):
    return BufferSpec(nbytes, "uint8", tier)


def ticket(nbytes):
    return Ticket(Block(spec(nbytes), nbytes))


def test_kin_are_other_specs_of_the_same_tier_and_class():
    shelves = Shelves()
    near, own = shelves.of(spec(1000)), shelves.of(spec(1024))
    shelves.of(spec(1025))
    shelves.of(spec(1024, Tier.MANAGED))
    assert shelves.of(spec(1024)) is own and len(shelves) == 4
    assert shelves.kin(spec(1024)) == [near] and shelves.kin(spec(1001)) == [near, own]
    assert shelves.kin(spec(5)) == []


def test_hits_see_the_ready_lines_while_they_are_served():
    shelves = Shelves()
    hot, first = shelves.hot, shelves.of(spec(8))
    assert hot == {spec(8): first.ready}
    shelves.serve(False)
    second = shelves.of(spec(9))
    assert shelves.hot is hot == {}
    shelves.serve(True)
    assert shelves.hot is hot == {spec(8): first.ready, spec(9): second.ready}
    assert hot[spec(9)] is second.ready


def test_a_shelf_is_forgotten_everywhere_with_its_last_block():
    shelves = Shelves()
    kept, _, _ = shelves.enter(spec(1000)), shelves.enter(spec(1024)), shelves.enter(spec(1024))
    shelves.leave(spec(1024))
    assert len(shelves) == 2, "a block of it is left"
    shelves.leave(spec(1024))
    assert list(shelves) == [kept] and shelves.kin(spec(1001)) == [kept] and list(shelves.hot) == [spec(1000)]
    shelves.leave(spec(1000))
    assert not list(shelves) and not shelves.kin(spec(1001)) and not shelves.hot


def test_idle_buffers_are_all_lines_and_the_longest_idle_goes_first():
    shelf = (shelves := Shelves()).of(spec(8))
    tickets = [ticket(8) for _ in range(4)]
    shelf.ready.extend(tickets[:2])
    shelf.ordered = {5: deque(), 7: deque(tickets[2:])}
    assert shelves.idle() == tickets
    found = [shelf.pop_idle() for _ in range(5)]
    assert [pair and pair[0] for pair in found] == [*tickets, None]
    assert found[1][1] is shelf.ready and found[2][1] is shelf.ordered[7]


def test_a_block_too_small_stays_and_the_newest_goes_first():
    small, large = ticket(4), ticket(8)
    line = deque([large, small])
    assert pop_fitting(line, 8) is None and list(line) == [large, small]
    assert pop_fitting(line, 4) is small and pop_fitting(line, 8) is large and pop_fitting(line, 0) is None
    line.extend([large, small])
    assert pop_oldest(line) is large and pop_oldest(line) is small and pop_oldest(line) is None
