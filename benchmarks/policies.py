"""What the tier policies' moves cost against LRU's on request streams, and what one decision costs.

A model, not a measurement: no byte is moved. A stream is a sequence of sizes, padded to the buckets of a list; each
bucket has one buffer of `UNIT_BYTES` times its size, and a step uses the buffer of its bucket. Device memory holds a
fraction of the bytes of all buffers that the stream uses. Bringing a buffer in costs a fixed time plus bytes over
bandwidth (`numbabuf.policies.move_seconds`); so does sending one away that was written since it came, and so does
reading one in place that was not admitted. "written" streams write in every step, "read" streams in none. Nothing
overlaps, and no other traffic is on the bus.

With ``--set traces=FOLDER`` the streams are the arrays `num_seqs`, `num_tokens` and `prefill` of its ``stream_*.npz``
files; without it, three seeded generators: mixed lengths, a batch size that drifts, and phases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from numbabuf.tiers.policies import LRU, Frequency, Ghost, Guarded, Policy

from . import harness

UNIT_BYTES = 8192
"""Bytes of a buffer for each unit of its bucket's size: a token's 4,096 half-precision activations."""
BUDGETS = (0.1, 0.25, 0.5)
POLICIES: dict[str, Callable[[int], Policy]] = {
    "lru": lambda budget: LRU(),
    "frequency, order alone": lambda budget: Frequency(admission=False),
    "frequency": lambda budget: Frequency(),
    "guarded, order alone": lambda budget: Guarded(budget, (LRU(), Frequency(admission=False))),
    "guarded": Guarded,
}
"""`policy="frequency"` of a pool is "guarded" here."""


class Device(Ghost):
    """The modelled device memory: asks the policy for the order at each miss, as a pool does; `Guarded` changes it."""

    def in_order(self) -> Iterator[int]:
        """Yield the keys held, coldest first."""
        return iter(sorted(self._held, key=lambda key: (self.policy.order.ranks.get(key, -np.inf), key)))


def bucket_lists(largest: int) -> dict[str, np.ndarray]:
    """Two lists of padded sizes up to `largest`: steps of a tenth, and 64 equal steps."""
    growing = [1]
    while growing[-1] < largest:
        growing.append(max(growing[-1] + 1, int(np.ceil(growing[-1] * 1.1))))
    growing[-1] = largest
    step = max(1, largest // 64)
    return {"x1.1": np.unique(growing), "equal": np.unique([*range(step, largest, step), largest])}


def generated(steps: int, seed: int = 0) -> Iterator[tuple[str, str, np.ndarray]]:
    """Three streams of `steps` sizes each: (source, name, sizes)."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(6, 1.2, steps), 1, 8192).astype(int)
    drift = np.clip(64 + np.cumsum(rng.integers(-1, 2, steps)), 1, 256)
    phase = np.repeat(rng.integers(1, 32, steps // 500 + 1), 500)[:steps]
    phases = np.clip(rng.poisson(phase * 16), 1, 2048)
    for name, sizes in (("lengths", lengths), ("drift", drift), ("phases", phases)):
        yield "generator", name, sizes


def from_traces(folder: str, steps: int) -> Iterator[tuple[str, str, np.ndarray]]:
    """The streams of a folder, `steps` sizes of each at most."""
    paths = sorted(Path(folder).glob("stream_*.npz"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no stream_*.npz: leave traces out to use the generator")
    for path in paths:
        with np.load(path) as arrays:
            for name in ("num_seqs", "num_tokens", "prefill"):
                yield path.stem.removeprefix("stream_"), name, arrays[name][:steps]


def cases(streams: Iterator[tuple[str, str, np.ndarray]]) -> Iterator[dict[str, Any]]:
    """Each stream with each bucket list, budget and way of use, and each policy's seconds of moves."""
    for source, name, sizes in streams:
        for listed, buckets in bucket_lists(int(sizes.max())).items():
            keys = np.searchsorted(buckets, sizes).tolist()
            nbytes = (buckets * UNIT_BYTES).tolist()
            total = sum(nbytes[key] for key in set(keys))
            for fraction in BUDGETS:
                for write in (True, False):
                    budget = int(fraction * total)
                    seconds = {}
                    for policy, make in POLICIES.items():
                        device = Device(make(budget), budget)
                        for key in keys:
                            device.use(key, nbytes[key], write=write)
                        seconds[policy] = device.seconds
                    yield {
                        "source": source, "stream": name, "buckets": listed, "budget": fraction,
                        "use": "written" if write else "read", "seconds": seconds,
                    }  # fmt: skip


def summarise(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds of moves relative to LRU's: over all cases together, and of single cases; by use, stream and budget."""
    groups: dict[str, list[dict[str, Any]]] = {"all": found}
    for field in ("use", "stream", "budget"):
        for case in found:
            groups.setdefault(f"{field}: {case[field]}", []).append(case)
    rows = []
    for group, members in groups.items():
        seconds = {policy: np.array([case["seconds"][policy] for case in members]) for policy in POLICIES}
        for policy in list(POLICIES)[1:]:
            ratios = seconds[policy] / seconds["lru"]
            rows.append(
                {
                    "cases": group,
                    "policy": policy,
                    "count": len(members),
                    "total": float(seconds[policy].sum() / seconds["lru"].sum()),
                    "median": float(np.median(ratios)),
                    "best": float(ratios.min()),
                    "worst": float(ratios.max()),
                }
            )
    return rows


def decisions(entries: int, repeats: int) -> list[dict[str, Any]]:
    """Host time of one decision among `entries`, of which the device holds a quarter: a use, and the victims for it."""
    rng = np.random.default_rng(0)
    nbytes = (rng.integers(1, 2048, entries) * UNIT_BYTES).tolist()
    keys = rng.integers(0, entries, 4 * entries).tolist()
    rows = []
    for name, make in POLICIES.items():
        budget = sum(nbytes) // 4
        device = Device(make(budget), budget)
        for key in keys:
            device.use(key, nbytes[key])
        uses = iter(keys * (repeats // len(keys) + 1) + keys)

        def decide(device: Device = device, uses: Iterator[int] = uses) -> None:
            key = next(uses)
            device.use(key, nbytes[key])

        timing = harness.measure(decide, repeats=repeats, warmup=20)
        rows.append(harness.row(f"{name}, {entries} entries", timing))
    return rows


def run(smoke: bool, *, traces: str | None = None, steps: int | None = None) -> dict[str, Any]:
    """Run every case, and time decisions.

    Parameters
    ----------
    smoke
        300 steps of each stream instead of 20,000.
    traces
        Folder with ``stream_*.npz``; None for the generators.
    steps
        Steps of each stream.
    """
    steps = steps or (300 if smoke else 20_000)
    found = list(cases(generated(steps) if traces is None else from_traces(str(traces), steps)))
    rows = [row for entries in (256, 4096) for row in decisions(entries, 50 if smoke else 5000)]
    return {
        "streams": "generator, seed 0" if traces is None else "request streams made from public traces",
        "steps": steps,
        "summary": summarise(found),
        "cases": found,
        "decisions": rows,
    }


def table(result: dict[str, Any]) -> str:
    """Moves relative to LRU's (below 1 is better), then the cost of a decision."""
    return "\n".join(
        [
            f"seconds of moves relative to LRU's; {result['streams']}, at most {result['steps']} steps each",
            harness.render(result["summary"]),
            "",
            "one decision: a use told to the policy, and the victims of it if it has any",
            harness.render(result["decisions"]),
        ]
    )
