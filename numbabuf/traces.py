"""Traces of requests and steps: the public name of `steps`, `traces` and `tracefiles` of `numbabuf.tools`."""

from .tools.steps import *  # noqa: F403
from .tools.steps import __all__ as _steps
from .tools.tracefiles import *  # noqa: F403
from .tools.tracefiles import __all__ as _tracefiles
from .tools.traces import *  # noqa: F403
from .tools.traces import __all__ as _traces

__all__ = [*_steps, *_tracefiles, *_traces]
