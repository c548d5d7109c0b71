"""HTML for notebooks: every long-lived object has it, it parses, and it says what the object holds."""

import xml.etree.ElementTree as tree

import kit
import numpy as np
import pytest

from numbabuf import (
    BufferSpec,
    HierarchicalBufferPool,
    InputBufferManager,
    PredictiveBufferManager,
    SimpleBufferPool,
    Tier,
)
from numbabuf._cuda import cuda
from numbabuf.demand import DemandModel
from numbabuf.view import html


def parse(markup):
    """The markup as a tree; the pieces are written as XML, so an unclosed or unescaped thing fails here."""
    return tree.fromstring(f"<page>{markup}</page>")


def words(markup):
    return " ".join(" ".join(parse(markup).itertext()).split())


def widths(markup):
    """Widths of the filled pieces of a bar, in pixels."""
    return [float(piece.get("width")) for piece in parse(markup).iter("rect") if piece.get("fill")]


def test_text_is_escaped():
    evil = "<b onclick='x'>&"
    for markup in (html.card(evil), html.table([evil], [[evil]]), html.bar({evil: 1}), html.columns({evil: 1})):
        assert not list(parse(markup).iter("b"))
        assert "&" in words(markup)


def test_a_bar_is_divided_in_proportion():
    assert widths(html.bar({"a": 1, "b": 3}, width=400)) == [100, 300]
    assert widths(html.bar({"a": 1, "b": 1}, total=8, width=400)) == [50, 50]
    assert widths(html.bar({"a": 0, "b": 0})) == []
    assert "2 KiB of 8 KiB" in words(html.bar({"a": 2048}, total=8192, unit="bytes"))
    assert len(widths(html.bar(dict.fromkeys(map(str, range(20)), 1)))) == 20


def test_columns_add_neighbours_up():
    markup = html.columns(dict.fromkeys(range(100), 1), most=10)
    assert len(widths(markup)) == 10 and "0 99" in words(markup).replace("most: 0 to 9 (10) ", "")
    assert words(html.columns({})) == "nothing yet"


def test_squares_show_how_full_a_ring_is():
    filled = [piece for piece in parse(html.squares(3, 8)).iter("rect") if piece.get("fill")]
    assert len(filled) == 3
    assert words(html.squares(500, 1000)) == "500 queued, 500 free"


def test_a_table_keeps_numbers_to_the_right():
    cells = list(parse(html.table(["name", "n"], [["a", 1000]])).iter("td"))
    assert [("right" in cell.get("style"), cell.text) for cell in cells] == [(False, "a"), (True, "1,000")]


@cuda.jit
def _copy(out, ids):
    for i in range(cuda.grid(1), ids.size, cuda.gridsize(1)):
        out[i] = ids[i]


@pytest.fixture
def manager():
    out = cuda.to_device(np.zeros(16, np.int64))
    with PredictiveBufferManager(max_batch_size=1, max_seq_len=16, buckets=[4, 16]) as manager:
        manager.capture_buckets(lambda step: _copy[1, 1, step.stream](out, step["input_ids"]), [4, 16])
        for n in (3, 3, 9):
            manager.replay({"input_ids": np.arange(n), "positions": np.arange(n)}, n)
        manager.synchronize()
        yield manager


def test_a_manager_shows_slots_ring_and_padding(manager):
    shown = words(kit.html(manager))
    for part in ("input_ids", "0 staged, 4 free", "live 15", "padding 9", "4 2 6 33.3", "16 1 9 77.8"):
        assert part in shown
    assert words(kit.html(manager.stats())) in shown
    manager.close()
    assert "closed" in words(kit.html(manager))


def test_the_parts_of_a_manager_show_themselves(manager):
    assert "follows tokens" in words(kit.html(manager.get_slot("positions")))
    (small, large) = manager._first.graphs
    assert "live tokens 6 padding 2" in words(kit.html(small))
    assert "positions 16 int64" in words(kit.html(large.step))
    assert "most: 3 (2)" in words(kit.html(manager.demand))
    assert "hits" in words(kit.html(manager.prediction()))
    assert "nothing yet" in words(kit.html(DemandModel()))


def test_padding_rows_agree_with_the_sums(manager):
    stats = manager.stats()
    rows = stats.padding_rows()
    assert [row[:3] for row in rows] == [(4, 2, 6), (16, 1, 9)]
    assert sum(live for _, _, live, _ in rows) == stats.live_tokens
    assert sum(bucket * steps for bucket, steps, _, _ in rows) == stats.padded_tokens


def test_a_pool_shows_its_tiers_and_limits():
    with SimpleBufferPool(max_bytes=1 << 20, max_pinned_bytes=4096) as pool:
        entry = pool.allocate(BufferSpec(1024, "uint8", Tier.PINNED))
        pool.allocate(BufferSpec(3072, "uint8")).release()
        shown = words(kit.html(pool))
        for part in ("pinned 1 KiB of 4 KiB", "device 3 KiB of 1 MiB", "in use 1 KiB", "idle 3 KiB"):
            assert part in shown
        assert "state allocated" in words(kit.html(entry))
        entry.release()
        assert "state free" in words(kit.html(entry))
        with pool.statistics() as scope:
            pool.allocate(BufferSpec(3072, "uint8")).release()
        assert "peak 3 KiB" in words(kit.html(scope.stats()))
    assert "nothing yet" in words(kit.html(SimpleBufferPool().stats()))


def test_a_hierarchical_pool_shows_its_moves():
    with HierarchicalBufferPool(device_bytes=4096, pinned_bytes=16384) as pool:
        first, second = (pool.allocate(BufferSpec(4096, "uint8"), movable=True) for _ in "ab")
        with pool.use([first], stream=None, in_place=False):
            pass
        shown = words(kit.html(pool))
        assert "device 4 KiB of 4 KiB" in shown and "promotions 1" in shown
        assert "tier device" in words(kit.html(first))
        first.release()
        second.release()


def test_a_manager_without_memory_shows_itself():
    with InputBufferManager(max_batch_size=1, max_seq_len=4) as manager:
        assert "steps 0" in words(kit.html(manager))
