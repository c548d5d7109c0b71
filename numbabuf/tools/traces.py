"""Request traces, generated or made by `tracefiles`, and turned into steps.

A trace is either one row a request (`RequestTrace`) or one row a step (`StepTrace`); `trace.steps(...)` gives
both the same form: `Step`s under a limit of tokens and of sequences. NumPy only: this module knows no device,
no slot and no manager. It sits above `steps`, below `tracefiles` and `replay`.
"""

from __future__ import annotations

import math
import operator
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .steps import Step

__all__ = ["RequestTrace", "StepTrace", "Workload"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def _check_limits(max_tokens: int, max_seqs: int) -> tuple[int, int]:
    for name, value in (("max_tokens", max_tokens), ("max_seqs", max_seqs)):
        if operator.index(value) < 1:
            raise ValueError(f"{name} must be at least 1; found {value}: give the most that one step may hold")
    return operator.index(max_tokens), operator.index(max_seqs)


@dataclass(frozen=True, eq=False)
class RequestTrace:
    """Requests in the order of their arrival.

    Attributes
    ----------
    name : str
        Where the trace comes from: a path, or the generator.
    arrival_ms : ndarray of float64, shape (n,)
        Arrival of each request, milliseconds from the first; never decreases.
    prompt : ndarray of int64, shape (n,)
        Tokens of each prompt, at least 1.
    output : ndarray of int64, shape (n,)
        Tokens generated for each request, at least 0.
    reordered : int
        Rows that the file held after a later arrival; they were sorted to their place, equal times in file
        order.
    """

    name: str
    arrival_ms: Floats
    prompt: Ints
    output: Ints
    reordered: int = 0

    kind = "requests"

    def __len__(self) -> int:
        return self.prompt.size

    def steps(self, *, max_tokens: int, max_seqs: int, step_ms: float = 20.0, token_ms: float = 0.02) -> Iterator[Step]:
        """Yield the steps that a server with continuous batching would run for these requests.

        First come, first served, on a clock that a step advances by ``step_ms + token_ms * num_tokens``. Each
        step takes one token of every decoding sequence; the room left goes to the waiting prompts in order,
        and a prompt that does not fit is cut (chunked prefill). A request is done after its prompt and
        `output` decode steps. Times with nothing to do are skipped. Not modelled: preemption, paging, prefix
        caches.

        Parameters
        ----------
        max_tokens, max_seqs : int
            Most tokens, and most sequences, in one step.
        step_ms, token_ms : float
            The clock: fixed time of a step and time of each of its tokens, in milliseconds.

        Yields
        ------
        Step
            Over all of them every token of every request (its prompt and its output) is there exactly once.

        Raises
        ------
        ValueError
            A limit is below 1, or a time is negative.
        """
        max_tokens, max_seqs = _check_limits(max_tokens, max_seqs)
        if not (0 <= step_ms < math.inf and 0 <= token_ms < math.inf):
            raise ValueError(f"step_ms and token_ms must be at least 0; found {step_ms} and {token_ms}")
        return self._steps(max_tokens, max_seqs, step_ms, token_ms)

    def _steps(self, max_tokens: int, max_seqs: int, step_ms: float, token_ms: float) -> Iterator[Step]:
        server = _Server(self)
        while server.busy:
            server.admit()
            step = server.next_step(max_tokens, max_seqs)
            yield step
            server.finish(step, step_ms + token_ms * step.num_tokens)


class _Server:
    """The requests of a trace on a clock: those that decode, those that wait, and those that are still to arrive."""

    def __init__(self, trace: RequestTrace) -> None:
        self._trace = trace
        self._done = np.zeros(len(trace), np.int64)  # tokens of each request that have been processed
        self._total = trace.prompt + trace.output
        self._waiting: deque[int] = deque()  # arrived, prompt not finished; only the first can have been begun
        self._decoding = np.zeros(0, np.int64)
        self._arrived, self._clock = 0, 0.0

    @property
    def busy(self) -> bool:
        """Whether a request is not served to its end."""
        return bool(self._arrived < len(self._trace) or self._waiting or self._decoding.size)

    def admit(self) -> None:
        """Let those wait that have arrived; where there is nothing else to do, the clock goes on to the next."""
        arrival = self._trace.arrival_ms
        if not self._waiting and not self._decoding.size:
            self._clock = max(self._clock, float(arrival[self._arrived]))
        while self._arrived < len(self._trace) and arrival[self._arrived] <= self._clock:
            self._waiting.append(self._arrived)
            self._arrived += 1

    def next_step(self, max_tokens: int, max_seqs: int) -> Step:
        """Return one token of each decoding sequence, and what fits of the waiting prompts."""
        chunks: list[tuple[int, int]] = []
        room, seats = max_tokens - self._decoding.size, max_seqs - self._decoding.size
        while self._waiting and room and seats:
            request = self._waiting[0]
            left = int(self._trace.prompt[request] - self._done[request])
            take = min(room, left)
            chunks.append((request, take))
            room, seats = room - take, seats - 1
            if take < left:
                break
            self._waiting.popleft()
        prefill = np.array(chunks, np.int64).reshape(-1, 2)
        requests = np.concatenate([self._decoding, prefill[:, 0]])
        counts = np.concatenate([np.ones_like(self._decoding), prefill[:, 1]])
        return Step(requests, self._done[requests], counts)

    def finish(self, step: Step, elapsed_ms: float) -> None:
        """Count a step's tokens; it took so long."""
        done, requests = self._done, step.requests
        done[requests] += step.counts
        prompts = self._trace.prompt[requests]
        self._decoding = requests[(done[requests] >= prompts) & (done[requests] < self._total[requests])]
        self._clock += elapsed_ms


@dataclass(frozen=True, eq=False)
class StepTrace:
    """Steps that a server has run: sizes only, no requests.

    Attributes
    ----------
    name : str
        Where the trace comes from.
    num_tokens, num_seqs, decode_seqs : ndarray of int64, shape (n,)
        Tokens, sequences, and sequences of one token (decoding ones) of each step.
    """

    name: str
    num_tokens: Ints
    num_seqs: Ints
    decode_seqs: Ints

    kind = "steps"
    reordered = 0

    def __len__(self) -> int:
        return self.num_tokens.size

    def steps(self, *, max_tokens: int, max_seqs: int) -> Iterator[Step]:
        """Yield the steps of the trace; a step beyond a limit is cut into several, nothing is left out.

        The sequences of a step are the decoding ones, one token each, then the others, which share the rest
        evenly. What came before is not in such a trace, so every sequence is a request of its own that starts
        at position 0.

        Parameters
        ----------
        max_tokens, max_seqs : int
            Most tokens, and most sequences, in one step.

        Raises
        ------
        ValueError
            A limit is below 1.
        """
        max_tokens, max_seqs = _check_limits(max_tokens, max_seqs)
        return self._steps(max_tokens, max_seqs)

    def _steps(self, max_tokens: int, max_seqs: int) -> Iterator[Step]:
        request = 0
        for tokens, seqs, decode in zip(self.num_tokens, self.num_seqs, self.decode_seqs, strict=True):
            counts = np.ones(seqs, np.int64)
            if seqs > decode:
                share, rest = divmod(int(tokens - decode), int(seqs - decode))
                counts[decode:] = share
                counts[decode : decode + rest] += 1
            yield from _cut(request + np.arange(seqs, dtype=np.int64), counts, max_tokens, max_seqs)
            request += int(seqs)


def _cut(requests: Ints, counts: Ints, max_tokens: int, max_seqs: int) -> Iterator[Step]:
    """Yield `counts` in order as steps under the limits, each as full as they allow."""
    first, left = np.zeros_like(counts), counts.copy()
    while left.size:
        ends = np.cumsum(left[:max_seqs])
        whole = int(np.searchsorted(ends, max_tokens, side="right"))  # sequences that fit without a cut
        room = max_tokens - (int(ends[whole - 1]) if whole else 0)
        part = whole < ends.size and room > 0
        take = left[: whole + part].copy()
        if part:
            take[-1] = room
        yield Step(requests[: take.size], first[: take.size].copy(), take)
        first[: take.size] += take
        left[: take.size] -= take
        requests, first, left = requests[whole:], first[whole:], left[whole:]


@dataclass(frozen=True)
class Workload:
    """Parameters of the generator: Poisson arrivals, log-normal lengths.

    Attributes
    ----------
    requests : int
        Requests to generate.
    rate_per_s : float
        Mean arrivals a second.
    prompt_median, output_median : float
        Median length in tokens.
    prompt_sigma, output_sigma : float
        Standard deviation of the logarithm of the length.
    max_tokens : int
        Longer prompts and outputs are cut to this.
    seed : int
        The same seed gives the same trace (as far as NumPy keeps its streams, NEP 19).
    """

    requests: int = 64
    rate_per_s: float = 20.0
    prompt_median: float = 48.0
    prompt_sigma: float = 0.9
    output_median: float = 16.0
    output_sigma: float = 0.7
    max_tokens: int = 2048
    seed: int = 0

    def generate(self) -> RequestTrace:
        """Return the trace of these parameters.

        Raises
        ------
        ValueError
            A parameter is out of its range.

        Examples
        --------
        >>> trace = Workload(requests=3).generate()
        >>> len(trace), float(trace.arrival_ms[0])
        (3, 0.0)
        """
        self._check()
        random = np.random.default_rng(self.seed)
        gaps = random.exponential(1000.0 / self.rate_per_s, self.requests)
        arrival_ms = np.cumsum(gaps) - gaps[0]
        prompt = random.lognormal(math.log(self.prompt_median), self.prompt_sigma, self.requests)
        output = random.lognormal(math.log(self.output_median), self.output_sigma, self.requests)
        lengths = np.clip(np.rint([prompt, output]), 1, self.max_tokens).astype(np.int64)
        return RequestTrace("generator", arrival_ms, lengths[0], lengths[1])

    def _check(self) -> None:
        least = {"requests": 1, "max_tokens": 1, "seed": 0, "prompt_sigma": 0, "output_sigma": 0}
        for name, low in least.items():
            if not low <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least {low}; found {getattr(self, name)}")
        for name in ("rate_per_s", "prompt_median", "output_median"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0; found {getattr(self, name)}")
