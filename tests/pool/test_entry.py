"""BufferEntry beyond the pool contract, which covers its life: its own small promises."""

import numpy as np
import pytest

from numbabuf import _cuda
from numbabuf.pool.block import Block, Handle
from numbabuf.pool.entry import FixedEntry
from numbabuf.pool.spec import BufferSpec, BufferState, Tier


@pytest.fixture
def home():
    return []


@pytest.fixture
def handle(home):
    block = Block(BufferSpec((2, 3), "int32", Tier.PINNED), 24)
    block.home = home.append
    block.store = lambda: None
    return Handle(block)


@pytest.fixture
def entry(handle):
    return FixedEntry(handle)


def test_a_plain_release_sends_the_handle_home_and_nothing_else(entry, handle, home):
    entry.release()
    assert home == [handle]
    assert entry.state is BufferState.FREE


def test_a_block_that_is_not_plain_goes_to_its_pool(entry, handle, home):
    calls = []

    class Pool:
        def take_back(self, *arguments):
            calls.append(arguments)
            return "somewhere.py:7"

    block = handle.block
    block.plain, block.store = False, Pool
    stream = _cuda.as_stream(None)
    entry.release(stream=stream)
    assert calls == [(handle, stream)] and not home
    with pytest.raises(RuntimeError, match=r"somewhere\.py:7"):
        entry.release()


def test_a_release_that_fails_can_be_tried_again(entry, handle, home):
    class Pool:
        def take_back(self, *arguments):
            raise RuntimeError("device is lost")

    block = handle.block
    block.plain, block.store = False, Pool
    with pytest.raises(RuntimeError, match="device is lost"):
        entry.release()
    assert entry.state is BufferState.ALLOCATED and entry.array.shape == (2, 3)
    block.plain = True
    entry.release()
    assert len(home) == 1


def test_a_release_after_the_pool_is_gone_is_quiet(entry, handle, home):
    handle.block.plain = False
    entry.release()
    assert not home and entry.state is BufferState.FREE


def test_streams_are_recorded_once_each(entry, handle):
    one, two = _cuda.as_stream(None), _cuda.as_stream(None)
    for stream in (one, two, one):
        entry.record_stream(stream)
    entry.mark_in_use(stream=two)
    block = handle.block
    assert block.users == (one, two) and not block.plain


def test_the_interface_reads_as_an_array(entry):
    entry.array[:] = np.arange(6).reshape(2, 3)
    interface = entry.__cuda_array_interface__
    assert set(interface) == {"shape", "typestr", "data", "strides", "stream", "version"}
    if not _cuda.SIM:
        from numba import cuda

        view = cuda.as_cuda_array(entry)
        assert view.shape == (2, 3) and view.copy_to_host().tolist() == [[0, 1, 2], [3, 4, 5]]


def test_bfloat16_reads_as_uint16():
    pytest.importorskip("ml_dtypes")
    entry = FixedEntry(Handle(Block(BufferSpec(4, "bfloat16", Tier.PINNED), 8)))
    assert entry.__cuda_array_interface__["typestr"] == "<u2"
    assert entry.nbytes == 8


def test_repr_and_unknown_names(entry):
    assert repr(entry) == "<BufferEntry BufferSpec((2, 3), int32, pinned) allocated>"
    with pytest.raises(AttributeError, match="no attribute 'shape'"):
        _ = entry.shape
    with pytest.raises(AttributeError):
        entry.anything = 1
    entry.release()
    assert repr(entry) == "<BufferEntry BufferSpec((2, 3), int32, pinned) free>"
    with pytest.raises(AttributeError, match="no attribute 'shape'"):
        _ = entry.shape


def test_each_lease_is_another_object_with_its_own_counts(entry, home):
    entry.mark_in_use(stream=None) if entry.tier is Tier.DEVICE else entry.mark_staged()
    entry.release()
    again = FixedEntry(home[0])
    assert again is not entry and again != entry
    assert (again.state, again.use_count, again.last_used) == (BufferState.ALLOCATED, 0, None)
