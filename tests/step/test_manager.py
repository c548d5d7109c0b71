"""InputBufferManager: padding, replay, errors that change nothing, leases, captures, overflow, addresses, threads."""

import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import warnings
import weakref

import kit
import numpy as np
import pytest
import twins

import numbabuf
from numbabuf import (
    BucketOverflowError,
    BufferSpec,
    BusyError,
    CaptureError,
    ClosedError,
    GraphMissingError,
    InputBufferManager,
    SimpleBufferPool,
    _cuda,
)
from numbabuf.step import ring as staging

SIM = _cuda.SIM


@pytest.fixture
def manager():
    with InputBufferManager(max_batch_size=4, max_seq_len=8, buckets=[8, 16, 32]) as made:
        yield made


def rich_manager(**options):
    """A manager with a slot of each kind."""
    m = InputBufferManager(
        default_slots=False, **({"max_batch_size": 4, "max_seq_len": 8, "buckets": [1, 4, 8, 32]} | options)
    )
    m.register_slot("ids", BufferSpec(32, "int64"), pad=3, index=True)
    m.register_slot("short", BufferSpec(32, "int32"), source_dtype="int64", pad="repeat_last")
    m.register_slot("half", BufferSpec(32, "float16"), source_dtype="float32", pad=1.5)
    m.register_slot("brain", BufferSpec(32, "bfloat16"), source_dtype="float32", pad="repeat_last")
    m.register_slot("kept", BufferSpec(32, "uint8"), pad="keep")
    m.register_slot("starts", BufferSpec(6, "int32"), axis="seqs+1", pad="repeat_last")
    m.register_slot("table", BufferSpec((5, 7), "int32"), axis="seqs", pad="repeat_last")
    m.register_slot("rows", BufferSpec((5, 7), "float32"), source_dtype="float64", axis="seqs", pad=np.nan)
    m.register_slot("cube", BufferSpec((5, 2, 3), "int16"), axis="seqs", pad="repeat_last")
    m.register_slot("whole", BufferSpec(4, "complex128"), axis=None)
    m.register_slot("outside", BufferSpec(4), is_static=False)
    return m


def rich_inputs(random, tokens, seqs):
    """Random inputs for `rich_manager`, each left out now and then."""
    width = int(random.integers(0, 8))
    inputs = {
        "ids": random.integers(-9, 9, tokens),
        "short": random.integers(-(1 << 31), 1 << 31, tokens),
        "half": random.standard_normal(tokens).astype(np.float32) * 1e4,
        "brain": random.standard_normal(tokens).astype(np.float32),
        "kept": random.integers(0, 255, tokens, np.uint8),
        "starts": random.integers(0, 99, seqs + 1, np.int32),
        "table": random.integers(0, 99, (seqs, width), np.int32),
        "rows": random.standard_normal((seqs, width)),
        "cube": random.integers(0, 99, (seqs, 2, 3), np.int16),
        "whole": random.standard_normal(4) + 1j,
    }
    return {name: data for name, data in inputs.items() if random.random() < 0.9}


def bucket_of(size, choices):
    return next(choice for choice in choices if choice >= size)


# ------------------------------------------------------------------------------------------------------------- filling


def test_after_any_steps_every_slot_is_its_input_and_its_pad():
    """Invariant 5, and its converse: nothing past the bucket changes."""
    random = np.random.default_rng(0)
    buckets = {"tokens": [1, 4, 8, 32], "seqs": [1, 3, 5]}
    with rich_manager(buckets=buckets, ring=3) as m:
        twin = twins.Slots(m)
        for _ in range(12 if SIM else 120):
            tokens, seqs = int(random.choice([0, 1, 3, 8, 9, 31, 32])), int(random.integers(0, 6))
            inputs = rich_inputs(random, tokens, seqs)
            kept = {name: data.copy() for name, data in inputs.items()}
            views = m.stage_inputs(inputs, tokens, seqs=seqs)
            for data in inputs.values():
                data[...] = 0  # the caller may overwrite its arrays as soon as the call returns
            bucket = {"tokens": bucket_of(tokens, buckets["tokens"]), "seqs": bucket_of(seqs, buckets["seqs"])}
            twin.step(kept, bucket)
            twin.assert_same(kit.contents(m))
            for name, whole in twin.contents.items():
                assert views[name].shape == whole[: twin.rows(name, bucket)].shape
        m.check()


def test_a_view_is_the_slot_padded_to_the_bucket(manager):
    views = manager.stage_inputs({"input_ids": np.arange(1, 6)}, 5)
    assert kit.to_host(views["input_ids"], manager.stream).tolist() == [1, 2, 3, 4, 5, 0, 0, 0]
    assert kit.to_host(views["positions"], manager.stream).tolist() == [0] * 8, "left out: all padding"
    assert _cuda.address(views["input_ids"]) == _cuda.address(manager.get_slot("input_ids").array)


@pytest.mark.parametrize("ring", [1, 2])
def test_an_input_that_is_left_out_leaves_nothing_of_the_step_before_in_its_block(ring):
    """The words of a block are written anew only where they differ from those of its last step."""
    with InputBufferManager(max_batch_size=1, max_seq_len=4, buckets=[4], default_slots=False, ring=ring) as m:
        for name in ("x", "y"):
            m.register_slot(name, BufferSpec(4, "int64"), pad=-1)
        m.capture_buckets(lambda step: step["x"])
        for _ in range(ring):
            m.replay({"x": [1, 2, 3], "y": [4, 5, 6]}, 3)
        for given, held in (({"y": [7, 8]}, [-1] * 4), ({"x": [9]}, [9, -1, -1, -1])) * 2:
            result = m.replay(given, len(next(iter(given.values()))))
            assert kit.to_host(result, m.stream).tolist() == held


def test_what_is_no_slot_passes_through(manager):
    manager.register_slot("mode", BufferSpec(1), is_static=False)
    marker = object()
    views = manager.stage_inputs({"mode": "fast", "other": marker, "input_ids": [1]}, 1)
    assert views["mode"] == "fast" and views["other"] is marker
    assert set(manager.get_static_tensors()) == {"input_ids", "positions"}
    assert manager.get_slot("mode").array is None


def test_no_slots_and_no_tokens():
    with InputBufferManager(default_slots=False, max_batch_size=1, max_seq_len=4) as m:
        assert m.stage_inputs({"x": 1}, 2) == {"x": 1}
        assert m.get_static_tensors() == {}
    with InputBufferManager(max_batch_size=1, max_seq_len=1) as m:
        assert kit.to_host(m.stage_inputs({}, 0)["input_ids"], m.stream).tolist() == [0]


def test_set_data_leaves_the_other_slots_alone():
    with rich_manager() as m:
        twin = twins.Slots(m)
        inputs = rich_inputs(np.random.default_rng(1), 9, 5)
        m.stage_inputs(inputs, 9, seqs=5)
        twin.step(inputs, {"tokens": 32, "seqs": 8})
        m.get_slot("ids").set_data(np.arange(3))
        m.get_slot("whole").set_data(np.full(4, 2 + 2j))
        m.get_slot("starts").set_data(np.array([5, 6], np.int32))
        slots = m.get_slot("ids"), m.get_slot("whole"), m.get_slot("starts")
        for slot, data, padded in zip(
            slots, (np.arange(3), np.full(4, 2 + 2j), np.array([5, 6])), (4, 4, 2), strict=True
        ):
            twin.contents[slot.name] = twins.fill_slot(twin.contents[slot.name], data, padded, slot.pad)
        twin.assert_same(kit.contents(m))
        m.check()


def test_a_slot_added_later_keeps_what_the_others_hold():
    with InputBufferManager(max_batch_size=1, max_seq_len=8) as m:
        m.stage_inputs({"input_ids": np.arange(1, 9)}, 8)
        m.register_slot("late", BufferSpec(8, "float32"), pad=2.0)
        found = kit.contents(m)
        assert found["input_ids"].tolist() == list(range(1, 9)) and found["late"].tolist() == [0.0] * 8
        m.stage_inputs({"late": np.ones(3, np.float32)}, 3)
        assert kit.contents(m)["late"].tolist() == [1, 1, 1, 2, 0, 0, 0, 0]
        m.check()


def test_all_slots_lie_in_one_arena():
    with rich_manager() as m:
        arrays = m.get_static_tensors().values()
        spans = sorted((_cuda.address(array), _cuda.address(array) + array.nbytes) for array in arrays)
        assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:]))
        assert spans[-1][1] - spans[0][0] <= m.stats().arena_bytes


# -------------------------------------------------------------------------------------------------------------- replay


class Pipeline:
    """A captured step that copies the padded slot into a log row and counts, so that every step can be checked."""

    def __init__(self, name, width, steps=64, dtype=np.int64):
        self.name = name
        self.log = kit.to_device(np.full((steps, width), -7, dtype))
        self.row = kit.to_device(np.zeros(1, np.int64))

    def __call__(self, step):
        kit.run(kit.log_row, step.stream, step[self.name], self.log, self.row)
        kit.run(kit.count_up, step.stream, self.row)
        return step.bucket["tokens"]


def test_replay_equals_numpy_for_random_steps(manager):
    pipeline = Pipeline("input_ids", 32)
    captured = manager.capture_buckets(pipeline)
    assert captured == ({"tokens": 8}, {"tokens": 16}, {"tokens": 32})
    at = int(kit.to_host(pipeline.row, manager.stream)[0])
    assert at == 0, "no capture ran"
    random, wanted = np.random.default_rng(2), []
    for _ in range(15 if SIM else 60):
        tokens = int(random.integers(0, 33))
        ids = random.integers(1, 1 << 40, tokens)
        bucket = bucket_of(tokens, (8, 16, 32))
        assert manager.replay({"input_ids": ids}, tokens) == bucket
        wanted.append(np.concatenate([ids, np.zeros(bucket - tokens, np.int64)]))
        ids[:] = -1
    log = kit.to_host(pipeline.log, manager.stream)
    for row, step in zip(log[at:], wanted, strict=False):
        assert row[: step.size].tolist() == step.tolist()
    stats = manager.stats()
    assert stats.steps == len(wanted) and stats.padded_tokens == sum(map(len, wanted))
    assert stats.graphs == 3 and sum(stats.buckets.values()) == stats.steps
    manager.check()


def test_replay_over_several_axes():
    random = np.random.default_rng(3)
    with rich_manager(buckets={"tokens": [8, 32], "seqs": [2, 5]}) as m:
        sizes = [{"tokens": t, "seqs": s} for t in (8, 32) for s in (2, 5)]
        assert m.capture_buckets(lambda step: dict(step.bucket), sizes) == tuple(sizes)
        twin = twins.Slots(m)
        for _ in range(6 if SIM else 60):
            tokens, seqs = int(random.integers(0, 33)), int(random.integers(0, 6))
            inputs = rich_inputs(random, tokens, seqs)
            bucket = m.replay(inputs, tokens, seqs=seqs)
            assert bucket == {"tokens": bucket_of(tokens, (8, 32)), "seqs": bucket_of(seqs, (2, 5))}
            twin.step(inputs, bucket)
            twin.assert_same(kit.contents(m))


def test_captures_warm_all_first_then_largest_first(manager):
    calls = []

    def fn(step):
        calls.append((_cuda.capturing(), step.bucket["tokens"]))

    manager.capture_buckets(fn, [8, 32, 16])
    assert calls == 2 * [(True, 32), (True, 16), (True, 8)]
    calls.clear()
    manager.capture_buckets(fn, [8, 32], warm_up="run")
    assert calls == [(False, 32), (False, 8), (True, 32), (True, 8)]
    with pytest.raises(ValueError, match="warm_up"):
        manager.capture_buckets(fn, [8], warm_up="twice")


def test_capture_by_hand(manager):
    out = kit.to_device(np.zeros(16, np.int64))
    total = kit.to_device(np.zeros(1, np.int64))
    manager.stage_inputs({}, 0)
    kit.run(kit.add_up, manager.stream, out, total)  # compiled before the capture
    with manager.capture(12) as step:
        assert step.bucket == {"tokens": 16} and step["input_ids"].shape == (16,)
        kit.run(kit.add_up, step.stream, step["input_ids"], total)
        step.result = total
    assert manager.replay({"input_ids": np.arange(12)}, 12) is total
    assert manager.replay({"input_ids": np.arange(5)}, 5) is total, "smaller steps use the graph that covers them"
    assert kit.to_host(total, manager.stream).tolist() == [66 + 10]


def test_a_failed_capture_changes_nothing(manager):
    pipeline = Pipeline("input_ids", 32)
    manager.capture_buckets(pipeline, [8, 16])
    before = manager.captured

    def breaks(step):
        if _cuda.capturing() and step.bucket["tokens"] == 8:
            raise ZeroDivisionError("half way")

    with pytest.raises(ZeroDivisionError):
        manager.capture_buckets(breaks, [8, 32])
    with pytest.raises(ZeroDivisionError), manager.capture(8):
        raise ZeroDivisionError
    assert manager.captured == before and not _cuda.capturing()
    at = int(kit.to_host(pipeline.row, manager.stream)[0])
    manager.replay({"input_ids": np.arange(3)}, 3)
    assert kit.to_host(pipeline.log, manager.stream)[at, :8].tolist() == [0, 1, 2, 0, 0, 0, 0, 0]
    manager.capture_buckets(pipeline, [32])
    assert manager.stats().graphs == 3
    manager.check()


def test_another_function_replaces_all_graphs_at_once(manager):
    """Were some of the old ones to stay, it would depend on a step's size which of the functions runs."""
    manager.capture_buckets(lambda step: "old")
    assert manager.replay({}, 1) == "old"
    before = manager.captured
    with pytest.raises(ZeroDivisionError):
        manager.capture_buckets(lambda step: 1 // (step.bucket["tokens"] - 8), [8, 16])
    assert manager.captured == before and manager.replay({}, 9) == "old", "never by halves"

    def new(step):
        return "new"

    manager.capture_buckets(new, [8])
    assert [one.num_tokens for one in manager.captured] == [8]
    manager.capture_buckets(new, [16])
    assert [one.num_tokens for one in manager.captured] == [8, 16], "the same function adds sizes"
    assert manager.replay({}, 1) == "new" and manager.replay({}, 9) == "new"
    assert manager.stats().graphs == 2 and manager.stats().steps == 4


# --------------------------------------------------------------------------------------------- what a capture forbids


def test_staging_inside_a_capture_is_refused(manager):
    manager.capture_buckets(lambda step: None, [8])
    with pytest.raises(CaptureError, match="inside a capture"), manager.capture(8):
        manager.stage_inputs({"input_ids": [1]}, 1)
    with pytest.raises(CaptureError, match="inside a capture"), manager.capture(8):
        manager.replay({"input_ids": [1]}, 1)
    with pytest.raises(CaptureError, match="inside a capture"), manager.capture(8):
        manager.get_slot("input_ids").set_data([1])
    with pytest.raises(CaptureError), manager.capture(8), manager.capture(8):
        pass
    manager.replay({"input_ids": [1]}, 1)
    assert kit.contents(manager)["input_ids"][0] == 1
    manager.check()


def test_a_launch_on_another_stream_is_refused(manager):
    """Queued outside the capture it would run at once, and be missing from every replay."""
    counter = kit.to_device(np.zeros(1, np.int64))
    other = _cuda.as_stream(None)
    kit.run(kit.count_up, other.numba, counter)
    with pytest.raises(CaptureError, match="count_up was queued on another stream"), manager.capture(8):
        kit.run(kit.count_up, other.numba, counter)
    with pytest.raises(CaptureError, match="another stream"), manager.capture(8):
        kit.run(kit.count_up, 0, counter)
    with pytest.raises(CaptureError, match="another stream"), manager.capture(8):
        counter.copy_to_device(np.ones(1, np.int64))
    assert kit.to_host(counter, other.numba).tolist() == [1]
    manager.stage_inputs({"input_ids": [1]}, 1)
    manager.check()


def test_a_new_manager_has_no_memory_inside_a_capture(manager):
    manager.stage_inputs({}, 0)
    with InputBufferManager(max_batch_size=1, max_seq_len=4) as late, pytest.raises(CaptureError), manager.capture(8):
        late.get_slot("input_ids").array  # noqa: B018
    manager.check()


# ------------------------------------------------------------------------------------------ errors that change nothing


def snapshot(m):
    m.synchronize()
    m.check()
    return kit.contents(m), m.stats(), _cuda.address(m.slots[0].array), m.captured


def assert_unchanged(m, before):
    after = snapshot(m)
    for name in before[0]:
        twins.assert_same(after[0][name], before[0][name], name)
    assert after[1:] == before[1:]


def ids(n):
    return np.arange(n)


BAD_STEPS = {
    "float tokens": (TypeError, "whole number", {}, 2.0, {}),
    "bool tokens": (TypeError, "bool", {}, True, {}),
    "text tokens": (TypeError, "whole number", {}, "3", {}),
    "negative tokens": (ValueError, "whole number >= 0", {}, -1, {}),
    "too many tokens": (BucketOverflowError, "tokens=33", {"input_ids": ids(33)}, 33, {}),
    "huge": (BucketOverflowError, "bucket", {}, 1 << 70, {}),
    "unknown axis": (TypeError, "no further sizes", {}, 1, {"seqs": 3}),
    "wrong rows": (ValueError, "2 rows; this step has 3", {"input_ids": ids(2)}, 3, {}),
    "second input wrong": (ValueError, "rows", {"input_ids": ids(3), "positions": ids(2)}, 3, {}),
    "wrong dtype": (TypeError, "float64", {"input_ids": ids(3) * 1.0}, 3, {}),
    "object dtype": (TypeError, "object", {"input_ids": ids(3).astype(object)}, 3, {}),
    "wrong rank": (ValueError, "dimension", {"input_ids": ids(4).reshape(2, 2)}, 2, {}),
    "scalar": (ValueError, "dimension", {"input_ids": 3}, 1, {}),
}


@pytest.mark.parametrize(
    "how, case",
    [(how, case) for how in ("stage_inputs", "replay") for case in BAD_STEPS]
    + [("stage", case) for case, bad in BAD_STEPS.items() if not bad[2] or case == "too many tokens"],
)
def test_a_bad_step_changes_nothing(manager, how, case):
    error, words, inputs, tokens, sizes = BAD_STEPS[case]
    manager.capture_buckets(lambda step: None, [8, 32])
    manager.replay({"input_ids": ids(3) + 1, "positions": ids(3) + 1}, 3)
    before = snapshot(manager)
    if how == "stage":
        error = ValueError if error is BucketOverflowError else error
        with pytest.raises(error):
            manager.stage(tokens, **sizes)
    else:
        with pytest.raises(error) as caught:
            getattr(manager, how)(inputs, tokens, **sizes)
        assert words in str(caught.value)
    assert_unchanged(manager, before)
    manager.replay({"input_ids": ids(2)}, 2)


def test_a_value_that_does_not_fit_changes_nothing():
    with rich_manager() as m:
        m.capture_buckets(lambda step: None, [{"tokens": 8}])
        for how in (m.stage_inputs, m.replay):
            before = snapshot(m)
            with pytest.raises(OverflowError, match="short"):
                how({"ids": ids(2), "short": np.array([1, 1 << 31])}, 2, seqs=1)
            assert_unchanged(m, before)
    with rich_manager(range_check=False) as m:
        m.stage_inputs({"short": np.array([1, (1 << 32) + 5])}, 2, seqs=1)
        assert kit.contents(m)["short"][:2].tolist() == [1, 5]


def test_a_replay_takes_slots_alone(manager):
    manager.capture_buckets(lambda step: None, [8])
    before = snapshot(manager)
    with pytest.raises(ValueError, match="'other' is not a static slot"):
        manager.replay({"input_ids": ids(2), "other": 1}, 2)
    assert_unchanged(manager, before)


def test_a_device_array_is_refused(manager):
    manager.capture_buckets(lambda step: None, [8])
    before = snapshot(manager)
    with pytest.raises(TypeError, match="device array"):
        manager.replay({"input_ids": kit.to_device(ids(2))}, 2)
    assert_unchanged(manager, before)


@pytest.mark.parametrize("policy", ["eager", "split"])
def test_a_bad_oversized_step_changes_nothing(policy):
    with InputBufferManager(max_batch_size=4, max_seq_len=8, buckets=[8], overflow=policy) as m:
        m.capture_buckets(lambda step: None)
        before = snapshot(m)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ValueError, match="rows|tokens"):
                m.replay({"input_ids": ids(19), "positions": ids(20)}, 20)
            with pytest.raises(TypeError):
                m.replay({"input_ids": ids(20), "positions": np.zeros(20)}, 20)
            with pytest.raises(ValueError, match="not a static slot"):
                m.replay({"input_ids": ids(20), "other": 3}, 20)
            if policy == "eager":
                with pytest.raises(ValueError, match="rows"):
                    m.stage_inputs({"input_ids": ids(19)}, 20)
        assert_unchanged(m, before)


def test_nothing_captured(manager):
    with pytest.raises(GraphMissingError, match="capture_buckets"):
        manager.replay({"input_ids": ids(2)}, 2)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"ring": 0}, ValueError, "ring"),
        ({"ring": 1.5}, TypeError, "ring"),
        ({"max_batch_size": 0}, ValueError, "max_batch_size"),
        ({"max_seq_len": -1}, ValueError, "max_seq_len"),
        ({"overflow": "drop"}, ValueError, "raise, eager, split"),
        ({"buckets": []}, ValueError, "at least one"),
        ({"buckets": [0, 4]}, ValueError, "bucket"),
        ({"buckets": [1 << 30]}, ValueError, "max_size"),
        ({"pool": 4}, TypeError, "BufferPool"),
        ({"stream": "mine"}, TypeError, "stream"),
    ],
)
def test_what_a_manager_cannot_be(options, error, words):
    with pytest.raises(error, match=words):
        InputBufferManager(**options)


def test_buckets_for_an_axis_that_no_slot_follows():
    with InputBufferManager(buckets={"seqs": [4]}) as m, pytest.raises(ValueError, match="seqs"):
        m.stage_inputs({}, 0)


@pytest.mark.parametrize("sizes", [[], [0], [33], [-1], 8, [{"seqs": 1}], [True], ["8"], [8.0]])
def test_sizes_that_cannot_be_captured(manager, sizes):
    manager.stage_inputs({}, 0)
    before = snapshot(manager)
    with pytest.raises((ValueError, TypeError)):
        manager.capture_buckets(lambda step: None, sizes)
    assert_unchanged(manager, before)


# ------------------------------------------------------------------------------------------------------------ overflow


def test_overflow_raise_names_the_remedy(manager):
    manager.capture_buckets(lambda step: None, [8])
    with pytest.raises(BucketOverflowError, match="tokens=9.*largest bucket is 8.*'eager' or 'split'"):
        manager.replay({}, 9)


def test_a_step_that_only_several_graphs_cover_is_told_so():
    """Each of its sizes is covered, so that no size is to blame."""
    sizes = [{"tokens": 8, "seqs": 4}, {"tokens": 32, "seqs": 1}]
    for policy, ways in (("raise", "'eager'"), ("split", "'eager'; overflow='split' cuts along"), ("eager", None)):
        with InputBufferManager(max_batch_size=4, max_seq_len=8, buckets=[8], overflow=policy) as m:
            m.register_slot("lens", BufferSpec(4, "int64"), axis="seqs")
            m.capture_buckets(lambda step: tuple(step.bucket.values()), sizes)

            def lease(m=m):
                with m.stage(20, seqs=3) as lease:
                    return lease.replay()

            for run in (lambda m=m: m.replay({}, 20, seqs=3), lease):
                if ways:
                    message = "{'tokens': 20, 'seqs': 3}: there is a graph for each of these sizes, and none for all"
                    with pytest.raises(BucketOverflowError, match=f"{message}.*overflow={ways}"):
                        run()
                else:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", RuntimeWarning)
                        assert run() == (20, 3)
            m.check()


@pytest.mark.parametrize("policy", ["raise", "split"])
def test_a_refused_step_is_told_what_would_help(policy):
    """Neither the policy that is in force nor one that could not run the step either."""
    with InputBufferManager(max_batch_size=4, max_seq_len=8, buckets=[8], overflow=policy) as m:
        m.register_slot("lens", BufferSpec(4, "int64"), axis="seqs")
        m.capture_buckets(lambda step: None, [{"tokens": 8, "seqs": 1}])
        end = "$" if policy == "raise" else "; overflow='split' cuts .* 'lens', which follows seqs"
        for call, message in (
            (lambda: m.replay({}, 4, seqs=2), f"add a bucket, or make the manager with overflow='eager'{end}"),
            (lambda: m.replay({}, 4, seqs=5), f"make its slots larger{end}"),
            (lambda: m.replay({}, 33, seqs=1), f"make its slots larger{end}"),
            (lambda: m.stage_inputs({}, 9, seqs=1), "add a bucket, or make the manager with overflow='eager'$"),
            (lambda: m.stage_inputs({}, 33, seqs=1), "make its slots larger$"),
            (lambda: m.stage(9, seqs=1).fill(), "add a bucket, or make the manager with overflow='eager'$"),
            (lambda: m.capture(9, seqs=1).__enter__(), "add a bucket$"),
        ):
            with pytest.raises(BucketOverflowError, match=message):
                call()
        m.check()
    with InputBufferManager(None, 1, 8, buckets=[8], overflow=policy) as m:
        m.capture_buckets(lambda step: None)
        if policy == "raise":
            with pytest.raises(BucketOverflowError, match="slots larger, or make the manager with overflow='split'$"):
                m.replay({"input_ids": ids(33)}, 33)
        else:
            m.replay({"input_ids": ids(33)}, 33)
        m.check()


def test_a_policy_is_advised_where_it_serves():
    """Split beyond the slots, only where an input says how long the step is; eager, only with a function to run."""
    with InputBufferManager(max_batch_size=4, max_seq_len=8, buckets=[8]) as m:
        m.capture_buckets(lambda step: None)
        with pytest.raises(BucketOverflowError, match="slots larger, or make the manager with overflow='split'$"):
            m.replay({"input_ids": ids(33)}, 33)
        with pytest.raises(BucketOverflowError, match="slots larger$"):
            m.replay({"input_ids": None}, 33)
    with InputBufferManager(max_batch_size=4, max_seq_len=8, buckets=[8]) as m:
        with m.capture(8):
            pass
        with pytest.raises(BucketOverflowError, match="add a bucket, or make the manager with overflow='split'$"):
            m.replay({}, 9)
    with InputBufferManager(max_batch_size=4, max_seq_len=8, buckets=[8]) as m:
        m.register_slot("lens", BufferSpec(4, "int64"), axis="seqs")
        with pytest.raises(BucketOverflowError, match="add a bucket$"):
            m.stage_inputs({}, 9, seqs=5)  # "eager" could not run it: it holds no 5 sequences


def test_overflow_eager_runs_warns_once_and_counts():
    with InputBufferManager(max_batch_size=4, max_seq_len=8, buckets=[8], overflow="eager") as m:
        pipeline = Pipeline("input_ids", 32)
        m.capture_buckets(pipeline)
        at = int(kit.to_host(pipeline.row, m.stream)[0])
        with pytest.warns(RuntimeWarning, match="fits no bucket") as caught:
            m.replay({"input_ids": ids(20)}, 20)
            m.replay({"input_ids": ids(21)}, 21)
        assert len(caught) == 1 and caught[0].filename == __file__
        log = kit.to_host(pipeline.log, m.stream)
        assert log[at, :20].tolist() == list(range(20)) and log[at + 1, :21].tolist() == list(range(21))
        m.stage_inputs({"input_ids": ids(9)}, 9)
        m.replay({}, 30)
        stats = m.stats()
        assert (stats.overflows, stats.steps, stats.live_tokens) == (4, 4, 80)
        with pytest.raises(BucketOverflowError, match="slots hold 32"):
            m.replay({"input_ids": ids(33)}, 33)
        assert m.stats() == stats
        m.check()


def test_overflow_eager_needs_the_function():
    with InputBufferManager(max_batch_size=4, max_seq_len=8, buckets=[8], overflow="eager") as m:
        with m.capture(8) as step:
            step.result = 1
        with pytest.raises(GraphMissingError, match="capture_buckets"):
            m.replay({}, 9)


def test_overflow_split_replays_in_pieces():
    with InputBufferManager(
        max_batch_size=4, max_seq_len=8, buckets=[4, 8], overflow="split", default_slots=False
    ) as m:
        m.register_slot("input_ids", BufferSpec(32, "int64"))
        m.register_slot("whole", BufferSpec(2, "int64"), axis=None)
        total = kit.to_device(np.zeros(1, np.int64))

        def fn(step):
            for name in step:
                kit.run(kit.add_up, step.stream, step[name], total)
            return total

        m.capture_buckets(fn, [4, 8])
        pieces = []

        def each(result, start, stop):
            pieces.append((start, stop, int(kit.to_host(result, m.stream)[0])))

        inputs = {"input_ids": ids(19), "whole": np.array([1000, 200])}
        assert m.replay(inputs, 19, each=each) is total
        sums = [sum(range(8)) + 1200, sum(range(16)) + 2400, sum(range(19)) + 3600]
        assert pieces == [(0, 8, sums[0]), (8, 16, sums[1]), (16, 19, sums[2])]
        stats = m.stats()
        assert stats.overflows == 1 and stats.buckets == {4: 1, 8: 2} and stats.live_tokens == 19
        m.replay({"input_ids": ids(1000)}, 1000)
        assert m.replay({}, 20) is total
        with pytest.raises(BucketOverflowError, match="tokens=1000000000000"):
            m.replay({}, 10**12)
        m.check()


def test_a_step_with_another_axis_is_not_split():
    """Offsets on seqs+1 point into all tokens of the step: a piece that got them all would read out of bounds."""
    for policy in ("raise", "split"):
        with InputBufferManager(None, 1, 32, buckets=[8], overflow=policy, default_slots=False) as m:
            m.register_slot("values", BufferSpec(32))
            m.register_slot("starts", BufferSpec(5, "int32"), axis="seqs+1", pad="repeat_last")
            m.capture_buckets(lambda step: None, [{"tokens": 8, "seqs": 4}])
            before = snapshot(m)
            with pytest.raises(BucketOverflowError) as caught:
                m.replay({"values": np.zeros(20, np.float32), "starts": np.array([0, 20], np.int32)}, 20, seqs=1)
            assert "overflow='split'" not in str(caught.value) or "'starts', which follows seqs+1" in str(caught.value)
            assert_unchanged(m, before)
            m.capture_buckets(lambda step: None, [{"tokens": 32, "seqs": 4}])  # as the text says
            m.replay({"values": np.zeros(20, np.float32), "starts": np.array([0, 20], np.int32)}, 20, seqs=1)


@pytest.mark.parametrize("ring", [1, 2, 4])
def test_a_step_from_each_is_refused_and_the_pieces_are_right(ring):
    with InputBufferManager(None, 1, 8, ring=ring, buckets=[2], overflow="split", default_slots=False) as m:
        m.register_slot("x", BufferSpec(8, "int64"))
        total = kit.to_device(np.zeros(1, np.int64))
        m.capture_buckets(lambda step: kit.run(kit.add_up, step.stream, step["x"], total))
        refused, sums = [], []

        def each(result, start, stop):
            with pytest.raises(BusyError) as caught:
                m.stage_inputs({"x": np.full(2, -5)}, 2)
            refused.append(caught.value)
            sums.append(int(kit.to_host(total, m.stream)[0]))

        with m.stage(8) as lease:
            lease["x"][:] = np.arange(8)
            lease.replay(each=each)
        assert len(refused) == 4 and sums == [1, 6, 15, 28]
        for call in (lambda: m.replay({"x": ids(8)}, 8, each=5), lambda: m.stage(8).replay(each=5)):
            with pytest.raises(TypeError, match="each is 5"):
                call()


# ----------------------------------------------------------------------------------------------- lifetimes, addresses


def test_a_graph_keeps_its_operands_alive(manager):
    """Invariant 7. New arrays of the same size are made after the drop, so that freed memory would be overwritten."""
    weights = kit.to_device(np.array([3, 10]))
    out = kit.to_device(np.zeros(8, np.int64))
    watched = weakref.ref(weights), weakref.ref(out)

    def fn(step, weights=weights, out=out):
        kit.run(kit.affine, step.stream, step["input_ids"], weights, out)
        return out

    kit.run(kit.affine, manager.stream, out, weights, out)  # compiled before the capture
    with manager.capture(8) as step:  # a function would hold the arrays, too
        step.result = fn(step)
    del fn, step, weights, out
    kit.collect()
    assert all(ref() is not None for ref in watched)
    noise = [kit.to_device(np.full(8, 99)) for _ in range(8)]
    result = manager.replay({"input_ids": ids(8)}, 8)
    assert kit.to_host(result, manager.stream).tolist() == [10, 13, 16, 19, 22, 25, 28, 31]
    del result
    manager.close_graphs()
    kit.collect()
    assert all(ref() is None for ref in watched), "closing the graphs lets the operands go"
    assert all(kit.to_host(array, manager.stream).tolist() == [99] * 8 for array in noise)


def test_copies_in_a_capture_are_kept_too(manager):
    source, target = kit.to_device(ids(8)), kit.to_device(np.zeros(8, np.int64))
    watched = weakref.ref(source)
    with manager.capture(8) as step:
        target.copy_to_device(source, stream=step.stream)
    assert kit.to_host(target, manager.stream).tolist() == [0] * 8, "nothing runs during the capture"
    del source
    kit.collect()
    noise = [kit.to_device(np.full(8, 99)) for _ in range(4)]
    assert watched() is not None
    manager.replay({}, 1)
    assert kit.to_host(target, manager.stream).tolist() == list(range(8))
    del noise


def test_nothing_moves_under_a_live_graph(manager):
    """Invariant 8: addresses are the same for as long as a graph lives."""
    manager.capture_buckets(lambda step: None, [8])
    before = {name: _cuda.address(array) for name, array in manager.get_static_tensors().items()}
    with pytest.raises(BusyError, match="close_graphs"):
        manager.register_slot("late", BufferSpec(4))
    assert [slot.name for slot in manager.slots] == ["input_ids", "positions"]
    manager.register_slot("outside", BufferSpec(4), is_static=False)  # has no memory: nothing moves
    for step in range(4):
        manager.stage_inputs({"input_ids": ids(step)}, step)
        manager.replay({"input_ids": ids(step)}, step)
        with manager.stage(step) as lease:
            lease["input_ids"][:] = 1
    manager.get_slot("positions").set_data(ids(3))
    manager.capture_buckets(lambda step: None, [8, 16])
    assert {name: _cuda.address(array) for name, array in manager.get_static_tensors().items()} == before
    manager.close_graphs()
    manager.register_slot("late", BufferSpec(4))
    manager.stage_inputs({}, 0)
    manager.check()


def test_registering_inside_a_capture_is_refused(manager):
    manager.stage_inputs({}, 0)
    with manager.capture(8):
        with pytest.raises(BusyError, match="captured"):
            manager.register_slot("late", BufferSpec(4))
        for end in (manager.close_graphs, manager.release_all, manager.close, manager.synchronize):
            with pytest.raises(CaptureError, match="inside a captured function"):
                end()
    assert manager.replay({}, 1) is None
    assert not manager.closed


def test_a_pool_closed_under_a_live_graph_is_reported():
    pool = SimpleBufferPool()
    m = InputBufferManager(pool, max_batch_size=1, max_seq_len=8)
    m.capture_buckets(lambda step: None, [8])
    m.replay({"input_ids": ids(3)}, 3)
    pool.close()
    for call in (lambda: m.replay({"input_ids": ids(3)}, 3), lambda: m.stage_inputs({}, 0), lambda: m.stage(1)):
        with pytest.raises(ClosedError, match="pool was closed"):
            call()
    m.close()
    m.close()


def test_release_all_gives_everything_back_and_the_next_step_starts_anew():
    with SimpleBufferPool() as pool:
        with InputBufferManager(pool, max_batch_size=1, max_seq_len=8) as m:
            m.capture_buckets(lambda step: None, [8])
            m.replay({"input_ids": ids(3) + 5}, 3)
            assert pool.stats().in_use_count == 2
            m.release_all()
            assert pool.stats().in_use_count == 0 and m.stats().arena_bytes == 0 and m.stats().steps == 1
            with pytest.raises(GraphMissingError):
                m.replay({}, 1)
            m.stage_inputs({"positions": ids(3)}, 3)
            assert kit.contents(m)["input_ids"].tolist() == [0] * 8
            m.check()
        assert pool.stats().in_use_count == 0 and not pool.closed
        pool.check()


def test_close_is_idempotent_and_final(manager):
    manager.capture_buckets(lambda step: None, [8])
    manager.close()
    manager.close()
    assert manager.closed
    for call in (
        lambda: manager.stage_inputs({}, 0),
        lambda: manager.replay({}, 0),
        lambda: manager.stage(0),
        lambda: manager.capture_buckets(lambda step: None),
        lambda: manager.register_slot("x", BufferSpec(1)),
        lambda: manager.get_slot("input_ids").set_data([1]),
        lambda: manager.get_slot("input_ids").array,
        lambda: manager.__enter__(),
        lambda: manager.capture(1).__enter__(),
    ):
        with pytest.raises(ClosedError):
            call()
    manager.check()
    assert "closed" in repr(manager)


def test_a_manager_that_was_never_used_closes():
    m = InputBufferManager()
    m.close()
    assert m.stats().steps == 0


def test_a_failed_allocation_leaves_the_manager_usable():
    with SimpleBufferPool(max_pinned_bytes=100) as pool, InputBufferManager(pool, max_batch_size=1, max_seq_len=8) as m:
        for _ in range(2):
            with pytest.raises(numbabuf.TierFullError):
                m.stage_inputs({}, 0)
            assert pool.stats().in_use_count == 0, "the arena went back"
        m.check()


def lived(*, close):
    """The parts of a manager that did a bit of everything, as weak references, and its slots."""
    m = InputBufferManager(max_batch_size=1, max_seq_len=8, buckets=[4, 8])
    for _ in range(2):  # the second time in place of the first, which leaves with an event
        m.capture_buckets(lambda step: None, [8])
    m.replay({"input_ids": ids(3)}, 3)
    m.stage_inputs({"input_ids": ids(3)}, 3)
    with m.stage(2) as lease:
        lease["input_ids"][:] = 1
    m.get_slot("positions").set_data([1])
    m.check()
    watched = [weakref.ref(part) for part in (m, m._shared.arena, m._first)]
    if close:
        m.close()
    return watched, m.slots


def flush():
    """Have Numba destroy what it has put off destroying."""
    context = _cuda.cuda.current_context()
    context.deallocations.clear()
    context.memory_manager.deallocations.clear()


@pytest.mark.parametrize("end", ["closed", "dropped"])
def test_a_manager_is_in_no_reference_cycle(end, request, backend):
    """Numba destroys what the collector finds in whatever thread that runs, context or none: it must find nothing."""
    lived(close=True)
    kit.collect()
    stub = request.getfixturevalue("stub") if backend == "stand-in" else None
    if stub is not None:
        flush()
        stub.reset_counts()
    gc.disable()
    try:
        watched, slots = lived(close=end == "closed")
        assert [ref() for ref in watched] == [None] * 3
        if stub is not None:
            flush()
            calls = stub.counts()
            for made, destroyed in (
                ("cuEventCreate", "cuEventDestroy_v2"),
                ("cuGraphInstantiateWithParams", "cuGraphExecDestroy"),
                ("cuMemAlloc_v2", "cuMemFree_v2"),
                ("cuMemHostAlloc", "cuMemFreeHost"),
            ):
                assert calls[made] == calls[destroyed] > 0, made
    finally:
        gc.enable()
    for use in (lambda: slots[0].array, lambda: slots[0].set_data([1])):
        with pytest.raises(ClosedError, match="the manager of slot 'input_ids' is gone"):
            use()


# ---------------------------------------------------------------------------------------------- names, stats, observer


def test_names(manager):
    with pytest.raises(ValueError, match="registered already"):
        manager.register_slot("input_ids", BufferSpec(4))
    with pytest.raises(KeyError, match="registered are input_ids, positions"):
        manager.get_slot("input")
    assert [slot.name for slot in manager.slots] == ["input_ids", "positions"]
    slot = manager.get_slot("input_ids")
    assert slot.index and slot.pad == 0 and slot.spec == BufferSpec(32, "int64")
    assert repr(manager).startswith("InputBufferManager(2 slots")


def test_an_observer_that_fails_costs_no_step(manager, caplog):
    def observer(size, program):
        raise ZeroDivisionError("mine")

    manager.observer = observer
    views = manager.stage_inputs({}, 3)
    assert set(views) == set(manager.get_static_tensors())
    with manager.stage(2):
        pass
    assert manager.stats().steps == 2
    assert "step of 3 tokens, which is queued: ZeroDivisionError('mine')" in caplog.text


def test_the_observer_hears_every_step(manager):
    heard = []
    manager.observer = lambda size, program: heard.append(size)
    manager.capture_buckets(lambda step: None, [8, 32])
    manager.replay({}, 3)
    manager.stage_inputs({}, 4)
    with manager.stage(5) as lease:
        lease.replay()
    with pytest.raises(ValueError):
        manager.replay({"input_ids": ids(1)}, 2)
    assert heard == [3, 4, 5]


def test_stats_are_a_frozen_snapshot(manager):
    manager.stage_inputs({}, 5)
    stats = manager.stats()
    assert (stats.steps, stats.live_tokens, stats.padded_tokens, stats.buckets) == (1, 5, 8, {8: 1})
    assert stats.padding == pytest.approx(0.6)
    with pytest.raises(AttributeError):
        stats.steps = 3
    manager.stage_inputs({}, 5)
    assert stats.steps == 1 and manager.stats().steps == 2


# ------------------------------------------------------------------------------------------------------------- threads


def test_threads_replay_through_one_manager(manager):
    """Each thread's steps are whole: a row of the log is one thread's input, never a mixture."""
    threads, steps = 4, 4 if SIM else 15
    pipeline = Pipeline("input_ids", 32, steps=threads * steps + 8)
    manager.capture_buckets(pipeline, [8, 32])
    at = int(kit.to_host(pipeline.row, manager.stream)[0])
    barrier = threading.Barrier(threads)
    failures = []

    def work(number):
        try:
            barrier.wait()
            for step in range(steps):
                size = (3, 8, 20)[step % 3]
                manager.replay({"input_ids": np.full(size, number * 1000 + step + 1)}, size)
        except BaseException as error:
            failures.append(error)

    running = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not failures
    log = kit.to_host(pipeline.log, manager.stream)[at : at + threads * steps]
    wanted = {number * 1000 + step + 1: (3, 8, 20)[step % 3] for number in range(threads) for step in range(steps)}
    for row in log:
        value = int(row[0])
        size = wanted.pop(value)
        bucket = bucket_of(size, (8, 32))
        assert row[:bucket].tolist() == [value] * size + [0] * (bucket - size)
    assert not wanted
    manager.check()


def test_other_threads_replay_while_one_captures(manager):
    manager.capture_buckets(lambda step: "ready", [8])
    inside, replayed = threading.Event(), []

    def work():
        inside.wait()
        replayed.append(manager.replay({"input_ids": ids(4)}, 4))

    thread = threading.Thread(target=work)
    thread.start()
    with manager.capture(16) as step:
        inside.set()
        thread.join()
        step.result = "larger"
    assert replayed == ["ready"]
    assert manager.replay({}, 9) == "larger"
    assert kit.contents(manager)["input_ids"][:4].tolist() == [0, 0, 0, 0]
    manager.check()


def test_other_threads_fill_while_one_captures(manager):
    """A bucket that has no fill graph yet cannot get one meanwhile: it is filled by a launch, which is no overflow."""
    manager.stage_inputs({}, 0)
    views, failures = [], []

    def work():
        try:
            views.append(manager.stage_inputs({"input_ids": ids(20) + 1}, 20))
            with manager.stage(3) as lease:
                lease["positions"][:] = 5
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    with manager.capture(8):
        thread.start()
        thread.join()
    assert not failures
    found = kit.contents(manager)
    assert found["positions"][:9].tolist() == [5, 5, 5, 0, 0, 0, 0, 0, 0] and views[0]["input_ids"].shape == (32,)
    assert found["input_ids"][:9].tolist() == [0] * 8 + [9], "the lease padded the first bucket alone"
    stats = manager.stats()
    assert (stats.steps, stats.overflows, stats.buckets) == (3, 0, {8: 2, 32: 1})
    manager.stage_inputs({"input_ids": ids(20)}, 20)
    manager.check()


def test_two_threads_capture_one_after_the_other(manager):
    barrier, results, failures = threading.Barrier(2), [], []

    def work(tokens):
        try:
            barrier.wait()
            for _ in range(3):
                with manager.capture(tokens) as step:
                    step.result = tokens
                results.append(manager.replay({}, tokens))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(tokens,)) for tokens in (8, 16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and sorted(results) == [8, 8, 8, 16, 16, 16]
    manager.check()


# ------------------------------------------------------------------------------------------------------ found by attack


@pytest.mark.parametrize("do", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_manager_is_not_copied(manager, do):
    """A copy would share the memory, and the first of the two to close would free it under the other."""
    with pytest.raises(TypeError, match="InputBufferManager cannot be copied or pickled"):
        do(manager)


@pytest.mark.parametrize(
    "step",
    [
        lambda m: m.replay({"input_ids": ids(3)}, 3),
        lambda m: m.stage_inputs({"input_ids": ids(3)}, 3),
        lambda m: m.get_slot("input_ids").set_data(ids(3)),
    ],
    ids=["replay", "stage_inputs", "set_data"],
)
def test_an_interrupt_right_after_the_launch(manager, monkeypatch, request, step):
    """Ctrl-C between the launch and the host's count of it must not leave host and device one step apart."""
    manager.capture_buckets(lambda step: None)
    manager.stage_inputs({}, 0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a run with SIGINT ignored has another
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    graphs = [graph for table in manager._shared.tables for graph in table]
    launches = [graph.launch_on for graph in graphs]
    for graph, launch in zip(graphs, launches, strict=True):
        graph.launch_on = lambda core, launch=launch: (launch(core), signal.raise_signal(signal.SIGINT))
    with monkeypatch.context() as patch:
        patch.setattr(staging.StagingRing, "advance", lambda ring: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            step(manager)
    for graph, launch in zip(graphs, launches, strict=True):
        graph.launch_on = launch
    manager.check()
    manager.replay({"input_ids": ids(5)}, 5)
    assert kit.contents(manager)["input_ids"][:8].tolist() == [*ids(5).tolist(), 0, 0, 0]


def test_a_captured_function_cannot_capture():
    """It would wait for itself: the right to capture is its own thread's already."""
    manager = InputBufferManager(max_batch_size=4, max_seq_len=8, buckets=[8])  # not closed where the thread hangs
    errors = []

    def capture_another(step):
        with manager.capture(8):
            pass

    def run():
        try:
            manager.capture_buckets(capture_another)
        except CaptureError as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive() and "inside a captured function" in str(errors[0])
    manager.capture_buckets(lambda step: None)
    manager.close()


def test_a_device_array_is_not_split():
    """NumPy would copy it back to the host without a word, at the cost of a synchronisation."""
    with InputBufferManager(max_batch_size=4, max_seq_len=8, buckets=[8], overflow="split") as m:
        m.capture_buckets(lambda step: None)
        with pytest.raises(TypeError, match="is a device array"):
            m.replay({"input_ids": kit.to_device(ids(20))}, 20)
        assert m.stats().overflows == 0


@pytest.mark.parametrize("end", ["fill", "leave"])
def test_the_warning_points_at_the_line_that_asked(end):
    with InputBufferManager(max_batch_size=4, max_seq_len=8, buckets=[8], overflow="eager") as m:
        with pytest.warns(RuntimeWarning, match="fits no bucket") as caught:
            with m.stage(9) as lease:
                if end == "fill":
                    lease.fill()
        assert caught[0].filename == __file__


FORK = """
import os, threading
from numbabuf import ClosedError, InputBufferManager

manager = InputBufferManager(max_batch_size=1, max_seq_len=8, buckets=[8])
manager.capture_buckets(lambda step: None)
manager.replay({}, 1)
held, done = threading.Event(), threading.Event()
def hold():
    with manager._shared.capturing.held(), manager._shared.lock:
        held.set()
        done.wait(60)
thread = threading.Thread(target=hold)
thread.start()
held.wait(60)
child = os.fork()
if child == 0:
    try:
        manager.replay({}, 1)
    except ClosedError:
        manager.close()
        os._exit(0)
    os._exit(1)
done.set()
thread.join()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
manager.replay({}, 1)
manager.check()
manager.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_does_not_wait_for_a_lock_of_the_parent():
    """Nobody in the child will ever release a lock that another thread of the parent held."""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")
