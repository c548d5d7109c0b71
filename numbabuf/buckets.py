"""Choice of buckets: the public name of `numbabuf.demand.buckets`."""

from .demand.buckets import *  # noqa: F403
