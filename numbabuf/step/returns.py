"""The way back: pinned blocks that the device writes in turn, and what a caller reads a step's values from.

A step that sends claims a number and a block before it is launched; the graph's last node writes the block and
publishes the number. Numbers only rise and are never used twice, so that what is read is that step's or nothing. Sits
above `output` and `layout`, below `arena`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import weakref
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from threading import get_ident
from typing import Any, NoReturn

import numpy as np

from .. import _cuda
from .._cuda import kernels
from ..errors import BusyError, CaptureError, ClosedError, StaleBufferError
from ..pool.spec import BufferState
from ..resource import Shown
from .layout import ALIGNMENT, Layout
from .output import OutputSlot

__all__ = ["Held", "Outputs", "ReturnRing", "SplitOutputs", "StepOutputs"]

_SPIN = 50e-6
"""Seconds for which a wait only reads pinned memory; from then on it asks the driver, too."""

_QUIET = 10e-3
"""Seconds without news after which `Outputs.done` asks the driver, so that a loop on it ends where a step failed."""


_in_order = threading.Lock()


class Held(Exception):
    """The block that a step needs is held by another thread: wait for it with the manager's lock let go."""


class ReturnRing:
    """`depth` pinned blocks for the values of as many steps, and who may read them.

    Parameters
    ----------
    entry : BufferEntry
        Pinned memory of `layout.return_ring_bytes(depth)` bytes; given back by `retire`.
    layout : Layout
    depth : int
        Number of blocks, >= 1.
    stream : _cuda.Stream
        Where the steps are queued.
    life : _cuda.Lifetime
        Of the context that the memory is in.
    why_closed : callable returning str
        Why nothing is read any more; empty while it is.

    Attributes
    ----------
    late_reads : int
        Steps whose values were copied out by the step that took over their block, unread so far.

    Notes
    -----
    Threads: `claim` and `own` are called under the manager's lock. What is read or changed here is under `guard`, whose
    holders never wait for the device nor for another lock.
    """

    def __init__(
        self, entry: Any, layout: Layout, depth: int, stream: _cuda.Stream, life: Any, why_closed: Callable[[], str]
    ) -> None:
        memory = entry.array
        self.late_reads = 0
        self.guard = threading.RLock()
        self._freed = threading.Condition(self.guard)
        self._entry = entry
        self._retired = False
        self._layout = layout
        self._stream = stream
        self._life = life
        self._why_closed = why_closed
        self._number = 0
        self._word = memoryview(memory[: kernels.WORD]).cast("q")
        self._word[0] = 0
        self._blocks = [
            [
                _cuda.host_view(memory, offset + target, (slot.max_live,), slot.result_dtype)
                for slot, target in zip(layout.outputs, layout.returns, strict=True)
            ]
            for offset in range(ALIGNMENT, ALIGNMENT + depth * layout.return_bytes, layout.return_bytes)
        ]
        self._owners: list[Callable[[], StepOutputs | None]] = [_nobody] * depth
        self._holders: list[list[int]] = [[] for _ in range(depth)]
        self._limited = [slot for slot in layout.outputs if slot.limited]
        self._sets: dict[int, dict[str, OutputSlot]] = {}

    @property
    def returned_address(self) -> int:
        """Where the device publishes numbers."""
        return int(_cuda.address(self._entry.array))

    @property
    def address(self) -> int:
        """Where the blocks begin."""
        return self.returned_address + ALIGNMENT

    # ---------------------------------------------------------------------------------------- a step, under the lock

    def claim(self, chosen: int, live: tuple[int, ...], *, skip: bool = False) -> StepOutputs:
        """Give the next step a number, and a block that nobody reads any more.

        Parameters
        ----------
        chosen : int
            A bit for each output that is sent.
        live : tuple of int
            Sizes of the step.
        skip : bool
            Pass over blocks that are held.

        Raises
        ------
        Held
            Another thread holds the block.
        BusyError
            This thread does; or, with `skip`, all blocks are held.
        ValueError
            The step would send more than a block has room for.
        """
        # Hot path, guarded by benchmarks/outputs.py.
        for slot in self._limited:
            if chosen >> slot.position & 1:
                slot.check_live(live)
        depth = len(self._blocks)
        number, last = self._number + 1, self._number + (depth if skip else 1)
        while True:
            place = number % depth
            owner = self._owners[place]()
            if owner is not None and not self._holders[place]:
                # The device is about to write over what its reader has not read:
                #     1: replays step n and keeps its Outputs; 2: replays step n + depth, into the same block
                #     1: reads: of step n + depth, were it not for the copy below.
                self.wait(owner.number, None)
            with self.guard:
                holders = self._holders[place]
                if not holders:
                    if owner is not None:
                        self.late_reads += not owner.read
                        owner.keep(self._live_rows(owner))
                    self._owners[place] = _nobody
                    self._number = number
                    return StepOutputs(self, number, place, chosen, live)
                if not skip and get_ident() not in holders:
                    raise Held
            if number == last:
                raise self._held()
            number += 1

    def refuse_held(self) -> None:
        """Refuse a step while every block is held."""
        with self.guard:
            if all(self._holders):
                raise self._held()

    def _held(self) -> BusyError:
        return BusyError(
            "the return block that this step needs is held: leave `with outputs.hold()` first, or make the manager "
            f"with more than returns={len(self._blocks)}"
        )

    def own(self, outputs: StepOutputs) -> None:
        """The step was queued: its block is for `outputs` to read."""
        self._owners[outputs.place] = weakref.ref(outputs)

    def wait_free(self) -> None:
        """Wait until no other thread holds the block of the next step; with no lock held."""
        with self.guard:
            while not self._why_closed():
                holders = self._holders[(self._number + 1) % len(self._blocks)]
                if not holders or get_ident() in holders:
                    return
                self._freed.wait(0.1)  # not for ever: who holds it may be ended without a word

    # --------------------------------------------------------------------------------------------------- the readers

    def news(self, outputs: StepOutputs) -> bool:
        """Return whether the values of `outputs` are there; `guard` is held, so the word is not given back."""
        why = self._why_closed()
        if why:
            raise ClosedError(why)
        if self._retired and outputs.kept is None:
            raise ClosedError("the manager gave its memory back, and this step was never done")
        return outputs.kept is not None or self._word[0] >= outputs.number

    def read(self, outputs: StepOutputs, name: str) -> np.ndarray:
        """Return a copy of an output of a step, once it is there."""
        # Hot path, guarded by benchmarks/outputs.py.
        slot = (self._sets.get(outputs.chosen) or self.names(outputs.chosen)).get(name)
        if slot is None:
            raise KeyError(f"{name!r} was not sent by this step; it sent {', '.join(outputs)}")
        while True:
            with self.guard:
                if self._retired or self._life.ended or outputs.kept is not None:
                    if self.news(outputs):
                        return outputs.kept[name].copy()  # type: ignore[index]
                elif self._word[0] >= outputs.number:
                    outputs.read = True
                    # An Arm processor may read the block before it reads the word above: it would read what was there
                    # before the device wrote, and the word after. A lock between the two keeps them in order.
                    with _in_order:
                        pass
                    return self.view(slot, outputs).copy()
            self.wait(outputs.number, None)

    def names(self, chosen: int) -> dict[str, OutputSlot]:
        """Return the outputs of a step that sent `chosen`, by name."""
        slots = self._sets.get(chosen)
        if slots is None:
            outputs = self._layout.outputs
            slots = self._sets[chosen] = {slot.name: slot for slot in outputs if chosen >> slot.position & 1}
        return slots

    def view(self, slot: OutputSlot, outputs: StepOutputs) -> np.ndarray:
        """Return the live rows of an output in the block of a step; `guard` is held."""
        rows = slot.rows(outputs.live)
        part = self._blocks[outputs.place][slot.position][: rows * slot.width]
        return part if slot.flat else part.reshape(slot.shape(rows))

    def wait(self, number: int, timeout: float | None) -> None:
        """Wait until the step `number` is sent, by reading pinned memory; after a while the driver is asked, too."""
        began = time.perf_counter()
        pause = 0.0
        while True:
            with self.guard:
                why = self._why_closed()
                if why:
                    raise ClosedError(why)
                if self._retired or self._word[0] >= number:
                    return
            waited = time.perf_counter() - began
            if timeout is not None and waited >= timeout:
                raise TimeoutError(f"the outputs of this step were not there after {timeout} s; they may still come")
            if waited > _SPIN:
                self.ask(number)
                time.sleep(pause if timeout is None else min(pause, max(0.0, timeout - waited)))
                pause = min(pause + 1e-6, 5e-5)

    def ask(self, number: int) -> None:
        """Ask the driver how the steps fare, which raises what a kernel of theirs has raised."""
        if _cuda.captures and _cuda.capturing():
            raise CaptureError("the outputs of a step are waited for inside a capture: read them before or after it")
        with _cuda.on_device(self._stream.device):
            idle = self._stream.query()
        with self.guard:
            if idle and not self._retired and not self._why_closed() and self._word[0] < number:
                raise RuntimeError(
                    f"the stream is idle but step {number} was not sent: its graph ran without its last kernel, or its "
                    "memory was overwritten"
                )

    def hold(self, outputs: StepOutputs) -> dict[str, np.ndarray]:
        """Lend the block of a step that is done, until `let_go`."""
        with self.guard:
            self.news(outputs)
            if outputs.kept is not None:
                raise StaleBufferError(
                    "the block of this step was given to another, and its values were copied: read outputs[name], or "
                    "hold the block before as many steps as it has blocks are queued behind this one "
                    f"(returns={len(self._blocks)})"
                )
            self._holders[outputs.place].append(get_ident())
            outputs.read = True
            return self._live_rows(outputs)

    def let_go(self, place: int, thread: int) -> None:
        """End a hold."""
        with self.guard:
            self._holders[place].remove(thread)
            self._freed.notify_all()
            self._give_back()

    def _live_rows(self, outputs: StepOutputs) -> dict[str, np.ndarray]:
        return {name: self.view(slot, outputs) for name, slot in self.names(outputs.chosen).items()}

    # ------------------------------------------------------------------------------------------------------- the end

    def retire(self) -> None:
        """Copy out what is not read, and give the memory back once no block is held; all steps are done.

        Where the context is gone no word is read: it went with it.
        """
        with self.guard:
            for owner in self._owners:
                outputs = owner()
                if outputs is not None and not self._life.ended and self._word[0] >= outputs.number:
                    outputs.keep(self._live_rows(outputs))
            self._retired = True
            self._give_back()

    def abandon(self) -> None:
        """In a forked child: read nothing any more, and leave the memory to the parent."""
        self.guard = threading.RLock()  # another thread may have held the old one
        self._freed = threading.Condition(self.guard)
        self._retired, self._entry = True, None

    def _give_back(self) -> None:
        entry = self._entry
        if self._retired and entry is not None and entry.state is not BufferState.FREE and not any(self._holders):
            entry.release()


def _nobody() -> None:
    return None


class Outputs(Shown, Mapping[str, np.ndarray]):
    """What one step sends back: a mapping of output names to arrays of its live rows, there when the step is done.

    Reading ``outputs["scores"]`` waits for this step alone and returns a copy, which is the caller's. The values are
    this step's, however late they are read: a later step that needs the memory copies them out first.

    Attributes
    ----------
    result
        What the captured function returned.

    Raises
    ------
    ClosedError
        The manager is closed.

    Notes
    -----
    Threads: any thread may read. Waiting reads pinned memory and, from about 50 us on, asks the driver, so that a step
    whose kernels failed raises what the driver says. Capture: an output that is not there yet is refused inside one.
    asyncio: ``await outputs`` waits without blocking the event loop.
    """

    __slots__ = ("__weakref__", "result")

    def __init__(self) -> None:
        self.result: Any = None

    @abstractmethod
    def done(self) -> bool:
        """Return whether the values are there; does not wait, and asks the driver after 10 ms without news."""

    @abstractmethod
    def wait(self, timeout: float | None = None) -> None:
        """Wait for this step, not for those behind it.

        Parameters
        ----------
        timeout : float, optional
            Seconds after which TimeoutError is raised; None waits until the step is done.
        """

    @abstractmethod
    def hold(self) -> contextlib.AbstractContextManager[dict[str, np.ndarray]]:
        """Wait for this step and lend its values where they are, without a copy, for a ``with`` block.

        Yields
        ------
        arrays : dict of str to numpy.ndarray
            Pinned memory, to be read inside the block only. A step that needs it waits until the block is left; in the
            same thread it raises BusyError. Of a step that was split: a copy.

        Raises
        ------
        StaleBufferError
            A later step has taken the memory over; ``outputs[name]`` has the values.
        """

    def __await__(self) -> Generator[Any, None, Outputs]:
        return self._awaited().__await__()

    async def _awaited(self) -> Outputs:
        pause = 0.0
        while not self.done():
            await asyncio.sleep(pause)
            pause = min(pause + 1e-5, 1e-3)
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("Outputs cannot be copied or pickled: read them, dict(outputs), and pass the arrays on")

    def __repr__(self) -> str:
        return f"Outputs({', '.join(self)})"


class StepOutputs(Outputs):
    """The outputs of one step, in its block of the return ring or, once that is given to another step, copied out.

    Attributes
    ----------
    number, place : int
        Under which the device publishes the step, and which block it writes.
    chosen : int
        A bit for each output that was sent.
    live : tuple of int
        Sizes of the step.
    kept : dict or None
        The copies.
    read : bool
        Whether some of them were read.
    """

    __slots__ = ("_quiet_since", "_returns", "chosen", "kept", "live", "number", "place", "read")

    def __init__(self, returns: ReturnRing, number: int, place: int, chosen: int, live: tuple[int, ...]) -> None:
        self.result = None
        self._returns = returns
        self._quiet_since = 0.0
        self.number, self.place, self.chosen, self.live = number, place, chosen, live
        self.kept: dict[str, np.ndarray] | None = None
        self.read = False

    def keep(self, values: Mapping[str, np.ndarray]) -> None:
        """Copy the values, as the block is given to another step; under the ring's guard."""
        self.kept = {name: array.copy() for name, array in values.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._returns.read(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._returns.names(self.chosen))

    def __len__(self) -> int:
        return len(self._returns.names(self.chosen))

    def __contains__(self, name: object) -> bool:
        return name in self._returns.names(self.chosen)

    def done(self) -> bool:
        """See `Outputs.done`."""
        returns = self._returns
        with returns.guard:
            if returns.news(self):
                return True
        now = time.perf_counter()
        if not self._quiet_since:
            self._quiet_since = now
        elif now - self._quiet_since > _QUIET:
            returns.ask(self.number)
        return False

    def wait(self, timeout: float | None = None) -> None:
        """See `Outputs.wait`."""
        with self._returns.guard:
            there = self._returns.news(self)
        if not there:
            self._returns.wait(self.number, timeout)

    @contextlib.contextmanager
    def hold(self) -> Iterator[dict[str, np.ndarray]]:
        """See `Outputs.hold`."""
        self.wait()
        returns, thread = self._returns, get_ident()
        arrays = returns.hold(self)
        try:
            yield arrays
        finally:
            returns.let_go(self.place, thread)


class SplitOutputs(Outputs):
    """The outputs of a step that was replayed in pieces: theirs, one after the other.

    Parameters
    ----------
    pieces : sequence of Outputs
        At least one.
    """

    __slots__ = ("_pieces",)

    def __init__(self, pieces: Sequence[Outputs]) -> None:
        self._pieces = tuple(pieces)
        self.result = pieces[-1].result

    def __getitem__(self, name: str) -> np.ndarray:
        return np.concatenate([piece[name] for piece in self._pieces])

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces[0])

    def __len__(self) -> int:
        return len(self._pieces[0])

    def __contains__(self, name: object) -> bool:
        return name in self._pieces[0]

    def done(self) -> bool:
        """See `Outputs.done`."""
        return all(piece.done() for piece in self._pieces)

    def wait(self, timeout: float | None = None) -> None:
        """See `Outputs.wait`."""
        self._pieces[-1].wait(timeout)  # the last to run

    @contextlib.contextmanager
    def hold(self) -> Iterator[dict[str, np.ndarray]]:
        """See `Outputs.hold`."""
        yield dict(self)
