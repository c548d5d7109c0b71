"""Buffers and CUDA graphs for Numba: static input slots, pools over memory tiers, one graph replay per step.

Importing this package touches no device and no optional package, and reads a module only when a name of it is asked
for. See the README for a tour, `InputBufferManager` for the hot path and `SimpleBufferPool` for memory.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import config

if TYPE_CHECKING:
    from ._cuda.dlpack import from_dlpack
    from .errors import (
        BackendError,
        BucketOverflowError,
        BusyError,
        CaptureError,
        ClosedError,
        GraphMissingError,
        NumbabufError,
        StaleBufferError,
        TierFullError,
        TraceError,
    )
    from .pool.base import ReusingPool
    from .pool.entry import BufferEntry
    from .pool.pool import BufferPool, SimpleBufferPool
    from .pool.spec import BufferSpec, BufferState, Tier
    from .pool.stats import PoolStats
    from .predict.factory import create_input_buffer_manager
    from .predict.manager import PredictiveBufferManager
    from .predict.stats import PredictionStats
    from .step.graph import Step
    from .step.lease import Lease
    from .step.manager import InputBufferManager
    from .step.output import OutputSlot
    from .step.program import CapturedSize, Program
    from .step.returns import Outputs
    from .step.slot import InputSlot
    from .step.stats import ManagerStats, ProgramStats
    from .tiers.pool import HierarchicalBufferPool
    from .tiers.stats import HierarchyStats

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BucketOverflowError",
    "BufferEntry",
    "BufferPool",
    "BufferSpec",
    "BufferState",
    "BusyError",
    "CaptureError",
    "CapturedSize",
    "ClosedError",
    "GraphMissingError",
    "HierarchicalBufferPool",
    "HierarchyStats",
    "InputBufferManager",
    "InputSlot",
    "Lease",
    "ManagerStats",
    "NumbabufError",
    "OutputSlot",
    "Outputs",
    "PoolStats",
    "PredictionStats",
    "PredictiveBufferManager",
    "Program",
    "ProgramStats",
    "ReusingPool",
    "SimpleBufferPool",
    "StaleBufferError",
    "Step",
    "Tier",
    "TierFullError",
    "TraceError",
    "create_input_buffer_manager",
    "from_dlpack",
]

_HOMES = {
    "_cuda.dlpack": ("from_dlpack",),
    "errors": (
        "BackendError",
        "BucketOverflowError",
        "BusyError",
        "CaptureError",
        "ClosedError",
        "GraphMissingError",
        "NumbabufError",
        "StaleBufferError",
        "TierFullError",
        "TraceError",
    ),
    "pool.base": ("ReusingPool",),
    "pool.entry": ("BufferEntry",),
    "pool.pool": ("BufferPool", "SimpleBufferPool"),
    "pool.spec": ("BufferSpec", "BufferState", "Tier"),
    "pool.stats": ("PoolStats",),
    "predict.factory": ("create_input_buffer_manager",),
    "predict.manager": ("PredictiveBufferManager",),
    "predict.stats": ("PredictionStats",),
    "step.graph": ("Step",),
    "step.lease": ("Lease",),
    "step.manager": ("InputBufferManager",),
    "step.output": ("OutputSlot",),
    "step.program": ("CapturedSize", "Program"),
    "step.returns": ("Outputs",),
    "step.slot": ("InputSlot",),
    "step.stats": ("ManagerStats", "ProgramStats"),
    "tiers.pool": ("HierarchicalBufferPool",),
    "tiers.stats": ("HierarchyStats",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, and keep it."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if config.enabled("NUMBABUF_NVTX", or_warn=True):
    from .ext import nvtx

    nvtx.enable(or_warn=True)
