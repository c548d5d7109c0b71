"""Frozen snapshots of what managers and programs did: values only, made by their `stats()` under the lock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..resource import Shown

__all__ = ["ManagerStats", "ProgramStats"]


@dataclass(frozen=True)
class ProgramStats(Shown):
    """What one program of a manager did, at one moment; as the fields of the same name of `ManagerStats`.

    Attributes
    ----------
    graph_bytes : int
        Device bytes that the driver took for the live graphs, as far as it tells them.
    capture_s : float
        Seconds that captures by size took, rehearsals included.
    """

    steps: int
    live_tokens: int
    padded_tokens: int
    buckets: dict[int, int]
    bucket_tokens: dict[int, int]
    overflows: int
    graphs: int
    graph_bytes: int
    capture_s: float = 0.0

    @property
    def padding(self) -> float:
        """Padded tokens over live tokens, less one: 0.25 is a quarter of padding."""
        return self.padded_tokens / self.live_tokens - 1 if self.live_tokens else 0.0


@dataclass(frozen=True)
class ManagerStats(Shown):
    """What a manager did, at one moment.

    Attributes
    ----------
    steps : int
        Steps staged: replays, fills and eager steps; a step that was split counts once a piece.
    live_tokens, padded_tokens : int
        Tokens given, and tokens that the buckets they ran in hold.
    buckets : dict of int to int
        Padded number of tokens -> steps that ran in it.
    overflows : int
        Steps larger than the largest bucket that were run all the same, in pieces or without a graph.
    ring_waits : int
        Times the host waited for a staging block.
    graphs : int
        Captured graphs that are live.
    arena_bytes, ring_bytes : int
        Device memory of the slots, pinned memory of the staging ring.
    bucket_tokens : dict of int to int
        Padded number of tokens -> live tokens of the steps that ran in it.
    late_reads : int
        Steps whose outputs were copied out, unread, by the step that took over their return block.
    programs : mapping of str to ProgramStats
        What each open program did; the steps of the fill alone are in none.
    """

    steps: int
    live_tokens: int
    padded_tokens: int
    buckets: dict[int, int]
    overflows: int
    ring_waits: int
    graphs: int
    arena_bytes: int
    ring_bytes: int
    bucket_tokens: dict[int, int] = field(default_factory=dict)
    late_reads: int = 0
    programs: Mapping[str, ProgramStats] = field(default_factory=dict)

    @property
    def padding(self) -> float:
        """Padded tokens over live tokens, less one: 0.25 is a quarter of padding."""
        return self.padded_tokens / self.live_tokens - 1 if self.live_tokens else 0.0

    def padding_rows(self) -> list[tuple[int, int, int, float]]:
        """Return (bucket, steps, live tokens, padding in % of the live tokens) for each bucket that a step ran in."""
        rows = []
        for bucket, steps in self.buckets.items():
            live = self.bucket_tokens.get(bucket, 0)
            rows.append((bucket, steps, live, round(100.0 * (bucket * steps / live - 1), 1) if live else 0.0))
        return rows
