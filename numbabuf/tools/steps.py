"""A step: what a server computes at once, and the arrays that go in.

NumPy only: knows no trace and no device. Sits above nothing, below `traces`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Step", "token_inputs"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Step:
    """What a server computes at once: some tokens of some sequences, the decoding sequences first.

    Attributes
    ----------
    requests : ndarray of int64, shape (num_seqs,)
        Which request each sequence belongs to (its row in the trace), all different.
    first : ndarray of int64, shape (num_seqs,)
        Position of the sequence's first token of this step within its request.
    counts : ndarray of int64, shape (num_seqs,)
        Tokens of each sequence in this step, at least 1.
    """

    requests: Ints
    first: Ints
    counts: Ints

    @property
    def num_seqs(self) -> int:
        """Sequences in the step."""
        return self.counts.size

    @property
    def num_tokens(self) -> int:
        """Tokens in the step, over all its sequences."""
        return int(self.counts.sum())


def token_inputs(step: Step, *, vocab: int, seed: int = 0) -> dict[str, Ints]:
    """Return the input arrays of one step.

    Traces hold lengths and no text, so a token id is a hash of (seed, request, position): the same token of
    the same request is the same id in every run, however the batcher cut the request up.

    Parameters
    ----------
    step : Step
    vocab : int
        Ids are in [0, vocab).
    seed : int

    Returns
    -------
    dict
        ``input_ids``, ``positions`` and ``token_index``, shape (num_tokens,), and ``seq_starts``, shape
        (num_seqs + 1,), whose entries i and i + 1 bound the tokens of sequence i. The token index is 0, 1, 2,
        ...: where a step is run in pieces, it tells each piece where it begins. All int64.

    Examples
    --------
    >>> step = Step(np.array([7, 9]), np.array([30, 0]), np.array([1, 3]))
    >>> inputs = token_inputs(step, vocab=1000)
    >>> inputs["positions"].tolist(), inputs["seq_starts"].tolist()
    ([30, 0, 1, 2], [0, 1, 4])
    """
    starts = np.zeros(step.num_seqs + 1, np.int64)
    np.cumsum(step.counts, out=starts[1:])
    index = np.arange(starts[-1], dtype=np.int64)
    positions = np.repeat(step.first - starts[:-1], step.counts) + index
    requests = np.repeat(step.requests, step.counts)
    return {
        "input_ids": (_hash(requests, positions, seed) % np.uint64(vocab)).astype(np.int64),
        "positions": positions,
        "token_index": index,
        "seq_starts": starts,
    }


def _hash(a: Ints, b: Ints, seed: int) -> NDArray[np.uint64]:
    """Mix three integers into 64 even bits; all arithmetic wraps modulo 2**64."""
    x = (a.astype(np.uint64) << np.uint64(32)) ^ b.astype(np.uint64)
    x ^= np.uint64(seed * 0x632BE59BD9B4E019 % 2**64)
    for factor in (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93):
        x ^= x >> np.uint64(31)
        x *= np.uint64(factor)
    return x ^ (x >> np.uint64(29))
