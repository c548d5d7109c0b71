"""Which of the two backends this process runs; fixed when numba is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from numba.core import config

if TYPE_CHECKING:
    from .backend import Backend

__all__ = ["SIM", "backend"]

SIM = bool(config.ENABLE_CUDASIM)
"""Whether Numba's simulator runs the kernels (NUMBA_ENABLE_CUDASIM=1)."""

backend: Backend
if SIM:
    from . import simulator

    backend = simulator
else:
    from . import driver

    backend = driver
