"""The report of a replay: the public name of `numbabuf.view.report`."""

from .view.report import *  # noqa: F403
from .view.report import __all__ as __all__
