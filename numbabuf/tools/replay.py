"""`numbabuf replay`: a trace is driven through a manager, every step is checked against NumPy, and the run is told.

Sits above `pipeline`, `traces` and the room `step`, below `cli`, which imports it when the command is given.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import itertools
import platform
import sys
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _cuda
from ..pool.spec import BufferSpec
from ..step.manager import InputBufferManager
from ..step.returns import Outputs
from ..view.progress import Bar
from ..view.report import thin
from .pipeline import Pipeline
from .steps import Step, token_inputs
from .traces import RequestTrace, StepTrace, Workload

__all__ = ["print_intro", "print_results", "report_of", "run"]

SCHEMA = 1
"""Version of the layout of `--json` files; it grows when a name changes its meaning or goes away."""


def run(args: argparse.Namespace, trace: RequestTrace | StepTrace) -> dict[str, Any]:
    """Replay a trace with the options of the command, and return what goes under "results"."""
    steps = iter(trace.steps(max_tokens=args.max_tokens, max_seqs=args.max_seqs))
    show = not args.quiet and sys.stderr is not None and sys.stderr.isatty()
    with InputBufferManager(
        max_batch_size=1,
        max_seq_len=args.max_tokens,
        buckets=args.buckets,
        overflow=args.overflow,
        ring=args.ring,
    ) as manager:
        driven = _Run(manager, args)
        with Bar("capture") if show else contextlib.nullcontext() as bar:
            capture_s = driven.capture(bar)
        limited = itertools.islice(steps, args.steps or None)
        with Bar("replay") if show else contextlib.nullcontext() as bar:
            driven.drive(limited, args.steps or 0, bar)
        manager.synchronize()
        return driven.results(capture_s, complete=driven.mismatch is None and next(steps, None) is None)


class _Run:
    """The pipeline over a manager, the steps that ran, and the first result that was wrong."""

    def __init__(self, manager: InputBufferManager, args: argparse.Namespace) -> None:
        seqs = BufferSpec(args.max_seqs + 1, "int32")
        manager.register_slot("seq_starts", seqs, axis="seqs+1", pad="repeat_last", index=True, source_dtype="int64")
        manager.register_slot("token_index", BufferSpec(args.max_tokens, "int64"), index=True)
        manager.register_output("scores", BufferSpec(args.max_seqs, "float64"), axis="seqs")
        sizes = {name: getattr(args, name) for name in ("vocab", "dim", "max_tokens", "max_seqs", "seed")}
        self._manager, self._pipeline = manager, Pipeline(**sizes)
        self._vocab, self._seed = args.vocab, args.seed
        self._host_ns: list[int] = []
        self._tokens: list[int] = []
        self._pending: deque[tuple[int, Outputs, NDArray[np.float64]]] = deque()  # in flight: number, scores, expected
        self._in_flight = args.ring
        self.mismatch: dict[str, float] | None = None

    def capture(self, on_progress: Bar | None) -> float:
        """Capture every bucket; return the seconds that it took."""
        begin = time.perf_counter()
        self._manager.capture_buckets(self._pipeline, on_progress=on_progress)
        seconds = time.perf_counter() - begin
        self._manager.synchronize()
        return seconds

    def drive(self, steps: Iterable[Step], total: int, bar: Bar | None) -> None:
        """Run the steps until one is wrong."""
        for number, step in enumerate(steps):
            self._step(number, step)
            if bar is not None:
                bar(number + 1, total)
            if len(self._pending) > self._in_flight:
                self._compare()
            if self.mismatch is not None:
                return
        while self._pending and self.mismatch is None:
            self._compare()

    def _step(self, number: int, step: Step) -> None:
        inputs = token_inputs(step, vocab=self._vocab, seed=self._seed)
        expected = self._pipeline.expected(inputs)
        begin_ns = time.perf_counter_ns()
        outputs = self._manager.replay(inputs, step.num_tokens, seqs=step.num_seqs)
        self._host_ns.append(time.perf_counter_ns() - begin_ns)
        self._pending.append((number, outputs, expected))
        self._tokens.append(step.num_tokens)
        for array in inputs.values():
            array.fill(0)  # the arrays are ours again: were they read later than this, it would show

    def _compare(self) -> None:
        """Wait for the oldest step in flight, and compare its scores bit for bit."""
        number, outputs, expected = self._pending.popleft()
        found = outputs["scores"]
        wrong = found != expected
        if wrong.any():
            at = int(wrong.argmax())
            values = {"expected": float(expected[at]), "found": float(found[at])}
            self.mismatch = {"step": number, "sequence": at, **values}

    def results(self, capture_s: float, *, complete: bool) -> dict[str, Any]:
        """Return the figures of the run."""
        stats = self._manager.stats()
        host_us = np.array(self._host_ns, np.float64) / 1000
        demand = np.unique(np.array(self._tokens, np.int64), return_counts=True)
        return {
            "steps": len(self._host_ns),
            "complete": complete,
            "graphs": stats.graphs,
            "capture_s": capture_s,
            "live_tokens": stats.live_tokens,
            "padded_tokens": stats.padded_tokens,
            "padding_percent": 100 * stats.padding,
            "buckets": {str(bucket): count for bucket, count in stats.buckets.items()},
            "bucket_tokens": {str(bucket): live for bucket, live in stats.bucket_tokens.items()},
            "demand": {str(size): count for size, count in zip(*(part.tolist() for part in demand), strict=True)},
            "tokens_per_step": thin(self._tokens),
            "host_us_per_step": thin(host_us.tolist()),
            "arena_bytes": stats.arena_bytes,
            "ring_bytes": stats.ring_bytes,
            "overflows": stats.overflows,
            "ring_waits": stats.ring_waits,
            "host_us_median": float(np.median(host_us)),
            "host_us_p99": float(np.percentile(host_us, 99)),
            "mismatch": self.mismatch,
        }


def report_of(
    results: dict[str, Any], trace: RequestTrace | StepTrace, generator: Workload | None, parameters: dict[str, Any]
) -> dict[str, Any]:
    """Return what `--json` writes."""
    return {
        "schema": SCHEMA,
        "command": "replay",
        "backend": _cuda.backend(),
        "device": _cuda.device_name(),
        "versions": _versions(),
        "trace": {
            "name": trace.name,
            "kind": trace.kind,
            "rows": len(trace),
            "reordered": trace.reordered,
            "generator": None if generator is None else dataclasses.asdict(generator),
        },
        "parameters": parameters,
        "results": results,
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("numbabuf", "numba", "numba-cuda", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # numba-cuda is optional
            versions[package] = importlib.metadata.version(package)
    return versions


def print_intro(args: argparse.Namespace, trace: RequestTrace | StepTrace, workload: Workload) -> None:
    """Say what is about to run."""
    if args.trace:
        print(f"trace: {trace.name}, {len(trace):,} {trace.kind}")
    else:
        parameters = dataclasses.asdict(workload).items()
        print("trace: generated,", ", ".join(f"{name} {value}" for name, value in parameters))
    if trace.reordered:
        print(f"  {trace.reordered:,} rows arrive earlier than a row before them: sorted by arrival")
    print(f"limits: {args.max_tokens:,} tokens and {args.max_seqs:,} sequences a step")
    print(f"pipeline: embedding {args.vocab:,} x {args.dim}, sum per sequence, score", flush=True)


def print_results(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Print the figures of a run as a table."""
    results = report["results"]
    what = "the same, bit for bit, as NumPy's" if results["mismatch"] is None else "WRONG, see below"
    simulator = report["backend"] == "simulator"
    host = f"median {results['host_us_median']:,.1f} us, p99 {results['host_us_p99']:,.1f} us"
    rows = {
        "backend": "Numba's simulator (results, not speed)" if simulator else f"cuda, {report['device']}",
        "steps": f"{results['steps']:,}, results {what}",
        "graphs": f"{results['graphs']:,}, captured in {results['capture_s']:.2f} s",
        "padding": f"{results['padding_percent']:.1f} % on top of {results['live_tokens']:,} tokens",
        "overflow": f"{results['overflows']:,} steps beyond the largest bucket ({args.overflow})",
        "ring waits": f"{results['ring_waits']:,} with {args.ring} blocks",
        "host per step": host + (", kernels included" if simulator else ""),
    }
    print()
    for name, value in rows.items():
        print(f"{name:<14} {value}")
    print(f"\n{'bucket':>8} {'runs':>8}")
    for bucket, count in sorted(results["buckets"].items(), key=lambda item: int(item[0])):
        print(f"{bucket:>8} {count:>8,}")
    if results["mismatch"] is None and not results["complete"]:
        print(f"\nOnly the first {results['steps']:,} steps were run; --steps 0 runs all.")
