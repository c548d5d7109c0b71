"""Traces of requests and steps: the public name of `numbabuf.tools.traces`."""

from .tools.traces import *  # noqa: F403
