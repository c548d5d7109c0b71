"""Every figure of a manager's statistics against an independent count, in seeded histories of every kind of step."""

from collections import Counter

import numpy as np
import pytest
from kit import LAUNCH, log_row, to_device

from numbabuf import BucketOverflowError, BufferSpec, BusyError, PredictiveBufferManager
from numbabuf.demand.model import DemandModel

CAPACITY, BUCKETS, GRAPHS, KNOWN = 24, (4, 8, 16), (4, 8), (2, 5, 9, 24)


class Ledger:
    """What the statistics shall say, counted from the descriptions of the figures alone."""

    def __init__(self, policy):
        self.policy = policy
        self.steps, self.live = Counter(), Counter()  # by the bucket that a step ran in
        self.overflows = self.refused = self.hits = self.misses = 0
        self.seen, self.expected = [], None

    def run(self, bucket, size):
        self.steps[bucket] += 1
        self.live[bucket] += size

    def demand(self, size):
        if size:
            self.seen.append(size)
            if self.expected is not None:
                hit = next(known for known in KNOWN if known >= size) in self.expected
                self.hits += hit
                self.misses += not hit

    def step(self, size, sizes, policy):
        """A step that the buckets `sizes` serve, as far as they go; whether it is run at all."""
        fitting = [bucket for bucket in sizes if bucket >= size]
        if fitting:
            self.run(fitting[0], size)
        elif policy == "eager" and size <= CAPACITY:
            self.overflows += 1
            self.run(size, size)
        elif policy == "split":
            self.overflows += 1
            for start in range(0, size, sizes[-1]):
                piece = min(sizes[-1], size - start)
                self.run(next(bucket for bucket in sizes if bucket >= piece), piece)
        else:
            self.refused += 1
        self.demand(size)
        return bool(fitting) or policy != "raise"


@pytest.mark.filterwarnings("ignore:.*runs without a graph:RuntimeWarning")
@pytest.mark.parametrize("policy", ["raise", "eager", "split"])
@pytest.mark.parametrize("seed", range(3))
def test_a_history_is_counted_as_it_was(policy, seed):
    random = np.random.default_rng(seed)
    ledger = Ledger(policy)
    log, row = to_device(np.zeros((1, CAPACITY), np.int64)), to_device(np.zeros(1, np.int64))
    with PredictiveBufferManager(
        None, 1, CAPACITY, default_slots=False, buckets=BUCKETS, overflow=policy, demand=DemandModel(512, buckets=KNOWN)
    ) as manager:
        manager.register_slot("x", BufferSpec(CAPACITY, "int64"))
        manager.capture_buckets(lambda s: log_row[(*LAUNCH, s.stream)](s["x"], log, row), GRAPHS)
        manager.synchronize()
        before = manager.stats()  # what capturing itself ran is no step of ours
        alone = "eager" if policy == "eager" else "raise"

        def attempt(size, sizes, policy, act):
            runs = ledger.step(size, sizes, policy)
            try:
                act({"x": np.ones(size, np.int64)}, size)
            except BucketOverflowError:
                assert not runs
            else:
                assert runs

        def leased(how):
            def act(inputs, size):
                with manager.stage(size) as lease:
                    lease["x"][:] = inputs["x"]
                    getattr(lease, how)()

            return act

        for _ in range(150):
            size = int(random.integers(0, CAPACITY + 1))
            kind = random.integers(0, 9)
            if kind < 3:
                attempt(size, GRAPHS, policy, manager.replay)
            elif kind == 3:
                attempt(size, BUCKETS, alone, manager.stage_inputs)
            elif kind == 4:
                attempt(size, GRAPHS, policy, leased("replay"))
            elif kind == 5:
                attempt(size, BUCKETS, alone, leased("fill"))
            elif kind == 6:
                leased("discard")({"x": np.ones(size, np.int64)}, size)
                with pytest.raises(ValueError, match="x"):
                    manager.replay({"x": np.ones(3, np.int64)}, 4)
            elif kind == 7 and size:
                manager.record_usage(size)
                ledger.demand(size)
            elif kind == 8:
                ledger.expected = set(manager.predict_next_sizes(2)) or None
        found, predicted = manager.stats(), manager.prediction()
        steps = Counter(found.buckets) - Counter(before.buckets)
        live = Counter(found.bucket_tokens) - Counter(before.bucket_tokens)
        assert steps == ledger.steps and live == +ledger.live
        assert found.steps - before.steps == ledger.steps.total()
        assert found.live_tokens == ledger.live.total()
        assert found.padded_tokens - before.padded_tokens == sum(size * n for size, n in ledger.steps.items())
        assert found.overflows == ledger.overflows
        assert predicted.unserved == ledger.overflows + ledger.refused
        assert (predicted.hits, predicted.misses) == (ledger.hits, ledger.misses)
        assert [size for _, size in manager.demand.seen] == ledger.seen
        assert predicted.padding == found.padding
        manager.check()


@pytest.mark.parametrize("steps", [4095, 8193, 30_000])
def test_every_step_since_a_forecast_is_a_hit_or_a_miss_and_few_are_kept(steps):
    with PredictiveBufferManager(None, 1, CAPACITY, demand=DemandModel(64, buckets=KNOWN)) as manager:
        manager.record_usage(9)
        assert manager.predict_next_sizes(1) == [9]
        for at in range(steps):
            manager.record_usage(7 if at % 3 else 1)
        found = manager.prediction()
        assert (found.hits, found.misses) == (steps - -(-steps // 3), -(-steps // 3))
        assert len(manager.demand) == 64


def test_refused_sizes_are_demand_and_prewarming_serves_them():
    log, row = to_device(np.zeros((1, CAPACITY), np.int64)), to_device(np.zeros(1, np.int64))
    with PredictiveBufferManager(None, 1, CAPACITY, default_slots=False, max_graphs=3) as manager:
        manager.register_slot("x", BufferSpec(CAPACITY, "int64"))
        manager.capture_buckets(lambda s: log_row[(*LAUNCH, s.stream)](s["x"], log, row), [4])
        for _ in range(40):
            with pytest.raises(BucketOverflowError):
                manager.replay({"x": np.arange(7)}, 7)
        with pytest.raises(BucketOverflowError):
            manager.replay({}, 1 << 50)  # what no slot can hold is counted, and teaches nothing
        assert manager.prediction().unserved == 41
        assert [size for _, size in manager.demand.seen] == [7] * 40
        assert 7 in manager.prewarm()
        manager.replay({"x": np.arange(7)}, 7)


def test_a_refusal_observer_that_fails_hides_no_refusal(caplog):
    def observer(size):
        raise ZeroDivisionError("mine")

    with PredictiveBufferManager(None, 1, CAPACITY, buckets=[4]) as manager:
        manager.refusal_observer = observer
        with pytest.raises(BucketOverflowError):
            manager.stage_inputs({}, 9)
        assert manager.prediction().unserved == 1 and len(manager.demand) == 1
    assert "on a step of 9 tokens: ZeroDivisionError('mine')" in caplog.text


def test_what_asks_in_the_middle_of_learning_is_refused_and_no_step_is_lost():
    """As a signal handler asks; here the model's clock does."""
    refused = []

    def clock():
        for ask in (manager.prediction, lambda: manager.predict_next_sizes(1), lambda: manager.adopt(DemandModel())):
            with pytest.raises(BusyError, match="when the call that learns it has returned"):
                ask()
            refused.append(ask)
        return 0.0

    model = DemandModel(clock=clock)
    with PredictiveBufferManager(None, 1, CAPACITY, demand=model) as manager:
        for size in (3, 5, 7):
            manager.record_usage(size)
        assert [size for _, size in manager.demand.seen] == [3, 5, 7]
        assert len(refused) == 9 and manager.demand is model


@pytest.mark.parametrize("seed", range(3))
def test_a_history_of_prewarming_is_counted_as_it_was(seed):
    random = np.random.default_rng(seed)
    log, row = to_device(np.zeros((1, CAPACITY), np.int64)), to_device(np.zeros(1, np.int64))
    failing, calls = set(), Counter()

    def fn(step):
        calls[step.bucket["tokens"]] += 1
        if step.bucket["tokens"] in failing:
            raise RuntimeError("no")
        log_row[(*LAUNCH, step.stream)](step["x"], log, row)

    with PredictiveBufferManager(None, 1, CAPACITY, default_slots=False, max_graphs=3) as manager:
        manager.register_slot("x", BufferSpec(CAPACITY, "int64"))
        manager.capture_buckets(fn, [CAPACITY])
        manager.synchronize()
        before = Counter(manager.stats().buckets)
        warm, used, ran = {}, Counter(), Counter()  # number of a warmed graph -> its size; steps of it; steps by size
        present, warmed, closed, failures = {}, 0, 0, 0  # size -> number of the warmed graph that serves it
        for at in range(12):
            middle = int(random.integers(1, CAPACITY))
            for _ in range(40):
                size = min(CAPACITY, middle + int(random.integers(0, 3)))
                manager.replay({"x": np.ones(size, np.int64)}, size)
                bucket = min(known for known in (*present, CAPACITY) if known >= size)
                ran[bucket] += 1
                if bucket in present:
                    used[present[bucket]] += 1
            manager.synchronize()
            failing = {min(CAPACITY - 1, middle + int(random.integers(0, 3))) for _ in range(at % 3)}
            calls.clear()
            captured = manager.prewarm()
            failures += sum(calls[size] > 0 for size in failing - set(captured))
            for size in captured:
                warm[warmed] = size
                present[size] = warmed
                warmed += 1
            served = {one.num_tokens for one in manager.captured} - {CAPACITY}
            closed += len(present.keys() - served)
            present = {size: number for size, number in present.items() if size in served}
            found = manager.prediction()
            assert served == set(present)
            assert (found.warmed, found.closed, found.failures) == (warmed, closed, failures)
            assert found.warmed_unused == sum(used[number] == 0 for number in warm)
            assert manager.stats().graphs == 1 + len(present)
            assert Counter(manager.stats().buckets) - before == ran
        assert warmed, "the history is one of prewarming"
