"""A small Numba pipeline for `numbabuf replay`, and its NumPy twin that every result is checked against.

Three kernels a step: gather embedding rows, add them up per sequence, score each sequence. They read every
live length from staged arrays, never from scalars, which a graph would freeze. Knows arrays and streams
alone, no manager; it sits below `_cuda` and above `cli`, and a user's own pipeline looks just like it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .._cuda import configure, cuda, launch_shape

if TYPE_CHECKING:
    from .._cuda import DeviceArray, NumbaStream
    from ..step.graph import Step

__all__ = ["Pipeline"]


@cuda.jit
def _embed(ids: np.ndarray, positions: np.ndarray, table: np.ndarray, hidden: np.ndarray) -> None:
    """hidden[t, d] = table[ids[t], d] + positions[t] % 8; reads and writes 4 bytes an element.

    Padded tokens are embedded like any other: the pad is a valid id, and no sequence reads the result.
    """
    dim = table.shape[1]
    for i in range(cuda.grid(1), ids.size * dim, cuda.gridsize(1)):
        t = i // dim
        d = i - t * dim
        hidden[t, d] = table[ids[t], d] + (positions[t] & 7)


@cuda.jit
def _pool(hidden: np.ndarray, token_index: np.ndarray, starts: np.ndarray, pooled: np.ndarray) -> None:
    """pooled[s, d] = sum of hidden[t, d] over the tokens of sequence s; reads 4 bytes a token and column.

    A step may come in pieces, in order: each adds the tokens that it holds to the sums of those before it.
    A padded sequence is an empty range, because the starts are padded with their last value.
    """
    begin = token_index[0]
    end = begin + token_index.size
    dim = pooled.shape[1]
    for i in range(cuda.grid(1), (starts.size - 1) * dim, cuda.gridsize(1)):
        s = i // dim
        d = i - s * dim
        total = pooled[s, d] if begin > 0 else 0.0
        for t in range(max(begin, starts[s]), min(end, starts[s + 1])):
            total += hidden[t - begin, d]
        pooled[s, d] = total


@cuda.jit
def _score(pooled: np.ndarray, starts: np.ndarray, weights: np.ndarray, scores: np.ndarray) -> None:
    """scores[s] = weighted sum of pooled[s] over the tokens of s; 0 where it has none."""
    for s in range(cuda.grid(1), scores.size, cuda.gridsize(1)):
        value = 0.0
        tokens = starts[s + 1] - starts[s]
        if tokens > 0:
            for d in range(weights.size):
                value += pooled[s, d] * weights[d]
            value = value / tokens
        scores[s] = value


class Pipeline:
    """Embedding gather, per-sequence sum, score, over device arrays that it owns.

    Parameters
    ----------
    vocab, dim : int
        Rows and columns of the embedding table.
    max_tokens, max_seqs : int
        Largest step, padding included.
    seed : int

    Notes
    -----
    Results are checked bit for bit. Table and weights are whole numbers up to 64, so every product and every
    sum is a whole number far below 2**53, exact in float64 in any order, fused or not; the one division at
    the end is correctly rounded by IEEE 754 on the host and on the device.

    Streams: the constructor copies on the default stream and waits for it.
    """

    def __init__(self, *, vocab: int, dim: int, max_tokens: int, max_seqs: int, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.table = random.integers(-64, 65, (vocab, dim)).astype(np.float32)  # [vocab, dim]
        self.weights = random.integers(-64, 65, dim).astype(np.float64)  # [dim]
        self._table = cuda.to_device(self.table)
        self._weights = cuda.to_device(self.weights)
        self._hidden = cuda.device_array((max_tokens, dim), np.float32)
        self._pooled = cuda.device_array((max_seqs, dim), np.float64)
        cuda.synchronize()  # a copy from pageable memory may return before it has arrived on the device

    def __call__(self, step: Step) -> None:
        """Launch one step's kernels on ``step.stream``; the function to give to `capture_buckets`.

        Parameters
        ----------
        step
            The capture context: a stream, the slots ``input_ids``, ``positions``, ``token_index``, ``seq_starts`` and
            the output ``scores``, float64, one for each sequence.
        """
        self.launch(step, step.stream)

    def launch(self, slots: Step | Mapping[str, DeviceArray], stream: NumbaStream) -> None:
        """Launch the kernels over the device arrays in `slots` (name to array) on a Numba stream."""
        ids, starts = slots["input_ids"], slots["seq_starts"]
        dim = self.table.shape[1]
        embed = configure(_embed, *launch_shape(ids.size * dim), stream)
        pool = configure(_pool, *launch_shape((starts.size - 1) * dim), stream)
        scores = slots["scores"]
        score = configure(_score, *launch_shape(scores.size), stream)
        embed(ids, slots["positions"], self._table, self._hidden)
        pool(self._hidden, slots["token_index"], starts, self._pooled)
        score(self._pooled, starts, self._weights, scores)

    def expected(self, inputs: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float64]:
        """Return what NumPy finds for the live inputs of one step: the scores, shape (sequences,)."""
        starts = inputs["seq_starts"]
        hidden = self.table[inputs["input_ids"]] + (inputs["positions"] & 7)[:, None].astype(np.float32)
        sums = np.zeros((len(hidden) + 1, hidden.shape[1]))
        np.cumsum(hidden, axis=0, dtype=np.float64, out=sums[1:])  # exact, so a difference of sums is a sum
        pooled = sums[starts[1:]] - sums[starts[:-1]]
        scores: NDArray[np.float64] = pooled @ self.weights / np.diff(starts)
        return scores
