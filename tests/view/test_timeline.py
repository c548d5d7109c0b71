"""The timeline export: nothing is lost or invented, and PyTorch's own reader takes the file where it is installed."""

import json
import pickle

import numpy as np
import pytest

from numbabuf import BufferSpec, SimpleBufferPool, Tier
from numbabuf.pool.stats import EVENT_DTYPE, EventRing
from numbabuf.view import timeline

SPEC = BufferSpec(1024, "uint8")
PINNED = BufferSpec(2048, "uint8", Tier.PINNED)


@pytest.fixture
def events():
    """A lease that ends, one that does not, a reuse, and memory given back."""
    with SimpleBufferPool(events=100) as pool:
        pool.allocate(SPEC).release()
        again = pool.allocate(SPEC)
        pinned = pool.allocate(PINNED)
        pinned.release()
        pool.clear()
        yield pool.events()
        again.release()


def of_phase(trace, phase):
    return [entry for entry in trace["traceEvents"] if entry["ph"] == phase]


def test_every_lease_is_one_slice(events):
    trace = json.loads(json.dumps(timeline.chrome_trace(events)))
    begins, ends = of_phase(trace, "b"), of_phase(trace, "e")
    assert len(begins) == len(ends) == 3
    for begin in begins:
        (end,) = (entry for entry in ends if entry["id"] == begin["id"])
        assert end["ts"] >= begin["ts"] and end["cat"] == begin["cat"] and end["name"] == begin["name"]
    assert sorted(begin["cat"] for begin in begins) == ["device", "device", "pinned"]
    assert {entry["name"].split()[0] for entry in of_phase(trace, "i")} == {"grow", "miss", "free"}
    assert all({"ph", "pid", "ts"} <= entry.keys() for entry in trace["traceEvents"] if entry["ph"] != "M")


def test_counters_follow_the_pool(events):
    counters = of_phase(timeline.chrome_trace(events), "C")
    last = {entry["name"]: entry["args"] for entry in counters}
    assert last["device bytes"] == {"leased": 1024, "reserved": 1024}
    assert last["pinned bytes"] == {"leased": 0, "reserved": 0}


def test_occupancy_never_falls_below_zero_though_the_beginning_is_lost():
    with SimpleBufferPool(events=3) as pool:
        first, second = pool.allocate(SPEC), pool.allocate(PINNED)
        first.release()
        second.release()
        pool.clear()
        events = pool.events()
        assert len(events) == 3
        time_us, leased, reserved = timeline.occupancy(events)
        assert leased.shape == reserved.shape == (3, 3) and (np.diff(time_us) >= 0).all()
        assert (leased >= 0).all() and (reserved >= 0).all()
        assert reserved[-1].tolist() == [0, 0, 0]
        assert of_phase(timeline.chrome_trace(events), "b") == []


def test_no_events_make_an_empty_timeline():
    none = np.zeros(0, EVENT_DTYPE)
    assert [entry["ph"] for entry in timeline.chrome_trace(none)["traceEvents"]] == ["M"]
    assert timeline.memory_snapshot(none)["segments"] == []


def test_a_snapshot_holds_what_is_left(events):
    snapshot = timeline.memory_snapshot(events)
    (segment,) = snapshot["segments"]
    (block,) = segment["blocks"]
    assert (segment["device"], segment["total_size"], segment["allocated_size"]) == (0, 1024, 1024)
    assert block["state"] == "active_allocated" and block["address"] == segment["address"]
    device, managed, pinned = snapshot["device_traces"]
    actions = ["segment_alloc", "alloc", "free_requested", "free_completed"]
    assert [entry["action"] for entry in device] == [*actions, "alloc"]
    assert managed == []
    assert [entry["action"] for entry in pinned] == [*actions, "segment_free"]


def test_every_kind_of_event_can_be_written():
    ring = EventRing(len(EventRing.KINDS))
    for at, kind in enumerate(EventRing.KINDS):
        ring.add(kind, Tier.DEVICE, 4096 * (at + 1), 256, 1)
    assert len(timeline.memory_snapshot(ring.snapshot())["device_traces"][0]) == len(EventRing.KINDS) + 1
    assert timeline.chrome_trace(ring.snapshot())["traceEvents"]


def test_pytorch_reads_the_file(events, tmp_path):
    viz = pytest.importorskip("torch.cuda._memory_viz", reason="torch is not installed", exc_type=ImportError)
    timeline.save(tmp_path / "pool.pickle", events)
    with open(tmp_path / "pool.pickle", "rb") as file:
        snapshot = pickle.load(file)
    told = viz.trace(snapshot)
    assert "cudaMalloc" in told and "free completed" in told and "Device 2" in told
    assert "total_allocated: 1.0KiB" in viz.segsum(snapshot)
    assert "<html" in viz.trace_plot(snapshot)


def test_the_suffix_says_what_is_written(events, tmp_path):
    timeline.save(tmp_path / "pool.json", events)
    assert json.loads((tmp_path / "pool.json").read_text()) == timeline.chrome_trace(events)
    with pytest.raises(ValueError, match="Perfetto"):
        timeline.save(tmp_path / "pool.txt", events)
    assert not (tmp_path / "pool.txt").exists()
    with pytest.raises(TypeError, match="events"):
        timeline.save(tmp_path / "other.json", [1, 2])
    assert not (tmp_path / "other.json").exists()
