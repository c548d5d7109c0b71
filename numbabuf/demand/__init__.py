"""Which sizes will come: the moving-window model and the choice of buckets. NumPy only; knows no pool and no device."""

from .model import DemandModel, Forecast

__all__ = ["DemandModel", "Forecast"]
