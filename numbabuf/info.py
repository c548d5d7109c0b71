"""What this machine has: the public name of `numbabuf.tools.info`."""

from .tools.info import *  # noqa: F403
from .tools.info import __all__ as __all__
