"""The prediction benchmark's own parts: oracles against brute force, replay rules, streams, a smoke run."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import headroom, prediction
from numbabuf.demand.buckets import padded


def best_of_all(ids, k, warm_steps, prefetch):
    """Most hits over every sequence of sets of at most k buckets, by search over what is ready when."""
    buckets = sorted(set(ids))
    sets = [s for n in range(k + 1) for s in itertools.combinations(buckets, n)]
    # state: ready-from step of each bucket named, as (bucket, step) pairs
    states = {(): 0}
    for t, b in enumerate(ids):
        after = {}
        for state, hits in states.items():
            ready = dict(state)
            for named in sets:
                new = {}
                for c in named:
                    if t and c == ids[t - 1]:
                        new[c] = min(ready.get(c, t), t)
                    elif c in ready:
                        new[c] = ready[c]
                    elif prefetch:
                        new[c] = t + warm_steps
                if not prefetch and len(new) < len(named):
                    continue
                key = tuple(sorted((c, max(r, t)) for c, r in new.items()))
                got = hits + (new.get(b, t + 1) <= t)
                after[key] = max(after.get(key, -1), got)
        states = after
    return max(states.values()) / len(ids)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 2), min_size=2, max_size=7), st.integers(1, 2), st.integers(1, 3))
def test_the_optimum_is_the_best_of_all_choices(ids, k, warm_steps):
    found = prediction.optimum(np.array(ids), k, warm_steps, 0)
    assert found == pytest.approx(best_of_all(ids, k, warm_steps, True))


@settings(max_examples=40)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=8), st.integers(1, 2))
def test_belady_is_the_best_without_prefetch(ids, k):
    found = prediction.optimum(np.array(ids), k, 1, 0, prefetch=False)
    assert found == pytest.approx(best_of_all(ids, k, 1, False))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 4))
def test_hindsight_is_the_best_of_all_lists(sizes, k):
    x = np.array(sizes)
    some = np.unique(x)
    lists = ((*c, some[-1]) for n in range(min(k, some.size)) for c in itertools.combinations(some[:-1].tolist(), n))
    found = prediction.hindsight(x, k)
    assert len(found) <= k and found[-1] == x.max()
    assert padded(x, found).sum() == min(padded(x, c).sum() for c in lists)


class Scripted:
    def __init__(self, sets):
        self.sets = sets

    def observe(self, b):
        pass

    def forecast(self, k):
        return self.sets[self.t]


def test_a_replay_counts_only_what_is_ready():
    def hits(ids, sets, warm_steps):
        share, _ = prediction.replay(Scripted(sets), np.array(ids), 2, warm_steps, 0)
        return round(share * len(ids))

    assert hits([1, 1, 1], [[1]] * 3, 2) == 2  # the first use makes it, the next two find it
    assert hits([0, 0, 1], [[1]] * 3, 2) == 1  # warmed ahead, ready at step 2
    assert hits([0, 0, 1], [[], [1], [1]], 2) == 0  # too late
    assert hits([1, 0, 1], [[1], [], [1]], 2) == 0  # dropped in between


def test_streams_are_cut_and_positive(tmp_path):
    x = np.arange(-5, 30000)
    np.savez(tmp_path / "stream_one.npz", num_seqs=x, num_tokens=x, prefill=x)
    (name,) = found = prediction.streams(tmp_path, 100)
    assert name == "one"
    assert found[name]["num_seqs"].tolist() == list(range(3995, 4095))
    assert found[name]["prefill"].tolist() == list(range(1, 95))
    with pytest.raises(FileNotFoundError, match="stream_"):
        prediction.streams(tmp_path / "none", 100)


def test_generated_streams_are_the_same_every_time():
    one, two = prediction.served(3, 60), prediction.served(3, 60)
    assert all((one[kind] == two[kind]).all() for kind in one)
    assert one["num_tokens"].max() <= 2048 and one["num_seqs"].max() <= 256


def test_a_smoke_run_fills_every_table(monkeypatch, tmp_path):
    monkeypatch.setattr(prediction, "TRACES", tmp_path / "not there")
    served = prediction.served
    monkeypatch.setattr(prediction, "served", lambda seed: served(seed, 40))
    result = prediction.run(True, limit=200)
    assert result["streams"] == "generated"
    text = prediction.table(result)
    for name in ("Hits", "Cost", "Lists", "belady", "optimum", "fixed"):
        assert name in text
    json.dumps(result)
    assert all(0 <= row["ours"] <= row["optimum"] for row in result["hits"])
    assert all(row["padding"] > 0.99 for row in result["lists"])


def test_estimates_that_are_told_are_chosen_by_as_the_models_own():
    random = np.random.default_rng(0)
    ids = np.clip(np.cumsum(random.integers(-2, 3, 400)) % 20, 0, 19)
    sizes = np.arange(1, 21)
    listener = headroom.Listener(sizes, 4)
    for b in ids.tolist():
        listener.observe(b)
    own, _ = prediction.replay(prediction.Ours(sizes, 4), ids, 3, 4, 40)
    headroom.Told.told = np.array(listener.estimates)
    told, _ = prediction.replay(headroom.Told(sizes, 4), ids, 3, 4, 40)
    assert own == told > 0.3
    known = headroom.outcomes(ids, 20, np.array([0, 0, 4, 4]), np.array([4, 12, 6, 12]))
    headroom.Told.told = np.where(known, 0.999, 0.001).astype(np.float32)
    best, _ = prediction.replay(headroom.Told(sizes, 4), ids, 3, 4, 40)
    assert own + 0.02 < best <= prediction.optimum(ids, 3, 4, 40)


def test_outcomes_are_those_of_the_next_use():
    found = headroom.outcomes(np.array([0, 1, 1, 2, 0]), 3, np.array([0, 1]), np.array([1, 4]))
    assert found[0].tolist() == [[False, True], [True, False], [False, True]]
    assert found[3].tolist() == [[True, False], [False, False], [False, False]]
