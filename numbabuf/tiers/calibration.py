"""What was measured of moves on this machine's devices, kept between programs in the user's cache folder.

One small JSON file per device. Without one, the kernel moves everything. Sits above `moves`, below `hierarchy`.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import _cuda
from ..checks import whole_number
from ..pool.block import Block
from ..pool.spec import BufferSpec, Tier
from .mover import BLOCKS, Move, Mover

__all__ = ["Tuning", "calibrate", "path", "recorded"]

SIZES = tuple(1 << n for n in range(16, 27, 2))  # 64 KiB to 64 MiB
COUNTS = (4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Tuning:
    """How a device moves best."""

    blocks: int = BLOCKS
    """Thread blocks of a batch of copies: the fewest that come within 5 % of the fastest."""
    engine_bytes: int | None = None
    """Least size from which the copy engine was faster, at it and at every larger size; None: at no size."""


def path() -> Path:
    """Return the file of this thread's device: in $XDG_CACHE_HOME, or ~/.cache where that is not set."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = re.sub(r"[^A-Za-z0-9]+", "-", _cuda.device_name()).strip("-").lower()
    return Path(folder) / "numbabuf" / f"moves-{name}.json"


def recorded() -> Tuning:
    """Return what was recorded for this thread's device; the defaults where there is nothing, or nothing readable."""
    try:
        found = json.loads(path().read_text())
        tuning = Tuning(blocks=found["blocks"], engine_bytes=found["engine_bytes"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # RuntimeError: no home folder
        return Tuning()
    sizes = (tuning.blocks, 1 if tuning.engine_bytes is None else tuning.engine_bytes)
    return tuning if all(type(size) is int and size > 0 for size in sizes) else Tuning()


def calibrate(
    *,
    sizes: Sequence[int] = SIZES,
    counts: Sequence[int] = COUNTS,
    repeats: int = 20,
    seconds_of: Callable[[Mover, Sequence[Move]], float] | None = None,
) -> Tuning:
    """Measure moves from pinned to device memory and record what is best for this thread's device.

    Parameters
    ----------
    sizes : sequence of int
        Bytes of the moves measured, in any order.
    counts : sequence of int
        Numbers of thread blocks tried, in any order.
    repeats
        Samples of each, of which the least counts.
    seconds_of
        Measures one batch; default: the host's clock from its launch to its end.

    Returns
    -------
    tuning : Tuning
        As recorded in `path()`; pools made from now on use it.

    Raises
    ------
    ValueError, TypeError
        `sizes` or `counts` is empty, or an item of them or `repeats` is not a whole number >= 1.
    TierFullError
        Or the driver's error, if the largest size cannot be allocated in either memory.

    Notes
    -----
    Takes about a second on a GPU. In the simulator the result says nothing, and is not recorded.
    """
    sizes, counts = _whole_numbers("sizes", sizes), _whole_numbers("counts", counts)
    repeats = whole_number("repeats", repeats, least=1)
    measure = seconds_of or _seconds_of
    source, target = (Block(BufferSpec(max(sizes), "uint8", tier), max(sizes)) for tier in (Tier.PINNED, Tier.DEVICE))

    def best(size: int, **options: Any) -> float:
        mover = Mover(**options)
        moves = [Move(source, target, size)]
        measure(mover, moves)  # compiles the kernel, makes stream and table
        return min(measure(mover, moves) for _ in range(repeats))

    by_count = {count: best(sizes[-1], blocks=count) for count in counts}
    fewest = next(count for count in counts if by_count[count] <= 1.05 * min(by_count.values()))
    engine: int | None = None
    for size in reversed(sizes):
        if best(size, blocks=fewest, engine_bytes=1) >= best(size, blocks=fewest):
            break
        engine = size
    tuning = Tuning(fewest, engine)
    if not _cuda.SIM:
        file = path()
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(asdict(tuning)) + "\n")
        partial.replace(file)  # at once: another program never reads half a file
    return tuning


def _whole_numbers(name: str, values: Iterable[int]) -> list[int]:
    """Return whole numbers >= 1, increasing, or say which of them is none."""
    found = sorted({whole_number(f"{name}[{i}]", value, least=1) for i, value in enumerate(values)})
    if not found:
        raise ValueError(f"{name} is empty: give at least one whole number >= 1, or leave it out")
    return found


def _seconds_of(mover: Mover, moves: Sequence[Move]) -> float:
    start = time.perf_counter()
    mover.run(moves).synchronize()
    return time.perf_counter() - start
