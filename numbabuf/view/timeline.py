"""A pool's remembered events as files that timeline viewers open: Perfetto, and PyTorch's memory_viz.

Reads the structured array that ``pool.events()`` returns and writes plain data; knows no pool and no device. Sits above
`stats`; nothing imports it but people's tools.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ..pool.spec import Tier
from ..pool.stats import EVENT_DTYPE, EventRing

__all__ = ["chrome_trace", "memory_snapshot", "occupancy", "save"]

_TIERS = tuple(Tier)
_LEASES = ("exact_hit", "class_hit", "miss")
_ENDS = ("release", "lost")


class _Event(NamedTuple):
    time_us: float
    kind: str
    tier: int
    address: int
    nbytes: int
    generation: int
    thread: int


def _read(events: np.ndarray) -> Iterator[_Event]:
    """The records as plain Python values, times from the first of them."""
    if getattr(events, "dtype", None) != EVENT_DTYPE:
        raise TypeError(f"events are {type(events).__name__}: give what pool.events() returns (dtype EVENT_DTYPE)")
    start = int(events["time_ns"][0]) if len(events) else 0
    for time_ns, kind, tier, address, nbytes, generation, thread in events.tolist():
        yield _Event((time_ns - start) / 1000, EventRing.KINDS[kind], tier, address, nbytes, generation, thread)


def _before(events: list[_Event], gain: tuple[str, ...], loss: tuple[str, ...]) -> list[int]:
    """Bytes per tier from before the oldest record: as few as keep every sum from going below 0."""
    low, now = [0] * len(_TIERS), [0] * len(_TIERS)
    for event in events:
        now[event.tier] += event.nbytes * ((event.kind in gain) - (event.kind in loss))
        low[event.tier] = min(low[event.tier], now[event.tier])
    return [-amount for amount in low]


def occupancy(events: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return how full each tier was over time.

    Parameters
    ----------
    events
        What ``pool.events()`` returns.

    Returns
    -------
    time_us : array of float64, shape (n,)
        Microseconds since the first event.
    leased, reserved : array of int64, shape (n, 3)
        Bytes after each event, a column per `Tier`.

    Notes
    -----
    What was leased or reserved before the oldest remembered event, and never after, is not known here.
    """
    listed = list(_read(events))
    leased, reserved = _before(listed, _LEASES, _ENDS), _before(listed, ("grow",), ("free",))
    rows: list[tuple[list[int], list[int]]] = []
    for event in listed:
        leased[event.tier] += event.nbytes * ((event.kind in _LEASES) - (event.kind in _ENDS))
        reserved[event.tier] += event.nbytes * ((event.kind == "grow") - (event.kind == "free"))
        rows.append((leased.copy(), reserved.copy()))
    shape = (len(rows), len(_TIERS))
    return (
        np.array([event.time_us for event in listed]),
        np.array([row[0] for row in rows], np.int64).reshape(shape),
        np.array([row[1] for row in rows], np.int64).reshape(shape),
    )


def chrome_trace(events: np.ndarray) -> dict[str, Any]:
    """Return events in the Trace Event Format, which https://ui.perfetto.dev and chrome://tracing open.

    A lease is a slice from allocation to release, on a track of its own below its tier; growth, frees and misses are
    marks on the thread that caused them; leased and reserved bytes of each tier are counters.

    Parameters
    ----------
    events
        What ``pool.events()`` returns.

    Returns
    -------
    trace : dict
        For `json.dump`.

    Raises
    ------
    TypeError
        `events` is another kind of array.
    """
    listed = list(_read(events))
    time_us, leased, reserved = occupancy(events)
    out: list[dict[str, Any]] = [{"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "numbabuf pool"}}]
    open_slices: dict[tuple[int, int], _Event] = {}
    for at, event in enumerate(listed):
        tier = _TIERS[event.tier].value
        key = (event.address, event.generation)
        common = {"pid": 1, "tid": event.thread, "ts": event.time_us}
        if event.kind in _LEASES:
            open_slices[key] = event
        if event.kind in _LEASES or (event.kind in _ENDS and key in open_slices):
            begins = event.kind in _LEASES
            if not begins:
                del open_slices[key]
            out.append({
                **common,
                "ph": "b" if begins else "e",
                "cat": tier,
                "id": f"{event.address:#x}.{event.generation}",
                "name": f"{event.nbytes:,} bytes",
                "args": {"address": f"{event.address:#x}", "lease": event.generation, "how": event.kind},
            })  # fmt: skip
        if event.kind in ("miss", "grow", "free", "lost"):
            name = f"{event.kind} {event.nbytes:,} bytes ({tier})"
            out.append({**common, "ph": "i", "s": "t", "cat": tier, "name": name})
        out.append({
            **common,
            "ph": "C",
            "name": f"{tier} bytes",
            "args": {"leased": int(leased[at, event.tier]), "reserved": int(reserved[at, event.tier])},
        })  # fmt: skip
    for event in open_slices.values():  # still leased: their slices end with the record
        out.append({
            "pid": 1, "tid": event.thread, "ts": float(time_us[-1]), "ph": "e", "cat": _TIERS[event.tier].value,
            "id": f"{event.address:#x}.{event.generation}", "name": f"{event.nbytes:,} bytes",
        })  # fmt: skip
    return {"traceEvents": out, "displayTimeUnit": "ns"}


def memory_snapshot(events: np.ndarray) -> dict[str, Any]:
    """Return events as ``torch.cuda.memory._snapshot()`` gives them, for https://pytorch.org/memory_viz.

    Each tier is shown as a device of its own: 0 device, 1 managed, 2 pinned. A pool's buffer is a segment of one block.

    Parameters
    ----------
    events
        What ``pool.events()`` returns.

    Returns
    -------
    snapshot : dict
        For `pickle.dump`.

    Raises
    ------
    TypeError
        `events` is another kind of array.
    """
    actions = {"grow": "segment_alloc", "free": "segment_free", "lost": "free_completed"}
    actions |= dict.fromkeys(_LEASES, "alloc")
    traces: list[list[dict[str, Any]]] = [[] for _ in _TIERS]
    memory: dict[int, dict[str, Any]] = {}
    for event in _read(events):
        frame = {"filename": "numbabuf", "line": event.generation, "name": f"{event.kind} in thread {event.thread}"}
        entry = {
            "addr": event.address, "size": event.nbytes, "stream": 0, "time_us": round(event.time_us),
            "compile_context": "N/A", "user_metadata": event.kind, "segment_pool_id": (0, 0),
            "frames": [frame],
        }  # fmt: skip
        trace = traces[event.tier]
        if event.kind == "release":
            trace.append({**entry, "action": "free_requested"})
            trace.append({**entry, "action": "free_completed"})
        else:
            trace.append({**entry, "action": actions[event.kind]})
        if event.kind == "free":
            memory.pop(event.address, None)
        else:
            memory[event.address] = {"event": event, "frames": entry["frames"]}
    return {
        "segments": [_segment(**held) for held in memory.values()],
        "device_traces": traces,
        "allocator_settings": {},
        "external_annotations": [],
    }


def _segment(event: _Event, frames: list[dict[str, Any]]) -> dict[str, Any]:
    """The memory that an event was the last about, as it is left."""
    leased = event.nbytes if event.kind in _LEASES else 0
    return {
        "device": event.tier, "address": event.address, "total_size": event.nbytes, "allocated_size": leased,
        "active_size": leased, "requested_size": leased, "stream": 0, "segment_type": "large",
        "segment_pool_id": (0, 0), "is_expandable": False, "frames": frames,
        "blocks": [{
            "address": event.address, "size": event.nbytes, "requested_size": leased, "frames": frames,
            "state": "active_allocated" if leased else "inactive",
        }],
    }  # fmt: skip


def save(path: str | os.PathLike[str], events: np.ndarray) -> None:
    """Write events to a file: ``.json`` for Perfetto, ``.pickle`` for PyTorch's memory_viz.

    Parameters
    ----------
    path
        The suffix says which.
    events
        What ``pool.events()`` returns.

    Raises
    ------
    ValueError
        Another suffix.
    TypeError
        `events` is another kind of array.

    Examples
    --------
    >>> import os, tempfile
    >>> from numbabuf import BufferSpec, SimpleBufferPool
    >>> with SimpleBufferPool(events=100) as pool, tempfile.TemporaryDirectory() as folder:
    ...     pool.allocate(BufferSpec(1024, "uint8")).release()
    ...     save(os.path.join(folder, "pool.json"), pool.events())
    ...     os.listdir(folder)
    ['pool.json']
    """
    suffix = os.path.splitext(path)[1]
    if suffix == ".json":
        data = json.dumps(chrome_trace(events)).encode()
    elif suffix == ".pickle":
        data = pickle.dumps(memory_snapshot(events))
    else:
        raise ValueError(f"{os.fspath(path)!r} ends in {suffix!r}: use .json (Perfetto) or .pickle (memory_viz)")
    with open(path, "wb") as file:
        file.write(data)
