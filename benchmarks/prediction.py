"""Hits of the demand model, padding of planned lists and what a user pays, against exact oracles.

Streams of sizes are replayed step by step, on the host alone. In each step a predictor names at most k
buckets; one that is new is ready `warm_steps` later, one left out is dropped at once, and the bucket just
used exists and costs nothing to keep. A hit is a step whose bucket was named and ready. The oracles are
exact. Streams come from a directory of `stream_<name>.npz` files with arrays `num_seqs`, `num_tokens` (one
entry a step) and `prefill` (one a request); without one, from a seeded generator.
"""

from __future__ import annotations

import argparse
import bisect
import functools
import json
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numba import njit
from numpy.typing import NDArray

from numbabuf.demand import learner
from numbabuf.demand.buckets import Cost, Refitter, padded
from numbabuf.demand.model import DemandModel
from numbabuf.planning import SGLANG, TENSORRT_LLM, VLLM

from . import harness

TRACES = Path(__file__).resolve().parents[2] / "shared" / "traces"
RESULTS = Path(__file__).resolve().parent / "results"

Ints = NDArray[np.int64]


# ------------------------------------------------------------------------------------------------- streams


def served(seed: int, requests: int = 3000) -> dict[str, Ints]:
    """What a small server with continuous batching sees of generated requests.

    Poisson arrivals whose rate swings by half over ten minutes, log-normal prompts and outputs. A step takes
    20 ms and 0.02 ms a token, at most 256 sequences and 2,048 tokens; a prompt may be cut over several steps.
    """
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1.0, requests)
    arrivals = np.zeros(requests)
    at = 0.0
    for i, gap in enumerate(gaps):
        at += gap / (4 * (1 + 0.5 * np.sin(at / 600 * 2 * np.pi)))
        arrivals[i] = at
    prompts = np.clip(rng.lognormal(6, 1.2, requests), 1, 16384).astype(np.int64)
    outputs = np.clip(rng.lognormal(4.5, 1, requests), 1, 2048).astype(np.int64)
    clock, first, waiting = 0.0, 0, deque[list[int]]()
    running = np.zeros(0, np.int64)
    seqs, tokens = [], []
    while first < requests or waiting or running.size:
        if not waiting and not running.size:
            clock = max(clock, arrivals[first])
        while first < requests and arrivals[first] <= clock:
            waiting.append([int(prompts[first]), int(outputs[first])])
            first += 1
        room, started, reading = 2048 - running.size, [], 0
        while waiting and room and running.size + reading < 256:
            taken = min(room, waiting[0][0])
            waiting[0][0] -= taken
            room -= taken
            reading += 1
            if not waiting[0][0]:
                started.append(waiting.popleft()[1])
        seqs.append(running.size + reading)
        tokens.append(2048 - room)
        clock += 0.020 + 0.00002 * tokens[-1]
        running = np.concatenate([running[running > 1] - 1, np.array(started, np.int64)])
    return {"num_seqs": np.array(seqs), "num_tokens": np.array(tokens), "prefill": prompts}


def streams(traces: Path | None, limit: int) -> dict[str, dict[str, Ints]]:
    """Streams by name of trace and kind, at most `limit` entries each; steps from the 4,000th on where so
    many."""
    if traces is None:
        found = {f"generated_{seed}": served(seed) for seed in (1, 2)}
    else:
        files = sorted(Path(traces).glob("stream_*.npz"))
        if not files:
            raise FileNotFoundError(f"no stream_*.npz in {traces}: name another directory, or none for generated ones")
        found = {}
        for file in files:
            with np.load(file, allow_pickle=False) as arrays:
                found[file.stem.removeprefix("stream_")] = {k: arrays[k] for k in ("num_seqs", "num_tokens", "prefill")}
    return {name: {kind: _cut(x, kind, limit) for kind, x in kinds.items()} for name, kinds in found.items()}


def _cut(x: Ints, kind: str, limit: int) -> Ints:
    if kind != "prefill" and len(x) > limit + 4000:
        x = x[4000:]  # a server that starts empty is not what runs all day
    x = x[:limit]
    return x[x > 0].astype(np.int64)


def _every(largest: int) -> Ints:
    return np.arange(1, largest + 1)


def _doublings(per: int) -> Callable[[int], Ints]:
    def grid(largest: int) -> Ints:
        count = per * int(np.ceil(np.log2(max(largest, 2)))) + per
        sizes = np.unique(np.ceil(2 ** (np.arange(count) / per)).astype(np.int64))
        return sizes[: np.searchsorted(sizes, largest) + 1]

    return grid


CASES: dict[str, tuple[str, Callable[[int], Ints], int]] = {
    "decode": ("num_seqs", _every, 8),
    "decode, 20 to warm": ("num_seqs", _every, 20),
    "tokens": ("num_tokens", _doublings(4), 8),
    "prompts": ("prefill", _doublings(4), 1),
    "prompts, powers of two": ("prefill", _doublings(1), 1),
}
"""Name: which stream, its buckets up to a largest size, steps to warm one. A bucket for each size, four
buckets a doubling, or one."""

ROWS = (
    ("decode", 3, "belady", 0.998),
    ("decode", 8, "optimum", 0.988),
    ("decode, 20 to warm", 8, "optimum", None),
    ("tokens", 3, "optimum", 0.952),
    ("tokens", 8, "optimum", 0.963),
    ("prompts", 3, "fixed", 1.15),
    ("prompts, powers of two", 3, "fixed", 1.15),
)
"""Case, k, the oracle that hits are divided by, and the goal for the mean of hits over the mean of the
oracle's."""


# ------------------------------------------------------------------------------------------------- oracles


def optimum(ids: Ints, k: int, warm_steps: int, start: int, *, prefetch: bool = True) -> float:
    """Most hits that any choice could have had, all of the stream known: exact.

    A hit holds a place from the last use, or from as long ahead as a warm-up takes if that is shorter;
    without `prefetch`, from the last use in any case (Belady's rule, with the right to hold nothing). Most
    intervals on k places: by their ends, each on the place that became free last.
    """
    last: dict[int, int] = {}
    free = [-1] * k  # step that each place is taken up to, increasing
    hits = 0
    for t, b in enumerate(ids.tolist()):
        gap = t - last[b] if b in last else None
        last[b] = t
        if prefetch:
            gap = warm_steps + 1 if gap is None else min(gap, warm_steps + 1)
        if gap is None or t - gap + 1 < 0:
            continue
        place = bisect.bisect_left(free, t - gap + 1) - 1
        if place >= 0:
            free.pop(place)
            free.append(t)
            hits += t >= start
    return hits / (len(ids) - start)


def fixed(ids: Ints, k: int, start: int) -> float:
    """Hits of the best set of k buckets that never changes, in hindsight."""
    return float(np.sort(np.bincount(ids[start:]))[::-1][:k].sum() / (len(ids) - start))


@njit
def _segments(x: np.ndarray, below: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:  # pragma: no cover
    """Least padded total of the sizes x in k buckets, exact, and the buckets: the plain recurrence in
    loops."""
    n = len(x)
    best = np.empty((k, n))
    back = np.zeros((k, n), np.int64)
    for j in range(n):
        best[0, j] = x[j] * below[j + 1]
    for q in range(1, k):
        for j in range(n):
            best[q, j] = best[q - 1, j]
            back[q, j] = -1
            for i in range(j):
                value = best[q - 1, i] + x[j] * (below[j + 1] - below[i + 1])
                if value < best[q, j]:
                    best[q, j] = value
                    back[q, j] = i
    return best, back


def hindsight(x: Ints, k: int) -> Ints:
    """The k buckets of least padding for a stream, all of it known: exact."""
    sizes, counts = np.unique(x, return_counts=True)
    _, back = _segments(sizes, np.concatenate([[0], np.cumsum(counts)]), min(k, sizes.size))
    chosen, q, j = [sizes[-1]], min(k, sizes.size) - 1, sizes.size - 1
    while q > 0:
        if back[q, j] >= 0:
            j = back[q, j]
            chosen.append(sizes[j])
        q -= 1
    return np.array(chosen[::-1])


# ----------------------------------------------------------------------------------------------- predictors


class Predictor(Protocol):
    """What is replayed: buckets are numbers from 0."""

    def observe(self, b: int) -> None:
        """Take in the bucket of a step."""

    def forecast(self, k: int) -> Sequence[int]:
        """Name at most k buckets to have ready."""


class Ours:
    """`numbabuf.demand.DemandModel`, through its public face."""

    def __init__(self, grid: Ints, warm_steps: int) -> None:
        self.sizes = grid.tolist()
        self.index = {size: i for i, size in enumerate(self.sizes)}
        self.model = DemandModel(buckets=self.sizes, warm_steps=warm_steps)

    def observe(self, b: int) -> None:
        """Take in the bucket of a step."""
        self.model.observe(self.sizes[b])

    def forecast(self, k: int) -> list[int]:
        """Name at most k buckets to have ready."""
        return [self.index[f.size] for f in self.model.forecast(k)]


class _Baseline:
    def __init__(self, grid: Ints, warm_steps: int) -> None:
        self.m, self.warm_steps, self.t = len(grid), warm_steps, 0
        self.grid = grid
        self.counts = np.zeros(self.m)
        self.set_up()

    def set_up(self) -> None:
        pass

    def most(self, value: Any, k: int) -> list[int]:
        best = np.argsort(-value, kind="stable")[:k]
        return best[value[best] > 0].tolist()


class _Commonest(_Baseline):
    """The k most common of the last 100."""

    def set_up(self) -> None:
        self.last: deque[int] = deque()
        self.count: Counter[int] = Counter()

    def observe(self, b: int) -> None:
        self.last.append(b)
        self.count[b] += 1
        if len(self.last) > 100:
            old = self.last.popleft()
            self.count[old] -= 1
            if not self.count[old]:
                del self.count[old]

    def forecast(self, k: int) -> list[int]:
        return [b for b, _ in self.count.most_common(k)]


class _ThreeCommonest(_Commonest):
    """The 3 most common of the last 100, whatever k is."""

    def forecast(self, k: int) -> list[int]:
        return super().forecast(3)


class _LRU(_Baseline):
    """The k used last."""

    def set_up(self) -> None:
        self.order: OrderedDict[int, None] = OrderedDict()

    def observe(self, b: int) -> None:
        self.order[b] = None
        self.order.move_to_end(b)

    def forecast(self, k: int) -> list[int]:
        return [b for b, _ in zip(reversed(self.order), range(k), strict=False)]


class _LFU(_Baseline):
    """The k used most, ever."""

    def observe(self, b: int) -> None:
        self.counts[b] += 1

    def forecast(self, k: int) -> list[int]:
        return self.most(self.counts, k)


class _Last(_Baseline):
    """The one just used."""

    def observe(self, b: int) -> None:
        self.b = b

    def forecast(self, k: int) -> list[int]:
        return [self.b] if self.t else []


class _Mean(_Baseline):
    """The bucket of the exponentially weighted mean size, and its neighbours in turn."""

    mean: float | None = None

    def observe(self, b: int) -> None:
        size = float(self.grid[b])
        self.mean = size if self.mean is None else 0.8 * self.mean + 0.2 * size

    def forecast(self, k: int) -> list[int]:
        if self.mean is None:
            return []
        b = int(np.searchsorted(self.grid, np.ceil(self.mean)))
        near = sorted(range(max(0, b - k), min(self.m, b + k + 1)), key=lambda i: (abs(i - b), -i))
        return near[:k]


class _Markov(_Baseline):
    """What followed the last bucket most often."""

    ORDER = 1

    def set_up(self) -> None:
        self.after: dict[tuple[int, ...], Any] = {}
        self.past: deque[int] = deque(maxlen=self.ORDER)

    def observe(self, b: int) -> None:
        if len(self.past) == self.ORDER:
            self.after.setdefault(tuple(self.past), np.zeros(self.m))[b] += 1
        self.counts[b] += 1
        self.past.append(b)

    def forecast(self, k: int) -> list[int]:
        value = self.counts / (self.counts.sum() + 1)
        row = self.after.get(tuple(self.past))
        return self.most(value if row is None else value * 1e-3 + row / (row.sum() + 1), k)


class _Markov2(_Markov):
    """What followed the last two buckets most often."""

    ORDER = 2


class _IdleTimes(_Baseline):
    """Each bucket is held from the 5th to the 99th percentile of its own idle times, the latest used first.

    After the hybrid histogram of Shahrad et al., "Serverless in the Wild" (USENIX ATC 2020).
    """

    LONGEST = 1024

    def set_up(self) -> None:
        self.idle = np.zeros((self.m, self.LONGEST + 1))
        self.used = np.full(self.m, -(10**9))
        self.low, self.high = np.zeros(self.m), np.full(self.m, float(self.LONGEST))

    def observe(self, b: int) -> None:
        gap = self.t - self.used[b]
        if gap <= 10**8:
            self.idle[b, min(gap, self.LONGEST)] += 1
            seen = np.cumsum(self.idle[b])
            if seen[-1] >= 5:
                self.low[b], self.high[b] = np.searchsorted(seen, [0.05 * seen[-1], 0.99 * seen[-1]])
        self.used[b] = self.t

    def forecast(self, k: int) -> list[int]:
        age = self.t - self.used
        start = np.where(self.low > self.warm_steps + 1, self.low - self.warm_steps, 0)
        due = np.flatnonzero((age >= start) & (age <= self.high))
        return due[np.argsort(age[due], kind="stable")[:k]].tolist()


class _GreedyDual(_Baseline):
    """Greedy-dual with frequency: the clock at the last use, plus the uses.

    After Fuerst and Sharma, "FaasCache" (ASPLOS 2021), warm-up cost taken proportional to size.
    """

    k = 0

    def set_up(self) -> None:
        self.uses: Counter[int] = Counter()
        self.priority: dict[int, float] = {}
        self.clock = 0.0

    def observe(self, b: int) -> None:
        self.uses[b] += 1
        self.priority[b] = self.clock + self.uses[b]
        while self.k and len(self.priority) > self.k:
            out = min(self.priority, key=self.priority.__getitem__)
            self.clock = self.priority.pop(out)
            self.uses[out] = 0

    def forecast(self, k: int) -> list[int]:
        self.k = k
        return list(self.priority)[:k]


BASELINES = {
    "3 commonest of 100": _ThreeCommonest,
    "commonest of 100": _Commonest,
    "lru": _LRU,
    "lfu": _LFU,
    "last": _Last,
    "mean": _Mean,
    "markov": _Markov,
    "markov2": _Markov2,
    "idle times": _IdleTimes,
    "greedy dual": _GreedyDual,
}


def replay(predictor: Any, ids: Ints, k: int, warm_steps: int, start: int) -> tuple[float, Any]:
    """Return the share of hits from step `start` on, and the seconds of each step's two calls."""
    ready: dict[int, int] = {}  # bucket -> the step it is ready from
    named: list[int] | None = None
    last, hits = -1, 0
    seconds = np.empty(len(ids))
    clock = time.perf_counter
    for t, b in enumerate(ids.tolist()):
        predictor.t = t
        begin = clock()
        chosen = predictor.forecast(k)
        seconds[t] = clock() - begin
        if chosen != named:
            named = chosen
            ready = {c: ready.get(c, t + warm_steps) for c in chosen[:k]}
        if last in ready:
            ready[last] = min(ready[last], t)
        hits += t >= start and ready.get(b, t + 1) <= t
        last = b
        begin = clock()
        predictor.observe(b)
        seconds[t] += clock() - begin
    return hits / (len(ids) - start), seconds


def _buckets(x: Ints, grid: Callable[[int], Ints]) -> tuple[Ints, Ints]:
    """The buckets of a grid that a stream spans, and the number of each step's."""
    sizes = grid(int(x.max()))
    ids = np.searchsorted(sizes, x)
    return sizes[ids.min() : ids.max() + 1], ids - ids.min()


def hit_rows(found: dict[str, dict[str, Ints]]) -> tuple[list[dict[str, Any]], list[float]]:
    """One row for each of `ROWS` and each trace, the oracles and baselines beside our hits; and our seconds a
    step."""
    rows, times = [], []
    for case, k, against, goal in ROWS:
        kind, grid, warm_steps = CASES[case]
        for name, kinds in found.items():
            sizes, ids = _buckets(kinds[kind], grid)
            start = len(ids) // 10
            ours, seconds = replay(Ours(sizes, warm_steps), ids, k, warm_steps, start)
            times.extend(seconds[start:].tolist())
            oracles = {
                "optimum": optimum(ids, k, warm_steps, start),
                "belady": optimum(ids, k, warm_steps, start, prefetch=False),
                "fixed": fixed(ids, k, start),
            }
            others = {n: replay(B(sizes, warm_steps), ids, k, warm_steps, start)[0] for n, B in BASELINES.items()}
            best = max(others, key=others.__getitem__)
            rows.append(
                {"case": case, "k": k, "trace": name, "steps": len(ids), "buckets": len(sizes), "ours": ours}
                | oracles
                | {"against": against, "goal": goal, "best baseline": best, "lead": ours - others[best]}
                | {"baselines": others}
            )
    return rows, times


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of all traces as one: mean of hits over mean of the oracle's, and the least lead over any
    baseline."""
    out = []
    for case, k, against, goal in ROWS:
        some = [row for row in rows if (row["case"], row["k"]) == (case, k)]
        mean = {key: float(np.mean([row[key] for row in some])) for key in ("ours", against)}
        names = some[0]["baselines"]
        best = {name: float(np.mean([row["baselines"][name] for row in some])) for name in names}
        out.append(
            {
                "case": case,
                "k": k,
                "against": against,
                "ratio": mean["ours"] / mean[against],
                "goal": goal,
                "3 commonest of 100": best["3 commonest of 100"] / mean[against],
                "commonest of 100": best["commonest of 100"] / mean[against],
                "best baseline": max(best.values()) / mean[against],
                "least lead": min(row["lead"] for row in some),
            }
        )
    return out


# -------------------------------------------------------------------------------------------------- ablation


ABLATIONS: dict[str, dict[str, Any]] = {
    "all of it": {},
    **{f"without {table}": {"tables": tuple(t for t in learner.TABLES if t != table)} for table in learner.TABLES},
    "equal weights, not learned": {"learn": 0.0},
    "forget over 1/8 window": {"forget": 0.125},
    "forget over 1/2 window": {"forget": 0.5},
    "weights learn 3 times faster": {"learn": 0.003},
    "weights learn 3 times slower": {"learn": 0.0003},
}


def ablation(found: dict[str, dict[str, Ints]]) -> list[dict[str, Any]]:
    """Each variant's ratio in each of `ROWS` (but the longer warm-up), and its lead in thousandths over all
    of it."""
    rows: list[dict[str, Any]] = []
    whole = learner.Learner
    for variant, changes in ABLATIONS.items():
        row: dict[str, Any] = {"variant": variant}
        learner.Learner = functools.partial(whole, **changes)  # type: ignore[misc, assignment]
        try:
            for case, k, against, _ in ROWS:
                kind, grid, warm_steps = CASES[case]
                if warm_steps == 20:
                    continue
                ours, oracle = [], []
                for kinds in found.values():
                    sizes, ids = _buckets(kinds[kind], grid)
                    start = len(ids) // 10
                    ours.append(replay(Ours(sizes, warm_steps), ids, k, warm_steps, start)[0])
                    oracle.append(
                        fixed(ids, k, start)
                        if against == "fixed"
                        else optimum(ids, k, warm_steps, start, prefetch=against == "optimum")
                    )
                row[f"{case} k={k}"] = float(np.mean(ours) / np.mean(oracle))
        finally:
            learner.Learner = whole  # type: ignore[misc]
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------- lists of buckets

CAPTURE_STEPS = 10
"""Steps that a capture takes: vLLM reports 67 captures in over 10 s, and a step of a server takes 20 to 30
ms."""

SECONDS = Cost(step=lambda size: 0.020 + 0.00002 * size, graph=0.15, miss=0.020)
"""A server by the clock: the step of `served`, a capture at vLLM's pace, 20 ms more for a step without a
graph."""


def work(mean: float) -> Cost:
    """The bill in padded work alone: a capture costs `CAPTURE_STEPS` mean steps, a miss one more mean
    step."""
    return Cost(graph=CAPTURE_STEPS * mean, miss=mean)


def follow(x: Ints, k: int, max_size: int, cost: Cost | None = None) -> tuple[Ints, int]:
    """Return the bucket that each step of a stream runs in under a `Refitter`, and the captures made in all.

    New sizes serve when their captures are done, one after the other; until then the old list does.
    """
    refitter = Refitter(k, max_size=max_size, cost=cost)
    ran = np.empty_like(x)
    serving, coming, due = refitter.sizes, refitter.sizes, 0
    for t, size in enumerate(x.tolist()):
        if t >= due:
            serving = coming
        ran[t] = serving[serving.searchsorted(size)]
        before = refitter.captures
        if refitter.observe(size):
            coming, due = refitter.sizes, t + 1 + CAPTURE_STEPS * (refitter.captures - before)
    return ran, refitter.captures


def list_rows(found: dict[str, dict[str, Ints]], k: int = 16) -> list[dict[str, Any]]:
    """Padding at k buckets, and bills at a third of vLLM's default count, for each stream.

    Padding: total of the buckets run in over that of the hindsight plan, after the first tenth of the stream.
    A bill is that of the whole stream, its cold start and every capture included, in padded work and by the
    clock; it is divided by that of the hindsight plan of as many buckets, and of whole default lists (vLLM's
    has 51).
    """
    rows = []
    whole = VLLM.sizes(512)
    third = len(whole) // 3
    for kind, most in (("num_seqs", 256), ("num_tokens", 2048), ("prefill", 0)):
        for name, kinds in found.items():
            x = kinds[kind]
            max_size = most if x.max() <= most else 1 << int(x.max() - 1).bit_length()
            start, price = len(x) // 10, work(float(x.mean()))
            ran, captures = follow(x, k, max_size)
            best = padded(x[start:], hindsight(x[start:], k)).sum()
            early = padded(x[start:], np.union1d(hindsight(x[:start], k), [max_size])).sum()
            after = hindsight(x, third)
            ours, paid = follow(x, third, max_size)
            bill = float(ours.sum()) + price.graph * paid
            timed, timed_paid = follow(x, third, max_size, SECONDS)
            seconds = float(SECONDS.steps(timed).sum()) + SECONDS.graph * timed_paid
            rows.append(
                {
                    "stream": kind,
                    "trace": name,
                    "padding": float(ran[start:].sum() / best),
                    "fitted once": float(early / best),
                    "padding %": 100 * float(ran[start:].sum() / x[start:].sum() - 1),
                    "captures": captures,
                    "work/hindsight": bill / price.bill(x, after),
                    "work/vllm": bill / price.bill(x, whole),
                    "hindsight/vllm": price.bill(x, after) / price.bill(x, whole),
                    "work/sglang": bill / price.bill(x, SGLANG.sizes(512)),
                    "work/trtllm": bill / price.bill(x, TENSORRT_LLM.sizes(2048)),
                    "seconds/hindsight": seconds / SECONDS.bill(x, after),
                    "seconds/vllm": seconds / SECONDS.bill(x, whole),
                }
            )
    return rows


# ------------------------------------------------------------------------------------------------------- run


def run(smoke: bool, *, traces: str | Path | None = None, limit: int | None = None) -> dict[str, Any]:
    """Replay all streams: `limit` entries of each (20,000; 600 for a smoke run), the ablation over 8,000 at
    most."""
    limit = limit or (600 if smoke else 20_000)
    where = Path(traces) if traces is not None else TRACES if TRACES.is_dir() else None
    found = streams(where, limit)
    if smoke:
        found = dict(list(found.items())[:1])
    rows, times = hit_rows(found)
    short = {name: {kind: x[:8000] for kind, x in kinds.items()} for name, kinds in found.items()}
    lists = list_rows(found)
    return {
        "streams": "generated" if where is None else "files",
        "limit": limit,
        "summary": summary(rows),
        "cost": harness.row("observe and forecast", harness.summarise(1e6 * np.array(times))),
        "hits": rows,
        "lists": lists,
        "lists summary": {
            "padding, worst": max(row["padding"] for row in lists),
            "padding, mean": float(np.mean([row["padding"] for row in lists])),
            "work/hindsight, worst": max(row["work/hindsight"] for row in lists),
            "work/vllm, worst": max(row["work/vllm"] for row in lists),
            "work/vllm, mean": float(np.mean([row["work/vllm"] for row in lists])),
            "seconds/hindsight, worst": max(row["seconds/hindsight"] for row in lists),
            "seconds/vllm, worst": max(row["seconds/vllm"] for row in lists),
        },
        "ablation": [] if smoke else ablation(short),
    }


def _parts(result: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Titles and rows of all tables, numbers to four places."""
    parts = [
        ("Hits: mean over traces, over the mean of an oracle's", result["summary"]),
        ("Cost of the model, microseconds of one thread", [result["cost"]]),
        ("Hits, trace by trace", result["hits"]),
        ("Lists of buckets", result["lists"]),
        ("Lists of buckets, over all streams", [result["lists summary"]]),
        ("What each part of the model buys, over 8,000 steps at most", result["ablation"]),
    ]
    leave = ("baselines", "repeats", "ends_in")
    return [
        (title, [{k: _text(v) for k, v in row.items() if k not in leave} for row in rows])
        for title, rows in parts
        if rows
    ]


def _text(value: Any) -> Any:
    return f"{value:.4f}" if isinstance(value, float) else "-" if value is None else value


def table(result: dict[str, Any]) -> str:
    """All parts as text."""
    return "\n\n".join(f"{title}\n{harness.render(rows, list(rows[0]))}" for title, rows in _parts(result))


def markdown(result: dict[str, Any], host: str) -> str:
    """All parts as Markdown tables."""
    text = [
        "# Prediction",
        f"`python -m benchmarks.prediction --json benchmarks/results/prediction.json`, host only, on {host}.",
        "Streams, rules and oracles: the docstrings of `benchmarks/prediction.py`.",
    ]
    for title, rows in _parts(result):
        head = list(rows[0])
        lines = [head, ["---"] * len(head), *([str(row[name]) for name in head] for row in rows)]
        text += [f"## {title}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    return "\n\n".join(text) + "\n"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run by itself, without a device: `python -m benchmarks.prediction`; the results are returned."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prediction", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="one trace, 600 steps")
    parser.add_argument("--traces", type=Path, metavar="DIR", help="directory with stream_<name>.npz files")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results to this file, a table beside it")
    options = parser.parse_args(argv)
    result = run(options.smoke, traces=options.traces)
    print(table(result))
    if options.json:
        host = harness._processor()
        options.json.write_text(json.dumps({"host": host, "results": result}, indent=1) + "\n")
        options.json.with_suffix(".md").write_text(markdown(result, host))
    return result


if __name__ == "__main__":
    main()
