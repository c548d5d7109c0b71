"""The way out of a shortage: one rung after the other makes room, the cheapest first, until a request can be served.

Every climb is bounded, every rung taken is counted, and the error at the end tells them all. Sits above `store`, below
`pool`.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from .. import _cuda
from ..errors import TierFullError
from .spec import BufferSpec, Tier
from .stats import OomSteps
from .store import Store

__all__ = ["Ladder", "Rung"]

_T = TypeVar("_T")
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

    def climb(self, spec: BufferSpec, serve: Callable[[], _T], demote: Rung) -> _T:
        """Make room for `spec`, rung by rung, until `serve` succeeds. Called without the lock.

        `on_oom` may have released anything, so all other rungs are taken once more after it.

        Parameters
        ----------
        serve
            Tries to serve the request; where there is no room it raises TierFullError, or what the driver says of
            memory. Tried before the first rung, and after each.
        demote
            What the pool itself can do: sends buffers to other tiers.

        Returns
        -------
        what `serve` returned

        Raises
        ------
        TierFullError
            No rung helped; the text holds the whole account.
        """
        rungs: dict[str, Rung] = {
            "reap": self._reap, "trim": self._trim, "demote": demote, "collect": self._collect, "flush": self._flush,
        }  # fmt: skip
        asks = self._on_oom is not None and not self._asked
        order = [*rungs.items(), *([("callback", self._callback), *rungs.items()] if asks else [])]
        report: list[str] = []
        last = ""
        for name, rung in [("", None), *order]:
            if rung is not None:
                note = rung(spec.tier, max(1, spec.size_bytes))
                if note is None:
                    continue
                report.append(f"{name}: {note}")
                self.counts[name] += 1
            try:
                return serve()
            # No error outlives its handler. One that is kept in a local of a frame that it passed through makes a
            # cycle, error -> traceback -> frame -> error, and whatever those frames hold, the memory of freed blocks
            # among it, then lives until the collector runs: beyond every limit.
            except Exception as error:
                if not _cuda.is_out_of_memory(error):
                    raise
                last = str(error)
        self.counts["failed"] += 1
        raise TierFullError(self._account(spec, report, last))

    def _reap(self, tier: Tier, nbytes: int) -> str:
        with self._store.turns.step("allocate"):
            return "buffers came back" if self._store.reap() else "nothing had finished"

    def _trim(self, tier: Tier, nbytes: int) -> str:
        return f"{self._store.make_room(tier, nbytes)} bytes freed"

    def _collect(self, tier: Tier, nbytes: int) -> str:
        gc.collect()
        with self._store.turns.step("allocate"):
            found = self._store.reap()
        return f"{'lost buffers found, ' if found else ''}{self._trim(tier, nbytes)}"

    def _flush(self, tier: Tier, nbytes: int) -> str:
        self._store.turns.flush()
        return "the frees that Numba had put off are carried out"

    @property
    def _asked(self) -> bool:
        """Whether this thread's `on_oom` is running: it is what asks, and is not asked itself."""
        return getattr(self._within, "asked", False)

    def _callback(self, tier: Tier, nbytes: int) -> str:
        # Without any lock. Two threads, a lock M of the caller's own, and a pool's lock held here:
        #   A: asks for memory, holds the pool's lock, and calls on_oom, which wants M
        #   B: holds M, and releases an entry, which wants the pool's lock
        # Each would wait for the other for ever.
        assert self._on_oom is not None
        self._within.asked = True
        try:
            self._on_oom(nbytes)
        finally:
            self._within.asked = False
        return "on_oom was called"

    def _account(self, spec: BufferSpec, report: list[str], last: str) -> str:
        store, tier = self._store, spec.tier
        with store.lock:
            mine = [block for block in store.blocks if block.tier is tier]
            idle = store.lists.idle_bytes(tier)
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
            f"{last}. Release buffers, ask for less, or raise pool.limits[{tier}]"
        )
