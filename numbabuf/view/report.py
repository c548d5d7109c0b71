"""One self-contained HTML page for a run of `numbabuf replay`: what the run was, what was padded, what it cost.

Reads the same plain dictionary that `--json` writes and returns text, out of the pieces in `html`; knows no manager and
no device. Nothing imports it but `cli`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from . import html

__all__ = ["render", "thin"]

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }}
h1 {{ font-size: 1.4em; margin-bottom: .2em }}
h2 {{ font-size: 1.05em; margin: 1.8em 0 .4em; border-bottom: 1px solid rgba(128,128,128,.4) }}
figure {{ margin: .4em 0 1em }}
figcaption {{ font-size: 12px; opacity: .7 }}
.wrong {{ color: #c0392b; font-weight: 600 }}
</style></head><body>
{body}
</body></html>
"""


def thin(values: Sequence[float], most: int = 200) -> list[float]:
    """Return at most `most` means of consecutive values: a long series for a small picture.

    Examples
    --------
    >>> thin([1, 3, 5, 7], most=2)
    [2.0, 6.0]
    """
    group = max(1, -(-len(values) // most))
    parts = [values[at : at + group] for at in range(0, len(values), group)]
    return [float(sum(part)) / len(part) for part in parts]


def _curve(values: Sequence[float], caption: str, *, color: str, width: int = 860, height: int = 90) -> str:
    """A series as an area, its largest and its mean value written at the side."""
    if not values:
        return ""
    top, mean = max(values) or 1, sum(values) / len(values)
    step = width / len(values)
    points = " ".join(
        f"{x:.1f},{height - height * value / top:.1f}"
        for at, value in enumerate(values)
        for x in (at * step, (at + 1) * step)
    )
    level = height - height * mean / top
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" width="100%" role="img" preserveAspectRatio="none" '
        f'style="border-bottom:1px solid rgba(128,128,128,.5);height:{height}px">'
        f'<polygon points="0,{height} {points} {width},{height}" fill="{color}" fill-opacity=".75"/>'
        f'<line x1="0" x2="{width}" y1="{level:.1f}" y2="{level:.1f}" stroke="currentColor" stroke-dasharray="4 4" '
        f'stroke-opacity=".6"/></svg><figcaption>{escape(caption)}; mean {html.text(float(mean))} (dashed), '
        f"most {html.text(float(top))}</figcaption></figure>"
    )


def _padding(results: Mapping[str, Any]) -> str:
    rows: list[tuple[int, int, int, int, float]] = []
    pieces: list[str] = []
    tokens = {bucket: results["bucket_tokens"].get(bucket, 0) for bucket in results["buckets"]}
    widest = max((int(bucket) * steps for bucket, steps in results["buckets"].items()), default=1)
    for bucket, steps in sorted(results["buckets"].items(), key=lambda item: int(item[0])):
        padded = int(bucket) * steps
        percent = 100 * (padded / tokens[bucket] - 1) if tokens[bucket] else 0.0
        rows.append((int(bucket), steps, tokens[bucket], padded - tokens[bucket], round(percent, 1)))
        live, rest = (520 * amount / widest for amount in (tokens[bucket], padded - tokens[bucket]))
        y = 20 * len(pieces)
        pieces.append(
            f'<text x="56" y="{y + 14}" text-anchor="end" font-size="12" fill="currentColor">{int(bucket):,}</text>'
            f'<rect x="64" y="{y + 3}" width="{live:.1f}" height="14" fill="{html.COLORS[0]}"/>'
            f'<rect x="{64 + live:.1f}" y="{y + 3}" width="{rest:.1f}" height="14" fill="{html.COLORS[1]}"/>'
            f'<text x="{70 + live + rest:.1f}" y="{y + 14}" font-size="12" fill="currentColor">'
            f"{steps:,} steps, +{percent:.0f} %</text>"
        )
    tall = 20 * len(pieces) + 4
    picture = (
        f'<figure><svg width="720" height="{tall}" role="img" style="max-width:100%">{"".join(pieces)}</svg>'
        "<figcaption>tokens by bucket: asked for (dark) and padding (light)</figcaption></figure>"
    )
    return picture + html.table(["bucket", "steps", "live tokens", "padding tokens", "padding %"], rows)


def render(report: Mapping[str, Any]) -> str:
    """Return the page.

    Parameters
    ----------
    report : mapping
        What ``numbabuf replay --json`` writes, read back with `json.load`.

    Returns
    -------
    page : str
        HTML that loads nothing from anywhere.
    """
    results, parameters, trace = report["results"], report["parameters"], report["trace"]
    simulator = report["backend"] == "simulator"
    where = "Numba's simulator (results, not speed)" if simulator else str(report["device"])
    wrong = results["mismatch"]
    verdict = (
        "every result equals NumPy's, bit for bit"
        if wrong is None
        else f'<span class="wrong">wrong result at step {wrong["step"]:,}, sequence {wrong["sequence"]:,}: '
        f"NumPy says {escape(str(wrong['expected']))}, the device {escape(str(wrong['found']))}</span>"
    )
    steps, waits = results["steps"], results["ring_waits"]
    live, padded = results["live_tokens"], results["padded_tokens"]
    host = "host time of each step, us" + (", kernels included" if simulator else "")
    environment = {"backend": where, **report["versions"], **parameters}
    generator = trace["generator"] or {}
    body = [
        f"<h1>numbabuf replay: {escape(str(trace['name']))}</h1>",
        f"<div>{steps:,} steps on {escape(where)}; {verdict}.</div>",
        "<h2>Steps</h2>",
        html.table(["", ""], [
            ("graphs", f"{results['graphs']:,}, captured in {results['capture_s']:.2f} s"),
            ("host per step", f"median {results['host_us_median']:,.1f} us, p99 {results['host_us_p99']:,.1f} us"),
            ("beyond the largest bucket", f"{results['overflows']:,} steps ({parameters['overflow']})"),
        ]),
        _curve(results["tokens_per_step"], "tokens asked for by each step, in order", color=html.COLORS[0]),
        _curve(results["host_us_per_step"], host, color=html.COLORS[2]),
        f"<h2>Padding: {results['padding_percent']:.1f} %</h2>",
        html.bar({"live tokens": live, "padding": padded - live}, width=584),
        _padding(results),
        "<h2>Demand</h2>",
        html.columns({int(size): count for size, count in results["demand"].items()}, most=96, width=860, height=90),
        '<div style="font-size:12px;opacity:.7">steps by the number of tokens that they asked for</div>',
        "<h2>Memory</h2>",
        html.bar(
            {"slots (device)": results["arena_bytes"], "staging ring (pinned)": results["ring_bytes"]},
            unit="bytes", width=584,
        ),
        "<h2>Staging ring</h2>",
        html.bar({"steps that found a free block": steps - waits, "steps that waited": waits}, width=584),
        f'<div style="font-size:12px;opacity:.7">{parameters["ring"]:,} blocks</div>',
        "<h2>Environment</h2>",
        html.table(["", ""], [(name, str(value)) for name, value in environment.items()]),
    ]  # fmt: skip
    if generator:
        body += ["<h2>Generated trace</h2>", html.table(["", ""], [(n, str(v)) for n, v in generator.items()])]
    return _PAGE.format(title=escape(f"numbabuf replay: {trace['name']}"), body="\n".join(body))
