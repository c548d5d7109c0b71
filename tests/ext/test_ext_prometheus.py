"""The Prometheus collector against the real client: its text parses back to what `stats()` says, on scrape only."""

import gc

import numpy as np
import pytest

from numbabuf.errors import BucketOverflowError
from numbabuf.ext.prometheus import _HIERARCHY, _MANAGER, _POOL, _PREDICTION, Collector
from numbabuf.pool.pool import SimpleBufferPool
from numbabuf.pool.spec import BufferSpec, Tier
from numbabuf.predict.manager import PredictiveBufferManager
from numbabuf.step.manager import InputBufferManager
from numbabuf.tiers.pool import HierarchicalBufferPool

client = pytest.importorskip("prometheus_client")
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

SPEC = BufferSpec(1000, "uint8", Tier.PINNED)


def scrape(collector):
    """What a server would send, read back: {(sample, name, other label...): value}."""
    registry = client.CollectorRegistry()
    registry.register(collector)
    samples = {}
    for family in text_string_to_metric_families(client.generate_latest(registry).decode()):
        assert family.documentation.endswith(".")
        for sample in family.samples:
            name = sample.labels.pop("name")
            key = (sample.name.removeprefix("numbabuf_"), name, *sample.labels.values())
            assert key not in samples
            samples[key] = sample.value
    return samples


def test_a_pools_figures():
    with SimpleBufferPool() as pool:
        pool.allocate(SPEC).release()
        entry = pool.allocate(SPEC)
        found, stats = scrape(Collector(mine=pool)), pool.stats()
        entry.release()
    assert found["pool_bytes", "mine", "in_use"] == stats.in_use_bytes == 1024
    assert found["pool_bytes", "mine", "idle"] == found["pool_buffers", "mine", "idle"] == 0
    assert found["pool_peak_bytes", "mine"] == 1024
    assert found["pool_tier_bytes", "mine", "pinned"] == 1024
    assert found["pool_waste_bytes", "mine"] == 24
    assert found["pool_leases_total", "mine", "exact"] == found["pool_leases_total", "mine", "driver"] == 1
    assert found["pool_leased_bytes_total", "mine"] == 2048
    assert found["pool_oom_total", "mine", "trim"] == 0
    assert not any(name.startswith("pool_move") for name, *_ in found)


def test_a_managers_figures():
    with InputBufferManager(max_batch_size=1, max_seq_len=16, buckets=[4, 16]) as manager:
        for size in (3, 4, 9):
            manager.stage_inputs({"input_ids": np.arange(size)}, size)
        found, stats = scrape(Collector(serving=manager)), manager.stats()
    assert found["manager_steps_total", "serving", "4"] == 2
    assert found["manager_steps_total", "serving", "16"] == 1
    assert found["manager_tokens_total", "serving", "live"] == 16
    assert found["manager_tokens_total", "serving", "padded"] == 24
    assert found["manager_bytes", "serving", "slots"] == stats.arena_bytes > 0
    assert not any(name.startswith("prediction") for name, *_ in found)


def test_what_only_some_of_them_have():
    with (
        PredictiveBufferManager(max_batch_size=1, max_seq_len=16) as manager,
        HierarchicalBufferPool(device_bytes=1 << 16, pinned_bytes=1 << 16) as pool,
    ):
        found = scrape(Collector(a=manager, b=pool))
    assert {key for key in found if key[0] == "prediction_steps_total"} == {
        ("prediction_steps_total", "a", "hit"),
        ("prediction_steps_total", "a", "miss"),
    }, "their sum is the steps that a forecast was made for"
    assert found["prediction_steps_total", "a", "miss"] == found["manager_overflows_total", "a"] == 0
    assert found["pool_moves_total", "b", "promotion"] == 0
    assert found["pool_moved_bytes_total", "b"] == 0


def test_nothing_is_read_before_a_scrape():
    class Counting(SimpleBufferPool):
        reads = 0

        def stats(self):
            self.reads += 1
            return super().stats()

    with Counting() as pool:
        collector = Collector(mine=pool)
        registry = client.CollectorRegistry()
        registry.register(collector)
        pool.allocate(SPEC).release()
        assert pool.reads == 0
        client.generate_latest(registry)
        assert pool.reads == 1


def test_two_of_a_kind_share_a_family():
    with SimpleBufferPool() as one, SimpleBufferPool() as two:
        two.allocate(SPEC).release()
        found = scrape(Collector(one=one, two=two))
        assert found["pool_bytes", "one", "idle"] == 0
        assert found["pool_bytes", "two", "idle"] == 1024


def test_the_gone_and_the_closed_are_left_out():
    gone, closed = SimpleBufferPool(), SimpleBufferPool()
    collector = Collector(gone=gone, closed=closed)
    assert {name for _, name, *_ in scrape(collector)} == {"gone", "closed"}
    closed.close()
    del gone
    gc.collect()
    assert scrape(collector) == {}


def test_other_things_are_refused():
    with pytest.raises(TypeError, match="x=3 cannot be watched"):
        Collector(x=3)


@pytest.mark.parametrize("name", [5, None, b"x", "\ud800"], ids=ascii)
def test_a_name_that_no_scrape_can_carry_is_refused_at_once(name):
    with SimpleBufferPool() as pool:
        collector = Collector(mine=pool)
        with pytest.raises((TypeError, ValueError), match="cannot be a label"):
            collector.watch(name, pool)
        assert {name for _, name, *_ in scrape(collector)} == {"mine"}


def test_any_text_is_a_name():
    with SimpleBufferPool() as pool:
        collector = Collector()
        for name in ("", 'a "b"\n\\', "Gröe"):
            collector.watch(name, pool)
        assert {name for _, name, *_ in scrape(collector)} == {"", 'a "b"\n\\', "Gröe"}


def test_one_that_fails_is_left_out_and_logged(caplog):
    class Failing(SimpleBufferPool):
        def stats(self):
            raise RuntimeError("its device is gone")

    with SimpleBufferPool() as pool, Failing() as failing:
        assert {name for _, name, *_ in scrape(Collector(bad=failing, good=pool))} == {"good"}
    assert "bad is left out of a scrape: its device is gone" in caplog.text


def test_what_was_counted_of_predictions():
    with PredictiveBufferManager(max_batch_size=1, max_seq_len=16, buckets=[4]) as manager:
        manager.record_usage(3)
        manager.predict_next_sizes(1)
        for size in (3, 3, 4):
            manager.stage_inputs({"input_ids": np.arange(size)}, size)
        with pytest.raises(BucketOverflowError):
            manager.stage_inputs({"input_ids": np.arange(9)}, 9)
        found, stats = scrape(Collector(a=manager)), manager.prediction()
    outcomes = {key[2]: value for key, value in found.items() if key[0] == "prediction_steps_total"}
    assert outcomes == {"hit": stats.hits, "miss": stats.misses} and sum(outcomes.values()) == 4
    assert found["prediction_unserved_total", "a"] == 1


def test_every_name_is_one_that_prometheus_advises():
    names = [metric.name for metric in (*_POOL, *_HIERARCHY, *_MANAGER, *_PREDICTION)]
    assert len(set(names)) == len(names)
    assert all(name == name.lower() and name.replace("_", "").isalpha() for name in names)
