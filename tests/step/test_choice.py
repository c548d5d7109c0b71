"""The graph that a caller asks for: a least size, as data-parallel ranks need, and a most padding."""

import math

import kit
import numpy as np
import pytest

from numbabuf import BucketOverflowError, BufferSpec, BusyError, InputBufferManager


def ids(n):
    return np.arange(1, n + 1)


def tokens_of(step):
    return step.bucket["tokens"]


@pytest.fixture(params=["raise", "eager", "split"])
def manager(request):
    with InputBufferManager(max_batch_size=1, max_seq_len=64, buckets=[8, 16, 32], overflow=request.param) as m:
        m.capture_buckets(tokens_of)
        yield m
        m.check()


@pytest.fixture
def two_axes():
    with InputBufferManager(max_batch_size=1, max_seq_len=64, buckets={"tokens": [8, 32], "seqs": [2, 4]}) as m:
        m.register_slot("lens", BufferSpec(4, "int64"), axis="seqs")
        m.capture_buckets(lambda step: dict(step.bucket), [{"tokens": t, "seqs": s} for t in (8, 32) for s in (2, 4)])
        yield m
        m.check()


@pytest.mark.parametrize("at_least", [16, {"tokens": 16}, np.int32(9)])
def test_ranks_run_one_size(manager, at_least):
    sizes = [manager.replay({"input_ids": ids(n)}, n, at_least=at_least) for n in (1, 8, 16)]
    assert sizes == [16, 16, 16]
    assert manager.replay({"input_ids": ids(17)}, 17, at_least=at_least) == 32
    assert manager.replay({"input_ids": ids(3)}, 3, at_least=0) == manager.replay({"input_ids": ids(3)}, 3) == 8


def test_the_slots_are_padded_to_the_size_that_runs(manager):
    manager.replay({"input_ids": np.full(32, 7)}, 32)
    manager.replay({"input_ids": ids(3)}, 3, at_least=16)
    values = kit.to_host(manager.get_slot("input_ids").array, manager.stream)
    assert values[:32].tolist() == [1, 2, 3, *[0] * 13, *[7] * 16]


def test_programs_and_leases_choose_too(manager):
    program = manager.program(tokens_of)
    program.capture_buckets()
    assert program.replay({}, 2, at_least=9) == 16
    with manager.stage(2) as lease:
        lease["input_ids"][:] = 5
        assert lease.replay(at_least={"tokens": 17}) == 32
    with program.stage(2) as lease, pytest.raises(ValueError, match="at_least names rows"):
        lease.replay(at_least={"rows": 1})
    assert not lease.open


def test_each_axis_has_a_least_size(two_axes):
    assert two_axes.replay({}, 3, seqs=1, at_least={"seqs": 3}) == {"tokens": 8, "seqs": 4}
    assert two_axes.replay({}, 3, seqs=1, at_least={"seqs": 3, "tokens": 9}) == {"tokens": 32, "seqs": 4}
    assert two_axes.replay({}, 3, seqs=3, at_least=9) == {"tokens": 32, "seqs": 4}
    with pytest.raises(BucketOverflowError, match=r"seqs=5.*at_least asks for \{'seqs': 5\}"):
        two_axes.replay({}, 3, seqs=1, at_least={"seqs": 5})


def test_padding_up_to_the_ratio_is_covered(manager):
    assert manager.replay({"input_ids": ids(4)}, 4, max_padding=2) == 8
    assert manager.replay({"input_ids": ids(8)}, 8, max_padding=1.0) == 8
    assert manager.replay({"input_ids": ids(1)}, 1, max_padding=math.inf) == 8
    assert manager.replay({}, 0, max_padding=8.0) == 8
    # What at_least asks for is not padding.
    assert manager.replay({"input_ids": ids(1)}, 1, at_least=16, max_padding=1) == 16


def test_beyond_the_ratio_overflow_decides(manager):
    seen = []
    data = {"input_ids": ids(17)}

    def run():
        return manager.replay(
            data, 17, max_padding=1.5, each=lambda size, start, stop: seen.append((size, start, stop))
        )

    if manager.overflow == "raise":
        with pytest.raises(BucketOverflowError, match=r"tokens': 17.*32 tokens, more than max_padding=1.5 times"):
            run()
        assert manager.stats().steps == 0
    elif manager.overflow == "eager":
        with pytest.warns(RuntimeWarning, match="tokens=17"):
            assert run() == 17
        assert manager.stats().buckets == {17: 1}
    else:
        assert run() == 8
        assert seen == [(16, 0, 16), (8, 16, 17)]
    assert manager.replay({"input_ids": ids(22)}, 22, max_padding=1.5) == 32


def test_a_least_size_without_a_graph_is_an_overflow(manager):
    if manager.overflow == "eager":
        with pytest.warns(RuntimeWarning):
            assert manager.replay({"input_ids": ids(3)}, 3, at_least=40) == 40
        values = kit.to_host(manager.get_slot("input_ids").array, manager.stream)
        assert values[:40].tolist() == [1, 2, 3, *[0] * 37]
    else:  # no piece of the step has that size
        with pytest.raises(BucketOverflowError, match=r"tokens=40; the largest bucket is 32.*at_least"):
            manager.replay({"input_ids": ids(3)}, 3, at_least=40)
    with pytest.raises(BucketOverflowError, match="tokens=65"):
        manager.replay({"input_ids": ids(3)}, 3, at_least=65)


def test_the_pieces_of_a_split_step_have_the_least_size():
    with InputBufferManager(max_batch_size=1, max_seq_len=64, buckets=[8, 16, 32], overflow="split") as m:
        m.capture_buckets(tokens_of)
        seen = []
        m.replay({"input_ids": ids(35)}, 35, at_least=16, each=lambda size, start, stop: seen.append((size, stop)))
        assert seen == [(32, 32), (16, 35)]
        with m.stage(17) as lease:
            lease["input_ids"][:] = ids(17)
            assert lease.replay(max_padding=1.0) == 8
        assert kit.to_host(m.get_slot("input_ids").array, m.stream)[:8].tolist() == [17, *[0] * 7]
        with pytest.raises(BucketOverflowError):  # no graph that it fills
            m.replay({"input_ids": ids(3)}, 3, max_padding=2)
        with pytest.raises(BucketOverflowError):  # its pieces would be smaller
            m.replay({"input_ids": ids(35)}, 35, at_least=40)


@pytest.mark.parametrize(
    ("choice", "error"),
    [
        ({"at_least": 1.0}, TypeError),
        ({"at_least": True}, TypeError),
        ({"at_least": "8"}, TypeError),
        ({"at_least": -1}, ValueError),
        ({"at_least": {"tokens": 1.5}}, TypeError),
        ({"at_least": {"seqs": 1}}, ValueError),
        ({"at_least": {3: 1}}, ValueError),
        ({"max_padding": 0.9}, ValueError),
        ({"max_padding": math.nan}, ValueError),
        ({"max_padding": True}, TypeError),
        ({"max_padding": "2"}, TypeError),
        ({"max_padding": 2j}, TypeError),
    ],
)
def test_what_means_nothing_is_refused_before_the_step(manager, choice, error):
    before = manager.stats()
    with pytest.raises(error, match="at_least|max_padding"):
        manager.replay({"input_ids": ids(3)}, 3, **choice)
    lease = manager.stage(3)
    with pytest.raises(error, match="at_least|max_padding"):
        lease.replay(**choice)
    assert lease.open
    with pytest.raises(BusyError):
        manager.replay({}, 3, at_least=8)
    lease.discard()
    assert manager.stats() == before


def test_the_managers_captured_sizes(manager):
    assert [one.num_tokens for one in manager.captured] == [8, 16, 32]
    manager.close_graphs()
    assert manager.captured == ()


def test_a_refusal_tells_the_observer_the_size_that_was_asked_for():
    with InputBufferManager(max_batch_size=1, max_seq_len=64, buckets=[8]) as m:
        m.capture_buckets(tokens_of)
        seen = []
        m.programs["main"].refusal_observer = lambda tokens, program: seen.append(tokens)
        with pytest.raises(BucketOverflowError):
            m.replay({}, 3, at_least=16)
        with pytest.raises(BucketOverflowError):
            m.replay({}, 3, max_padding=2)
        assert seen == [16, 3]
