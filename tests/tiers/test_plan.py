"""The plan of a move, against a model that is slow and plain, and the line of the coldest that it draws from."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from numbabuf.tiers.plan import Plan, plan
from numbabuf.tiers.policies import LRU, Frequency, Guarded, Line, Policy

SIZES = st.lists(st.integers(1, 9), max_size=6)


@given(wanted=SIZES, cold=SIZES, room=st.integers(0, 12), refused=st.sets(st.integers(0, 5)))
def test_a_plan_keeps_to_the_room_and_goes_in_order(wanted, cold, room, refused):
    names = [f"v{i}" for i in range(len(cold))]
    sizes = dict(zip(names, cold, strict=True))
    made = plan(list(enumerate(wanted)), room, iter(sizes.items()), lambda key, victims: key not in refused)
    assert sorted(made.bring + made.refuse + made.full) == list(range(len(wanted))), "each is decided once"
    assert made.evict == names[: len(made.evict)], "the coldest go, and no other"
    assert made.room == room + sum(sizes[name] for name in made.evict) - sum(wanted[key] for key in made.bring) >= 0
    assert set(made.refuse) <= refused
    left = room + sum(cold) - sum(wanted[key] for key in made.bring)
    assert all(wanted[key] > left for key in made.full if key > max(made.bring, default=-1)), "all that may go was seen"


def test_a_plan_takes_no_more_victims_than_it_looks_at():
    seen = []
    cold = ((seen.append(i) or i, 1) for i in itertools.count())
    assert plan([("a", 3), ("b", 1)], 1, cold) == Plan([0, 1, 2], ["a", "b"], [], [], 0)
    assert seen == [0, 1, 2]


def test_a_victim_that_was_spared_goes_for_the_next():
    made = plan([("poor", 2), ("rich", 2)], 0, iter([("x", 2), ("y", 2)]), lambda key, victims: key == "rich")
    assert made == Plan(["x"], ["rich"], ["poor"], [], 0)


class Newest(Policy):
    """A rank that falls with each use."""

    def rank(self, key, nbytes):
        return -self.now


@pytest.mark.parametrize(
    "make", [LRU, Newest, Frequency, lambda: Guarded(400)], ids=["lru", "newest", "freq", "guarded"]
)
@pytest.mark.parametrize("seed", range(4))
def test_a_line_is_the_order_of_the_ranks(make, seed):
    """Against a sort of all keys, while keys enter, leave, come again and are used, and the policy changes its mind."""
    rng, policy = random.Random(seed), make()
    line, inside = Line(policy), set()
    for _ in range(600):
        key = rng.randrange(30)
        step = rng.choice(["add", "discard", "touch", "touch", "look", "part"])
        if step == "add":
            line.add(key)
            inside.add(key)
        elif step == "discard":
            line.discard(key)
            inside.discard(key)
        elif step == "touch":
            policy.touch(key, 100 + key)
            line.touched(key)
        else:
            wanted = sorted(inside, key=lambda k: (policy.order.ranks.get(k, float("-inf")), k))
            few = len(wanted) if step == "look" else rng.randrange(5)
            assert list(itertools.islice(line.coldest(), few)) == wanted[:few]
        assert len(line) == len(inside) and (key in line) == (key in inside)


def test_what_leaves_while_it_is_looked_at_does_not_come_back():
    line = Line(LRU())
    for key in range(5):
        line.add(key)
    for key in line.coldest():
        line.discard(key)
        if key == 3:
            break
    assert list(line.coldest()) == [4]


def test_the_work_of_a_line_does_not_grow_with_the_keys():
    """Counts the ranks that are looked at: a miss among 10,000 keys looks at about as many as one among 100."""

    def looks(count):
        policy, seen = LRU(), []
        line = Line(policy)
        for key in range(count):
            policy.touch(key, 1)
            line.add(key)

        class Counting(dict):
            def get(self, key, default=None):
                seen.append(key)
                return super().get(key, default)

        policy.ranks = Counting(policy.ranks)
        for _ in range(50):
            victim = next(line.coldest())
            policy.touch(victim, 1)
            line.touched(victim)
        return len(seen)

    assert looks(10_000) <= looks(100) + 50
