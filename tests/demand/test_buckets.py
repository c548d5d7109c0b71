"""Bucket lists: validation, padding, the planner against brute force, and the list that follows demand."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from numbabuf.demand import buckets
from numbabuf.demand.buckets import Cost, Refitter, padded, plan, powers_of_two, validate

SMALL = st.integers(1, 14)


def brute(sizes, k, max_size, cost):
    """Least cost over every list of at most k sizes that ends in max_size."""
    x = np.array([size for size in sizes if size <= max_size], int)
    return min(
        sum(float(cost.steps(min(b for b in (*some, max_size) if b >= size))) for size in x.tolist())
        + cost.graph * (count + 1)
        for count in range(min(k, max_size))
        for some in itertools.combinations(range(1, max_size), count)
    )


def bill(sizes, chosen, max_size, cost):
    return cost.bill([size for size in sizes if size <= max_size], chosen)


# ------------------------------------------------------------------------------------------ lists as given


@pytest.mark.parametrize(
    ("max_size", "expected"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (3, (1, 2, 3)),
        (64, (1, 2, 4, 8, 16, 32, 64)),
        (65, (1, 2, 4, 8, 16, 32, 64, 65)),
    ],
)
def test_powers_of_two_end_in_the_largest(max_size, expected):
    assert powers_of_two(max_size) == expected


def test_validate_sorts_and_drops_repeats():
    found = validate([np.int32(8), 2, 8], 8)
    assert found == (2, 8)
    assert all(type(size) is int for size in found)


@pytest.mark.parametrize("sizes", [[0], [-1], [17], [2.0], [True], ["4"], [None], [float("nan")], []], ids=repr)
def test_validate_refuses(sizes):
    with pytest.raises(ValueError, match="sizes"):
        validate(sizes, 16)


@pytest.mark.parametrize("max_size", [0, -3, 2.5, True, None])
def test_validate_refuses_a_bad_maximum(max_size):
    with pytest.raises(ValueError, match="max_size"):
        validate([1], max_size)
    with pytest.raises(ValueError, match="max_size"):
        powers_of_two(max_size)


def test_padded():
    assert padded([1, 4, 5, 9], [4, 8]).tolist() == [4, 4, 8, 9]


# ------------------------------------------------------------------------------------------------ the planner


@given(st.lists(SMALL, max_size=12), st.integers(1, 6), SMALL, st.sampled_from([0.0, 0.5, 3.0, 50.0]))
def test_plan_is_as_good_as_the_best_of_all_lists(sizes, k, max_size, graph):
    cost = Cost(graph=graph)
    found = plan(sizes, k, max_size=max_size, prior=0, cost=cost)
    assume(min(sizes, default=max_size + 1) <= max_size)
    assert bill(sizes, found, max_size, cost) == pytest.approx(brute(sizes, k, max_size, cost))


@given(st.lists(SMALL, min_size=1, max_size=10), st.integers(1, 4), SMALL)
def test_plan_makes_the_given_cost_least(sizes, k, max_size):
    cost = Cost(step=lambda size: np.ceil(size / 4) ** 2, graph=0.25)
    found = plan(sizes, k, max_size=max_size, prior=0, cost=cost)
    assume(min(sizes) <= max_size)
    assert bill(sizes, found, max_size, cost) == pytest.approx(brute(sizes, k, max_size, cost))


@given(
    st.lists(st.integers(1, 1 << 20), max_size=40),
    st.integers(1, 80),
    st.one_of(st.integers(1, 200), st.integers(1, 1 << 20)),
    st.sampled_from([0, 0.01, 0.5]),
)
def test_plan_has_k_increasing_sizes_and_ends_in_the_maximum(sizes, k, max_size, prior):
    found = plan(sizes, k, max_size=max_size, prior=prior)
    assert found.dtype == np.int64
    assert found.size == min(k, max_size)
    assert found[-1] == max_size and found[0] >= 1
    assert (np.diff(found) > 0).all()


def test_plan_takes_any_form_of_demand():
    class Counted:
        def histogram(self):
            return np.array([3, 9]), np.array([5, 2])

    sizes = [3] * 5 + [9] * 2
    expected = plan(sizes, 3, max_size=20).tolist()
    for demand in (Counted(), ([3, 9], [5, 2]), np.array(sizes), (np.array([3, 9]), np.array([5.0, 2.0]))):
        assert plan(demand, 3, max_size=20).tolist() == expected


def test_a_prior_given_as_demand_is_added():
    assert plan([4] * 10, 3, max_size=64, prior=[30] * 10).tolist() == [4, 30, 64]


def test_a_prior_keeps_the_list_useful_when_demand_moves():
    seen, later = [40] * 1000, np.arange(1, 257)
    without, with_prior = (plan(seen, 8, max_size=256, prior=prior) for prior in (0, 0.05))
    assert padded(later, with_prior).sum() < 0.75 * padded(later, without).sum()
    assert 40 in with_prior  # and what was seen still has its bucket


def test_many_sizes_are_merged_and_the_plan_stays_close_to_the_best(monkeypatch):
    x = np.random.default_rng(0).lognormal(6, 1, 4000).astype(int) + 1
    merged = plan(x, 12, max_size=int(x.max()), prior=0)
    monkeypatch.setattr(buckets, "MOST_CANDIDATES", 10**6)
    exact = plan(x, 12, max_size=int(x.max()), prior=0)
    assert padded(x, exact).sum() <= padded(x, merged).sum() <= 1.01 * padded(x, exact).sum()


def test_a_price_on_graphs_leaves_out_those_that_do_not_pay():
    sizes = [10] * 100 + [50] * 1
    assert plan(sizes, 8, max_size=64, prior=0, cost=Cost(graph=30.0)).tolist() == [10, 64]


@pytest.mark.parametrize(
    "demand",
    [
        [0],
        [-4],
        [1 << 60],
        [1.5],
        [float("nan")],
        ["8"],
        [[1, 2]],
        ([1, 2], [1]),
        ([1], [-1.0]),
        ([1], [np.nan]),
    ],
    ids=repr,
)
def test_plan_refuses_what_is_no_demand(demand):
    with pytest.raises((ValueError, TypeError), match="demand"):
        plan(demand, 4, max_size=16)


@pytest.mark.parametrize(
    ("k", "max_size", "prior"),
    [(0, 8, 0), (2.0, 8, 0), (True, 8, 0), (4, 0, 0), (4, "8", 0), (4, 8, 1.0), (4, 8, -1)],
)
def test_plan_refuses_bad_arguments(k, max_size, prior):
    with pytest.raises((ValueError, TypeError), match="k|max_size|prior"):
        plan([1, 2], k, max_size=max_size, prior=prior)


@pytest.mark.parametrize("price", [-1.0, float("nan"), float("inf"), "3", None])
@pytest.mark.parametrize("name", ["graph", "miss"])
def test_a_cost_is_finite_and_not_negative(name, price):
    with pytest.raises(ValueError, match=name):
        Cost(**{name: price})


def test_a_cost_function_must_give_one_cost_a_size():
    with pytest.raises(ValueError, match=r"Cost\.step"):
        plan([1, 2], 2, max_size=4, cost=Cost(step=lambda size: 1.0))
    with pytest.raises(ValueError, match=r"Cost\.step"):
        plan([1, 2], 2, max_size=4, cost=Cost(step=lambda size: size * np.nan))


def test_a_bill_adds_up_steps_misses_and_captures():
    cost = Cost(graph=100, miss=7)
    assert cost.bill([1, 3, 9], [2, 4]) == (2 + 4 + 9) + 7 * 1 + 100 * 2
    assert cost.bill([1, 3, 9], [2, 4], captures=5) == (2 + 4 + 9) + 7 * 1 + 100 * 5


# -------------------------------------------------------------------------------------- the list that follows


def run(refitter, sizes):
    """Padded total of a stream, every step in the list in force before it."""
    total = 0
    for size in sizes:
        total += int(padded([size], refitter.sizes)[0])
        refitter.observe(int(size))
    return total


def check(refitter):
    assert refitter.sizes.size <= refitter.k
    assert refitter.sizes[-1] == refitter.max_size
    assert (np.diff(refitter.sizes) > 0).all()


@given(st.lists(st.integers(1, 300), max_size=200), st.integers(1, 9), st.integers(1, 300))
def test_a_refitted_list_is_always_a_list(sizes, k, max_size):
    refitter = Refitter(k, max_size=max_size, every=16)
    for size in sizes:
        before = refitter.sizes.tolist()
        changed = refitter.observe(size)
        assert changed == (refitter.sizes.tolist() != before)
        check(refitter)


def test_a_list_follows_a_demand_that_moves():
    rng = np.random.default_rng(1)
    here, there = rng.integers(20, 30, 3000), rng.integers(150, 170, 3000)
    refitter = Refitter(6, max_size=256)
    run(refitter, here)
    assert run(refitter, there) < 1.1 * there.sum()
    once = np.union1d(plan(here, 6, max_size=256, prior=0), [256])
    assert padded(there, once).sum() > 1.4 * there.sum()


def test_a_list_forgets_what_is_no_longer_asked_for():
    rng = np.random.default_rng(4)
    here, there = rng.integers(1, 101, 20_000), rng.integers(151, 251, 5000)
    refitter = Refitter(8, max_size=256, cost=Cost(graph=1.0))
    run(refitter, here)
    run(refitter, there)
    assert (refitter.sizes > 150).sum() >= 6


def test_an_unchanged_demand_changes_nothing():
    sizes = np.random.default_rng(2).integers(1, 9, 8000) * 7
    refitter = Refitter(8, max_size=64)
    run(refitter, sizes[:4000])
    captures, refits = refitter.captures, refitter.refits
    run(refitter, sizes[4000:])
    assert refitter.refits > refits
    assert refitter.captures == captures


def test_a_list_that_cannot_repay_its_captures_is_not_adopted():
    sizes = np.random.default_rng(3).integers(20, 30, 2000)
    dear = Refitter(6, max_size=256, cost=Cost(graph=1e9))
    start = dear.sizes.tolist()
    run(dear, sizes)
    assert dear.refits > 0 and dear.sizes.tolist() == start and dear.captures == len(start)
    cheap = Refitter(6, max_size=256, cost=Cost(graph=1e-9))
    run(cheap, sizes)
    assert cheap.captures > len(start)


@pytest.mark.parametrize(("k", "size"), [(4, 64), (1, 30), (4, 100)])
def test_a_demand_that_no_other_list_would_serve_better_is_seldom_reconsidered(k, size):
    refitter = Refitter(k, max_size=64)
    refits = []
    for _ in range(2048):
        before = refitter.refits
        refitter.observe(size)
        refits.append(refitter.refits > before)
    assert sum(refits) <= 11, "32, 64 and 128 steps in, and then every 256"


def test_sizes_that_no_list_can_serve_are_let_pass():
    refitter = Refitter(4, max_size=16)
    start = refitter.sizes.tolist()
    for _ in range(100):
        refitter.observe(1000)
    assert refitter.sizes.tolist() == start


@pytest.mark.parametrize("size", [0, -1, 2.0, True, float("nan"), None, 1 << 60])
def test_a_bad_size_is_refused_and_changes_nothing(size):
    one, other = Refitter(3, max_size=64), Refitter(3, max_size=64)
    for t in range(300):
        if t % 10 == 0:
            with pytest.raises((ValueError, TypeError), match="size"):
                one.observe(size)
        assert one.observe(1 + t % 7) == other.observe(1 + t % 7)
    assert one.sizes.tolist() == other.sizes.tolist()
