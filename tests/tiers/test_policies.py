"""The tier policies: their orders, what they admit, and the ghosts that choose between them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numbabuf.tiers.policies import LRU, POLICIES, Frequency, Ghost, Guarded, Line, Policy, make_policy, move_seconds

MIB = 1 << 20


def touched(policy, *keys, nbytes=MIB):
    for key in keys:
        policy.touch(key, nbytes)
    return policy


def coldest(policy, keys):
    """The keys in the order in which a pool would give them up."""
    line = Line(policy)
    for key in keys:
        line.add(key)
    return line.coldest()


def test_lru_gives_up_the_longest_unused():
    policy = touched(LRU(), 1, 2, 3, 2, 1)
    assert list(coldest(policy, [1, 2, 3])) == [3, 2, 1]
    assert list(coldest(policy, [1, 9, 2])) == [9, 2, 1], "what was never used goes before all others"
    assert policy.admits(9, [1, 2])


def test_frequency_gives_up_what_is_used_least():
    policy = touched(Frequency(), 1, 1, 1, 2, 3, 3)
    assert list(coldest(policy, [1, 2, 3])) == [2, 3, 1]


def test_frequency_counts_old_uses_less():
    policy = touched(Frequency(half_life=4), 1, 1, 1, *[3] * 40, 2)
    assert next(coldest(policy, [1, 2])) == 1
    assert next(coldest(touched(Frequency(half_life=1e9), 1, 1, 1, *[3] * 40, 2), [1, 2])) == 2


def test_one_use_does_not_bring_old_ones_back():
    policy = touched(Frequency(half_life=4), *[1] * 50, *[3] * 100, 1, 2)
    assert policy.worth(1) < policy.worth(2)
    assert list(coldest(policy, [1, 2])) == [1, 2]


def test_frequency_weighs_a_use_by_what_it_saves_per_byte():
    """The launch is the same for all, so that a byte of a small buffer saves more."""
    policy = Frequency()
    policy.touch(1, 4096)
    policy.touch(2, 64 * MIB)
    assert list(coldest(policy, [1, 2])) == [2, 1]


def test_order_does_not_change_between_uses():
    """The property that lets ranks stand: decay alone never reorders."""
    policy = touched(Frequency(half_life=7), 1, 2, 1, 3, 1)
    before = list(coldest(policy, [1, 2, 3]))
    touched(policy, *[4] * 500)
    assert list(coldest(policy, [1, 2, 3])) == before
    worth = [policy.worth(key) for key in before]
    assert worth == sorted(worth)


def test_admission_compares_with_all_victims_together():
    policy = touched(Frequency(half_life=1e9), 1, 1, 1, 2, 2, 3, 3)
    assert policy.admits(1, [2]) and policy.admits(1, [3])
    assert not policy.admits(1, [2, 3])
    assert not policy.admits(2, [3]), "for the same worth nothing is moved"
    assert not policy.admits(9, [2]), "what was never used is worth nothing"
    assert touched(Frequency(admission=False), 1).admits(9, [1])


def test_worth_decays_by_half():
    policy = touched(Frequency(half_life=10), 1)
    at_once = policy.worth(1)
    touched(policy, *[2] * 10)
    assert policy.worth(1) == pytest.approx(at_once / 2)


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_forgotten_leaves_nothing(name):
    policy = POLICIES[name](4 * MIB)
    for key in range(50):
        policy.touch(key, MIB)
    for key in range(51):
        policy.forget(key)
    parts = [policy, *(ghost.policy for ghost in getattr(policy, "_ghosts", ()))]
    assert all(not part.ranks and not getattr(part, "_uses", ()) for part in parts)
    assert all(not g._held and not g._line and g.free_bytes == g.budget_bytes for g in getattr(policy, "_ghosts", ()))


@pytest.mark.parametrize("name", POLICIES)
def test_decisions_are_a_function_of_what_happened(name):
    rng = np.random.default_rng(0)
    uses = [(int(key), int(size), bool(write)) for key, size, write in rng.integers(1, [40, MIB, 2], (500, 3))]
    orders = []
    for _ in range(2):
        policy = POLICIES[name](8 * MIB)
        for key, size, write in uses:
            policy.touch(key, size, write=write)
        orders.append(list(coldest(policy, range(40))))
    assert orders[0] == orders[1] and sorted(orders[0]) == list(range(40))


# ------------------------------------------------------------------------------------------------------------- ghosts


def test_a_ghost_charges_for_what_moves():
    ghost = Ghost(LRU(), 2 * MIB)
    one = move_seconds(MIB)
    assert ghost.use(1, MIB, write=False) == one
    assert ghost.use(1, MIB, write=True) == 0
    assert ghost.use(2, MIB, write=False) == one
    assert ghost.use(3, MIB) == 2 * one, "1 was written since it came, so it is copied back"
    assert ghost.use(4, MIB) == one, "2 was only read"
    assert ghost.use(5, 3 * MIB) == move_seconds(3 * MIB), "larger than all there is: read in place"
    assert ghost.seconds == pytest.approx(5 * one + move_seconds(3 * MIB))


def test_a_ghost_reads_in_place_what_is_not_admitted():
    ghost = Ghost(Frequency(), MIB)
    for _ in range(3):
        ghost.use(1, MIB)
    assert ghost.use(2, MIB) == move_seconds(MIB)
    assert ghost.use(1, MIB) == 0


class Model:
    """A plain cache that searches all it holds for the least recent, to compare with."""

    def __init__(self, budget):
        self.budget, self.held, self.seconds = budget, {}, 0.0

    def use(self, key, nbytes, write):
        if key in self.held:
            written = self.held.pop(key)[1]
            self.held[key] = nbytes, write or written
            return
        self.seconds += move_seconds(nbytes)
        if nbytes > self.budget:
            return
        while sum(size for size, _ in self.held.values()) + nbytes > self.budget:
            size, written = self.held.pop(next(iter(self.held)))
            self.seconds += move_seconds(size) if written else 0
        self.held[key] = nbytes, write


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=60), st.integers(0, 20))
def test_a_ghost_of_lru_is_lru(uses, budget):
    ghost, model = Ghost(LRU(), budget), Model(budget)
    for key, write in uses:
        ghost.use(key, key + 1, write=write)
        model.use(key, key + 1, write)
        assert set(ghost._held) == set(model.held)
        assert ghost.free_bytes == budget - sum(size for size, _ in model.held.values())
    assert ghost.seconds == pytest.approx(model.seconds)


# ------------------------------------------------------------------------------------------------------------ guarded


def seconds_of(policy, keys, budget):
    ghost = Ghost(policy, budget)
    ghost.in_order = lambda: coldest(policy, ghost._held)  # Guarded changes its order between uses of a key
    for key in keys:
        ghost.use(key, MIB)
    return ghost.seconds


def drifting(steps):
    """A few neighbours in use, the place moving steadily: last year's favourites are never wanted again."""
    rng = np.random.default_rng(1)
    return [int(step // 25 + rng.integers(0, 4)) for step in range(steps)]


def mixed(steps):
    """Most uses of a few keys, with a long tail in between that flushes an LRU cache."""
    rng = np.random.default_rng(2)
    return [int(key) for key in np.minimum(rng.zipf(1.3, steps), 200)]


def test_guarded_is_as_good_as_the_better_of_the_two():
    for keys in (drifting(3000), mixed(3000)):
        budget = 8 * MIB
        lru, frequency = (seconds_of(policy, keys, budget) for policy in (LRU(), Frequency()))
        guarded = seconds_of(Guarded(budget), keys, budget)
        assert guarded <= 1.1 * min(lru, frequency)
        assert max(lru, frequency) > 1.3 * min(lru, frequency), "the streams tell the two apart"


def test_guarded_begins_with_recency_and_changes_sides():
    policy = Guarded(8 * MIB)
    assert isinstance(policy.order, LRU)
    touched(policy, *mixed(1500))
    assert isinstance(policy.order, Frequency)
    assert list(coldest(policy, range(9))) == list(coldest(policy.order, range(9)))


# -------------------------------------------------------------------------------------------------------------- names


def test_policies_by_name():
    assert isinstance(make_policy("lru", MIB), LRU) and isinstance(make_policy("frequency", MIB), Guarded)
    own = LRU()
    assert make_policy(own, MIB) is own
    with pytest.raises(ValueError, match="frequency, lru"):
        make_policy("random", MIB)
    with pytest.raises(TypeError, match="Policy"):
        make_policy(LRU, MIB)


def test_a_users_policy_needs_a_rank_only():
    class Largest(Policy):
        def rank(self, key, nbytes):
            return -nbytes

    policy = Largest()
    policy.touch(1, 10)
    policy.touch(2, 20)
    assert list(coldest(policy, [1, 2])) == [2, 1] and policy.admits(1, [2])


def test_a_ghost_follows_its_budget():
    ghost = Ghost(LRU(), 300)
    for key in (1, 2, 3):
        ghost.use(key, 100)
    ghost.resize(150)
    assert list(ghost.in_order()) == [3] and ghost.free_bytes == 50
    ghost.resize(0)
    assert list(ghost.in_order()) == [] and ghost.free_bytes == 0
    ghost.resize(200)
    ghost.use(1, 100)
    assert list(ghost.in_order()) == [1] and ghost.free_bytes == 100
