"""Bar: what captures report, on standard error only, and a line that is cleared."""

import importlib.util
import itertools
import sys

import pytest

from numbabuf import InputBufferManager, PredictiveBufferManager
from numbabuf.progress import Bar


@pytest.fixture(params=["tqdm", "counter"])
def shown_by(request, monkeypatch):
    if request.param == "counter":
        monkeypatch.setitem(sys.modules, "tqdm", None)
    elif importlib.util.find_spec("tqdm") is None:
        pytest.skip("tqdm is not installed")
    return request.param


@pytest.mark.parametrize("total", [3, 0])
def test_a_bar_shows_what_it_is_told_and_clears_its_line(capsys, shown_by, total):
    with Bar("reading") as bar:
        for done in range(1, 4):
            bar(done, total, {"tokens": 7}, 2048)
    out, err = capsys.readouterr()
    assert out == "" and "reading" in err and "tokens=7" in err and "2 KiB free" in err
    assert err.rstrip(" ").endswith(("\r", "\x1b[K")) and "stopped" not in err


def test_a_bar_that_is_told_nothing_shows_nothing(capsys, shown_by):
    with Bar("reading"):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_capture_that_fails_says_how_far_it_came(capsys, shown_by):
    calls = []

    def refuse_the_smallest(step):
        calls.append(step.bucket["tokens"])
        if calls.count(2) == 2:  # the first call compiles, in a capture that is thrown away
            raise RuntimeError("refused")

    with InputBufferManager(max_batch_size=1, max_seq_len=8, buckets=[2, 4, 8]) as manager:
        with pytest.raises(RuntimeError, match="refused"), Bar("capture") as bar:
            manager.capture_buckets(refuse_the_smallest, on_progress=bar)
        assert manager.stats().graphs == 0
    assert "capture: stopped after 5 of 6: RuntimeError" in capsys.readouterr().err


def test_each_call_of_a_capture_is_reported():
    told = []
    with InputBufferManager(max_batch_size=1, max_seq_len=8, buckets=[2, 8]) as manager:
        manager.capture_buckets(lambda step: None, on_progress=lambda *item: told.append(item[:3]))
    assert told == [(1, 4, {"tokens": 8}), (2, 4, {"tokens": 2}), (3, 4, {"tokens": 8}), (4, 4, {"tokens": 2})]


def test_what_the_callable_raises_ends_the_capture_and_keeps_no_graph():
    def stop(done, total, size, free_bytes):
        if done == 3:
            raise KeyboardInterrupt

    with InputBufferManager(max_batch_size=1, max_seq_len=8, buckets=[2, 8]) as manager:
        with pytest.raises(KeyboardInterrupt):
            manager.capture_buckets(lambda step: None, on_progress=stop)
        assert manager.stats().graphs == 0
        manager.capture_buckets(lambda step: None)
        assert manager.stats().graphs == 2


def test_a_prewarming_that_ends_early_says_how_far_it_came(capsys, shown_by):
    with PredictiveBufferManager(
        max_batch_size=1, max_seq_len=64, max_graphs=3, prewarm_seconds=0, clock=itertools.count().__next__
    ) as manager:
        for size in [3, 20] * 100:
            manager.record_usage(size)
        with Bar("prewarm") as bar:
            assert len(manager.prewarm(lambda step: None, on_progress=bar)) == 1
        assert "prewarm: stopped after 1 of 3" in capsys.readouterr().err
        assert manager.prewarm() and capsys.readouterr().err == ""


def test_what_cannot_be_called_is_refused_before_anything_runs():
    calls = []
    with PredictiveBufferManager(max_batch_size=1, max_seq_len=8, buckets=[8]) as manager:
        for refused in (
            lambda: manager.capture_buckets(calls.append, on_progress=5),
            lambda: manager.prewarm(calls.append, on_progress=True),
        ):
            with pytest.raises(TypeError, match="give a function of"):
                refused()
    assert not calls
