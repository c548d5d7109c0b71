"""Moves: the plan, the copy kernel against its twin, the ring of tables, and marks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numbabuf import _cuda
from numbabuf._cuda import kernels
from numbabuf.pool.block import Block
from numbabuf.pool.spec import BufferSpec, Tier
from numbabuf.tiers.mover import BLOCKS_DOWN, BLOCKS_UP, ENGINE_BYTES, Move, Mover, table

SIM = _cuda.SIM


def copy_many(memory, table):
    """The kernel's twin: `memory` after the copies of `table`, whose addresses count from its start."""
    after = memory.copy()
    for source, target, nbytes in np.asarray(table).reshape(-1, 3):
        after[target : target + nbytes] = memory[source : source + nbytes]
    return after


@st.composite
def batches(draw, limit=4000, most=12):
    """Copies within `limit` bytes whose targets overlap nothing, some of them end to end."""
    cuts = sorted(draw(st.sets(st.integers(0, limit // 2), min_size=2, max_size=most + 1)))
    pieces = list(zip(cuts, cuts[1:], strict=False))
    base, copies = limit // 2, []
    for begin, end in draw(st.permutations(pieces)):
        kind = draw(st.sampled_from(["along", "apart", "skip"]))
        if kind == "along":  # what lies end to end at the source lies so at the target
            copies.append((begin, base + begin, end - begin))
        elif kind == "apart":
            copies.append((draw(st.integers(0, base - (end - begin))), base + begin, end - begin))
    return copies


# --------------------------------------------------------------------------------------------------------------- plan


@given(batches(), st.randoms(use_true_random=False), st.integers(1, 64))
def test_a_plan_copies_the_same_and_depends_on_no_order(copies, random, blocks):
    memory = np.random.default_rng(0).integers(0, 256, 4000).astype(np.uint8)
    rows = table(copies, blocks=blocks)
    assert (copy_many(memory, rows) == copy_many(memory, copies)).all()
    assert rows.dtype == np.int64 and rows.shape[1] == 3 and (rows[:, 2] > 0).all()
    random.shuffle(copies)
    assert table(copies, blocks=blocks).tolist() == rows.tolist()


@given(batches())
def test_nothing_in_a_plan_could_be_merged_further(copies):
    rows = table(copies).tolist()
    for (source, target, nbytes), (after, behind, _) in zip(rows, rows[1:], strict=False):
        assert (after, behind) != (source + nbytes, target + nbytes)


def test_runs_are_merged_only_if_both_sides_run_on():
    assert table([(0, 100, 8), (8, 108, 8)]).tolist() == [[0, 100, 16]]
    assert len(table([(0, 100, 8), (8, 120, 8)])) == 2
    assert len(table([(0, 100, 8), (9, 108, 8)])) == 2


def test_both_directions_in_one_plan():
    up, down = (1 << 20, 1 << 40, 512), (1 << 41, 1 << 21, 512)
    assert table([down, up]).tolist() == [list(up), list(down)]


def test_long_copies_are_cut_so_that_all_blocks_have_work():
    rows = table([(16, 1 << 40, (64 << 20) + 5)], blocks=16)
    assert len(rows) >= 16 * 4
    assert rows[:, 2].sum() == (64 << 20) + 5 and rows[:, 2].max() - rows[:-1, 2].min() == 0
    assert (rows[1:, 0] == rows[:-1, 0] + rows[:-1, 2]).all() and (rows[1:, 1] == rows[:-1, 1] + rows[:-1, 2]).all()
    assert ((rows[:, 0] ^ rows[:, 1]) % 16 == (16 ^ (1 << 40)) % 16).all(), "alignment of the two sides is kept"
    assert len(table([(16, 1 << 40, 16 << 10)])) == 1, "short ones stay whole"


def test_empty_plans():
    for nothing in ([], [(1, 2, 0)]):
        assert table(nothing).shape == (0, 3)


@pytest.mark.parametrize(
    ("copies", "text"),
    [
        ([(0, 100, -1)], ">= 0"),
        ([(0, 100, 10), (50, 109, 10)], "two copies write address 0x6d"),
        ([(0, 100, 10), (50, 100, 10)], "two copies write"),
        ([(0, 100, 10), (105, 200, 10)], "read and written"),
        ([(0, 4, 10)], "read and written"),
    ],
)
def test_what_has_no_order_is_refused(copies, text):
    with pytest.raises(ValueError, match=text):
        table(copies)


def test_touching_ranges_do_not_overlap():
    assert len(table([(0, 100, 10), (110, 90, 10), (10, 120, 5)])) == 3


# ------------------------------------------------------------------------------------------------------------- kernel


def device_bytes(data):
    base = _cuda.empty_device(max(1, len(data)))
    view = _cuda.device_view(base, 0, (len(data),), np.dtype(np.uint8))
    view.copy_to_device(data)
    return base, view


@settings(max_examples=25 if SIM else 60)
@given(batches(limit=2000 if SIM else 40_000), st.integers(1, 3), st.sampled_from([1, 32, 40, 64]))
def test_copy_many_equals_its_twin(copies, grid, threads):
    size = 2000 if SIM else 40_000
    before = np.random.default_rng(0).integers(0, 256, size).astype(np.uint8)
    base, view = device_bytes(before)
    address = _cuda.address(base)
    rows = table([(address + source, address + target, nbytes) for source, target, nbytes in copies])
    pinned = _cuda.host_view(_cuda.empty_pinned(max(1, rows.nbytes)), 0, rows.shape, np.dtype(np.int64))
    pinned[...] = rows
    stream = _cuda.as_stream(None)
    _cuda.launch(kernels.copy_many, 1 if SIM else grid, 1 if SIM else threads, stream, _cuda.address(pinned), len(rows))
    stream.synchronize()
    assert (view.copy_to_host() == copy_many(before, copies)).all()


@pytest.mark.parametrize("shift", [0, 1, 4, 8, 15])
def test_every_alignment(shift):
    before = np.random.default_rng(1).integers(0, 256, 3000).astype(np.uint8)
    base, view = device_bytes(before)
    address = _cuda.address(base)
    copies = [(offset, 1500 + offset + shift, length) for offset, length in ((0, 301), (400, 16), (500, 3), (600, 640))]
    pinned = _cuda.host_view(_cuda.empty_pinned(24 * 4), 0, (4, 3), np.dtype(np.int64))
    pinned[...] = [(address + source, address + target, nbytes) for source, target, nbytes in copies]
    stream = _cuda.as_stream(None)
    _cuda.launch(kernels.copy_many, 1 if SIM else 2, 1 if SIM else 32, stream, _cuda.address(pinned), 4)
    stream.synchronize()
    assert (view.copy_to_host() == copy_many(before, copies)).all()


# -------------------------------------------------------------------------------------------------------------- mover


def block(tier, data):
    made = Block(BufferSpec(len(data), "uint8", tier), max(1, len(data)))
    fill(made, data)
    return made


def fill(made, data):
    if made.tier is Tier.DEVICE and len(data):
        made.array.copy_to_device(data)
    elif len(data):
        made.array[:] = data


def contents(made):
    return made.array.copy_to_host() if made.tier is Tier.DEVICE else np.array(made.array)


@pytest.mark.parametrize("engine_bytes", [None, 1, 600])
def test_one_batch_moves_between_all_tiers(engine_bytes, backend):
    rng = np.random.default_rng(2)
    data = {(a, b): rng.integers(0, 256, 500 + 37 * i).astype(np.uint8) for i, (a, b) in enumerate(
        (a, b) for a in Tier for b in Tier)}  # fmt: skip
    mover = Mover(engine_bytes=engine_bytes)
    moves = [Move(block(a, d), block(b, np.zeros_like(d)), len(d)) for (a, b), d in data.items()]
    fence = mover.run(moves)
    fence.synchronize()
    assert fence.done()
    for move, wanted in zip(moves, data.values(), strict=True):
        assert (contents(move.target) == wanted).all() and (contents(move.source) == wanted).all()
    assert mover.moved_bytes == sum(map(len, data.values()))
    by_engine = 0 if engine_bytes is None else sum(len(d) >= engine_bytes for d in data.values())
    assert mover.engine_copies == by_engine and mover.launches == (1 if by_engine < 9 else 0)


def test_a_batch_of_nothing_has_a_fence():
    mover = Mover()
    mover.run([]).synchronize()
    empty = block(Tier.PINNED, np.empty(0, np.uint8))
    mover.run([Move(empty, block(Tier.DEVICE, np.empty(0, np.uint8)), 0)]).synchronize()
    assert mover.launches == 0 == mover.moved_bytes


def test_tables_come_round_and_grow():
    mover = Mover(depth=2)
    rng = np.random.default_rng(3)
    for count in (1, 300, 2, 1, 700 if not SIM else 300):
        data = [rng.integers(0, 256, 3).astype(np.uint8) for _ in range(count)]
        moves = [Move(block(Tier.PINNED, d), block(Tier.DEVICE, np.zeros(3, np.uint8)), 3) for d in data]
        mover.run(moves).synchronize()
        for move, wanted in zip(moves[:: max(1, count // 20)], data[:: max(1, count // 20)], strict=True):
            assert (contents(move.target) == wanted).all()
    assert mover.launches == 5
    assert [len(table) for table in mover._tables] == [512 if SIM else 1024, 512]


@pytest.mark.stub
def test_a_batch_is_one_launch_and_one_event(stub):
    moves = [
        Move(block(Tier.PINNED, np.full(64, i, np.uint8)), block(Tier.DEVICE, np.zeros(64, np.uint8)), 64)
        for i in range(50)
    ]
    mover = Mover(depth=1)
    mover.run(moves[:1]).synchronize()  # makes the stream, the table and the event, and compiles
    stub.reset_counts()
    fence = mover.run(moves)
    counts = stub.counts()
    fence.synchronize()
    assert sum(n for name, n in counts.items() if name.startswith("cuLaunchKernel")) == 1
    assert sum(n for name, n in counts.items() if name.startswith("cuEventRecord")) == 1
    others = ("cuMemcpy", "cuMemAlloc", "cuMemHostAlloc", "cuStreamSynchronize")
    assert not [name for name in counts if name.startswith(others)]
    assert all((contents(move.target) == i).all() for i, move in enumerate(moves))


@pytest.mark.stub
@pytest.mark.parametrize("seed", range(4))
def test_no_table_is_written_while_a_launch_may_read_it(stub, seed):
    """In lazy mode nothing runs before something waits: without the ring's wait the first launches find later rows."""
    sources = [block(Tier.PINNED, np.full(100, i, np.uint8)) for i in range(12)]
    targets = [block(Tier.DEVICE, np.zeros(100, np.uint8)) for _ in range(12)]
    mover = Mover(depth=3)
    mover.run([Move(sources[0], targets[0], 100)]).synchronize()
    stub.set_async(1)
    stub.set_seed(seed)
    try:
        for source, target in zip(sources, targets, strict=True):
            mover.run([Move(source, target, 100)])
        mover.synchronize()
    finally:
        stub.set_async(0)
    assert [int(contents(target)[7]) for target in targets] == list(range(12))


@pytest.mark.parametrize("failing", ["launch", "copy"])
def test_a_failed_batch_counts_nothing_and_the_next_one_works(monkeypatch, failing):
    data = np.arange(50, dtype=np.uint8)
    mover = Mover(engine_bytes=40)
    moves = [Move(block(Tier.PINNED, data[:n]), block(Tier.DEVICE, np.zeros(n, np.uint8)), n) for n in (50, 30)]
    with monkeypatch.context() as patch:
        patch.setattr(_cuda, failing, lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
        with pytest.raises(RuntimeError, match="no"):
            mover.run(moves)
    assert (mover.launches, mover.engine_copies, mover.moved_bytes) == (0, 0, 0)
    mover.run(moves).synchronize()
    assert (contents(moves[0].target) == data).all() and (contents(moves[1].target) == data[:30]).all()


def test_a_batch_without_an_event_has_ended(monkeypatch):
    """Nothing may be on its way into the targets that no fence is behind."""
    waited, synchronize = [], _cuda.synchronize
    mover = Mover()
    with monkeypatch.context() as patch:
        patch.setattr(_cuda, "synchronize", lambda: waited.append(synchronize()))
        patch.setattr(_cuda, "Event", lambda: (_ for _ in ()).throw(MemoryError("no event")))
        move = Move(block(Tier.PINNED, np.ones(9, np.uint8)), block(Tier.DEVICE, np.zeros(9, np.uint8)), 9)
        fence = mover.run([move])
    assert waited and fence.done() and (contents(move.target) == 1).all()


# ------------------------------------------------------------------------------------------------------- what is chosen


def moves_of(source, target, nbytes):
    blocks = (Block(BufferSpec(nbytes, "uint8", tier), nbytes) for tier in (source, target))
    return [Move(*blocks, nbytes)]


@pytest.mark.parametrize(
    ("source", "target", "blocks"),
    [(Tier.PINNED, Tier.DEVICE, BLOCKS_UP), (Tier.DEVICE, Tier.PINNED, BLOCKS_DOWN)],
)
def test_the_direction_chooses_the_blocks_and_a_number_fixes_them(monkeypatch, source, target, blocks):
    """A batch of 2 MiB has enough pieces for either."""
    grids = []
    monkeypatch.setattr(_cuda, "SIM", False)
    monkeypatch.setattr(Mover, "_compile", lambda self: None)
    monkeypatch.setattr(_cuda, "launch", lambda kernel, grid, *rest: grids.append(grid))
    moves = moves_of(source, target, 2 << 20)
    Mover().run(moves)
    Mover(blocks=3).run(moves)
    assert grids == [blocks, 3]


def test_large_moves_go_to_the_copy_engine():
    moves = moves_of(Tier.PINNED, Tier.DEVICE, ENGINE_BYTES)
    mover, never = Mover(), Mover(engine_bytes=1 << 60)
    for each in (mover, never):
        each.run(moves).synchronize()
    assert (mover.engine_copies, mover.launches, never.engine_copies, never.launches) == (1, 0, 0, 1)
