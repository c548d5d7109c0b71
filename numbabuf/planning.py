"""Bucket lists compared over a demand: the public name of `numbabuf.demand.compare`."""

from .demand.compare import *  # noqa: F403
from .demand.compare import __all__ as __all__
