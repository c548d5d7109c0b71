"""Choice of buckets: the public name of `numbabuf.demand.buckets`."""

from .demand.buckets import *  # noqa: F403
from .demand.buckets import __all__ as __all__
