"""create_input_buffer_manager: the four kinds work alike, and no option is lost or silently ignored."""

import itertools

import numpy as np
import pytest

from numbabuf import (
    HierarchicalBufferPool,
    InputBufferManager,
    PredictiveBufferManager,
    SimpleBufferPool,
    create_input_buffer_manager,
)


@pytest.mark.parametrize("hierarchical, predictive", list(itertools.product([False, True], repeat=2)))
def test_each_kind_stages_and_closes_its_own_pool(hierarchical, predictive):
    manager = create_input_buffer_manager(
        2, 8, use_hierarchical=hierarchical, use_predictive=predictive, buckets=[4, 16], ring=2
    )
    assert isinstance(manager, PredictiveBufferManager if predictive else InputBufferManager)
    pool = manager.pool
    assert isinstance(pool, HierarchicalBufferPool) == hierarchical
    views = manager.stage_inputs({"input_ids": np.arange(3)}, 3)
    manager.synchronize()
    assert views["input_ids"].copy_to_host().tolist() == [0, 1, 2, 0]
    manager.check()
    pool.check()
    manager.close()
    assert pool.closed


def test_budgets_reach_the_pool():
    budgets = {"device_bytes": 1 << 16, "pinned_bytes": 1 << 15}
    with create_input_buffer_manager(1, 8, use_hierarchical=True, **budgets) as manager:
        manager.stage_inputs({}, 1)
        assert manager.pool.stats().reserved_bytes <= (1 << 16) + (1 << 15)
    with (
        pytest.raises(MemoryError),
        create_input_buffer_manager(
            64, 64, use_hierarchical=True, device_bytes=1 << 10, pinned_bytes=1 << 10
        ) as manager,
    ):
        manager.stage_inputs({}, 1)


def test_a_pool_of_the_users_stays_open():
    with SimpleBufferPool() as pool:
        with create_input_buffer_manager(1, 8, pool=pool) as manager:
            manager.stage_inputs({}, 1)
        assert not pool.closed


def test_options_that_nobody_takes_are_refused():
    with pytest.raises(TypeError, match="use_hierarchical"):
        create_input_buffer_manager(device_bytes=1)
    with SimpleBufferPool() as pool, pytest.raises(TypeError, match="pool"):
        create_input_buffer_manager(pool=pool, use_hierarchical=True)
    with pytest.raises(TypeError, match="max_graphs"):
        create_input_buffer_manager(max_graphs=3)
    with pytest.raises(TypeError):
        create_input_buffer_manager(use_hierarchical=True, no_such_option=1)
