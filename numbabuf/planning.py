"""Bucket lists compared over a demand: the public name of `numbabuf.demand.planning`."""

from .demand.planning import *  # noqa: F403
