"""Statistics of pools and managers: the public name of `numbabuf.pool.stats`."""

from .pool.stats import *  # noqa: F403
