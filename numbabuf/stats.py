"""Statistics of pools and managers: the public name of the rooms' `stats`."""

from .pool.stats import *  # noqa: F403
from .predict.stats import *  # noqa: F403
from .step.stats import *  # noqa: F403
from .tiers.stats import *  # noqa: F403
