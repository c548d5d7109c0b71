"""Planned lists beside other engines' lists: the rules, what is measured, and how it is shown."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numbabuf import planning
from numbabuf.demand.buckets import padded
from numbabuf.planning import LISTS, SGLANG, TENSORRT_LLM, VLLM, Fit, compare


def test_the_rules():
    assert VLLM.sizes(512)[:5] == (1, 2, 4, 8, 16) and len(VLLM.sizes(512)) == 51
    assert VLLM.sizes(272)[-3:] == (248, 256, 272)
    assert SGLANG.sizes(512)[:6] == (1, 2, 4, 8, 12, 16) and SGLANG.sizes(512)[-3:] == (480, 496, 512)
    assert TENSORRT_LLM.sizes(4096)[-5:] == (128, 256, 512, 1024, 2048)


@pytest.mark.parametrize("other", LISTS, ids=lambda other: other.name)
@given(max_size=st.integers(1, 5000))
def test_every_rule_gives_a_list_up_to_the_maximum(other, max_size):
    sizes = other.sizes(max_size)
    assert sizes == tuple(sorted(set(sizes)))
    assert 1 <= sizes[0] and sizes[-1] <= max_size


def test_a_fit_is_measured_on_what_the_list_covers():
    fit = Fit.of("some", [4, 8], np.array([3, 3, 8, 100]))
    assert fit == Fit("some", (4, 8), padding=16 / 14 - 1, covered=0.75, used=2)
    assert Fit.of("none", [2], np.array([3, 4])).covered == 0


@given(st.lists(st.integers(1, 700), min_size=1, max_size=60), st.integers(1, 24))
def test_the_planned_list_pads_no_more_than_any_list_of_its_count(sizes, k):
    found = compare(sizes, k)
    assert found.steps == len(sizes)
    assert found.planned.covered == 1 and found.planned.buckets[-1] == max(sizes)
    total = padded(sizes, found.planned.buckets).sum()
    for fit, whole in zip(found.at_equal_count, found.as_they_are, strict=True):
        assert set(fit.buckets) <= set(whole.buckets)
        assert len(fit.buckets) == min(len(whole.buckets), len(found.planned.buckets))
        assert fit.covered == whole.covered
        if fit.covered == 1:
            # the planner counts on a hundredth of demand that it has not seen, so not to the last token
            assert total <= 1.05 * padded(sizes, fit.buckets).sum() + 8


def test_a_thinned_list_keeps_what_pads_least():
    found = compare([7, 7, 7, 100], 2)
    (thin,) = (fit for fit in found.at_equal_count if fit.name.startswith("vLLM"))
    assert thin.buckets == (8, 96)  # 100 itself is not in vLLM's list
    assert (thin.covered, thin.used) == (0.75, 1)


def test_the_table_names_every_list_and_the_planned_sizes():
    text = compare([3, 3, 5, 60], 3).table()
    assert text.startswith("buckets: 3, 5, 60\n")
    for name in ("planned", "powers of two", "vLLM", "SGLang", "TensorRT-LLM", "padding %", "covered %"):
        assert name in text
    rows = text.split("\n")[2:]
    assert len(rows) == 1 + 1 + 2 * len(LISTS)
    assert len({len(row) for row in rows}) == 1


@pytest.mark.parametrize("sizes", [[], [[1, 2]], [1.5], ["a"], [0, 1], [-1]], ids=repr)
def test_what_is_no_stream_is_refused(sizes):
    with pytest.raises((ValueError, TypeError), match="sizes"):
        compare(sizes, 4)


def test_a_plot_has_a_bar_for_each_list():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    found = compare([3, 3, 5, 600], 3)
    ax = found.plot()
    assert len(ax.patches) == len(found.fits)
    assert any("uncovered" in text.get_text() for text in ax.texts)
    matplotlib.pyplot.close(ax.figure)


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"numbabuf\[plot\]"):
        planning.compare([1], 1).plot()
