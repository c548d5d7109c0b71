"""NVTX ranges: the public name of `numbabuf.ext.nvtx`."""

from .ext.nvtx import *  # noqa: F403
from .ext.nvtx import __all__ as __all__
