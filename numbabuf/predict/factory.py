"""One function that makes the right manager over the right pool. Knows nothing that its parts do not know.

Sits above `hierarchy` and `predictive`.
"""

from __future__ import annotations

from typing import Any

from .. import _cuda
from ..step.manager import InputBufferManager
from ..tiers.pool import HierarchicalBufferPool
from .manager import PredictiveBufferManager

__all__ = ["create_input_buffer_manager"]

_POOL_OPTIONS = ("device_bytes", "managed_bytes", "pinned_bytes", "policy")
_UNKNOWN_BYTES = 1 << 30  # a budget where the backend does not tell how much memory there is


def create_input_buffer_manager(
    max_batch_size: int = 256,
    max_seq_len: int = 4096,
    use_hierarchical: bool = False,
    use_predictive: bool = False,
    **options: Any,
) -> InputBufferManager:
    """Make an input manager, with the pool and the prediction that were asked for.

    Parameters
    ----------
    max_batch_size, max_seq_len : int
        As `InputBufferManager`.
    use_hierarchical : bool
        Allocate from a `HierarchicalBufferPool` of the manager's own. Its options `device_bytes`, `managed_bytes`,
        `pinned_bytes` and `policy` may be given here; without them the budgets are 80 % of the device memory that is
        free now (1 GiB where the backend does not tell), no managed memory, and as much pinned as device memory, at
        most 4 GiB.
    use_predictive : bool
        Make a `PredictiveBufferManager`.
    **options
        As the manager that is made.

    Returns
    -------
    manager : InputBufferManager
        It owns its pool, unless `pool` was given, and closes it with itself.

    Raises
    ------
    TypeError
        An option that what is made does not take; a pool's option without `use_hierarchical`, or beside `pool`.

    Examples
    --------
    >>> with create_input_buffer_manager(4, 64, use_hierarchical=True, use_predictive=True, max_graphs=4) as manager:
    ...     print(manager)
    PredictiveBufferManager(2 slots, 256 tokens, ring=4, 0 graphs)
    """
    pool_options = {name: options.pop(name) for name in _POOL_OPTIONS if name in options}
    if pool_options and not use_hierarchical:
        raise TypeError(f"{', '.join(pool_options)} belong to a hierarchical pool: pass use_hierarchical=True as well")
    if use_hierarchical and options.get("pool") is not None:
        raise TypeError("pool and use_hierarchical are both given: give the pool alone")
    kind = PredictiveBufferManager if use_predictive else InputBufferManager
    if not use_hierarchical:
        return kind(options.pop("pool", None), max_batch_size, max_seq_len, **options)
    options.pop("pool", None)
    if "device_bytes" not in pool_options:
        info = _cuda.memory_info()
        pool_options["device_bytes"] = _UNKNOWN_BYTES if info is None else info[0] * 4 // 5
    pool_options.setdefault("pinned_bytes", min(pool_options["device_bytes"], 4 << 30))
    pool = HierarchicalBufferPool(**pool_options)
    try:
        manager = kind(pool, max_batch_size, max_seq_len, **options)
    except BaseException:
        pool.close()
        raise
    manager.owns_pool = True
    return manager
