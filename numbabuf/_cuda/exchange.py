"""Memory of the CPU as other libraries take it: by DLPack, in NumPy's own words, with its owner kept alive.

What both backends do alike; a GPU's memory is `driver`'s alone.
"""

from __future__ import annotations

import numpy as np


class _Kept:
    """What an exported array's memory belongs to: NumPy keeps this, and with it `owner`, as long as the memory."""

    def __init__(self, array: np.ndarray, owner: object) -> None:
        self.__array_interface__ = array.__array_interface__
        self.owner = owner


def host_exporter(array: np.ndarray, owner: object) -> np.ndarray:
    """Return an array over the memory of `array` that keeps `owner`; bfloat16, which NumPy cannot export, as uint16."""
    return np.asarray(_Kept(array.view(np.uint16) if array.dtype.name == "bfloat16" else array, owner))
