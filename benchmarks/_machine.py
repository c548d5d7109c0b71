"""What the machine itself does, measured in the run that compares with it, and the times that follow from it.

The copy engine moves one large block within the device, to it and from it: bytes over time are the bandwidths of its
memory and of the bus. A kernel that does nothing, many times in one graph, gives the price of being launched at all.
A prediction takes these and the bytes of a piece of work, and nothing else: how far a measured time lies above it is
what the work wastes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from numbabuf import _cuda
from numbabuf._cuda import cuda

from . import harness


@cuda.jit
def _nothing(words: np.ndarray) -> None:
    if words.size == 0:
        words[0] = 0


@dataclass(frozen=True)
class Machine:
    """Bandwidths in GB/s (1e9 bytes), as the copy engine reaches them, and the least time of a kernel in a graph."""

    device_GB_per_s: float
    """Bytes read and bytes written in device memory, together."""
    up_GB_per_s: float
    """From pinned memory to the device."""
    down_GB_per_s: float
    launch_us: float

    def predict_us(self, *, up: int = 0, down: int = 0, device: int = 0) -> float:
        """Return the least time of work that moves these bytes, in microseconds.

        Parameters
        ----------
        up, down, device : int
            Bytes over the bus to the device and from it, and bytes read and written in device memory. The three go on
            at the same time, so the slowest of them counts.
        """
        rates = (self.up_GB_per_s, self.down_GB_per_s, self.device_GB_per_s)
        return self.launch_us + max(n / rate / 1e3 for n, rate in zip((up, down, device), rates, strict=True))


def measure(smoke: bool) -> Machine:
    """Measure this thread's device; without a GPU the figures are an interpreter's."""
    nbytes = 256 << 20 if harness.on_gpu() and not smoke else 1 << 20
    repeats = 3 if smoke else 20
    stream = _cuda.as_stream(None)
    device, other, pinned = _cuda.empty_device(nbytes), _cuda.empty_device(nbytes), _cuda.empty_pinned(nbytes)
    over_pinned = _cuda.device_view(pinned, 0, (nbytes,), np.dtype(np.uint8))

    def rate(target: Any, source: Any) -> float:
        copy = functools.partial(_cuda.copy, target, source, stream)
        return nbytes / harness.measure_device(copy, stream, repeats=repeats, inner=1).median_us / 1e3

    launch = functools.partial(_cuda.launch, _nothing, 1, 1, stream, other)
    return Machine(
        device_GB_per_s=2 * rate(device, other),
        up_GB_per_s=rate(device, over_pinned),
        down_GB_per_s=rate(over_pinned, device),
        launch_us=harness.measure_device(launch, stream, repeats=repeats).median_us,
    )


def describe(machine: dict[str, float]) -> str:
    """One line for people, of a `Machine` as a dictionary."""
    return (
        f"this machine's copies: {machine['device_GB_per_s']:.1f} GB/s in device memory (read and written), "
        f"{machine['up_GB_per_s']:.1f} up, {machine['down_GB_per_s']:.1f} down; "
        f"an empty kernel in a graph: {machine['launch_us']:.2f} us"
    )
