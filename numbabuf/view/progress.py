"""A progress bar for the few operations that take seconds: tqdm where it is installed, a plain counter where it is not.

Writes to standard error. What it shows comes through the callable that `capture_buckets` and `prewarm` take.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..checks import nbytes

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["Bar"]


class Bar:
    """A bar on standard error, given as ``on_progress``; leaving its ``with`` block clears it.

    Where the work ended early, one line says how far it came.

    Parameters
    ----------
    label
        What is being done.

    Examples
    --------
    >>> with Bar("capture") as bar:
    ...     bar(1, 1, {"tokens": 8}, None)
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._done = self._total = 0
        self._shown = 0.0
        self._tqdm: tqdm | None = None

    def __call__(
        self, done: int, total: int, size: Mapping[str, int] | None = None, free_bytes: int | None = None
    ) -> None:
        """Show that `done` of `total` are done, `size` the last of them, with `free_bytes` free on the device.

        A total of 0 is not known.
        """
        self._done, self._total = done, total
        if sys.stderr is None:
            return
        named = ", ".join(f"{axis}={value}" for axis, value in (size or {}).items())
        note = named + (f", {nbytes(free_bytes)} free" if free_bytes else "")
        if self._tqdm is None and not self._open():
            self._count(note)
        elif self._tqdm is not None:
            self._tqdm.update(done - self._tqdm.n)
            if note:
                self._tqdm.set_postfix_str(note)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._tqdm is not None:
            self._tqdm.close()
        if sys.stderr is None:  # print would take stdout
            return
        if self._tqdm is None and self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        if kind is not None or self._done < self._total:
            why = "" if kind is None else f": {kind.__name__}"
            print(f"{self._label}: stopped after {self._done:,} of {self._total:,}{why}", file=sys.stderr)

    def _open(self) -> bool:
        try:
            from tqdm import tqdm
        except ImportError:
            return False
        self._tqdm = tqdm(total=self._total or None, desc=self._label, file=sys.stderr, leave=False)
        return True

    def _count(self, note: str) -> None:
        if time.monotonic() - self._shown < 0.1:  # a terminal shows no more, and writing to it costs
            return
        self._shown = time.monotonic()
        part = f"{self._done:,}/{self._total:,}" if self._total else f"{self._done:,}"
        print(f"\r\x1b[K{self._label} {part} {note}", end="", file=sys.stderr, flush=True)
