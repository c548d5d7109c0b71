"""What `import numbabuf` adds to numba's own import.

Each sample is a fresh interpreter that imports numba first and numbabuf after it, the clock read in between.
A warm-up comes first, so that the files are in the page cache and compiled, as an installed package is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from . import harness

_PROGRAM = """
from time import perf_counter_ns as clock
start = clock()
import numba, numpy
from numba import cuda
middle = clock()
import numbabuf
print(middle - start, clock() - middle)
"""


def _sample_us() -> list[float]:
    """Time of both imports in one fresh interpreter: [numba and numpy, numbabuf]."""
    root = Path(__file__).resolve().parent.parent
    compiling = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], cwd=root, env=compiling, capture_output=True, text=True, check=True
    )
    return [int(nanoseconds) / 1e3 for nanoseconds in done.stdout.split()]


def run(smoke: bool, *, repeats: int | None = None) -> dict[str, Any]:
    """Time the imports in `repeats` fresh interpreters."""
    _sample_us()
    samples_us = np.array([_sample_us() for _ in range(repeats or (2 if smoke else 20))])  # [repeats, 2]
    return {
        "rows": [
            harness.row("numba and numpy", harness.summarise(samples_us[:, 0])),
            harness.row("numbabuf after them", harness.summarise(samples_us[:, 1])),
        ]
    }


def table(result: dict[str, Any]) -> str:
    """The rows as text."""
    return harness.render(result["rows"])
