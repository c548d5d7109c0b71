"""Is there more to predict? A far larger model on the same streams, taught with the steps around those it is asked for.

Gradient-boosted trees (LightGBM) get this package's own estimates and some twenty features of the past besides, and
learn from four fifths of the whole stream, blocks before and after each one that they are tested on, which no model in
use could. Their estimates then go through the model's own choice of what to hold ready, by the rules of `prediction`.
Where they win little, what `demand.DemandModel` misses is not in the stream of sizes to be found. That is no bound, and
on some streams the trees do worse. Streams are those of `prediction`, the first 8,000 steps of each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from . import harness, prediction

BLOCK, FOLDS = 500, 5
ROWS = tuple(row for row in prediction.ROWS if not row[0].endswith("20 to warm"))
TREES = 100
SETTINGS = {
    "objective": "binary", "num_leaves": 63, "learning_rate": 0.08, "min_data_in_leaf": 100, "verbose": -1, "seed": 0,
}  # fmt: skip
SAMPLES = 100_000
"""Most rows, a bucket at a step each, that one set of trees learns from."""


@njit
def features(ids: np.ndarray, m: int) -> np.ndarray:  # pragma: no cover
    """What is known of each bucket after each step: [steps, m, 23]."""
    found = np.zeros((len(ids), m, 23), np.float32)
    used = np.full(m, -5000)
    rate = np.zeros((m, 4))
    before = np.zeros(3, np.int64)  # the last buckets that differ from the one that followed
    run = rise = 0
    for t in range(len(ids)):
        b = ids[t]
        run, rise = run + 1, rise + 1
        if t and b != ids[t - 1]:
            before[1:] = before[:-1].copy()
            before[0] = ids[t - 1]
            run = 1
            if b > ids[t - 1]:
                rise = 0
        used[b] = t
        for j, keep in enumerate((0.9, 0.98, 0.995, 0.999)):
            rate[:, j] *= keep
            rate[b, j] += 1 - keep
        rank = np.argsort(np.argsort(-used))
        near, far = ids[max(0, t - 15) : t + 1], ids[max(0, t - 63) : t + 1]
        for i in range(m):
            row = found[t, i]
            row[0], row[1], row[2] = i, b, i - b
            row[3], row[4] = min(t - used[i], 5000), rank[i]
            row[5:9] = rate[i].astype(np.float32)
            for j, lag in enumerate((1, 2, 4, 8, 16)):
                row[9 + j] = b - ids[max(0, t - lag)]
            row[14], row[15] = run, rise
            row[16], row[17], row[18] = i - before[0], i - before[1], i - before[2]
            row[19], row[20], row[21] = near.max() - i, i - near.min(), far.max() - i
            row[22] = t
    return found


def outcomes(ids: NDArray[np.int64], m: int, low: NDArray[Any], high: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each bucket's next use falls into each window of steps (low, high], seen from each step."""
    until = np.full(m, 1 << 30)
    found = np.empty((len(ids), m, len(low)), bool)
    for t in range(len(ids) - 1, -1, -1):
        found[t] = (until[:, None] > low) & (until[:, None] <= high)
        until += 1
        until[ids[t]] = 1
    return found


class Listener(prediction.Ours):
    """The model as it is, its estimates written down."""

    def __init__(self, sizes: NDArray[np.int64], warm_steps: int) -> None:
        super().__init__(sizes, warm_steps)
        self.learner = self.model.learner
        self.estimates: list[NDArray[np.float32]] = []

    def observe(self, b: int) -> None:
        """Take in the bucket of a step."""
        super().observe(b)
        self.estimates.append(self.learner.estimates[(self.learner.t - 1) % self.learner.horizon].copy())


class Told(Listener):
    """The model's choice of what to hold ready, by estimates that somebody else made."""

    told: NDArray[np.float32]

    def observe(self, b: int) -> None:
        """Take in the bucket of a step, and learn nothing."""
        learner = self.learner
        learner.estimates[learner.t % learner.horizon] = self.told[learner.t]
        learner.history.now = b
        learner.t += 1


def trees(past: NDArray[np.float32], outcome: NDArray[np.bool_], horizon: int, count: int) -> NDArray[np.float32]:
    """Estimates for every step, by trees (`count` a window) that saw no outcome which reaches into its block."""
    import lightgbm

    steps, m, columns = past.shape
    rng = np.random.default_rng(0)
    block = np.arange(steps) // BLOCK
    clear = (np.arange(steps) % BLOCK < BLOCK - horizon) & (np.arange(steps) >= 200)
    made = np.empty(outcome.shape, np.float32)
    for fold in range(FOLDS):
        test = block % FOLDS == fold
        learned = np.flatnonzero(~test & clear)
        pick = rng.random((learned.size, m)) < SAMPLES / (learned.size * m)
        rows = past[learned][pick]
        for h in range(outcome.shape[2]):
            data = lightgbm.Dataset(rows, outcome[learned, :, h][pick])
            found = lightgbm.train(SETTINGS, data, count).predict(past[test].reshape(-1, columns))
            made[test, :, h] = np.clip(found.reshape(-1, m), 1e-3, 1 - 1e-3)
    return made


def run(smoke: bool, *, traces: str | Path | None = None, limit: int = 8_000) -> dict[str, Any]:
    """Hits of our estimates and of the trees', for each case and stream; over one stream, cut short, in a smoke run."""
    try:
        import lightgbm
    except ImportError as missing:
        return {"rows": [{"case": "all", "note": f"skipped: {missing}"}]}
    where = Path(traces) if traces is not None else prediction.TRACES if prediction.TRACES.is_dir() else None
    found = prediction.streams(where, 1200 if smoke else limit)
    if smoke:
        found = dict(list(found.items())[:1])
    hits: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for case in dict.fromkeys(row[0] for row in ROWS):
        kind, grid, warm_steps = prediction.CASES[case]
        for kinds in found.values():
            sizes, ids = prediction._buckets(kinds[kind], grid)
            start = len(ids) // 10
            listener = Listener(sizes, warm_steps)
            for b in ids.tolist():
                listener.observe(b)
            estimates = np.clip(np.array(listener.estimates), 1e-4, 1 - 1e-4)
            learner = listener.learner
            low = np.array([0, 0, warm_steps, warm_steps])
            high = np.array([4, learner.horizon, warm_steps + 2, warm_steps + 8])
            past = np.concatenate([features(ids, len(sizes)), np.log(estimates / (1 - estimates))], 2)
            Told.told = trees(past, outcomes(ids, len(sizes), low, high), learner.horizon, 10 if smoke else TREES)
            for _, k, against, _ in (row for row in ROWS if row[0] == case):
                ours, _ = prediction.replay(prediction.Ours(sizes, warm_steps), ids, k, warm_steps, start)
                told, _ = prediction.replay(Told(sizes, warm_steps), ids, k, warm_steps, start)
                oracle = (
                    prediction.fixed(ids, k, start)
                    if against == "fixed"
                    else prediction.optimum(ids, k, warm_steps, start, prefetch=against == "optimum")
                )
                hits.setdefault((case, k), []).append((ours, told, oracle))
    rows: list[dict[str, Any]] = []
    for case, k, against, goal in ROWS:
        ours, told, oracle = np.mean(hits[case, k], 0)
        gain = max(b - a for a, b, _ in hits[case, k])
        rows.append(
            {"case": case, "k": k, "against": against, "ours": ours / oracle, "trees": told / oracle, "goal": goal}
            | {"most the trees gain on a stream": gain}
        )
    return {"lightgbm": lightgbm.__version__, "streams": list(found), "rows": rows}


def table(result: dict[str, Any]) -> str:
    """The rows as text."""
    rows = [{k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in result["rows"]]
    return harness.render(rows, list(rows[0]))
