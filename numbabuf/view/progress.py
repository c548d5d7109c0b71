"""A progress bar for the few operations that take seconds: tqdm where it is installed, a plain counter where it is not.

Writes to standard error and knows nothing of buffers. Imports nothing of numbabuf.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

__all__ = ["stopped", "track"]

T = TypeVar("T")


def track(
    items: Iterable[T],
    *,
    label: str,
    enabled: bool,
    total: int | None = None,
    note: Callable[[T], Any] | None = None,
) -> Iterator[T]:
    """Yield `items`, showing on standard error how far it is.

    Parameters
    ----------
    items
        What to go through.
    label
        What is being done.
    enabled
        Shows nothing when false.
    total
        How many there are, where that is known.
    note
        Says of an item what to show beside the bar while it is worked on.
    """
    if not enabled or sys.stderr is None:
        yield from items
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield from _count(items, label, total, note)
        return
    with tqdm(items, total=total, desc=label, file=sys.stderr, leave=False) as bar:
        for item in bar:
            if note is not None:
                bar.set_postfix_str(str(note(item)))
            yield item


def stopped(label: str, done: int, total: int, why: str) -> None:
    """Say on standard error how far an operation came that did not reach its end."""
    if sys.stderr is not None:  # else print would take stdout
        print(f"{label}: stopped after {done:,} of {total:,}: {why}", file=sys.stderr)


def _count(items: Iterable[T], label: str, total: int | None, note: Callable[[T], Any] | None) -> Iterator[T]:
    shown = 0.0
    try:
        for number, item in enumerate(items):
            if time.monotonic() - shown >= 0.1:  # a terminal shows no more, and writing to it costs
                shown = time.monotonic()
                part = f"{number:,}/{total:,}" if total else f"{number:,}"
                about = "" if note is None else note(item)
                print(f"\r\x1b[K{label} {part} {about}", end="", file=sys.stderr, flush=True)
            yield item
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
