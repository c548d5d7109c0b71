"""track(): yields everything, writes to standard error only, and clears its line."""

import importlib.util
import itertools
import sys

import pytest

from numbabuf import InputBufferManager, PredictiveBufferManager
from numbabuf.view.progress import track


@pytest.mark.parametrize("total", [3, None])
@pytest.mark.parametrize("installed", [True, False])
def test_every_item_comes_through(capsys, monkeypatch, total, installed):
    if not installed:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    elif importlib.util.find_spec("tqdm") is None:
        pytest.skip("tqdm is not installed")
    items = track("abc", label="reading", total=total, enabled=True, note=str.upper)
    assert list(items) == ["a", "b", "c"]
    out, err = capsys.readouterr()
    assert out == "" and "\r" in err and "reading" in err and "A" in err
    assert list(track("abc", label="reading", total=total, enabled=False)) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_the_counter_clears_its_line_when_the_work_fails(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    items = track("abc", label="reading", total=3, enabled=True)
    next(items)
    items.close()
    assert capsys.readouterr().err == "\r\x1b[Kreading 0/3 \r\x1b[K"


def test_a_capture_that_fails_says_how_far_it_came(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)

    calls = []

    def refuse_the_smallest(step):
        calls.append(step.bucket["tokens"])
        if calls.count(2) == 2:  # the first call compiles, in a capture that is thrown away
            raise RuntimeError("refused")

    with InputBufferManager(max_batch_size=1, max_seq_len=8, buckets=[2, 4, 8]) as manager:
        with pytest.raises(RuntimeError, match="refused"):
            manager.capture_buckets(refuse_the_smallest, progress=True)
        assert manager.stats().graphs == 0
    err = capsys.readouterr().err
    assert "capture_buckets: stopped after 2 of 3: RuntimeError at capture {'tokens': 2}; none is kept" in err


def test_a_prewarming_that_ends_early_says_why(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with PredictiveBufferManager(
        max_batch_size=1, max_seq_len=64, max_graphs=3, prewarm_seconds=0, clock=itertools.count().__next__
    ) as manager:
        for size in [3, 20] * 100:
            manager.record_usage(size)
        assert len(manager.prewarm(lambda step: None, progress=True)) == 1
        assert "prewarm: stopped after 1 of 3: the budget of 0 s is spent" in capsys.readouterr().err
        assert manager.prewarm() and capsys.readouterr().err == ""
