"""A progress bar for captures: the public name of `numbabuf.view.progress`."""

from .view.progress import *  # noqa: F403
from .view.progress import __all__ as __all__
