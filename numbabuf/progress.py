"""A progress bar for the few operations that take seconds: tqdm where it is installed, plain lines where it is not.

Knows nothing of buffers. Imports nothing of numbabuf.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

__all__ = ["track"]

T = TypeVar("T")


def track(items: Iterable[T], *, total: int, label: str, enabled: bool, note: Callable[[T], str] = str) -> Iterator[T]:
    """Yield `items`, showing on standard error how far it is.

    Parameters
    ----------
    items
        What to go through.
    total
        How many there are.
    label
        What is being done.
    enabled
        Shows nothing when false.
    note
        Says of an item what to show beside the bar while it is worked on.
    """
    if not enabled:
        yield from items
        return
    try:
        from tqdm import tqdm
    except ImportError:
        for done, item in enumerate(items):
            print(f"{label}: {done}/{total} {note(item)}", file=sys.stderr)
            yield item
        print(f"{label}: {total}/{total}", file=sys.stderr)
        return
    with tqdm(items, total=total, desc=label) as bar:
        for item in bar:
            bar.set_postfix_str(note(item))
            yield item
