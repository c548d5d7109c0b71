"""How a step that is too large is cut: every piece made and checked before the first one is used."""

import numpy as np
import pytest

from numbabuf import BufferSpec, InputBufferManager
from numbabuf.overflow import cut


@pytest.fixture
def slots():
    with InputBufferManager(max_batch_size=1, max_seq_len=32, default_slots=False) as m:
        m.register_slot("ids", BufferSpec(32, "int32"), source_dtype="int64")
        m.register_slot("lens", BufferSpec(4, "int64"), axis="seqs")
        yield m.slots


def test_pieces_cover_the_step(slots):
    inputs = {"ids": np.arange(20), "lens": np.arange(3)}
    pieces = cut(inputs, (20, 3), 8, slots)
    assert [(start, stop) for start, stop, _ in pieces] == [(0, 8), (8, 16), (16, 20)]
    assert np.concatenate([piece["ids"] for _, _, piece in pieces]).tolist() == list(range(20))
    assert all(piece["lens"] is inputs["lens"] for _, _, piece in pieces)


def test_none_is_left_out(slots):
    """As in a step that is not split."""
    assert [list(piece) for _, _, piece in cut({"ids": np.arange(9), "lens": None}, (9, 0), 8, slots)] == [["ids"]] * 2


def test_a_fault_in_the_last_piece_is_found_first(slots):
    inputs = {"ids": np.arange(20)}
    inputs["ids"][-1] = 1 << 40
    with pytest.raises(OverflowError):
        cut(inputs, (20, 0), 8, slots)
    with pytest.raises(ValueError, match="this step has 21 tokens"):
        cut({"ids": np.arange(20)}, (21, 0), 8, slots)
    with pytest.raises(ValueError, match="this step has 2"):
        cut({"lens": np.arange(3)}, (20, 2), 8, slots)


def test_rows_to_spare_cannot_be_cut():
    with InputBufferManager(max_batch_size=1, max_seq_len=32, default_slots=False) as m:
        m.register_slot("starts", BufferSpec(33), axis="tokens+1")
        with pytest.raises(ValueError, match="follows tokens\\+1, which cannot be split"):
            cut({"starts": np.zeros(21, np.float32)}, (20,), 8, m.slots)
