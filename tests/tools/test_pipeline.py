"""The demonstration pipeline against its NumPy twin, and the twin against plain Python."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numbabuf._cuda import cuda
from numbabuf.tools.pipeline import Pipeline

VOCAB, DIM, MAX_TOKENS, MAX_SEQS = 50, 4, 24, 5


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline(vocab=VOCAB, dim=DIM, max_tokens=MAX_TOKENS, max_seqs=MAX_SEQS, seed=1)


def step_inputs(lengths, seed):
    """Live inputs of a step whose sequences have these lengths."""
    random = np.random.default_rng(seed)
    tokens = sum(lengths)
    return {
        "input_ids": random.integers(0, VOCAB, tokens),
        "positions": random.integers(0, 100_000, tokens),
        "token_index": np.arange(tokens),
        "seq_starts": np.concatenate([[0], np.cumsum(lengths)]),
    }


def run(pipeline, inputs, *, bucket, seqs=MAX_SEQS):
    """Pad as a manager would, launch, and return the scores of all its sequences, padded ones too."""
    starts = inputs["seq_starts"]
    padded = {
        "input_ids": np.zeros(bucket, np.int64),
        "positions": np.zeros(bucket, np.int64),
        "token_index": np.zeros(bucket, np.int64),
        "seq_starts": np.full(seqs + 1, starts[-1], np.int32),
        "scores": np.full(seqs, np.nan),
    }
    for name, values in inputs.items():
        padded[name][: values.size] = values
    stream = cuda.stream()
    device = {name: cuda.to_device(values) for name, values in padded.items()}
    pipeline.launch(device, stream)
    stream.synchronize()
    return device["scores"].copy_to_host()


def by_hand(pipeline, inputs):
    """The scores in plain Python, with exact integers until the one division."""
    table, weights = pipeline.table.astype(int).tolist(), pipeline.weights.astype(int).tolist()
    starts = inputs["seq_starts"].tolist()
    scores = [0.0] * (len(starts) - 1)
    for s in range(len(starts) - 1):
        total = 0
        for t in range(starts[s], starts[s + 1]):
            token, position = int(inputs["input_ids"][t]), int(inputs["positions"][t])
            total += sum((table[token][d] + position % 8) * weights[d] for d in range(DIM))
        scores[s] = total / (starts[s + 1] - starts[s])
    return scores


step_lengths = st.lists(st.integers(1, MAX_TOKENS), min_size=1, max_size=MAX_SEQS).filter(
    lambda lengths: sum(lengths) <= MAX_TOKENS
)


@settings(max_examples=25)
@given(lengths=step_lengths, seed=st.integers(0, 2**32 - 1))
def test_kernels_equal_numpy_bit_for_bit(pipeline, lengths, seed):
    inputs = step_inputs(lengths, seed)
    expected = pipeline.expected(inputs)
    for bucket, seqs in ((sum(lengths), len(lengths)), (MAX_TOKENS, MAX_SEQS)):
        found = run(pipeline, inputs, bucket=bucket, seqs=seqs)
        assert (found[: len(lengths)] == expected).all() and not found[len(lengths) :].any()


@settings(max_examples=15)
@given(lengths=step_lengths, seed=st.integers(0, 2**32 - 1), width=st.integers(1, MAX_TOKENS))
def test_a_step_in_pieces_gives_the_same(pipeline, lengths, seed, width):
    inputs = step_inputs(lengths, seed)
    for start in range(0, sum(lengths), width):
        piece = {
            name: values if name == "seq_starts" else values[start : start + width] for name, values in inputs.items()
        }
        found = run(pipeline, piece, bucket=width)
    assert (found[: len(lengths)] == pipeline.expected(inputs)).all()


@given(lengths=step_lengths, seed=st.integers(0, 2**32 - 1))
def test_numpy_equals_plain_python(pipeline, lengths, seed):
    inputs = step_inputs(lengths, seed)
    assert pipeline.expected(inputs).tolist() == by_hand(pipeline, inputs)


def test_scores_beyond_the_step_are_zero(pipeline):
    run(pipeline, step_inputs([3, 2, 4, 1, 5], 0), bucket=MAX_TOKENS)
    after = run(pipeline, step_inputs([2], 1), bucket=4)
    assert after[0] != 0 and not after[1:].any()


@pytest.mark.parametrize("name", ["input_ids", "positions", "seq_starts"])
def test_every_input_counts(pipeline, name):
    """A wrong input cannot hide: each of them changes the scores."""
    inputs = step_inputs([3, 4], 5)
    changed = {key: values.copy() for key, values in inputs.items()}
    changed[name][1] += 1
    expected = pipeline.expected(inputs)
    assert (pipeline.expected(changed) != expected).any()
    assert (run(pipeline, changed, bucket=8)[:2] != expected).any()


def test_tables_are_seeded_and_whole():
    one, same, other = (Pipeline(vocab=9, dim=3, max_tokens=4, max_seqs=2, seed=seed) for seed in (1, 1, 2))
    assert (one.table == same.table).all() and (one.weights == same.weights).all()
    assert (one.table != other.table).any()
    for values in (one.table, one.weights):
        assert (values == np.rint(values)).all() and abs(values).max() <= 64
