"""Statistics of pools and managers: the public name of the rooms' `stats`."""

from .pool.stats import *  # noqa: F403
from .pool.stats import __all__ as _pool
from .predict.stats import *  # noqa: F403
from .predict.stats import __all__ as _predict
from .step.stats import *  # noqa: F403
from .step.stats import __all__ as _step
from .tiers.stats import *  # noqa: F403
from .tiers.stats import __all__ as _tiers

__all__ = [*_pool, *_predict, *_step, *_tiers]
