"""Which buffers deserve device memory: small policies over one contract, and a cache without memory to judge them by.

A policy knows keys, sizes and the order of uses; it knows no buffers, no tiers and no clock but its own count of uses.
Its caller holds a lock. Pure Python: no device is needed. Sits below `residents`.
"""

from __future__ import annotations

import bisect
import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

__all__ = ["LRU", "POLICIES", "Frequency", "Ghost", "Guarded", "Line", "Policy", "make_policy", "move_seconds"]

HALF_LIFE = 500
"""Uses, of all buffers together, after which one use counts half."""
MOVE_FIXED_S, BYTES_PER_S = 10e-6, 25e9
"""What one move is taken to cost where nothing was measured: a launch, and bytes over a PCIe 4.0 x16 bus. Policies only
compare such costs, so they need the ratio of the two to be of the right order, not the figures."""


def move_seconds(nbytes: int) -> float:
    """Return what moving `nbytes` between host and device is taken to cost, in seconds.

    Examples
    --------
    >>> round(1e6 * move_seconds(25_000_000))
    1010
    """
    return MOVE_FIXED_S + nbytes / BYTES_PER_S


class Policy(ABC):
    """The contract: told of every use, it says what goes first and what may come in.

    A subclass gives each key a rank, higher for what should stay; a rank changes with a use of its key only.

    Parameters
    ----------
    cost : callable
        Seconds that moving a number of bytes costs.

    Attributes
    ----------
    now : int
        Uses so far, of all keys.
    ranks : dict
        Key -> rank, of all keys used so far.
    """

    taken = False
    """Whether a pool has it. Keys are a pool's own, and so is the lock that guards the policy: no other may have it."""

    def __init__(self, cost: Callable[[int], float] = move_seconds) -> None:
        self.cost = cost
        self.now = 0
        self.ranks: dict[int, float] = {}

    @property
    def order(self) -> Policy:
        """The policy whose ranks decide now: this one, where it does not choose among others."""
        return self

    @abstractmethod
    def rank(self, key: int, nbytes: int) -> float:
        """Return the rank of a key that is used now."""

    def touch(self, key: int, nbytes: int, *, write: bool = True) -> None:
        """Take note of a use of `key`, a buffer of `nbytes`; `write` says whether it was written."""
        self.now += 1
        self.ranks[key] = self.rank(key, nbytes)

    def forget(self, key: int) -> None:
        """Drop all that is known of `key`; an unknown key is no error."""
        self.ranks.pop(key, None)

    def resize(self, budget_bytes: int) -> None:  # noqa: B027  # most policies have no use for the budget
        """Take note of another device budget."""

    def admits(self, key: int, victims: Sequence[int]) -> bool:
        """Return whether bringing in `key` is worth sending away `victims`."""
        return True


class Line:
    """The keys of one tier, coldest first by a policy's ranks: a heap from which what is out of date goes late.

    A use raises a rank as a rule, and then nothing is done before the key comes to the front, which puts it back at its
    place. What leaves stays in the heap until it comes to the front, or until half of the heap is such remains.

    Parameters
    ----------
    policy : Policy

    Notes
    -----
    Cost: O(log n) for each key that enters or is taken; O(n) in the step after a policy changed its mind, see
    `Policy.order`.

    Examples
    --------
    >>> policy = LRU()
    >>> line = Line(policy)
    >>> for key in (1, 2, 3, 1):
    ...     line.add(key)
    ...     policy.touch(key, 4096)
    >>> list(line.coldest()), len(line)
    ([2, 3, 1], 3)
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._order = policy.order
        self._ranks: dict[int, float] = {}  # key -> its rank in the heap
        self._heap: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._ranks)

    def __contains__(self, key: int) -> bool:
        return key in self._ranks

    def add(self, key: int) -> None:
        """Let a key in; again is no error."""
        rank = self._ranks[key] = self._rank(key)
        heapq.heappush(self._heap, (rank, key))
        if len(self._heap) > 2 * len(self._ranks) + 16:
            self._renew()

    def discard(self, key: int) -> None:
        """Let a key go; an unknown one is no error."""
        self._ranks.pop(key, None)

    def touched(self, key: int) -> None:
        """Take note that the policy was told of a use of `key`, whose rank may have fallen."""
        before = self._ranks.get(key)
        if before is not None and self._rank(key) < before:
            self.add(key)

    def coldest(self) -> Iterator[int]:
        """Yield the keys, the one to give up first at the start; those never used come before all others.

        Keys may enter and leave meanwhile; nothing else of the kind may run.
        """
        if self._order is not self._policy.order:
            self._renew()
        seen: dict[int, float] = {}
        try:
            while self._heap:
                rank, key = self._heap[0]
                now = self._rank(key)
                if self._ranks.get(key) != rank or key in seen:
                    heapq.heappop(self._heap)
                elif now != rank:
                    self._ranks[key] = now
                    heapq.heapreplace(self._heap, (now, key))
                else:
                    heapq.heappop(self._heap)
                    seen[key] = rank
                    yield key
        finally:
            for key, rank in seen.items():
                if self._ranks.get(key) == rank:
                    heapq.heappush(self._heap, (rank, key))

    def _rank(self, key: int) -> float:
        return self._order.ranks.get(key, -math.inf)

    def _renew(self) -> None:
        self._order = self._policy.order
        self._ranks = {key: self._rank(key) for key in self._ranks}
        self._heap = [(rank, key) for key, rank in self._ranks.items()]
        heapq.heapify(self._heap)


class LRU(Policy):
    """The longest unused goes first, and whatever is used comes in."""

    def rank(self, key: int, nbytes: int) -> float:
        """Return the count of uses."""
        return self.now


class Frequency(Policy):
    """What saves the fewest seconds of moves per byte goes first: decayed number of uses x cost of a move / bytes.

    Parameters
    ----------
    half_life
        Uses of all keys after which one use counts half.
    admission
        Whether a key that saves less than its victims together stays out.

    Notes
    -----
    All counts decay at one rate, so their order stays as it is between uses: the rank is the logarithm of the value as
    it would be at use 0, and nothing has to be recomputed as time goes on.
    """

    def __init__(
        self, half_life: float = HALF_LIFE, *, admission: bool = True, cost: Callable[[int], float] = move_seconds
    ) -> None:
        super().__init__(cost)
        self.half_life = half_life
        self.admission = admission
        self._uses: dict[int, tuple[float, int, float]] = {}  # key -> (decayed uses, at which use, cost of a move)

    def rank(self, key: int, nbytes: int) -> float:
        """Count the use; return the logarithm of the key's value per byte."""
        uses, then, _ = self._uses.get(key, (0.0, 0, 0.0))
        uses = 1.0 + uses * 2.0 ** ((then - self.now) / self.half_life)
        cost = self.cost(nbytes)
        self._uses[key] = uses, self.now, cost
        return math.log2(uses * cost / max(1, nbytes)) + self.now / self.half_life

    def worth(self, key: int) -> float:
        """Return the key's decayed uses times the cost of moving it; 0 for one that was never used."""
        uses, then, cost = self._uses.get(key, (0.0, 0, 0.0))
        return uses * cost * 2.0 ** ((then - self.now) / self.half_life)

    def admits(self, key: int, victims: Sequence[int]) -> bool:
        """Return whether the key is worth more than its victims together."""
        return not self.admission or self.worth(key) > sum(map(self.worth, victims))

    def forget(self, key: int) -> None:
        """Drop all that is known of `key`."""
        super().forget(key)
        self._uses.pop(key, None)


class Ghost:
    """A cache without memory: which keys a policy would hold within a budget, and what its moves would cost.

    Parameters
    ----------
    policy : Policy
        Its own; the ghost tells it of every use.
    budget_bytes
        What the keys held may have together.

    Attributes
    ----------
    seconds : float
        Cost of all moves so far. Coming in costs a move; so does a use from outside the cache, which reads the same
        bytes in place over the same bus; going costs a move if the key was written since it came, else nothing.
    """

    def __init__(self, policy: Policy, budget_bytes: int) -> None:
        self.policy = policy
        self.free_bytes = self.budget_bytes = budget_bytes
        self.seconds = 0.0
        self._held: dict[int, tuple[int, bool, float]] = {}  # key -> (bytes, written since it came, rank)
        self._line: list[tuple[float, int]] = []  # (rank, key) of the held, coldest first

    def use(self, key: int, nbytes: int, *, write: bool = True) -> float:
        """Use a key, let the policy decide, and return what that cost, in seconds.

        Notes
        -----
        Cost: O(log n) for n keys held, and a move of 8 n bytes.
        """
        self.policy.touch(key, nbytes, write=write)
        seconds = 0.0
        if key in self._held:
            _, written = self._leave(key)
            self._enter(key, nbytes, write or written)
        else:
            seconds = self.policy.cost(nbytes)
            victims = self._victims(nbytes)
            if nbytes <= self.budget_bytes and (not victims or self.policy.admits(key, victims)):
                for nbytes_out, written in map(self._leave, victims):
                    seconds += self.policy.cost(nbytes_out) if written else 0.0
                self._enter(key, nbytes, write)
        self.seconds += seconds
        return seconds

    def forget(self, key: int) -> None:
        """Let a key go, at no cost."""
        if key in self._held:
            self._leave(key)
        self.policy.forget(key)

    def resize(self, budget_bytes: int) -> None:
        """Change the budget; what does not fit it any more goes, coldest first, at no cost."""
        self.free_bytes += budget_bytes - self.budget_bytes
        self.budget_bytes = budget_bytes
        while self.free_bytes < 0:
            self._leave(self._line[0][1])

    def _victims(self, nbytes: int) -> list[int]:
        victims: list[int] = []
        missing = nbytes - self.free_bytes
        for key in self.in_order() if missing > 0 else ():
            victims.append(key)
            missing -= self._held[key][0]
            if missing <= 0:
                break
        return victims

    def in_order(self) -> Iterator[int]:
        """Yield the keys held, coldest first."""
        return (key for _, key in self._line)

    def _enter(self, key: int, nbytes: int, written: bool) -> None:
        rank = self.policy.ranks.get(key, 0.0)
        self._held[key] = nbytes, written, rank
        bisect.insort(self._line, (rank, key))
        self.free_bytes -= nbytes

    def _leave(self, key: int) -> tuple[int, bool]:
        nbytes, written, rank = self._held.pop(key)
        del self._line[bisect.bisect_left(self._line, (rank, key))]
        self.free_bytes += nbytes
        return nbytes, written


class Guarded(Policy):
    """Frequency with admission, unless plain recency would have cost less lately.

    Frequency is much the better where demand is mixed, and much the worse where it drifts, as a batch size does: it
    clings to the sizes of the past. Both are run as ghosts, which costs no memory and no moves, and the one whose moves
    have cost less lately decides; on a tie, as in the beginning, recency.

    Parameters
    ----------
    budget_bytes
        Bytes the ghosts may hold: the device budget.
    policies : sequence of Policy
        What to choose from, the first preferred on a tie. Default: `LRU` and `Frequency`.
    half_life
        Uses after which a move counts half, and that of the default `Frequency`.
    """

    def __init__(
        self, budget_bytes: int, policies: Sequence[Policy] | None = None, *, half_life: float = HALF_LIFE
    ) -> None:
        super().__init__()
        policies = (LRU(), Frequency(half_life)) if policies is None else policies
        self._ghosts = [Ghost(policy, budget_bytes) for policy in policies]
        self._recent = [0.0] * len(self._ghosts)  # decayed seconds of each
        self._decay = 2.0 ** (-1 / half_life)
        self._chosen = 0

    @property
    def order(self) -> Policy:
        """The policy that decides now."""
        return self._ghosts[self._chosen].policy

    def touch(self, key: int, nbytes: int, *, write: bool = True) -> None:
        """Let every ghost use the key, and see which is the cheapest by now."""
        for i, ghost in enumerate(self._ghosts):
            self._recent[i] = self._recent[i] * self._decay + ghost.use(key, nbytes, write=write)
        self._chosen = self._recent.index(min(self._recent))

    def resize(self, budget_bytes: int) -> None:
        """Change what the ghosts may hold."""
        for ghost in self._ghosts:
            ghost.resize(budget_bytes)

    def rank(self, key: int, nbytes: int) -> float:
        """Not asked: the two policies rank."""
        raise NotImplementedError

    def admits(self, key: int, victims: Sequence[int]) -> bool:
        """Ask the policy that decides now."""
        return self.order.admits(key, victims)

    def forget(self, key: int) -> None:
        """Drop all that is known of `key`."""
        for ghost in self._ghosts:
            ghost.forget(key)


POLICIES: dict[str, Callable[[int], Policy]] = {"frequency": Guarded, "lru": lambda budget_bytes: LRU()}
"""Policies by name, each made from the device budget in bytes."""


def make_policy(policy: str | Policy, budget_bytes: int) -> Policy:
    """Return the policy of that name, or `policy` itself where it is one, for one pool.

    Raises
    ------
    ValueError
        There is no policy of that name, or another pool has this one.
    TypeError
        `policy` is neither a name nor a Policy.
    """
    if isinstance(policy, Policy):
        if policy.taken:
            raise ValueError(f"{policy!r} serves another pool, whose buffers it remembers: give each pool its own")
        policy.taken = True
        return policy
    if not isinstance(policy, str):
        raise TypeError(f"policy is {policy!r}: give one of {', '.join(POLICIES)}, or a Policy")
    if policy not in POLICIES:
        raise ValueError(f"policy {policy!r} is unknown; use one of {', '.join(POLICIES)}, or give a Policy")
    return POLICIES[policy](budget_bytes)
