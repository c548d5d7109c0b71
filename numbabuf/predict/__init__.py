"""Buffers and graphs that are warm before they are needed: `Prewarmer`, `PredictiveBufferManager` and the factory."""

from .budgets import Budgets
from .prewarm import Prewarmer

__all__ = ["Budgets", "Prewarmer"]
