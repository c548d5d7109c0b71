"""Slots that keep their last write when a step leaves them out."""

import kit
import numpy as np
import pytest

from numbabuf import BufferSpec, InputBufferManager


def make(**options):
    m = InputBufferManager(
        max_batch_size=1, max_seq_len=32, default_slots=False, **({"buckets": [4, 8, 16], "ring": 2} | options)
    )
    m.register_slot("x", BufferSpec(32, "int64"))
    m.register_slot("mask", BufferSpec(32, "int32"), missing="keep", pad=-1)
    m.register_slot("lr", BufferSpec((), "float32"), axis=None)
    m.register_slot("row", BufferSpec(2, "int64"), axis=None, missing="pad", pad=7)
    return m


@pytest.fixture
def manager():
    with make() as m:
        m.capture_buckets(lambda step: None)
        yield m
        m.check()


def held(manager):
    found = kit.contents(manager)
    return found["x"][:4].tolist(), found["mask"][:4].tolist(), float(found["lr"]), found["row"].tolist()


def leased(manager, end):
    def run(inputs, tokens):
        with manager.stage(tokens) as lease:
            for name, data in inputs.items():
                lease[name][...] = data
            getattr(lease, end)()

    return run


WAYS = {
    "replay": lambda manager: manager.replay,
    "fill": lambda manager: manager.stage_inputs,
    "lease": lambda manager: leased(manager, "replay"),
    "lease that fills": lambda manager: leased(manager, "fill"),
}


@pytest.mark.parametrize("later", WAYS)
@pytest.mark.parametrize("first", [*WAYS, "set_data"])
def test_what_is_left_out_keeps_its_last_write(manager, first, later):
    for n in (1, 2):
        if first == "set_data":
            manager.get_slot("mask").set_data([n, n + 1])
            manager.get_slot("lr").set_data(n / 2)
        else:
            inputs = {"x": np.array([4, 4]), "mask": np.array([n, n + 1], np.int32), "lr": n / 2, "row": [5, 6]}
            WAYS[first](manager)(inputs, 2)
            assert held(manager) == ([4, 4, 0, 0], [n, n + 1, -1, -1], n / 2, [5, 6])
        for _ in range(3):  # more steps than blocks
            WAYS[later](manager)({"x": np.array([9])}, 1)
            assert held(manager) == ([9, 0, 0, 0], [n, n + 1, -1, -1], n / 2, [7, 7])


def test_now_given_now_left_out_over_the_same_blocks(manager):
    """A block whose words said nothing of a slot says everything again, and the other way round."""
    random = np.random.default_rng(3)
    mask, lr = np.zeros(4, np.int32), 0.0
    for step in range(60):
        inputs = {"x": np.arange(2)}
        if random.random() < 0.5 or not step:
            inputs["mask"] = random.integers(0, 99, 2, np.int32)
            mask = np.array([*inputs["mask"], -1, -1])
        if random.random() < 0.5:
            inputs["lr"] = lr = float(step)
        manager.replay(inputs, 2)
        assert held(manager) == ([0, 1, 0, 0], mask.tolist(), lr, [7, 7])


def test_what_was_never_written_is_padding(manager):
    for tokens in (1, 5, 3, 16):
        manager.replay({}, tokens)
    assert kit.contents(manager)["mask"].tolist() == [-1] * 16 + [0] * 16
    manager.release_all()
    manager.stage_inputs({}, 1)
    assert held(manager) == ([0] * 4, [-1] * 4, 0.0, [7, 7])


@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_needs_more_rows_than_were_written_is_refused(manager, way):
    run = WAYS[way](manager)
    run({"mask": np.array([1, 2], np.int32)}, 2)
    before = manager.stats(), held(manager)
    with pytest.raises(ValueError, match="input 'mask' was left out, and what it keeps is padded to 4 rows; .* to 8"):
        run({"x": np.arange(5)}, 5)
    assert (manager.stats(), held(manager)) == before
    run({"x": np.arange(3)}, 3)
    run({"x": np.arange(5), "mask": np.arange(5, dtype=np.int32)}, 5)
    run({"x": np.arange(5)}, 5)
    run({"x": np.arange(1)}, 1)
    assert kit.contents(manager)["mask"][:8].tolist() == [0, 1, 2, 3, 4, -1, -1, -1]


def test_a_refused_step_is_no_write(manager):
    manager.replay({"mask": [1, 2]}, 2)
    with pytest.raises(TypeError):
        manager.replay({"mask": [1] * 5, "x": object()}, 5)
    with pytest.raises(ValueError, match="not a static slot"):
        manager.replay({"mask": [1] * 5, "y": [1] * 5}, 5)
    with pytest.raises(ValueError, match="padded to 4 rows"):
        manager.replay({}, 5)
    with pytest.raises(ValueError, match="padded to 4 rows"):
        manager.replay({}, 16)


@pytest.mark.stub
def test_a_step_whose_launch_failed_is_no_write(manager, stub):
    manager.replay({"mask": [1, 2]}, 2)
    stub.fail("cuGraphLaunch:1")
    try:
        with pytest.raises(Exception, match="CUDA"):
            manager.replay({"mask": [1] * 5}, 5)
    finally:
        stub.fail("")
    with pytest.raises(ValueError, match="padded to 4 rows"):
        manager.replay({}, 5)
    manager.replay({}, 3)
    assert held(manager)[1] == [1, 2, -1, -1]


def test_another_slot_moves_the_memory_and_not_what_is_kept(manager):
    manager.replay({"mask": [1, 2], "lr": 3}, 2)
    manager.close_graphs()
    manager.register_slot("late", BufferSpec(32, "int64"))
    manager.stage_inputs({"late": [1]}, 1)
    assert held(manager) == ([0] * 4, [1, 2, -1, -1], 3.0, [7, 7])
    with pytest.raises(ValueError, match="padded to 4 rows"):
        manager.stage_inputs({}, 5)


@pytest.mark.parametrize("warm_up", [None, "run"])
def test_a_capture_changes_nothing_of_it(manager, warm_up):
    manager.replay({"mask": [1, 2], "lr": 3}, 2)
    manager.capture_buckets(lambda step: None, [4, 16], warm_up=warm_up)
    assert held(manager)[1:3] == ([1, 2, -1, -1], 3.0)
    manager.replay({}, 1)
    assert held(manager)[1:3] == ([1, 2, -1, -1], 3.0)


def test_steps_without_a_graph_and_pieces():
    with make(overflow="split") as m:
        m.capture_buckets(lambda step: None, [4])
        m.replay({"mask": np.arange(6, dtype=np.int32), "lr": 2}, 6)
        assert held(m)[1] == [4, 5, -1, -1]
        m.replay({"x": np.arange(6)}, 6)
        assert held(m) == ([4, 5, 0, 0], [4, 5, -1, -1], 2.0, [7, 7])
    with make(overflow="eager") as m:
        m.capture_buckets(lambda step: None, [4])
        with pytest.warns(RuntimeWarning):
            m.replay({"mask": np.arange(6, dtype=np.int32), "lr": 2}, 6)
        m.replay({}, 5)
        m.replay({}, 1)
        assert kit.contents(m)["mask"][:6].tolist() == [0, 1, 2, 3, 4, 5] and held(m)[2] == 2
        with pytest.raises(ValueError, match="padded to 6 rows"):
            m.replay({}, 7)


@pytest.mark.parametrize("missing", ["zero", True, 0, ""])
def test_what_a_missing_slot_cannot_do(manager, missing):
    with pytest.raises(ValueError, match="use 'pad' or 'keep'"):
        manager.register_slot("y", BufferSpec(4), missing=missing)
