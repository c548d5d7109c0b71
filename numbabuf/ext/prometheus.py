"""Pools and managers as Prometheus metrics, read at each scrape and at no other time.

Every figure is one that `stats()` gives, so that a step or a lease costs the same whether it is watched or not. Needs
the extra `prometheus`. Sits above the library; nothing imports it.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from ..pool.pool import BufferPool
from ..predict.manager import PredictiveBufferManager
from ..step.manager import InputBufferManager

__all__ = ["Collector"]

_log = logging.getLogger("numbabuf")

Samples = Iterable[tuple[str, float]]


class _Metric(NamedTuple):
    """One family: a name ending in "total" is a counter's; `label` is what tells its samples apart beside the name."""

    name: str
    help: str
    read: Callable[[Any], Samples]
    label: str = ""


def _one(field: str) -> Callable[[Any], Samples]:
    return lambda stats: [("", getattr(stats, field))]


def _each(**fields: str) -> Callable[[Any], Samples]:
    return lambda stats: [(value, getattr(stats, field)) for value, field in fields.items()]


_POOL = (
    _Metric("pool_bytes", "Bytes taken from the driver, by what they are doing.",
            _each(in_use="in_use_bytes", idle="idle_bytes", pending="pending_bytes"), "state"),
    _Metric("pool_buffers", "Buffers taken from the driver, by what they are doing.",
            _each(in_use="in_use_count", idle="idle_count", pending="pending_count"), "state"),
    _Metric("pool_tier_bytes", "Bytes taken from the driver, by memory tier.",
            lambda stats: [(tier.value, n) for tier, n in stats.reserved_by_tier.items()], "tier"),
    _Metric("pool_peak_bytes", "Most bytes taken from the driver so far.", _one("peak_bytes")),
    _Metric("pool_waste_bytes", "Bytes that rounding to size classes added.", _one("waste_bytes")),
    _Metric("pool_leases_total", "Leases, by what served them.",
            _each(exact="exact_hits", size_class="class_hits", driver="misses"), "source"),
    _Metric("pool_leased_bytes_total", "Bytes of all leases.", _one("allocated_bytes")),
    _Metric("pool_stream_waits_total", "Leases for which one stream was made to wait for another.",
            _one("stream_waits")),
    _Metric("pool_lost_total", "Buffers dropped without release, and reclaimed.", _one("lost")),
    _Metric("pool_freed_total", "Buffers given back to the driver.", _one("freed")),
    _Metric("pool_oom_total", "Steps taken when memory ran out.",
            lambda stats: [(step, getattr(stats.oom, step)) for step in stats.oom.__dataclass_fields__], "step"),
)  # fmt: skip
_HIERARCHY = (
    _Metric("pool_moves_total", "Buffers moved between tiers.",
            _each(promotion="promotions", demotion="demotions"), "direction"),
    _Metric("pool_moved_bytes_total", "Bytes moved between tiers.", _one("moved_bytes")),
)  # fmt: skip
_MANAGER = (
    _Metric("manager_steps_total", "Steps, by the bucket of tokens that they ran in.",
            lambda stats: [(str(bucket), steps) for bucket, steps in stats.buckets.items()], "bucket"),
    _Metric("manager_tokens_total", "Tokens of all steps: those given, and those that their buckets hold.",
            _each(live="live_tokens", padded="padded_tokens"), "kind"),
    _Metric("manager_overflows_total", "Steps larger than the largest bucket that were run all the same.",
            _one("overflows")),
    _Metric("manager_ring_waits_total", "Times the host waited for a staging block.", _one("ring_waits")),
    _Metric("manager_graphs", "Captured graphs that are live.", _one("graphs")),
    _Metric("manager_bytes", "Device bytes of the slots, pinned bytes of the staging ring.",
            _each(slots="arena_bytes", ring="ring_bytes"), "part"),
)  # fmt: skip
_PREDICTION = (
    _Metric("prediction_steps_total", "Steps, by what the forecast said of their size.",
            _each(hit="hits", miss="misses"), "outcome"),
    _Metric("prediction_unserved_total", "Steps that no graph served: refused, split, or run without one.",
            _one("unserved")),
    _Metric("prediction_captures_total", "Graphs captured ahead of need.", _one("warmed")),
    _Metric("prediction_failures_total", "Prewarmings that failed and changed nothing.", _one("failures")),
    _Metric("prediction_seconds_total", "Time spent ahead of need.",
            _each(capture="capture_seconds", model="model_seconds"), "what"),
)  # fmt: skip


def _snapshots(watched: BufferPool | InputBufferManager) -> Iterator[tuple[Any, tuple[_Metric, ...]]]:
    """Yield each snapshot that an object gives, with the metrics that are read from it."""
    stats = watched.stats()
    if isinstance(watched, InputBufferManager):
        yield stats, _MANAGER
        if isinstance(watched, PredictiveBufferManager):
            yield watched.prediction(), _PREDICTION
    else:
        yield stats, _POOL
        if hasattr(stats, "promotions"):
            yield stats, _HIERARCHY


class Collector:
    """Gives Prometheus the figures of pools and managers; for ``prometheus_client``'s registries.

    Parameters
    ----------
    **watched
        Pools and managers by the value of the label ``name`` that they get. They are held weakly: what is gone, or
        closed, is left out; so is what cannot tell its figures, which is logged.

    Raises
    ------
    TypeError, ValueError
        One of them is neither a pool nor a manager, or its name is not one that a scrape can carry.

    Notes
    -----
    Threads: a scrape may come in any thread. Like `stats()` it takes the lock of each object, one after the other; a
    manager holds its own during `capture_buckets` and `prewarm`, and a scrape waits for that.

    Examples
    --------
    >>> from numbabuf.pool import SimpleBufferPool
    >>> from numbabuf import BufferSpec, Tier
    >>> pool = SimpleBufferPool()
    >>> collector = Collector(serving=pool)
    >>> pool.allocate(BufferSpec(1024, "uint8", Tier.PINNED)).release()

    To be read over HTTP::

        prometheus_client.REGISTRY.register(collector)
        prometheus_client.start_http_server(9000)
    """

    def __init__(self, **watched: Any) -> None:
        self._lock = threading.Lock()
        self._watched: dict[str, weakref.ref[Any]] = {}
        for name, thing in watched.items():
            self.watch(name, thing)

    def watch(self, name: str, thing: BufferPool | InputBufferManager) -> None:
        """Add a pool or a manager, in place of the one of that name.

        Raises
        ------
        TypeError, ValueError
            As for the class: here, where the mistake is, and not at every scrape.
        """
        if not isinstance(name, str):
            raise TypeError(f"the name {name!r} cannot be a label: give a string")
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the name {name!r} cannot be a label: it is not text in UTF-8") from None
        if not isinstance(thing, (BufferPool, InputBufferManager)):
            raise TypeError(f"{name}={thing!r} cannot be watched: give a BufferPool or an InputBufferManager")
        with self._lock:
            self._watched[name] = weakref.ref(thing)

    def describe(self) -> list[Any]:
        """Say nothing ahead of the first scrape, so that a registry does not take one at registration."""
        return []

    def collect(self) -> Iterator[Any]:
        """Yield one metric family per figure: what a registry calls on a scrape."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        families: dict[str, Any] = {}
        with self._lock:
            watched = [(name, reference()) for name, reference in self._watched.items()]
        for name, thing in watched:
            if thing is None or thing.closed:
                continue
            try:
                snapshots = list(_snapshots(thing))  # all of them, so that a scrape has a thing whole or not at all
            except Exception as error:
                _log.warning("%s is left out of a scrape: %s", name, error)
                continue
            for stats, metrics in snapshots:
                for metric in metrics:
                    family = families.get(metric.name)
                    if family is None:
                        kind = CounterMetricFamily if metric.name.endswith("_total") else GaugeMetricFamily
                        labels = ["name", metric.label] if metric.label else ["name"]
                        family = families[metric.name] = kind(f"numbabuf_{metric.name}", metric.help, labels=labels)
                    for value, number in metric.read(stats):
                        family.add_metric([name, value] if metric.label else [name], number)
        yield from families.values()

    def __repr__(self) -> str:
        return f"Collector({', '.join(self._watched) or 'nothing'})"
