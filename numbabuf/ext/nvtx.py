"""NVTX ranges for Nsight Systems around the calls that a timeline is read for; off by default.

Switched on, whole methods are replaced by ones that push a prebuilt range; switched off there is nothing in their
place, not even a flag check, so the hot path pays only while it is looked at. Sits above everything it names, and
nothing imports it but the package itself where NUMBABUF_NVTX is on.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any, Protocol

from ..pool.base import ReusingPool
from ..pool.oom import Ladder
from ..predict.manager import PredictiveBufferManager
from ..step.manager import InputBufferManager
from ..tiers.pool import HierarchicalBufferPool

__all__ = ["RANGES", "disable", "enable", "enabled"]

RANGES: dict[tuple[type, str], str] = {
    (InputBufferManager, "stage_inputs"): "stage_inputs",
    (InputBufferManager, "replay"): "replay",
    (InputBufferManager, "capture_buckets"): "capture_buckets",
    (InputBufferManager, "synchronize"): "synchronize",
    (PredictiveBufferManager, "prewarm"): "prewarm",
    (ReusingPool, "reserve"): "reserve",
    (ReusingPool, "trim"): "trim",
    (Ladder, "climb"): "allocate from the driver",
    (HierarchicalBufferPool, "promote"): "promote",
    (HierarchicalBufferPool, "demote"): "demote",
    (HierarchicalBufferPool, "prefetch"): "prefetch",
}
"""Class and method -> the name of its range in the domain "numbabuf". A hit in a pool is too short to be worth one."""

_lock = threading.Lock()
_originals: dict[tuple[type, str], Callable[..., Any]] = {}


def enable(*, or_warn: bool = False) -> None:
    """Put a range around every method of `RANGES`, for the whole process. Doing it again does nothing.

    Parameters
    ----------
    or_warn
        Where the package nvtx is missing, warn and go on instead of raising: a switch left on must stop no program.

    Raises
    ------
    ImportError
        The package nvtx is not installed.

    Notes
    -----
    Cost: about 1 us a call while a profiler listens, a fraction of that while none does.
    """
    try:
        import nvtx
    except ImportError:
        missing = "NVTX ranges need the package nvtx: pip install numbabuf[nvtx], or leave NUMBABUF_NVTX off"
        if not or_warn:
            raise ImportError(missing) from None
        warnings.warn(missing, RuntimeWarning, stacklevel=3)
        return
    domain = nvtx.get_domain("numbabuf")
    with _lock:
        for (owner, name), label in RANGES.items():
            if (owner, name) not in _originals:
                _originals[owner, name] = function = vars(owner)[name]
                setattr(owner, name, _ranged(function, domain, domain.get_event_attributes(message=label)))


def disable() -> None:
    """Put every method back as it was. A call that is under way ends its range itself."""
    with _lock:
        for (owner, name), function in _originals.items():
            setattr(owner, name, function)
        _originals.clear()


def enabled() -> bool:
    """Return whether the ranges are on."""
    return bool(_originals)


class _Domain(Protocol):
    """What is used of an `nvtx.Domain`."""

    def push_range(self, attributes: object) -> None: ...

    def pop_range(self) -> None: ...


def _ranged(function: Callable[..., Any], domain: _Domain, attributes: object) -> Callable[..., Any]:
    push, pop = domain.push_range, domain.pop_range

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        push(attributes)
        try:
            return function(*args, **options)
        finally:
            pop()

    return call
