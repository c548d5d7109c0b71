"""What every long-lived object of the package is: closed once, a context manager, never copied, shown in notebooks.

Knows no view: what an object looks like is fetched from `view.show` by name, when a notebook asks for it.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from typing import NoReturn, TypeVar

__all__ = ["Resource", "Shown"]

R = TypeVar("R", bound="Resource")


class Shown:
    """An object with an HTML view in notebooks."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return str(importlib.import_module("numbabuf.view.show").show(self))


class Resource(Shown, ABC):
    """An object that holds memory or graphs until it is closed.

    `close` is idempotent, `closed` says whether it was called, and a ``with`` block calls it at its end.
    """

    __slots__ = ()

    closed: bool

    @abstractmethod
    def close(self) -> None:
        """Give back what is held and refuse further work. Idempotent."""

    def __enter__(self: R) -> R:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} cannot be copied or pickled: what it holds is its own; make another")
