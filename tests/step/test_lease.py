"""The zero-copy lease: exactly once, read-only afterwards, one at a time, given back on an error."""

import threading

import kit
import numpy as np
import pytest

from numbabuf import (
    BucketOverflowError,
    BufferSpec,
    BusyError,
    CaptureError,
    ClosedError,
    GraphMissingError,
    InputBufferManager,
)


@pytest.fixture
def manager():
    with InputBufferManager(max_batch_size=4, max_seq_len=8, buckets=[8, 16]) as made:
        made.register_slot("short", BufferSpec(32, "int32"), source_dtype="int64", max_live=20)
        made.register_slot("table", BufferSpec((4, 3), "int32"), axis="seqs", pad="repeat_last")
        yield made


def test_what_is_written_is_filled_and_padded(manager):
    with manager.stage(3, seqs=2) as lease:
        assert lease["input_ids"].shape == (3,) and lease["input_ids"].dtype == np.int64
        assert lease["table"].shape == (2, 3) and lease["short"].dtype == np.int64
        lease["input_ids"][:] = [7, 8, 9]
        lease["table"][:] = [[1, 2, 3], [4, 5, 6]]
        lease["short"][:] = -5
    found = kit.contents(manager)
    assert found["input_ids"][:9].tolist() == [7, 8, 9, 0, 0, 0, 0, 0, 0]
    assert found["short"][:9].tolist() == [-5] * 3 + [0] * 6
    assert found["table"][:2].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert found["positions"][:8].tolist() == [0] * 8, "never asked for: all padding"
    assert set(lease.result) == {"input_ids", "positions", "short", "table"}
    assert lease.result["input_ids"].shape == (8,)
    manager.check()


def test_asking_twice_gives_the_same_array(manager):
    with manager.stage(3, seqs=1) as lease:
        assert lease["input_ids"] is lease["input_ids"]


def test_replay_ends_the_lease(manager):
    manager.capture_buckets(lambda step: step.bucket["tokens"], [8, 16])
    with manager.stage(9, seqs=0) as lease:
        lease["input_ids"][:] = np.arange(9)
        assert lease.replay() == 16
        with pytest.raises(ClosedError, match="ended"):
            lease["input_ids"]
    assert lease.result == 16
    assert manager.stats().steps == 1, "leaving the block does not stage it again"
    assert kit.contents(manager)["input_ids"][:10].tolist() == [*range(9), 0]


@pytest.mark.parametrize("how", ["fill", "replay", "discard", "leave"])
def test_a_lease_ends_exactly_once(manager, how):
    manager.capture_buckets(lambda step: None, [8])
    lease = manager.stage(3, seqs=1)
    array = lease["input_ids"]
    array[:] = 1
    if how == "leave":
        with lease:
            pass
    else:
        getattr(lease, how)()
    for again in (lease.fill, lease.replay, lease.discard, lambda: lease["input_ids"], lease.__enter__):
        with pytest.raises(ClosedError):
            again()
    with pytest.raises(ValueError, match="read-only"):
        array[:] = 2
    manager.replay({}, 0, seqs=0)
    manager.check()


def test_an_exception_gives_the_block_back_unused(manager):
    manager.stage_inputs({"input_ids": [5]}, 1, seqs=0)
    before, steps = kit.contents(manager), manager.stats()
    with pytest.raises(ZeroDivisionError), manager.stage(3, seqs=1) as lease:
        lease["input_ids"][:] = 99
        raise ZeroDivisionError
    after = kit.contents(manager)
    assert all((after[name] == before[name]).all() for name in before) and manager.stats() == steps
    manager.stage_inputs({"input_ids": [6]}, 1, seqs=0)
    assert kit.contents(manager)["input_ids"][:2].tolist() == [6, 0]
    manager.check()


def test_one_lease_at_a_time(manager):
    manager.capture_buckets(lambda step: None, [8])
    with manager.stage(3, seqs=1):
        for call in (
            lambda: manager.stage(1, seqs=1),
            lambda: manager.stage_inputs({}, 0, seqs=0),
            lambda: manager.replay({}, 0, seqs=0),
            lambda: manager.get_slot("input_ids").set_data([1]),
            lambda: manager.capture(8, seqs=1).__enter__(),
            lambda: manager.capture_buckets(lambda step: None),
            lambda: manager.register_slot("late", BufferSpec(1)),
            manager.release_all,
        ):
            with pytest.raises(BusyError):
                call()
    assert [slot.name for slot in manager.slots] == ["input_ids", "positions", "short", "table"]
    manager.stage_inputs({}, 0, seqs=0)
    manager.check()


def test_the_range_is_checked_at_the_end(manager):
    manager.stage_inputs({"short": [5]}, 1, seqs=0)
    with pytest.raises(OverflowError, match="short"), manager.stage(2, seqs=0) as lease:
        lease["short"][:] = [1, 1 << 40]
    assert kit.contents(manager)["short"][:2].tolist() == [5, 0], "nothing was filled"
    manager.stage_inputs({"short": [6]}, 1, seqs=0)
    manager.check()


def test_sizes_that_do_not_fit(manager):
    with pytest.raises(BucketOverflowError, match="tokens=33.*hold 32"):
        manager.stage(33, seqs=0)
    with pytest.raises(BucketOverflowError, match="seqs=5.*hold 4"):
        manager.stage(3, seqs=5)
    with pytest.raises(TypeError, match="seqs"):
        manager.stage(3)
    with manager.stage(16, seqs=1) as lease:
        with pytest.raises(KeyError, match="not a static slot"):
            lease["other"]
        lease["short"][:] = 0
    with pytest.raises(BucketOverflowError), manager.stage(21, seqs=0) as lease:
        with pytest.raises(ValueError, match="max_live=20"):
            lease["short"]
        lease.discard()
        manager.stage(17, seqs=0).fill()
    manager.stage_inputs({}, 0, seqs=0)
    manager.check()


def test_replay_without_a_graph(manager):
    with pytest.raises(GraphMissingError):
        manager.stage(3, seqs=0).replay()
    manager.capture_buckets(lambda step: None, [8])
    with pytest.raises(BucketOverflowError):
        manager.stage(9, seqs=0).replay()
    manager.stage_inputs({}, 0, seqs=0)
    manager.check()


def test_a_lease_may_end_in_another_thread(manager):
    lease = manager.stage(3, seqs=0)
    lease["input_ids"][:] = 4
    thread = threading.Thread(target=lease.fill)
    thread.start()
    thread.join()
    assert kit.contents(manager)["input_ids"][:4].tolist() == [4, 4, 4, 0]


def test_repr_is_one_line(manager):
    lease = manager.stage(3, seqs=0)
    assert repr(lease) == "Lease(open, nothing written)"
    lease["short"][:] = 0
    lease.discard()
    assert repr(lease) == "Lease(ended, short)"


def test_a_replay_along_one_axis_is_refused_too():
    """The shortest way through `replay`, which looks at the lease by itself."""
    with InputBufferManager(max_batch_size=1, max_seq_len=8, buckets=[8]) as m:
        m.capture_buckets(lambda step: None)
        with m.stage(3) as lease:
            lease["input_ids"][:] = 7
            with pytest.raises(BusyError):
                m.replay({"input_ids": np.arange(4)}, 4)
        assert kit.contents(m)["input_ids"].tolist() == [7, 7, 7, 0, 0, 0, 0, 0]
        m.check()


def test_closing_the_manager_discards_an_open_lease():
    manager = InputBufferManager(max_batch_size=1, max_seq_len=8)
    lease = manager.stage(3)
    array = lease["input_ids"]
    manager.close()
    assert manager.closed and not array.flags.writeable
    with pytest.raises(ClosedError):
        lease.fill()


def test_of_two_threads_that_end_a_lease_one_does(manager):
    """Both find it open; then one after the other ends it."""
    manager.capture_buckets(lambda step: None, [{"tokens": 8, "seqs": 4}])
    lease = manager.stage(3, seqs=1)
    lease["input_ids"][:] = 1
    check, both, errors, seen = lease._check_open, threading.Barrier(2), [], set()

    def open_for_both():
        check()
        if threading.get_ident() not in seen:
            seen.add(threading.get_ident())
            both.wait(30)

    def end():
        try:
            lease.replay()
        except ClosedError as error:
            errors.append(error)

    lease._check_open = open_for_both
    threads = [threading.Thread(target=end) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 1 and manager.stats().steps == 1
    manager.check()


def test_closing_the_manager_while_another_thread_ends_the_lease():
    """A: ends the lease, and is about to tell the manager; B: closes the manager; A: is told that it came too late."""
    manager = InputBufferManager(max_batch_size=1, max_seq_len=8)
    lease = manager.stage(3)
    finish, ending, closed, errors = lease._finish, threading.Event(), threading.Event(), []

    def late(lease, *rest):
        if threading.current_thread() is not threading.main_thread():
            ending.set()
            closed.wait(30)
        return finish(lease, *rest)

    def end():
        try:
            lease.fill()
        except ClosedError as error:
            errors.append(error)

    lease._finish = late
    thread = threading.Thread(target=end)
    thread.start()
    ending.wait(30)
    try:
        manager.close()
    finally:
        closed.set()
        thread.join()
    assert manager.closed and len(errors) == 1


@pytest.mark.parametrize("how", ["replay", "fill", "leave"])
def test_a_lease_is_not_ended_inside_a_capture(manager, how):
    """Not even inside another manager's: the step would run once, now, and be missing from every replay."""
    manager.capture_buckets(lambda step: None, [{"tokens": 8, "seqs": 4}])
    with InputBufferManager(max_batch_size=1, max_seq_len=8) as other:
        other.stage_inputs({}, 0)
        lease = manager.stage(3, seqs=1)
        with pytest.raises(CaptureError, match="inside a capture"), other.capture(8):
            if how == "leave":
                with lease:
                    lease["input_ids"][:] = 5
            else:
                getattr(lease, how)()
        assert manager.stats().steps == 0
        if how == "leave":
            with pytest.raises(ClosedError):
                lease.fill()
        else:
            lease["input_ids"][:] = 6
            getattr(lease, how)()
            assert kit.contents(manager)["input_ids"][:4].tolist() == [6, 6, 6, 0]
        manager.stage_inputs({}, 0, seqs=0)
        manager.check()


def test_a_close_that_is_refused_leaves_the_lease(manager):
    manager.stage_inputs({}, 0, seqs=0)
    errors = []

    def lease_and_close():
        with manager.stage(2, seqs=1) as lease:
            lease["input_ids"][:] = 4
            try:
                manager.close()
            except BusyError as error:
                errors.append(error)

    with manager.capture(8, seqs=1):
        thread = threading.Thread(target=lease_and_close)
        thread.start()
        thread.join()
    assert len(errors) == 1 and not manager.closed
    assert kit.contents(manager)["input_ids"][:3].tolist() == [4, 4, 0]


def test_a_replay_names_the_axis_that_no_graph_covers(manager):
    manager.capture_buckets(lambda step: None, [{"tokens": 16, "seqs": 2}])
    with pytest.raises(BucketOverflowError, match="seqs=3; the largest bucket is 2"), manager.stage(3, seqs=3) as lease:
        lease.replay()


# ------------------------------------------------------------------------------------------------------------ overflow


def small(seqs=True, **options):
    """A manager with slots of each kind and a graph of at most 8 tokens and 2 seqs, whose result is its size."""
    m = InputBufferManager(max_batch_size=4, max_seq_len=8, buckets=[8], default_slots=False, **options)
    m.register_slot("ids", BufferSpec(32, "int64"), pad=-1)
    m.register_slot("short", BufferSpec(32, "int32"), source_dtype="int64", pad=-1)
    m.register_slot("table", BufferSpec((32, 2), "float32"), source_dtype="float64", pad=-1)
    m.register_slot("lens", BufferSpec(4, "int64"), axis="seqs" if seqs else None, pad=-1)
    m.register_slot("whole", BufferSpec(2, "int64"), axis=None)
    m.capture_buckets(lambda step: tuple(step.bucket.values()), [{"tokens": 8, "seqs": 2} if seqs else 8])
    return m


def write(lease, tokens, seqs):
    lease["ids"][:] = np.arange(tokens)
    lease["short"][:] = -np.arange(tokens)
    lease["table"][:] = np.arange(2 * tokens).reshape(tokens, 2)
    lease["lens"][:] = np.arange(seqs) + 5
    lease["whole"][:] = [8, 9]


def assert_holds(m, start, stop, seqs, bucket):
    """Every slot holds tokens [start, stop) of what `write` wrote, and its padding."""
    found, live, pad = kit.contents(m), np.arange(start, stop), [-1] * (bucket - stop + start)
    assert found["ids"][:bucket].tolist() == [*live, *pad]
    assert found["short"][:bucket].tolist() == [*-live, *pad]
    assert found["table"][:bucket].ravel().tolist() == [*range(2 * start, 2 * stop), *pad, *pad]
    assert found["lens"][:seqs].tolist() == list(range(5, 5 + seqs))
    assert found["whole"].tolist() == [8, 9]


def test_a_lease_that_overflows_runs_eagerly_warned_once_and_counted():
    with small(overflow="eager") as m:
        with pytest.warns(RuntimeWarning, match="tokens=20, seqs=3 fits no bucket") as caught:
            for tokens, seqs in ((20, 3), (9, 1), (3, 3)):
                with m.stage(tokens, seqs=seqs) as lease:
                    write(lease, tokens, seqs)
                    assert lease.replay() == (tokens, seqs)
                assert_holds(m, 0, tokens, seqs, tokens)
        assert len(caught) == 1 and caught[0].filename == __file__
        assert (m.stats().overflows, m.stats().steps) == (3, 3)
        m.check()


@pytest.mark.parametrize("ring", [1, 2, 4])
def test_a_lease_that_overflows_is_split(ring):
    with small(seqs=False, overflow="split", ring=ring) as m:
        for _ in range(3):
            pieces = []

            def each(result, start, stop, pieces=pieces):
                assert_holds(m, start, stop, 4, 8)
                pieces.append((result, start, stop))

            with m.stage(27) as lease:
                write(lease, 27, 4)
                assert lease.replay(each=each) == (8,)
            assert pieces == [((8,), start, min(start + 8, 27)) for start in range(0, 27, 8)]
            assert lease.result == (8,)
        with m.stage(27) as lease:  # nobody waits for a piece
            write(lease, 27, 4)
            lease.replay()
        assert_holds(m, 24, 27, 4, 8)
        assert (m.stats().overflows, m.stats().steps) == (4, 16)
        m.check()
