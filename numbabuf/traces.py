"""Traces of requests and steps: the public name of `steps`, `traces` and `tracefiles` of `numbabuf.tools`."""

from .tools.steps import *  # noqa: F403
from .tools.tracefiles import *  # noqa: F403
from .tools.traces import *  # noqa: F403
