"""What this machine has: the public name of `numbabuf.tools.info`."""

from .tools.info import *  # noqa: F403
