"""track(): yields everything, writes to standard error only, and clears its line."""

import importlib.util
import sys

import pytest

from numbabuf.progress import track


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
