"""The demand model: its window against a naive twin, what it learns, merging, and files good and bad."""

import copy
import gc
import itertools
import json
import pickle
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numbabuf.demand import model as demand
from numbabuf.demand.learner import Learner
from numbabuf.demand.model import DemandModel
from numbabuf.errors import BusyError

SIZES = st.lists(st.integers(1, 3000), max_size=60)
BAD_SIZES = [
    0,
    -1,
    (1 << 40) + 1,
    10**30,
    2.0,
    float("nan"),
    float("inf"),
    True,
    None,
    "8",
    [3],
    np.float64(4),
]


def feed(model, sizes):
    for size in sizes:
        model.observe(size)
    return model


def ticking(start=0.0, step=1.0):
    return map(float, itertools.count(start, step)).__next__


def content(model):
    return list(model.seen), model.settings


# ------------------------------------------------------------------------------------------------ the window


@given(SIZES, st.integers(1, 20))
def test_the_window_is_the_newest_sizes(sizes, window):
    model = feed(DemandModel(window), sizes)
    kept = sizes[-window:]
    found, counts = model.histogram()
    assert len(model) == len(kept)
    assert dict(zip(found.tolist(), counts.tolist(), strict=True)) == {x: kept.count(x) for x in kept}
    assert (np.diff(found) > 0).all() and found.dtype == counts.dtype == np.int64


@pytest.mark.parametrize("size", BAD_SIZES, ids=repr)
def test_a_bad_size_is_refused_and_changes_nothing(size):
    model, twin = (feed(DemandModel(8, clock=ticking()), [3, 9, 3]) for _ in range(2))
    with pytest.raises((TypeError, ValueError), match="size"):
        model.observe(size)
    assert content(model) == content(twin)
    assert model.forecast(4) == twin.forecast(4)


def test_any_kind_of_integer_is_a_size():
    model = feed(DemandModel(), [np.int32(5), np.uint8(5), 5])
    assert [a.tolist() for a in model.histogram()] == [[5], [3]]


def test_a_clock_that_gives_no_number_is_refused():
    model = DemandModel(clock=lambda: float("nan"))
    with pytest.raises(ValueError, match="clock"):
        model.observe(3)
    assert len(model) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"window": 0},
        {"window": 2.5},
        {"warm_steps": 0},
        {"warm_steps": float("nan")},
        {"buckets": []},
        {"buckets": [4, 4]},
        {"buckets": [8, 4]},
        {"buckets": [0, 4]},
        {"buckets": [1.0]},
    ],
    ids=str,
)
def test_bad_options_are_refused(options):
    with pytest.raises((TypeError, ValueError), match="window|warm_steps|bucket"):
        DemandModel(**options)


# -------------------------------------------------------------------------------------------------- forecasts


@given(SIZES, st.integers(1, 12), st.integers(1, 12))
def test_a_forecast_is_distinct_buckets_with_probabilities(sizes, k, warm_steps):
    model = DemandModel(64, warm_steps=warm_steps)
    for size in sizes:
        model.observe(size)
        found = model.forecast(k)
        assert len(found) == len({f.size for f in found}) == min(k, len(model.buckets))
        assert {f.size for f in found} <= set(model.buckets)
        assert all(0 <= f.probability <= 1 for f in found)


def test_nothing_seen_forecasts_nothing():
    assert DemandModel().forecast(3) == ()


@pytest.mark.parametrize("k", [0, -1, 1.5, True, None, float("nan")], ids=repr)
def test_a_forecast_needs_a_count(k):
    with pytest.raises((TypeError, ValueError), match="k is"):
        feed(DemandModel(), [1]).forecast(k)


def test_buckets_grow_with_demand_and_keep_what_was_seen():
    model = feed(DemandModel(clock=ticking()), [3] * 50)
    assert model.buckets[-1] == 16
    feed(model, [1000])
    assert model.buckets[-1] == 1024
    assert len(model) == 51
    assert model.forecast(1)[0].size in (3, 1024)


def test_default_buckets_pad_at_most_a_fifth():
    buckets = feed(DemandModel(), [1 << 20]).buckets
    assert all(b <= 1.19 * a + 1 for a, b in itertools.pairwise(buckets))


def test_given_buckets_are_kept_and_larger_sizes_count_for_the_largest():
    model = feed(DemandModel(buckets=[8, 64]), [1000] * 40)
    assert model.buckets == (8, 64)
    assert model.forecast(1)[0].size == 64


def hits(model, sizes, k):
    """Steps of the second half that found their bucket named, and warm for long enough."""
    ready, count = {}, 0
    for t, size in enumerate(sizes):
        named = [f.size for f in model.forecast(k)]
        ready = {b: ready.get(b, t + model.warm_steps) for b in named}
        if t and (last := sizes[t - 1]) in ready:
            ready[last] = min(ready[last], t)
        count += t >= len(sizes) // 2 and ready.get(size, t + 1) <= t
        model.observe(size)
    return count / (len(sizes) - len(sizes) // 2)


def test_a_size_that_is_used_again_is_kept():
    sizes = [5, 9] * 300
    assert hits(DemandModel(buckets=range(1, 17), warm_steps=4), sizes, 2) == 1


def test_a_climb_is_warmed_ahead():
    ramp = [*range(1, 60), *range(60, 1, -1)]
    sizes = [size for size in ramp * 12 for _ in range(4)]
    assert hits(DemandModel(buckets=range(1, 61), warm_steps=8), sizes, 6) > 0.97
    lru = sum(a == b for a, b in itertools.pairwise(sizes)) / len(sizes)
    assert lru < 0.76  # what is had by keeping alone: three steps of four, and the turns


def test_the_common_sizes_are_held_where_nothing_else_is_to_be_known():
    rng = random.Random(0)
    sizes = rng.choices(range(1, 17), [32, 24, 16, *[1] * 13], k=6000)
    best = (32 + 24 + 16) / (72 + 13)
    assert hits(DemandModel(buckets=range(1, 17), warm_steps=4), sizes, 3) > 0.95 * best


def test_probabilities_are_calibrated():
    """A size that is used in a share p of all windows of `horizon` steps is given about that probability."""
    rng = random.Random(1)
    model = DemandModel(buckets=[8, 16], warm_steps=4)
    given_to_16 = []
    for t in range(6000):
        model.observe(16 if rng.random() < 0.05 else 8)
        if t > 2000:
            given_to_16 += [f.probability for f in model.forecast(2) if f.size == 16]
    assert np.mean(given_to_16) == pytest.approx(1 - 0.95**model.horizon, abs=0.05)


# ------------------------------------------------------------------------------- the learner against a twin


def test_outcomes_are_read_from_the_steps_that_followed(monkeypatch):
    """The learner's bookkeeping against the plain definition: is the next use within the window?"""
    rng = random.Random(2)
    learner = Learner(6, 64, 3)
    seen = []
    windows = [(0, 4), (0, learner.horizon), (3, 5), (3, 11)]
    for t in range(300):
        b = rng.randrange(6)
        seen.append(b)
        learner.observe(b)
        source = t - learner.horizon
        if source < 0:
            continue
        for bucket in range(6):
            after = seen[source + 1 :]
            ahead = after.index(bucket) + 1 if bucket in after else 10**6
            expected = [low < ahead <= high for low, high in windows]
            assert (learner.windows.outcomes[learner.until[bucket]] > 0.5).tolist() == expected, (t, bucket)


def test_a_situation_is_looked_up_once_a_step():
    """Rows are written with plain indexing, which is right only if no row comes twice."""
    rng = random.Random(3)
    learner = Learner(9, 64, 2)
    for _ in range(200):
        learner.observe(rng.randrange(9))
        rows = learner.rows[(learner.t - 1) % learner.horizon]
        assert np.unique(rows).size == rows.size
        assert rows.min() >= 0 and rows.max() < len(learner.tables.share)


def told(estimates, warm=()):
    """A learner of as many buckets as there are estimates, shape (m, 4), of which some are warm."""
    learner = Learner(len(estimates), 64, 8)
    learner.observe(len(estimates) - 1)  # the last is in use, and its estimates below may say otherwise
    learner.estimates[0] = estimates
    learner.ready[list(warm)] = 0
    return learner


def test_a_place_is_worth_the_hits_for_the_steps_it_takes():
    soon, later, never = [0.5, 0.5, 0, 0], [0, 0.8, 0, 0], [0, 0, 0, 0]
    chosen, probability = told([later, soon, never], warm=[0, 1]).forecast(2)
    assert chosen == [1, 0]
    assert probability == pytest.approx([0.5, 0.8])


def test_only_what_is_warm_can_catch_a_use_that_comes_before_a_warm_up():
    soon, in_time, never = [0.9, 0.9, 0, 0], [0, 0.3, 0.3, 0.3], [0, 0, 0, 0]
    assert told([soon, in_time, never], warm=[0]).forecast(1)[0] == [0]
    assert told([soon, in_time, never]).forecast(1)[0] == [1]


def test_a_warm_up_goes_on_while_its_bucket_is_named_and_ends_in_warm_steps():
    learner = told([[0, 0.3, 0.3, 0.3], [0, 0, 0, 0]])
    for t in range(1, 12):
        learner.estimates[(learner.t - 1) % learner.horizon] = learner.estimates[0]
        assert learner.forecast(1)[0] == [0]
        assert learner.ready[0] == max(1 + learner.warm_steps, t)
        learner.observe(1)


def test_counters_forget_over_a_quarter_of_the_window():
    learner = Learner(2, 1024, 8)
    shares = []
    for b in [0] * 4000 + [1] * 300:
        learner.observe(b)
        shares.append(float(learner.tables.share[0, 0]))  # the rate of bucket 0, within 4 steps
    assert shares[3999] > 0.99
    assert shares[-1] < 0.5


def test_very_many_buckets_take_little_memory():
    learner = Learner(5000, 1024, 8)
    for b in (0, 4999, 2500):
        learner.observe(b)
    assert learner.tables.share.nbytes < 16e6
    assert learner.rows.max() < len(learner.tables.share)


def test_estimates_stay_numbers_under_any_demand():
    learner = Learner(40, 1024, 8)
    for b in [0] * 3000 + [39] * 10 + list(range(40)) * 20:
        learner.observe(b)
    assert np.isfinite(learner.tables.weight).all()
    assert np.isfinite(learner.estimates).all()


@pytest.mark.parametrize("window", [64, 2048, 1 << 16])
def test_a_size_beyond_all_buckets_costs_the_same_whatever_the_window(monkeypatch, window):
    model = DemandModel(window, seen=[(0.0, 3)] * window)
    learned = []
    observe = Learner.observe
    monkeypatch.setattr(Learner, "observe", lambda self, b: (learned.append(b), observe(self, b)))
    costs = []
    for size in (40, 39, 1000, 999, 1 << 30):
        learned.clear()
        model.observe(size)
        costs.append(len(learned))
    most = min(window, demand.RELEARNED)
    assert costs == [most, 1, most, 1, most]
    assert model.buckets[-1] == 1 << 30 and len(model.forecast(3)) == 3


def test_a_call_from_within_a_call_of_the_same_thread_is_refused(monkeypatch):
    """As a signal handler makes it, in the middle of an update."""
    model, refused = DemandModel(8), []
    observe = Learner.observe

    def interrupted(self, b):
        for call in (lambda: model.observe(4), lambda: model.forecast(1), model.histogram):
            with pytest.raises(BusyError, match="in a call of the demand model"):
                call()
            refused.append(call)
        observe(self, b)

    monkeypatch.setattr(Learner, "observe", interrupted)
    model.observe(3)
    assert len(refused) == 3 and [size for _, size in model.seen] == [3]


def test_a_model_can_be_copied_and_pickled():
    model = feed(DemandModel(16, buckets=[4, 64]), [3, 9, 3])
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert content(again) == content(model)
        feed(again, [5])
    assert len(model) == 3


def test_a_model_has_one_owner_until_it_is_let_go():
    class Owner:
        pass

    model, one, two = DemandModel(), Owner(), Owner()
    model.claim(one)
    model.claim(one)
    with pytest.raises(BusyError, match="close that one first"):
        model.claim(two)
    model.let_go(two)  # not its owner
    with pytest.raises(BusyError):
        model.claim(two)
    model.let_go(one)
    model.claim(two)
    del two
    gc.collect()
    model.claim(one)


# ---------------------------------------------------------------------------------------------------- merging


def workers(streams, window=12, **options):
    return [feed(DemandModel(window, clock=ticking(i * 0.37), **options), sizes) for i, sizes in enumerate(streams)]


@given(st.lists(SIZES, min_size=3, max_size=3), st.permutations(range(3)))
def test_merging_knows_no_order_and_no_grouping(streams, order):
    a, b, c = workers(streams)
    merge = DemandModel.merge
    expected = content(merge([a, b, c]))
    assert content(merge([merge([a, b]), c])) == expected
    assert content(merge([a, merge([b, c])])) == expected
    assert content(merge([(a, b, c)[i] for i in order])) == expected


@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), max_size=6), min_size=3, max_size=3))
def test_merging_knows_no_grouping_where_clocks_stand_still_or_go_back(streams):
    a, b, c = (DemandModel(4, seen=seen) for seen in streams)
    merge = DemandModel.merge
    expected = merge([a, b, c])
    for other in (merge([merge([a, b]), c]), merge([a, merge([b, c])]), merge([c, a, b])):
        assert (other.seen, other.buckets, other.forecast(3)) == (expected.seen, expected.buckets, expected.forecast(3))


@given(st.lists(SIZES, min_size=1, max_size=4))
def test_a_merged_window_is_the_newest_of_all(streams):
    models = workers(streams)
    merged = DemandModel.merge(models)
    assert list(merged.seen) == sorted(pair for model in models for pair in model.seen)[-12:]
    assert sum(merged.histogram()[1].tolist()) == len(merged)


def test_merging_leaves_its_parts_as_they_were():
    models = workers([[3, 5], [700]])
    before = [content(model) for model in models]
    merged = feed(DemandModel.merge(models), [9])
    assert [content(model) for model in models] == before
    assert merged.histogram()[0].tolist() == [3, 5, 9, 700]
    assert merged.buckets[-1] == 1024


@pytest.mark.parametrize("other", [{"window": 13}, {"warm_steps": 3}, {"buckets": [4, 8]}], ids=str)
def test_unlike_models_are_not_merged(other):
    with pytest.raises(ValueError, match="merge"):
        DemandModel.merge([DemandModel(12), DemandModel(**{"window": 12, **other})])
    with pytest.raises(ValueError, match="at least one"):
        DemandModel.merge([])


# ------------------------------------------------------------------------------------------------------ files


@given(sizes=SIZES, window=st.integers(1, 40), buckets=st.sampled_from([None, (4, 64, 5000)]))
def test_a_saved_model_comes_back(tmp_path_factory, sizes, window, buckets):
    path = tmp_path_factory.mktemp("saved") / "demand"  # the name is kept as it is, ".json" or not
    model = feed(DemandModel(window, buckets=buckets, warm_steps=3, clock=ticking(0.1, 1 / 3)), sizes)
    model.save(path)
    back = DemandModel.load(path, clock=ticking(1e6))
    assert content(back) == content(model)
    assert back.buckets[-1] >= max(sizes[-window:], default=1) or buckets
    if len(sizes) <= window and buckets:
        assert back.forecast(3) == model.forecast(3)
    feed(back, [7])
    assert list(path.parent.iterdir()) == [path]


def test_a_saved_model_is_plain_json(tmp_path):
    path = tmp_path / "demand.json"
    DemandModel(8, buckets=[4, 64], seen=[(0.5, 3), (1.5, 60)]).save(path)
    assert json.loads(path.read_text()) == {
        "format": "numbabuf demand",
        "version": 1,
        "window": 8,
        "warm_steps": 8,
        "buckets": [4, 64],
        "times": [0.5, 1.5],
        "sizes": [3, 60],
    }


def test_the_fullest_window_of_the_longest_numbers_is_read_again(tmp_path):
    window = 1 << 12
    path = tmp_path / "demand.json"
    seen = [(-1.2345678901234567e-300, 1 << 40)] * window
    DemandModel(window, seen=seen).save(path)
    assert path.stat().st_size / window * demand.MAX_WINDOW < demand.MAX_STATE_BYTES
    assert DemandModel.load(path).seen == tuple(seen)


def test_a_file_larger_than_any_model_is_not_read(tmp_path):
    path = tmp_path / "demand.json"
    with open(path, "wb") as file:
        file.truncate(demand.MAX_STATE_BYTES + 1)
    with pytest.raises(ValueError, match=r"demand\.json cannot be read: it is larger than 67,108,864 bytes"):
        DemandModel.load(path)


def test_the_npz_of_an_earlier_version_is_refused_in_one_line(tmp_path):
    path = tmp_path / "demand.npz"
    np.savez_compressed(path, format=np.array([1, 8, 2]), times=np.zeros(1), sizes=np.ones(1, np.int64))
    with pytest.raises(ValueError, match=r"demand\.npz is an NPZ file.*save that one here$") as caught:
        DemandModel.load(path)
    assert "\n" not in str(caught.value)
    feed(DemandModel(), [3]).save(path)  # as the error advises
    assert len(DemandModel.load(path)) == 1


@given(st.data())
def test_a_damaged_file_is_refused_or_holds_a_model(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "demand.json"
    feed(DemandModel(16, clock=ticking()), [3, 500, 3]).save(path)
    whole = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    cut = data.draw(st.booleans())
    if cut:
        whole = whole[:at]
    else:
        whole[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    try:
        model = DemandModel.load(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:  # a digit of a number that is a number still
        assert not cut and len(model) == 3 and len(model.forecast(3)) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"sizes": None},
        {"sizes": [0, 4]},
        {"sizes": [3, -4]},
        {"sizes": [3, 1 << 50]},
        {"sizes": [3, 10**400]},
        {"sizes": [3.0, 4.0]},
        {"sizes": [3, True]},
        {"sizes": [3]},
        {"sizes": [[3, 4]]},
        {"sizes": "34"},
        {"sizes": ["3", "4"]},
        {"times": [0.0, float("nan")]},
        {"times": [0.0, float("inf")]},
        {"times": [0.0, 10**400]},
        {"times": ["0.0", "1.0"]},
        {"times": {"0": 0, "1": 1}},
        {"format": "numbabuf trace"},
        {"version": 2},
        {"window": 0},
        {"window": 1},
        {"window": demand.MAX_WINDOW + 1},
        {"window": "8"},
        {"warm_steps": 0},
        {"warm_steps": 1024, "buckets": list(range(1, 1 << 16))},
        {"buckets": [8, 4]},
        {"buckets": [0]},
        {"buckets": []},
        {"buckets": "8"},
        {"buckets": 8},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_a_file_of_what_no_model_can_hold_is_refused(tmp_path, changes):
    path = tmp_path / "demand.json"
    DemandModel(8, warm_steps=2, seen=[(0.0, 3), (1.0, 4)]).save(path)
    state = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in state.items() if value is not None}))
    with pytest.raises(ValueError, match=r"demand\.json holds no saved demand") as caught:
        DemandModel.load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["", "[]", "3", "null", '"x"', "{}", "{", "[" * 100_000], ids=lambda t: t[:3])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    path = tmp_path / "demand.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"demand\.json holds no saved demand"):
        DemandModel.load(path)


def test_what_a_model_was_and_saw_is_all_there_is_to_it():
    for options in ({}, {"buckets": [8, 64, 512], "warm_steps": 3}):
        model = feed(DemandModel(32, clock=ticking(), **options), [3, 500, 3, 20] * 20)
        again = DemandModel(**model.settings, seen=model.seen)
        assert (again.settings, again.seen) == (model.settings, model.seen)
        assert again.seen == tuple(zip(range(48, 80), [3, 500, 3, 20] * 8, strict=True))
        assert again.histogram()[0].tolist() == [3, 20, 500]


@pytest.mark.parametrize("pair", [(0.0, 0), (float("nan"), 3), (0.0, 1.5), (0.0, True), (0.0, 1 << 41)], ids=str)
def test_what_nobody_can_have_seen_is_refused(pair):
    with pytest.raises((TypeError, ValueError)):
        DemandModel(8, seen=[(0.0, 3), pair])


def test_a_file_that_is_not_there_says_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        DemandModel.load(tmp_path / "none.json")
