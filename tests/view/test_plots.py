"""Pictures: what is drawn is what was counted. Needs matplotlib; without it the remedy is named."""

import sys

import numpy as np
import pytest

from numbabuf import BufferSpec, SimpleBufferPool, Tier
from numbabuf.demand.model import DemandModel, Forecast
from numbabuf.pool.stats import EVENT_DTYPE
from numbabuf.step.stats import ManagerStats
from numbabuf.view import plots


def test_without_matplotlib_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'numbabuf\[plot\]'"):
        plots.demand(DemandModel())


@pytest.fixture
def ax():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from matplotlib.figure import Figure  # without pyplot: no display, and nothing to close

    figure = Figure()
    yield figure.add_subplot()
    figure.canvas.draw()  # a picture that cannot be drawn fails here


def test_demand(ax):
    model = DemandModel()
    for size in [5, 5, 5, 30]:
        model.observe(size)
    assert plots.demand(model, forecast=[Forecast(5, 0.75)], buckets=[8, 32], ax=ax) is ax
    assert sum(bar.get_height() for bar in ax.patches) == 4
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["observed", "bucket", "forecast"]
    assert len(ax.figure.axes) == 2  # the second scale is the forecast's


def test_demand_of_a_new_model(ax):
    plots.demand(DemandModel(), ax=ax)


def test_padding(ax):
    stats = ManagerStats(
        steps=3, live_tokens=15, padded_tokens=24, buckets={4: 2, 16: 1}, overflows=0, ring_waits=0, graphs=2,
        arena_bytes=0, ring_bytes=0, bucket_tokens={4: 6, 16: 9},
    )  # fmt: skip
    plots.padding(stats, ax=ax)
    live, padding = ax.containers
    assert [bar.get_height() for bar in live] == [6, 9]
    assert [(bar.get_y(), bar.get_height()) for bar in padding] == [(6, 2), (9, 7)]


def test_tiers(ax):
    with SimpleBufferPool(events=100) as pool:
        entry = pool.allocate(BufferSpec(2048, "uint8", Tier.PINNED))
        pool.allocate(BufferSpec(1024, "uint8")).release()
        plots.tiers(pool.events(), ax=ax)
        entry.release()
    assert [line.get_label() for line in ax.lines] == ["device", "pinned"]
    assert [float(line.get_ydata()[-1]) for line in ax.lines] == [1, 2] and ax.get_ylabel() == "KiB"


def test_tiers_of_a_pool_without_events(ax):
    plots.tiers(np.zeros(0, EVENT_DTYPE), ax=ax)
