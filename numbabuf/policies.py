"""Policies that choose which buffer leaves a tier: the public name of `numbabuf.tiers.policies`."""

from .tiers.policies import *  # noqa: F403
from .tiers.policies import __all__ as __all__
