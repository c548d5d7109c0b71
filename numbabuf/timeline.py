"""Timelines of pool events: the public name of `numbabuf.view.timeline`."""

from .view.timeline import *  # noqa: F403
from .view.timeline import __all__ as __all__
