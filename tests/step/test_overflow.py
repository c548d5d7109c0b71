"""How a step that is too large is cut: every piece checked before the first one is used, and none made early."""

import numpy as np
import pytest

from numbabuf import BucketOverflowError, BufferSpec, InputBufferManager
from numbabuf.step.overflow import cut, uncut


@pytest.fixture
def slots():
    with InputBufferManager(max_batch_size=1, max_seq_len=32, default_slots=False) as m:
        m.register_slot("ids", BufferSpec(32, "int32"), source_dtype="int64")
        m.register_slot("lens", BufferSpec(4, "int64"), axis=None)
        yield m.slots


def test_pieces_cover_the_step(slots):
    inputs = {"ids": np.arange(20), "lens": np.arange(4)}
    pieces = list(cut(inputs, 20, 8, slots))
    assert [(start, stop) for start, stop, _ in pieces] == [(0, 8), (8, 16), (16, 20)]
    assert np.concatenate([piece["ids"] for _, _, piece in pieces]).tolist() == list(range(20))
    assert all(piece["lens"] is inputs["lens"] for _, _, piece in pieces)


def test_none_is_left_out(slots):
    """As in a step that is not split."""
    assert [list(piece) for _, _, piece in cut({"ids": np.arange(9), "lens": None}, 9, 8, slots)] == [["ids"]] * 2


def test_no_piece_is_made_before_its_turn():
    """A step of a quadrillion tokens, which takes no memory: neither do its pieces."""
    with InputBufferManager(max_batch_size=1, max_seq_len=32) as m:
        pieces = cut({"positions": np.broadcast_to(3, (10**15,))}, 10**15, 8, m.slots)
        start, stop, piece = next(pieces)
        assert (start, stop, piece["positions"].tolist()) == (0, 8, [3] * 8)


def test_a_fault_in_the_last_piece_is_found_first(slots):
    inputs = {"ids": np.arange(20)}
    inputs["ids"][-1] = 1 << 40
    with pytest.raises(OverflowError):
        cut(inputs, 20, 8, slots)
    with pytest.raises(ValueError, match="this step has 21 tokens"):
        cut({"ids": np.arange(20)}, 21, 8, slots)
    with pytest.raises(ValueError, match="this step has 4"):
        cut({"lens": np.arange(3)}, 20, 8, slots)


@pytest.mark.parametrize("axis", ["tokens+1", "seqs", "seqs+1"])
@pytest.mark.parametrize("given", [True, False])
def test_a_slot_that_speaks_of_the_whole_step_is_not_split(axis, given):
    """Handed whole to a piece, offsets would lead a kernel past the tokens of the piece."""
    with InputBufferManager(max_batch_size=1, max_seq_len=32, buckets=[8], overflow="split") as m:
        m.register_slot("starts", BufferSpec(33, "int64"), axis=axis)
        assert uncut(m.slots).name == "starts"
        sizes = {} if "tokens" in axis else {"seqs": 2}
        m.capture_buckets(lambda step: step.bucket["tokens"], [{"tokens": 8, **sizes}])
        before = m.stats()
        rows = (sizes.get("seqs") or 20) + axis.endswith("+1")
        inputs = {"input_ids": np.arange(20)} | ({"starts": np.arange(rows)} if given else {})
        with pytest.raises(BucketOverflowError, match="overflow='eager'; .* slot 'starts', which"):
            m.replay(inputs, 20, **sizes)
        assert m.stats() == before
        assert m.replay({"input_ids": np.arange(5)}, 5, **sizes) == 8
        m.check()
