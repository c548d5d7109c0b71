"""Pictures of result files, one for each benchmark that has one: `python -m benchmarks plot RESULTS.json`.

Reads what `--json` wrote and measures nothing. Each picture names the device and the driver that its figures belong to.
matplotlib (the extra "plot") is imported when the first picture is drawn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numbabuf.view.html import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = list[dict[str, Any]]

_OURS = COLORS[0]
_OTHERS = (*COLORS[1:], "#8c564b", "#7f7f7f", "#bcbd22", "#17becf", "#9467bd", "#e377c2", "#000000")


def draw(file: Path, folder: Path, suffix: str = "svg") -> Iterator[Path]:
    """Draw every benchmark of a result file that has a picture; yields the path of each picture written.

    Parameters
    ----------
    file : Path
        What ``--json`` wrote.
    folder : Path
        Made if it is not there. A picture is named after the file and the benchmark.
    suffix
        "svg" or "png".

    Raises
    ------
    ImportError
        matplotlib is not installed.
    ValueError
        The file is no result of the benchmarks, or has nothing that can be drawn.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install 'numbabuf[plot]'") from error
    try:
        document = json.loads(file.read_text())
        environment, results = document["environment"], document["results"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no result file ({error!r}): give one that --json wrote") from error
    drawn = [name for name in results if name in PICTURES]
    if not drawn:
        raise ValueError(f"{file} holds {', '.join(results) or 'nothing'}; pictures are of {', '.join(PICTURES)}")
    folder.mkdir(parents=True, exist_ok=True)
    for name in drawn:
        # Letters stay text, and nothing random or dated goes in: small files, equal for equal results.
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "numbabuf", "font.size": 9}):
            figure = Figure(figsize=(8, 4), layout="constrained")
            PICTURES[name](figure, results[name])
            figure.suptitle(f"{name}: {_where(environment)}", fontsize=10)
            path = folder / f"{file.stem}-{name}.{suffix}"
            figure.savefig(path, metadata={"Date": None} if suffix == "svg" else None, dpi=100)
        yield path


def _where(environment: dict[str, Any]) -> str:
    driver = f", driver {environment['driver']}" if environment.get("driver") else ""
    return f"{environment.get('device')}{driver}; {environment.get('host')}; {environment.get('date')}"


def _lines(ax: Axes, rows: Iterable[dict[str, Any]], x: str, y: str, by: Callable[[dict[str, Any]], str]) -> None:
    """Draw a line for each of `by`'s answers, on logarithmic scales; numbabuf's own in its colour and thicker."""
    from matplotlib.ticker import NullFormatter

    groups: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get(x) is not None and row.get(y):
            groups.setdefault(by(row), []).append((row[x], row[y]))
    others: dict[str, str] = ax.figure.__dict__.setdefault("numbabuf_colors", {})  # the same one all over a figure
    ours = 0
    for label, points in groups.items():
        mine = label.startswith("numbabuf")
        ours += mine
        ax.plot(
            *zip(*sorted(points), strict=True),
            marker="o",
            markersize=3,
            linewidth=2 if mine else 1,
            linestyle=("-", "--", ":", "-.")[(ours - 1) % 4] if mine else "-",
            color=_OURS if mine else others.setdefault(label, _OTHERS[len(others) % len(_OTHERS)]),
            label=label,
        )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(lambda value, _: _short(value))
    ax.yaxis.set_major_formatter("{x:,.10g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(alpha=0.3, linewidth=0.5)
    ax.set_xlabel(x)
    ax.set_ylabel(y)


def _bars(ax: Axes, rows: Rows, label: Callable[[dict[str, Any]], str], x: str = "median_us") -> None:
    """Draw a bar for each row that was measured, the first on top, its figure beside it."""
    measured = [row for row in rows if row.get(x)]
    names = [label(row) for row in measured]
    bars = ax.barh(
        range(len(measured)), [row[x] for row in measured],
        color=[_OURS if name.startswith("numbabuf") else "#b0b0b0" for name in names],
    )  # fmt: skip
    ax.bar_label(bars, [f"{row[x]:,.{2 if row[x] < 10 else 0}f}" for row in measured], padding=3, fontsize=8)
    ax.set_yticks(range(len(measured)), names)
    ax.invert_yaxis()
    if max(row[x] for row in measured) > 20 * min(row[x] for row in measured):
        ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:,.10g}")
    ax.margins(x=0.15)
    ax.set_xlabel(x)


def _short(value: float) -> str:
    """Return 65536 as "64 Ki", for axes whose ticks are powers of two."""
    power = 0
    while value >= 1024 and value % 1024 == 0:
        value, power = value / 1024, power + 1
    return f"{value:,.10g} {('', 'Ki', 'Mi', 'Gi', 'Ti')[power]}".rstrip()


def _legend(figure: Any, ax: Axes) -> None:
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)


def _step(figure: Any, result: dict[str, Any]) -> None:
    ax = figure.subplots()
    _bars(ax, [row for row in result["rows"] if row.get("tokens") == result["tokens"]], lambda row: row["what"])
    ax.set_title(f"host time of a step, {result['slots']} inputs of {result['tokens']} tokens", fontsize=9)


def _growth(figure: Any, result: dict[str, Any]) -> None:
    ax = figure.subplots()
    named = {"replay": "numbabuf: replay", "stage_inputs": "numbabuf: stage_inputs"}
    _lines(ax, result["rows"], "slots", "median_us", lambda row: named.get(row["way"], row["way"]))
    ax.set_title(f"host time of a step, {result['tokens']} tokens a slot", fontsize=9)
    _legend(figure, ax)


def _capture(figure: Any, result: dict[str, Any]) -> None:
    ax = figure.subplots()
    _bars(ax, result["rows"], lambda row: row["what"])
    ax.set_title(f"time to capture a graph of {result['slots']} slots and {result['kernels']} kernels", fontsize=9)


def _pool(figure: Any, result: dict[str, Any]) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    leases = [row for row in result["rows"] if row["case"] not in ("lease among idle", "snapshot", "price")]

    def label(row: dict[str, Any]) -> str:
        if row["case"] != "lease":
            return f"{row['what']} ({row['case']})"
        threads = f", {row['threads']} threads" if row["threads"] > 1 else ""
        return f"{row['what']}{threads}" + (f", {row['specs']} specs" if row["specs"] > 1 else "")

    _bars(left, leases, label)
    left.set_title("a lease: allocate and release", fontsize=9)
    _lines(right, (row for row in result["rows"] if "idle" in row), "idle", "median_us", lambda row: row["what"])
    right.set_title("with idle buffers in the pool", fontsize=9)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=8, ncols=5)


def _fill(figure: Any, result: dict[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    full = [row for row in result["rows"] if row.get("live", row.get("tokens")) == row.get("tokens")]
    _lines(left, full, "tokens", "median_us", lambda row: row["what"])
    predicted = {row["tokens"]: row["predicted_us"] for row in full if row["what"] == "numbabuf: fill"}
    left.plot(list(predicted), list(predicted.values()), ":", color="black", label="predicted for the fill")
    left.set_title(f"time on the device, {result['slots']} slots", fontsize=9)
    left.legend(frameon=False, fontsize=7)
    shapes = [row for row in result["shapes"] if row["threads"] == max(r["threads"] for r in result["shapes"])]
    _lines(right, shapes, "blocks", "to_predicted", lambda row: f"{row['tokens']:,} tokens")
    right.set_title(f"by thread blocks per slot, {shapes[0]['threads']} threads each", fontsize=9)
    right.legend(frameon=False, fontsize=7)


def _moves(figure: Any, result: dict[str, Any]) -> None:
    rows = [row for row in result["rows"] if "direction" in row]
    counts = sorted({row["count"] for row in rows})
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    grid = figure.subplots(len(counts), len(directions), squeeze=False)
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:  # of our launch shapes the fastest
        key = (row["direction"], row["count"], row["nbytes"], row["way"])
        if key not in best or row["GB_per_s"] > best[key]["GB_per_s"]:
            best[key] = row
    for line, count in zip(grid, counts, strict=True):
        for ax, direction in zip(line, directions, strict=True):
            here = [row for row in best.values() if (row["direction"], row["count"]) == (direction, count)]
            _lines(ax, here, "nbytes", "GB_per_s", lambda row: row["way"])
            ax.set_title(f"{direction}, {count:,} at a time", fontsize=9)
    _legend(figure, grid[-1][0])


def _tuning(figure: Any, result: dict[str, Any]) -> None:
    rows = result["rows"]
    sources = list(dict.fromkeys(row["source"] for row in rows))
    largest = max(row["bytes"] for row in rows)
    for ax, source in zip(figure.subplots(1, len(sources), squeeze=False)[0], sources, strict=True):
        best: dict[tuple[Any, ...], dict[str, Any]] = {}
        for row in rows:  # of all numbers of threads the fastest
            key = (row["width"], row["unroll"], row["blocks"])
            if (row["source"], row["bytes"]) == (source, largest):
                if key not in best or row["GB_per_s"] > best[key]["GB_per_s"]:
                    best[key] = row
        _lines(ax, best.values(), "blocks", "GB_per_s", lambda row: f"{row['width']} B x {row['unroll']}")
        ax.set_title(f"{largest:,} B from {source} memory", fontsize=9)
    _legend(figure, ax)


PICTURES: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    "step": _step,
    "growth": _growth,
    "capture": _capture,
    "pool": _pool,
    "fill": _fill,
    "moves": _moves,
    "tuning": _tuning,
}
"""Benchmark -> what draws its result on a figure."""
