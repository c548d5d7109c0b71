"""The staging ring by itself: its layout, and when a block may be written again."""

import kit
import numpy as np
import pytest

from numbabuf import BufferSpec, InputBufferManager, _cuda
from numbabuf._cuda import kernels
from numbabuf.step.layout import ALIGNMENT, Layout, align
from numbabuf.step.ring import StagingRing
from numbabuf.step.slot import InputSlot


class Stream:
    """A stream that is busy for a number of queries; `then` runs at each."""

    device = 0

    def __init__(self, busy, then=None):
        self.busy, self.then = busy, then

    def query(self):
        if self.then is not None:
            self.then()
        self.busy -= 1
        return self.busy < 0


def make(specs, depth=2, stream=None):
    slots = []
    for position, (spec, source, max_live) in enumerate(specs):
        slot = InputSlot(f"s{position}", BufferSpec(*spec), static=True, pad=0, index=False, source_dtype=source,
                         axis="tokens", max_live=max_live, range_check=True)  # fmt: skip
        slot.position = position
        slots.append(slot)
    layout = Layout.of(slots, {}, 64)
    memory = np.full(layout.ring_bytes(depth) + ALIGNMENT, 0xEE, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT  # as the driver would align it
    return StagingRing(memory[start:][: layout.ring_bytes(depth)], layout, depth, stream), layout


@pytest.mark.parametrize("nbytes, rounded", [(0, 0), (1, 256), (256, 256), (257, 512)])
def test_align(nbytes, rounded):
    assert align(nbytes) == rounded


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_nothing_in_the_ring_overlaps(depth):
    ring, layout = make(
        [((7, "int32"), "int64", None), (((3, 5), "float32"), None, 4), ((9, "uint8"), None, None)], depth
    )
    spans = [(ring.retired_address, ring.retired_address + 8)]
    for number, block in enumerate(ring.blocks):
        words = np.asarray(block.words)
        assert words.ctypes.data == ring.address + number * ring.block_bytes, "where the kernel looks for them"
        assert words.size == len(layout.slots) * kernels.LIVE + layout.step_words and not words.any()
        spans.append((words.ctypes.data, words.ctypes.data + words.nbytes))
        for slot, source, staged in zip(layout.slots, layout.sources, block.staged, strict=True):
            assert staged.ctypes.data == ring.address + number * ring.block_bytes + source
            assert staged.dtype == slot.source_dtype and staged.shape == (slot.max_live,)
            assert staged.ctypes.data % ALIGNMENT == 0
            spans.append((staged.ctypes.data, staged.ctypes.data + staged.nbytes))
    spans.sort()
    assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:]))


def test_a_ring_without_slots_has_words_for_the_one_row_that_is_launched():
    ring, layout = make([])
    assert [len(block.words) for block in ring.blocks] == [kernels.LIVE + layout.step_words] * 2
    assert not any(any(block.words) for block in ring.blocks)
    assert ring.block_bytes >= kernels.LIVE * kernels.WORD


def test_blocks_go_round_and_a_full_ring_asks_the_stream():
    stream = Stream(busy=3)
    ring, _ = make([((4, "int64"), None, None)], depth=2, stream=stream)

    def retire():
        ring._retired[0] = 1

    assert ring.acquire() is ring.blocks[0]
    assert ring.acquire() is ring.blocks[0], "acquiring alone counts nothing"
    ring.advance()
    assert ring.acquire() is ring.blocks[1]
    ring.advance()
    assert ring.pending == 2 and ring.waits == 0
    stream.then = retire
    assert ring.acquire() is ring.blocks[0]
    assert ring.waits == 1 and ring.pending == 1


def test_an_idle_stream_that_read_nothing_is_an_error():
    ring, _ = make([((4, "int64"), None, None)], depth=1, stream=Stream(busy=2))
    ring.advance()
    with pytest.raises(RuntimeError, match="idle but only 0 of 1"):
        ring.acquire()


def test_the_last_fill_may_finish_between_the_two_questions():
    """The stream becomes idle after the count was looked at: that is no error."""
    ring, _ = make([((4, "int64"), None, None)], depth=1)
    ring.advance()
    ring._stream = Stream(busy=0, then=lambda: ring._retired.__setitem__(0, 1))
    assert ring.acquire() is ring.blocks[0]


def test_a_fault_ends_the_wait():
    class Faulted(Stream):
        def query(self):
            raise OSError("illegal address")

    ring, _ = make([((4, "int64"), None, None)], depth=1, stream=Faulted(busy=0))
    ring.advance()
    with pytest.raises(OSError, match="illegal"):
        ring.acquire()


def test_reset_starts_anew():
    ring, _ = make([((4, "int64"), None, None)], depth=2)
    for _ in range(2):
        ring.advance()
    ring.reset()
    assert ring.step == ring.pending == 0 and ring.acquire() is ring.blocks[0]


@pytest.mark.parametrize("depth", [1, 2, 3, 7])
def test_ring_depths_in_use(depth):
    with InputBufferManager(max_batch_size=1, max_seq_len=4, ring=depth) as m:
        for step in range(2 * depth + 3):
            m.stage_inputs({"input_ids": np.full(3, step)}, 3)
            assert kit.contents(m)["input_ids"].tolist() == [step] * 3 + [0]
        m.check()


def test_max_live_makes_the_ring_smaller():
    def ring_bytes(max_live):
        with InputBufferManager(max_batch_size=1, max_seq_len=1, default_slots=False, ring=4) as m:
            m.register_slot("x", BufferSpec(100_000, "int64"), max_live=max_live)
            m.stage_inputs({}, 0)
            return m.stats().ring_bytes

    assert ring_bytes(None) > 3_200_000 > 20_000 > ring_bytes(100)


def test_pinned_memory_has_one_address_on_host_and_device():
    memory = _cuda.empty_pinned(64)
    assert (
        _cuda.address(memory)
        == memory.ctypes.data
        == _cuda.address(_cuda.device_view(memory, 0, (64,), np.dtype("u1")))
    )
