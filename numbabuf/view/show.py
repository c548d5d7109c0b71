"""The HTML view of every object, by its class; notebooks reach it through `resource.Shown`.

Reads public names alone, so a view cannot keep an object from changing its insides.
"""

from __future__ import annotations

from functools import singledispatch

from ..demand.model import DemandModel
from ..pool.entry import BufferEntry
from ..pool.pool import BufferPool
from ..pool.stats import PoolStats, ScopeStats
from ..predict.stats import PredictionStats
from ..step.graph import CapturedStep, Step
from ..step.manager import InputBufferManager
from ..step.output import OutputSlot
from ..step.program import Program
from ..step.slot import InputSlot
from ..step.stats import ManagerStats, ProgramStats
from . import html

__all__ = ["show"]


@singledispatch
def show(item: object) -> str:
    """Return the HTML view of an object of this package."""
    return html.card(repr(item))


@show.register
def _pool(pool: BufferPool) -> str:
    stats = pool.stats()
    bars = [
        html.bar({tier.value: amount}, total=pool.limits[tier], unit="bytes")
        for tier, amount in stats.reserved_by_tier.items()
        if amount and pool.limits[tier]
    ]
    return html.card(repr(pool), *bars, show(stats))


@show.register
def _pool_stats(stats: PoolStats) -> str:
    use = {"in use": stats.in_use_bytes, "pending": stats.pending_bytes, "idle": stats.idle_bytes}
    tiers = {tier.value: amount for tier, amount in stats.reserved_by_tier.items() if amount}
    return html.card(
        type(stats).__name__,
        html.bar(use, unit="bytes"),
        html.bar(tiers, unit="bytes") if len(tiers) > 1 else "",
        html.fields(stats),
        html.fields(stats.oom) if any(vars(stats.oom).values()) else "",
    )


@show.register
def _scope_stats(stats: ScopeStats) -> str:
    return html.card("ScopeStats", html.fields(stats))


@show.register
def _entry(entry: BufferEntry) -> str:
    rows = [("state", entry.state.value), ("tier", entry.tier.value), ("size", html.nbytes(entry.nbytes))]
    if entry.state.value != "free":
        rows += [("lease", f"number {entry.generation} of this memory"), ("uses", str(entry.use_count))]
    return html.card(f"BufferEntry {entry.spec}", html.table(["", ""], rows))


@show.register
def _slot(slot: InputSlot) -> str:
    rows = [
        ("holds", f"{slot.spec}, {html.nbytes(slot.spec.size_bytes)}"),
        ("staged as", f"{slot.source_dtype}, at most {slot.max_live:,} elements"),
        ("follows", f"{slot.axis}+{slot.extra}" if slot.extra else slot.axis or "nothing: staged whole"),
        ("pad", str(slot.pad)),
    ]
    return html.card(f"InputSlot {slot.name}", html.table(["", ""], rows))


@show.register
def _output(slot: OutputSlot) -> str:
    rows = [
        ("holds", f"{slot.spec}, {html.nbytes(slot.spec.size_bytes)}"),
        ("sent as", f"{slot.result_dtype}, at most {slot.max_live:,} elements"),
        ("follows", f"{slot.axis}+{slot.extra}" if slot.extra else slot.axis or "nothing: sent whole"),
    ]
    return html.card(f"OutputSlot {slot.name}", html.table(["", ""], rows))


@show.register
def _step(step: Step) -> str:
    rows = [(name, "x".join(map(str, view.shape)), str(view.dtype)) for name, view in step.items()]
    return html.card(repr(step), html.table(["slot", "padded shape", "type"], rows))


@show.register
def _graph(graph: CapturedStep) -> str:
    padding = max(0, graph.sizes[0] * graph.steps - graph.live)
    return html.card(repr(graph), html.bar({"live tokens": graph.live, "padding": padding}), show(graph.step))


@show.register
def _manager(manager: InputBufferManager) -> str:
    slots = [(slot.name, str(slot.spec), slot.axis or "whole", str(slot.pad)) for slot in manager.slots]
    pending = manager.pending
    ring = "" if pending is None else html.squares(*pending, names=("staged", "free"))
    return html.card(repr(manager), html.table(["slot", "spec", "follows", "pad"], slots), ring, show(manager.stats()))


@show.register
def _program(program: Program) -> str:
    rows = [(str(one.num_tokens), html.nbytes(one.nbytes), str(one.steps)) for one in program.captured]
    return html.card(repr(program), html.table(["tokens", "bytes", "steps"], rows), show(program.stats()))


@show.register
def _program_stats(stats: ProgramStats) -> str:
    tokens = {"live": stats.live_tokens, "padding": stats.padded_tokens - stats.live_tokens}
    return html.card(f"ProgramStats: steps {stats.steps:,}", html.bar(tokens), html.fields(stats))


@show.register
def _manager_stats(stats: ManagerStats) -> str:
    tokens = {"live": stats.live_tokens, "padding": stats.padded_tokens - stats.live_tokens}
    return html.card(
        f"ManagerStats: steps {stats.steps:,}, padding {100 * stats.padding:.1f} %",
        html.bar(tokens),
        html.table(["bucket", "steps", "live tokens", "padding %"], stats.padding_rows()),
        html.bar({"slots (device)": stats.arena_bytes, "ring (pinned)": stats.ring_bytes}, unit="bytes"),
        html.fields(stats),
    )


@show.register
def _prediction_stats(stats: PredictionStats) -> str:
    return html.card("PredictionStats", html.bar({"hits": stats.hits, "misses": stats.misses}), html.fields(stats))


@show.register
def _demand(model: DemandModel) -> str:
    sizes, counts = model.histogram()
    return html.card(repr(model), html.columns(dict(zip(sizes.tolist(), counts.tolist(), strict=True))))
