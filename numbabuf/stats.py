"""Statistics of pools and managers: the public name of `pool.stats` and `step.stats`."""

from .pool.stats import *  # noqa: F403
from .step.stats import *  # noqa: F403
