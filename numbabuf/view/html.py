"""Small pieces of HTML for notebooks and the report: cards, tables and inline SVG bars, out of f-strings.

Knows no buffer, only names and numbers; every text is escaped. Text takes the colour of the page it lands in, so that
dark notebooks stay readable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields as dataclass_fields
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

from ..checks import nbytes

__all__ = ["COLORS", "bar", "card", "columns", "escape", "fields", "nbytes", "squares", "table", "text"]

COLORS = ("#3572b0", "#86b6e0", "#e0a03c", "#5a9e6f", "#b5527a", "#8a8a8a")
"""Fill colours by position, dark enough for a white page and light enough for a black one."""

_CELL = "padding:2px 10px 2px 0;border:0;background:none;vertical-align:top"
_FRAME = "stroke:currentColor;stroke-opacity:.35;stroke-width:1;fill:none"


def text(value: object, unit: str = "") -> str:
    """Return a value as a reader wants it: thousands grouped, four digits that count, bytes with their unit.

    Examples
    --------
    >>> text(12345), text(0.123456), text(98765.4), text(2048, "bytes")
    ('12,345', '0.1235', '98,765', '2 KiB')
    """
    if unit == "bytes":
        return nbytes(value)  # type: ignore[arg-type]  # TypeError is the answer
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def card(title: str, *parts: str) -> str:
    """Return the HTML parts under a title, set apart from what is around them.

    Parameters
    ----------
    title
        Plain text.
    *parts
        HTML.
    """
    return (
        '<div class="numbabuf" style="display:inline-block;max-width:44em;border:1px solid rgba(128,128,128,.35);'
        'border-radius:6px;padding:8px 12px;margin:4px 0;font:13px/1.5 system-ui,sans-serif">'
        f'<div style="font-weight:600;margin-bottom:4px">{escape(title.strip("<>"))}</div>{"".join(parts)}</div>'
    )


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table; numbers are grouped in thousands and stand to the right.

    Parameters
    ----------
    head
        A name per column; all empty for a table without a head.
    rows
        A value per column each.

    Examples
    --------
    >>> "1,000" in table(["size"], [[1000]])
    True
    """

    def cell(value: object, kind: str) -> str:
        side = "right" if isinstance(value, (int, float)) and not isinstance(value, bool) else "left"
        return f'<{kind} style="{_CELL};text-align:{side}">{escape(text(value))}</{kind}>'

    listed = [list(row) for row in rows]
    lines = ["<tr>" + "".join(cell(value, "td") for value in row) + "</tr>" for row in listed]
    if any(head):
        first = listed[0] if listed else head
        sides = ["right" if isinstance(value, (int, float)) else "left" for value in first]
        names = "".join(
            f'<th style="{_CELL};text-align:{side};font-weight:600;opacity:.7">{escape(name)}</th>'
            for name, side in zip(head, sides, strict=True)
        )
        lines.insert(0, f"<tr>{names}</tr>")
    return f'<table style="border-collapse:collapse;margin:4px 0;font-size:12px">{"".join(lines)}</table>'


def fields(snapshot: DataclassInstance) -> str:
    """Return a table of a dataclass's plain fields: bytes and seconds with their unit, zeros and mappings left out."""
    rows = []
    for field in dataclass_fields(snapshot):
        name, value = field.name, getattr(snapshot, field.name)
        if not value or not isinstance(value, (int, float, str)):
            continue
        stem, _, unit = name.rpartition("_")
        if unit == "bytes":
            rows.append((stem.replace("_", " "), text(value, unit)))
        elif unit == "seconds":
            rows.append((stem.replace("_", " "), f"{value:.3g} s"))
        else:
            rows.append((name.replace("_", " "), text(value)))
    return table(["", ""], rows) if rows else "<div>nothing yet</div>"


def _legend(parts: Sequence[tuple[str, str, str]]) -> str:
    items = "".join(
        f'<span style="margin-right:1em;white-space:nowrap"><span style="display:inline-block;width:.7em;height:.7em;'
        f'background:{color};margin-right:.35em"></span>{escape(name)} {escape(amount)}</span>'
        for name, amount, color in parts
    )
    return f'<div style="font-size:12px">{items}</div>'


def bar(parts: Mapping[str, float], *, total: float | None = None, unit: str = "", width: int = 420) -> str:
    """Return a bar in one piece per part, and a legend; what `total` leaves over stays empty.

    Parameters
    ----------
    parts
        Name -> amount >= 0.
    total
        What the whole length stands for; the sum of the parts where that is more, or nothing is given.
    unit
        "bytes" to write amounts as such.
    width
        Pixels.
    """
    whole = max(sum(parts.values()), total or 0) or 1
    x, pieces, legend = 0.0, [], []
    for (name, amount), color in zip(parts.items(), COLORS * (1 + len(parts) // len(COLORS)), strict=False):
        length = width * amount / whole
        title = escape(f"{name}: {text(amount, unit)}")
        if amount:
            pieces.append(
                f'<rect x="{x:.1f}" y="0" width="{length:.1f}" height="14" fill="{color}"><title>{title}</title></rect>'
            )
        legend.append((name, text(amount, unit), color))
        x += length
    if total:
        legend.append(("of", text(total, unit), "none"))
    return (
        f'<svg width="{width}" height="14" viewBox="0 0 {width} 14" role="img" style="display:block;max-width:100%">'
        f'{"".join(pieces)}<rect x=".5" y=".5" width="{width - 1}" height="13" style="{_FRAME}"/></svg>'
        + _legend(legend)
    )


def columns(values: Mapping[Any, float], *, most: int = 48, width: int = 420, height: int = 64) -> str:
    """Return a column per value, with the first, the largest and the last of them named beneath.

    Parameters
    ----------
    values
        Label -> height >= 0, in the order in which they are drawn. Beyond `most`, neighbours are added up.
    most
        Columns drawn at most.
    width, height
        Pixels.
    """
    items = list(values.items())
    if not items:
        return "<div>nothing yet</div>"
    group = -(-len(items) // most)
    merged = [
        (part[0][0] if group == 1 else f"{part[0][0]} to {part[-1][0]}", sum(amount for _, amount in part))
        for part in (items[at : at + group] for at in range(0, len(items), group))
    ]
    top = max(amount for _, amount in merged) or 1
    step = width / len(merged)
    pieces = []
    for at, (label, amount) in enumerate(merged):
        tall = height * amount / top
        title = escape(f"{label}: {text(amount)}")
        pieces.append(
            f'<rect x="{at * step + step * 0.1:.1f}" y="{height - tall:.1f}" width="{min(step * 0.8, 40):.1f}" '
            f'height="{tall:.1f}" fill="{COLORS[0]}"><title>{title}</title></rect>'
        )
    peak = max(merged, key=lambda item: item[1])
    ends = (
        f"<span>{escape(text(items[0][0]))}</span><span>most: {escape(text(peak[0]))} ({escape(text(peak[1]))})</span>"
        f"<span>{escape(text(items[-1][0]))}</span>"
    )
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" style="display:block;'
        f'max-width:100%;border-bottom:1px solid rgba(128,128,128,.5)">{"".join(pieces)}</svg>'
        f'<div style="display:flex;justify-content:space-between;width:{width}px;max-width:100%;font-size:12px">'
        f"{ends}</div>"
    )


def squares(used: int, total: int, *, names: tuple[str, str] = ("queued", "free")) -> str:
    """Return `total` squares of which `used` are filled: how full a ring is."""
    shown = min(total, 64)
    filled = min(shown, used) if total <= 64 else round(used * shown / total)
    size = 16
    pieces = "".join(
        f'<rect x="{at * size + 1}" y="1" width="13" height="13" rx="2" '
        + (f'fill="{COLORS[2]}"/>' if at < filled else f'style="{_FRAME}"/>')
        for at in range(shown)
    )
    return (
        f'<svg width="{shown * size}" height="{size}" role="img" style="display:block;max-width:100%">{pieces}</svg>'
        f'<div style="font-size:12px">{used:,} {escape(names[0])}, {total - used:,} {escape(names[1])}</div>'
    )
