"""The way out of a shortage: one rung after the other makes room, the cheapest first, until a request can be served.

Every climb is bounded, every rung taken is counted, and the error at the end tells them all. Sits above `store`, below
`pool`.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

from . import _cuda
from .errors import TierFullError
from .memory import Ticket
from .spec import BufferSpec, Tier
from .stats import OomSteps
from .store import Store

__all__ = ["Ladder", "Rung"]

Rung = Callable[[Tier, int], "str | None"]
"""Makes room for a number of bytes in a tier, as far as it can; returns what it did, or None if it had nothing to do,
which does not count."""


class Ladder:
    """The rungs of one pool, by their names in `stats.OomSteps`.

    Parameters
    ----------
    store
        The pool's memory.
    on_oom
        The user's own rung, the last: called with the number of bytes.

    Attributes
    ----------
    counts : dict of str to int
        How often each rung was taken, and under "failed" how often none helped.
    """

    def __init__(self, store: Store, on_oom: Callable[[int], Any] | None) -> None:
        self.counts = dict.fromkeys(OomSteps.__dataclass_fields__, 0)
        self._store = store
        self._on_oom = on_oom
        self._within = threading.local()

    def climb(self, spec: BufferSpec, stream: Any, demote: Rung) -> tuple[Ticket, str]:
        """Take memory for `spec` from the driver; where there is no room, make some. Called without the lock.

        Parameters
        ----------
        demote
            What the pool itself can do: sends buffers to other tiers.

        Returns
        -------
        ticket, kind
            As of `Store.find`: room may turn out to be an idle buffer.

        Raises
        ------
        TierFullError
            No rung helped; the text holds the whole account.
        """
        store = self._store
        rungs: dict[str, Rung] = {
            "reap": self._reap, "trim": self._trim, "demote": demote, "collect": self._collect, "flush": self._flush,
            "callback": self._callback,
        }  # fmt: skip
        found = store.try_to_grow(spec)
        report: list[str] = []
        for name, rung in rungs.items():
            if isinstance(found, Ticket):
                break
            note = rung(spec.tier, max(1, spec.size_bytes))
            if note is None:
                continue
            report.append(f"{name}: {note}")
            with store.lock:
                self.counts[name] += 1
                ticket, kind = store.find(spec, stream)
            if ticket is not None:
                return ticket, kind
            found = store.try_to_grow(spec)
        if isinstance(found, Ticket):
            return found, "miss"
        with store.lock:
            self.counts["failed"] += 1
        raise TierFullError(self._account(spec, report, found)) from found

    def _reap(self, tier: Tier, nbytes: int) -> str:
        with self._store.lock:
            return "buffers came home" if self._store.settle() else "nothing had finished"

    def _trim(self, tier: Tier, nbytes: int) -> str:
        return f"{self._store.make_room(tier, nbytes)} bytes freed"

    def _collect(self, tier: Tier, nbytes: int) -> str:
        gc.collect()
        with self._store.lock:
            found = self._store.settle()
        return f"{'lost buffers found, ' if found else ''}{self._trim(tier, nbytes)}"

    def _flush(self, tier: Tier, nbytes: int) -> str:
        _cuda.flush_pending_frees()
        return "the frees that Numba had put off are carried out"

    def _callback(self, tier: Tier, nbytes: int) -> str | None:
        if self._on_oom is None or getattr(self._within, "quiet", False):
            return None
        with self.quiet():
            self._on_oom(nbytes)
        return "on_oom was called"

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Leave `on_oom` out of this thread's climbs: it is what asks, or there are other ways to try first."""
        before = getattr(self._within, "quiet", False)
        self._within.quiet = True
        try:
            yield
        finally:
            self._within.quiet = before

    def _account(self, spec: BufferSpec, report: list[str], last: BaseException) -> str:
        store, tier = self._store, spec.tier
        with store.lock:
            mine = [block for block in store.blocks if block.tier is tier]
            idle = sum(ticket.block.nbytes for ticket in store.idle() if ticket.block.tier is tier)
            limit = store.ledger.limit(tier)
        try:
            info = _cuda.memory_info()
        except Exception:  # the account is for reading; an error here must not hide the one it explains
            info = None
        device = f"the device has {info[0]} of {info[1]} bytes free" if info else "the device does not say what is free"
        reserved = sum(block.nbytes for block in mine)
        return (
            f"{spec} asks for {spec.size_bytes} bytes of {tier.value} memory and there is no room. Reserved by this "
            f"pool in this tier: {reserved} bytes in {len(mine)} buffers, of which {idle} idle; limit: "
            f"{'none' if limit is None else f'{limit} bytes'}; {device}. Tried: {'; '.join(report)}. Last error: "
            f"{last}. Release buffers, ask for less, or raise the limit"
        )
