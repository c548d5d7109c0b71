"""Pictures of demand, memory and steps: the public name of `numbabuf.view.plots`."""

from .view.plots import *  # noqa: F403
from .view.plots import __all__ as __all__
