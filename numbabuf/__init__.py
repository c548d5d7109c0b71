"""Buffers and CUDA graphs for Numba: static input slots, pools over memory tiers, one graph replay per step.

Importing this package touches no device and no optional package. See the README for a tour, `InputBufferManager` for
the hot path and `SimpleBufferPool` for memory.
"""

from . import config
from .entry import BufferEntry
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
from .factory import create_input_buffer_manager
from .graph import Step
from .hierarchy import HierarchicalBufferPool, HierarchyStats
from .interop import from_dlpack
from .lease import Lease
from .manager import InputBufferManager
from .pool import BufferPool, SimpleBufferPool
from .predictive import PredictiveBufferManager
from .slot import InputSlot
from .spec import BufferSpec, BufferState, Tier
from .stats import ManagerStats, PoolStats, PredictionStats

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
    "ClosedError",
    "GraphMissingError",
    "HierarchicalBufferPool",
    "HierarchyStats",
    "InputBufferManager",
    "InputSlot",
    "Lease",
    "ManagerStats",
    "NumbabufError",
    "PoolStats",
    "PredictionStats",
    "PredictiveBufferManager",
    "SimpleBufferPool",
    "StaleBufferError",
    "Step",
    "Tier",
    "TierFullError",
    "TraceError",
    "create_input_buffer_manager",
    "from_dlpack",
]

if config.enabled("NUMBABUF_NVTX", or_warn=True):
    from . import nvtx

    nvtx.enable(or_warn=True)

