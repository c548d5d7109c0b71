"""The frozen snapshot of how predictions did. Values only."""

from __future__ import annotations

from dataclasses import dataclass

from ..resource import Shown

__all__ = ["PredictionStats"]


@dataclass(frozen=True)
class PredictionStats(Shown):
    """How a predictive manager's predictions did, at one moment.

    Attributes
    ----------
    hits, misses : int
        Steps whose size was, or was not, among those last forecast; none are counted before the first forecast. Those
        refused for their size count too, those of no tokens do not.
    unserved : int
        Steps for which no captured graph was large enough, or no bucket where they were staged alone: refused, split,
        or run without a graph.
    warmed, warmed_unused : int
        Graphs captured ahead of need, and those of them that no step has used, or had used when they were closed.
    closed : int
        Graphs taken out of service because the plan no longer wanted them, or wanted others more.
    failures : int
        Prewarmings that failed and left everything as it was.
    graph_bytes, reserved_bytes : int
        Device bytes that prewarmed graphs took, as far as the driver tells, until they are closed, and bytes of the
        buffers reserved ahead of need, until the pool was trimmed of them.
    padding : float
        As `ManagerStats.padding`.
    refits : int
        Times the bucket list was reconsidered.
    capture_seconds, model_seconds : float
        Time spent capturing ahead of need, and learning and forecasting.
    """

    hits: int
    misses: int
    unserved: int
    warmed: int
    warmed_unused: int
    closed: int
    failures: int
    graph_bytes: int
    reserved_bytes: int
    padding: float
    refits: int
    capture_seconds: float
    model_seconds: float
