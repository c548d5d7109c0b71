"""Pictures with matplotlib: demand and forecast, padding by bucket, tiers over time.

Each function draws one picture, on axes that it is given or on new ones, and returns the axes. matplotlib (the extra
"plot") is imported when the first picture is drawn. Reads models and snapshots, changes none; nothing imports it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from ..demand.compare import Comparison
from ..demand.model import DemandModel, Forecast
from ..pool.spec import Tier
from ..step.stats import ManagerStats
from . import html
from .timeline import occupancy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["comparison", "demand", "padding", "tiers"]

_LIVE, _PADDED, _MARK = html.COLORS[:3]


def _axes(ax: Axes | None, width: float = 7, height: float = 3.2) -> Axes:
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install 'numbabuf[plot]'") from error
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def demand(
    model: DemandModel, *, forecast: Iterable[Forecast] = (), buckets: Iterable[int] = (), ax: Axes | None = None
) -> Axes:
    """Draw how often each size was asked for, the chance of those forecast, and the buckets that serve them.

    Parameters
    ----------
    model : DemandModel
        Its window is drawn.
    forecast : iterable of Forecast
        What ``model.forecast(k)`` returned; drawn as points on a second scale, from 0 to 1.
    buckets : iterable of int
        Drawn as thin lines, for instance what `buckets.plan` returned.
    ax : matplotlib.axes.Axes, optional
        Where to draw.

    Returns
    -------
    ax : matplotlib.axes.Axes
    """
    ax = _axes(ax)
    sizes, counts = model.histogram()
    ax.hist(sizes, bins=_edges(ax, sizes), weights=counts, color=_LIVE, label="observed")
    ax.set_xlabel("size")
    ax.set_ylabel("steps")
    ax.set_title(f"demand: the last {len(model):,} steps")
    lines = list(buckets)
    for at, bucket in enumerate(lines):
        ax.axvline(bucket, color="gray", linewidth=0.8, linestyle=":", zorder=0, label=None if at else "bucket")
    points = list(forecast)
    if points:
        chance = ax.twinx()
        chance.set_ylim(0, 1.05)
        chance.set_ylabel("chance of use")
        x, y = [point.size for point in points], [point.probability for point in points]
        marks = chance.stem(x, y, linefmt=_MARK, markerfmt="o", basefmt=" ")
        marks.stemlines.set_linewidth(1.2)
        ax.plot([], [], "o", color=_MARK, label="forecast")
    ax.legend(frameon=False, loc="upper right")
    return ax


def _edges(ax: Axes, sizes: np.ndarray) -> list[float]:
    """Where the columns of a histogram begin and end; a long tail gets a logarithmic scale, columns by doublings."""
    if not sizes.size:
        return [0, 1]
    if sizes[-1] < 32 * sizes[0]:
        return np.histogram_bin_edges(sizes, bins=min(60, sizes.size)).tolist()  # type: ignore[no-any-return]
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:.0f}")
    points = np.geomspace(sizes[0], sizes[-1] + 1, 36)
    return (np.unique(np.ceil(points)) - 0.5).tolist()  # type: ignore[no-any-return]


def padding(stats: ManagerStats, *, ax: Axes | None = None) -> Axes:
    """Draw, for each bucket, the tokens that were asked for and those that were padding.

    Parameters
    ----------
    stats : ManagerStats
        Of one manager.
    ax : matplotlib.axes.Axes, optional
        Where to draw.

    Returns
    -------
    ax : matplotlib.axes.Axes
    """
    ax = _axes(ax)
    rows = stats.padding_rows()
    names = [f"{bucket:,}" for bucket, *_ in rows]
    live = np.array([tokens for _, _, tokens, _ in rows])
    whole = np.array([bucket * steps for bucket, steps, _, _ in rows])
    ax.bar(names, live, color=_LIVE, label="asked for")
    bars = ax.bar(names, whole - live, bottom=live, color=_PADDED, label="padding")
    ax.bar_label(bars, [f"{steps:,} steps\n+{percent:.0f} %" for _, steps, _, percent in rows], padding=2, fontsize=8)
    ax.margins(y=0.22)
    ax.set_xlabel("bucket")
    ax.set_ylabel("tokens")
    ax.set_title(f"padding: {100 * stats.padding:.1f} % over {stats.steps:,} steps")
    ax.legend(frameon=False)
    return ax


def tiers(events: np.ndarray, *, ax: Axes | None = None) -> Axes:
    """Draw the bytes that were leased and reserved in each tier over time.

    Parameters
    ----------
    events
        What ``pool.events()`` returns.
    ax : matplotlib.axes.Axes, optional
        Where to draw.

    Returns
    -------
    ax : matplotlib.axes.Axes
    """
    ax = _axes(ax)
    time_us, leased, reserved = occupancy(events)
    top = max(int(reserved.max(initial=0)), int(leased.max(initial=0)))
    power = max(0, (top.bit_length() - 1) // 10)
    unit, scale = ("B", "KiB", "MiB", "GiB", "TiB")[power], 1024.0**power
    for at, tier in enumerate(Tier):
        if reserved[:, at].any() or leased[:, at].any():
            color = html.COLORS[(0, 3, 2)[at]]
            ax.fill_between(time_us / 1000, leased[:, at] / scale, step="post", alpha=0.35, color=color, linewidth=0)
            ax.step(time_us / 1000, reserved[:, at] / scale, where="post", color=color, label=tier.value)
    ax.set_xlabel("ms since the first event")
    ax.set_ylabel(unit)
    ax.set_ylim(0)
    ax.set_title("tiers: reserved (line) and leased (filled)")
    if ax.get_legend_handles_labels()[1]:
        ax.legend(frameon=False)
    return ax


def comparison(found: Comparison, *, ax: Axes | None = None) -> Axes:
    """Draw the padding of each bucket list as a bar.

    Parameters
    ----------
    found : Comparison
        What `planning.compare` returned. Steps that a list has no bucket for are named at its bar: its padding speaks
        of the others alone.
    ax : matplotlib.axes.Axes, optional
        Where to draw.

    Returns
    -------
    ax : matplotlib.axes.Axes
    """
    ax = _axes(ax, height=0.4 * len(found.fits) + 1)
    names = [f"{fit.name} ({len(fit.buckets)})" for fit in found.fits]
    colours = ["tab:green"] + ["tab:gray"] * (len(names) - 1)
    bars = ax.barh(names, [100 * fit.padding for fit in found.fits], color=colours)
    labels = [
        f"{100 * fit.padding:.1f} %" + (f", {100 * (1 - fit.covered):.1f} % uncovered" if fit.covered < 1 else "")
        for fit in found.fits
    ]
    ax.bar_label(bars, labels, padding=3)
    ax.margins(x=0.25)
    ax.invert_yaxis()
    ax.set_xlabel("padding, % of the work asked for")
    ax.set_title(f"{found.steps:,} steps")
    return ax
