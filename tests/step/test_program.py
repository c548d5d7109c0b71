"""Several programs over one set of slots: each has graphs and counts of its own, and one closes without the others."""

import copy
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
    SimpleBufferPool,
)


def ids(n):
    return np.arange(1, n + 1)


@pytest.fixture
def manager():
    with InputBufferManager(max_batch_size=4, max_seq_len=8, buckets=[8, 16, 32]) as m:
        yield m
        m.check()


@pytest.fixture
def totals():
    return [kit.to_device(np.zeros(1, np.int64)) for _ in range(2)]


def adder(total):
    def add(step):
        kit.run(kit.add_up, step.stream, step["input_ids"], total)
        return total

    return add


def tokens_of(program):
    return [one.num_tokens for one in program.captured]


def test_each_runs_its_own_function_over_the_same_slots(manager, totals):
    one, two = (manager.program(adder(total), name=name) for total, name in zip(totals, "ab"))
    assert one.capture_buckets([8, 16]) == ({"tokens": 8}, {"tokens": 16})
    two.capture_buckets([32])
    assert one.replay({"input_ids": ids(3)}, 3) is totals[0]
    assert two.replay({"input_ids": ids(20)}, 20) is totals[1]
    with two.stage(2) as lease:
        lease["input_ids"][:] = 5
        lease.replay()
    assert [int(kit.to_host(total, manager.stream)[0]) for total in totals] == [6, 210 + 10]
    stats = manager.stats()
    assert {name: (p.steps, p.live_tokens, p.graphs) for name, p in stats.programs.items()} == {
        "main": (0, 0, 0), "a": (1, 3, 2), "b": (2, 22, 1),
    }  # fmt: skip
    assert (stats.steps, stats.graphs, stats.buckets) == (3, 3, {8: 1, 32: 2})
    with pytest.raises(GraphMissingError):
        manager.replay({}, 1)


def test_the_managers_own_calls_are_those_of_its_first_program(manager):
    manager.capture_buckets(lambda step: "own", [8])
    assert manager.programs["main"].replay({}, 1) == "own"
    assert manager.captured == manager.programs["main"].captured and tokens_of(manager) == [8]
    with manager.capture(16) as step:
        step.result = "by hand"
    assert manager.programs["main"].replay({}, 9) == "by hand"


def test_sizes_are_captured_and_dropped_one_by_one(manager):
    program = manager.program(lambda step: step.bucket["tokens"])
    assert program.capture(5).num_tokens == 5
    assert program.capture(12).sizes == {"tokens": 12}
    program.replay({}, 3)
    program.replay({}, 7)
    program.replay({}, 4)
    five, twelve = program.captured
    assert (five.steps, twelve.steps) == (2, 1) and five.last_used > twelve.last_used > 0
    program.drop(5)
    assert tokens_of(program) == [12] and program.replay({}, 3) == 12
    with pytest.raises(GraphMissingError, match="has no graph of {'tokens': 5}; its graphs have 12 tokens"):
        program.drop(5)
    assert program.stats().steps == 4, "what a graph that is gone has counted stays"


def test_a_capture_that_fails_changes_nothing(manager):
    program = manager.program(lambda step: 1 // (8 - step.bucket["tokens"]))
    program.capture(9)
    with pytest.raises(ZeroDivisionError):
        program.capture(8)
    with pytest.raises(ZeroDivisionError):
        program.capture_buckets([8, 16])
    assert tokens_of(program) == [9] and manager.stats().graphs == 1
    with pytest.raises(ValueError, match="slots hold 1 to 32"):
        program.capture(33)
    with pytest.raises(GraphMissingError, match="no function yet"):
        manager.programs["main"].capture(8)


def test_buckets_and_overflow_of_its_own(manager):
    program = manager.program(lambda step: step.bucket["tokens"], buckets=[4, 24], overflow="eager")
    program.capture_buckets()
    assert tokens_of(program) == [4, 24] and program.replay({}, 5) == 24
    with pytest.warns(RuntimeWarning, match="fits no bucket"):
        assert program.replay({}, 30) == 30
    assert manager.stats().overflows == program.stats().overflows == 1
    other = manager.program(lambda step: None)
    other.capture(4)
    with pytest.raises(BucketOverflowError):
        other.replay({}, 5)
    with pytest.raises(ValueError, match="from 1 to 32"):
        manager.program(lambda step: None, buckets=[64])
    with pytest.raises(ValueError, match="no slot follows such an axis"):
        manager.program(lambda step: None, buckets={"seqs": [2]}).capture_buckets()


def test_names(manager):
    def score(step):
        pass

    assert [manager.program(score).name for _ in range(3)] == ["score", "score-2", "score-3"]
    with pytest.raises(ValueError, match="'score' is open already"):
        manager.program(score, name="score")
    with pytest.raises(TypeError):
        manager.program(score, name=3)
    manager.programs["score"].close()
    assert manager.program(score).name == "score"


def test_one_closes_and_the_others_go_on(manager):
    first, second = (manager.program(lambda step, n=n: n, name=str(n)) for n in (1, 2))
    for program in (first, second):
        program.capture(8)
        program.replay({}, 3)
    with first:
        pass
    first.close()
    assert first.closed and list(manager.programs) == ["main", "2"] and second.replay({}, 3) == 2
    with pytest.raises(ClosedError, match="program '1' is closed"):
        first.replay({}, 3)
    with pytest.raises(ClosedError):
        first.capture(8)
    manager.program(lambda step: None, name="1")
    assert manager.stats().steps == 3 and manager.stats().programs["1"].steps == 0
    manager.close()
    assert second.closed
    with pytest.raises(ClosedError):
        second.replay({}, 3)
    second.close()


def test_close_graphs_closes_those_of_all(manager):
    program = manager.program(lambda step: None)
    program.capture(8)
    manager.capture_buckets(lambda step: None, [16])
    with pytest.raises(BusyError, match="2 graph"):
        manager.register_slot("late", BufferSpec(4))
    manager.close_graphs()
    assert manager.captured == program.captured == ()
    manager.register_slot("late", BufferSpec(4))
    program.capture(8)
    program.replay({"late": np.ones(3, np.float32)}, 3)
    program.check()


def test_the_observer_is_told_which_program(manager):
    heard = []
    program = manager.program(lambda step: None, name="other")
    manager.observer = lambda size, of: heard.append((size, of.name))
    later = manager.program(lambda step: None, name="later")
    later.observer = None
    for one in (program, later):
        one.capture(8)
        one.replay({}, 3)
    manager.stage_inputs({}, 4)
    assert heard == [(3, "other"), (4, "main")]


def test_no_capture_waits_for_itself(manager):
    program = manager.program(lambda step: program.capture(16))
    with pytest.raises((BusyError, CaptureError)):
        program.capture(8)
    entered, go = threading.Event(), threading.Event()

    def slow(step):
        entered.set()
        assert go.wait(60)

    waiting = manager.program(slow)
    thread = threading.Thread(target=waiting.capture, args=(8,))
    thread.start()
    assert entered.wait(60)
    try:
        with pytest.raises(BusyError, match="another thread captures"):
            manager.program(lambda step: None).capture(8, wait=False)
        manager.stage_inputs({"input_ids": ids(3)}, 3)  # steps go on meanwhile
    finally:
        go.set()
        thread.join()
    assert tokens_of(waiting) == [8]


def test_a_program_is_one_of_its_kind(manager):
    program = manager.program(lambda step: None, name="main thing")
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.copy(program)
    assert repr(program) == "Program('main thing', 0 graphs)" and "main thing" in program._repr_html_()


# ------------------------------------------------------------------------------------------------- memory and on_oom


def test_two_first_steps_whose_on_oom_steps_the_other_manager():
    """Were a manager's lock held while its pool asks, each thread would wait for the lock that the other holds."""
    inside, errors, made = threading.Barrier(2), [], []

    def make(number):
        def on_oom(nbytes):
            inside.wait(60)
            spare[number].release()
            try:
                made[1 - number].stage_inputs({"input_ids": ids(2)}, 2)
            except BusyError as error:
                errors.append(error)

        pool = SimpleBufferPool(max_bytes=1 << 12, on_oom=on_oom)
        return pool, InputBufferManager(pool, max_batch_size=1, max_seq_len=64, buckets=[64])

    pools, made[:] = zip(*(make(number) for number in (0, 1)))
    made = list(made)
    spare = [pool.allocate(BufferSpec(1 << 12, "uint8")) for pool in pools]

    def step(manager):
        try:
            manager.stage_inputs({"input_ids": ids(3)}, 3)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=step, args=(manager,), daemon=True) for manager in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads) and not errors
    for manager in made:
        assert manager.stats().steps == 2
        manager.check()
        manager.close()
    for pool in pools:
        assert pool.stats().in_use_bytes == 0
        pool.close()


def test_a_step_from_the_on_oom_of_its_own_first_step_is_refused():
    seen = []

    def on_oom(nbytes):
        for call in (lambda: manager.stage_inputs({}, 1), manager.release_all, manager.close):
            with pytest.raises(BusyError, match="on_oom"):
                call()
        seen.append(nbytes)
        spare.release()

    with SimpleBufferPool(max_bytes=1 << 12, on_oom=on_oom) as pool:
        spare = pool.allocate(BufferSpec(1 << 12, "uint8"))
        with InputBufferManager(pool, max_batch_size=1, max_seq_len=64, buckets=[64]) as manager:
            manager.stage_inputs({"input_ids": ids(3)}, 3)
            assert len(seen) == 1 and kit.contents(manager)["input_ids"][:4].tolist() == [1, 2, 3, 0]


def test_a_slot_that_comes_while_memory_is_made_has_its_place():
    """The lock is free meanwhile: the memory of too few slots is given back, and other is made."""

    def on_oom(nbytes):
        thread = threading.Thread(target=manager.register_slot, args=("late", BufferSpec(8, "int64")))
        thread.start()
        thread.join(60)
        spare.release()

    with SimpleBufferPool(max_bytes=1 << 13, on_oom=on_oom) as pool:
        spare = pool.allocate(BufferSpec(1 << 13, "uint8"))
        with InputBufferManager(pool, max_batch_size=1, max_seq_len=64, buckets=[64]) as manager:
            manager.stage_inputs({"input_ids": ids(3)}, 3)
            manager.stage_inputs({"late": ids(8)}, 8)
            assert kit.contents(manager)["late"].tolist() == ids(8).tolist()
            manager.check()
            assert pool.stats().in_use_count == 2


def test_two_first_steps_ask_for_memory_once():
    with SimpleBufferPool() as pool, InputBufferManager(pool, max_batch_size=1, max_seq_len=64) as manager:
        ready = threading.Barrier(4)

        def step():
            ready.wait(60)
            manager.stage_inputs({"input_ids": ids(3)}, 3)

        threads = [threading.Thread(target=step) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert pool.stats().allocations == 2 and manager.stats().steps == 4


# --------------------------------------------------------------------------------------------- the right to capture


def test_a_capture_that_is_dropped_in_its_block_leaves_nothing(manager):
    manager.stage_inputs({}, 0)
    block = manager.capture(8)
    block.__enter__()
    with pytest.raises(BusyError, match="while a graph is being captured"):
        manager.register_slot("late", BufferSpec(4))
    del block
    kit.collect()
    manager.capture_buckets(lambda step: None, [8])
    manager.register_slot("more", BufferSpec(4), is_static=False)


def test_a_capture_that_its_thread_leaves_open_is_given_up_elsewhere(manager):
    """A generator that a task was suspended in dies in whatever thread drops it."""
    manager.capture_buckets(lambda step: "kept", [8])
    blocks = []

    def enter():
        blocks.append(manager.capture(16))
        blocks[0].__enter__()

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(60)
    assert manager.replay({"input_ids": ids(3)}, 3) == "kept"
    blocks.clear()
    kit.collect()
    manager.capture_buckets(lambda step: "new", [8, 16])
    assert manager.replay({}, 9) == "new"


def test_a_capture_tells_what_it_cost(manager, totals, caplog):
    program = manager.program(adder(totals[0]), name="told")
    assert program.stats().capture_s == 0
    with caplog.at_level("INFO", logger="numbabuf"):
        program.capture_buckets([8, 16])
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "INFO"]
    assert line.startswith("Program('told', 2 graphs): 2 sizes captured in ")
    first = program.stats().capture_s
    assert first > 0
    program.capture(32)
    assert program.stats().capture_s > first
