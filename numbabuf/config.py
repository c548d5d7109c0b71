"""Every NUMBABUF_* environment switch, declared and read in this one place.

A switch is read when the object that it concerns is made, never on a hot path, and an argument given in code always
wins over it. Sits below `errors` only.
"""

from __future__ import annotations

import os
import warnings
from typing import NamedTuple

__all__ = ["SWITCHES", "Switch", "enabled"]


class Switch(NamedTuple):
    """One environment switch: its name, its default and what it does."""

    name: str
    default: bool
    help: str


SWITCHES = (
    Switch("NUMBABUF_DEBUG", False, "remember where each buffer was allocated and released, and say so in errors"),
    Switch(
        "NUMBABUF_RANGE_CHECK",
        True,
        "refuse integers that do not fit a narrower slot before anything is staged (a NumPy reduction each)",
    ),
    Switch("NUMBABUF_NVTX", False, "put NVTX ranges around steps, captures and allocations; read once, at import"),
)
_DEFAULTS = {switch.name: switch.default for switch in SWITCHES}
_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def enabled(name: str, *, or_warn: bool = False) -> bool:
    """Return the value of the switch `name` as the environment has it now.

    Parameters
    ----------
    name
        One of `SWITCHES`.
    or_warn
        Where the variable is set to neither on nor off, warn and return the default: an import must not fail of it.

    Raises
    ------
    ValueError
        The variable is set to something that is neither on nor off.

    Examples
    --------
    >>> enabled("NUMBABUF_RANGE_CHECK")
    True
    """
    default = _DEFAULTS[name]
    word = os.environ.get(name, "").strip().lower()
    if not word:
        return default
    if word not in _WORDS:
        fault = f"{name} is {word!r}; set it to one of {', '.join(_WORDS)}"
        if not or_warn:
            raise ValueError(fault)
        warnings.warn(fault, RuntimeWarning, stacklevel=2)
        return default
    return _WORDS[word]
