"""NVTX ranges: the public name of `numbabuf.ext.nvtx`."""

from .ext.nvtx import *  # noqa: F403
