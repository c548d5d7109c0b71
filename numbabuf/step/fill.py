"""The fill alone: slots filled and padded to a step's bucket without a function, by a graph per bucket or a launch.

Sits above `shared` and `overflow`, below `program`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .. import _cuda
from ..errors import BucketOverflowError, BusyError
from .arena import Arena
from .graph import CapturedStep
from .layout import Layout
from .overflow import Overflow
from .shared import Shared
from .slot import InputSlot

if TYPE_CHECKING:
    from .program import Program

__all__ = ["Fill"]

_this_thread = _cuda.this_thread


class Fill:
    """What fills the slots of `shared`, and runs nothing behind it.

    Parameters
    ----------
    shared : Shared
    overflow : Overflow
        Of a step beyond the largest bucket: "eager" runs it in its own size, the others refuse it.
    """

    def __init__(self, shared: Shared, overflow: Overflow) -> None:
        self._shared = shared
        self._graphs = shared.fills
        self._overflow = overflow

    def run(
        self, inputs: Mapping[str, Any], num_tokens: int, sizes: Mapping[str, int], program: Program
    ) -> dict[str, Any]:
        """Fill the slots in a step that counts as one of `program`; see `InputBufferManager.stage_inputs`."""
        # Hot path, guarded by benchmarks/step.py.
        shared = self._shared
        if shared.inside():
            shared.refuse_inside("stage_inputs")
        with shared.lock:
            arena = shared.arena
            if arena is None or shared.life.ended or shared.pool.closed or not _this_thread.ready:
                arena = None
            else:
                live = shared.begin_step(arena, num_tokens, sizes)
                target = self._graphs.exact(arena.layout.round_up(live)[0]) or self.target(arena, live, program)
                found = arena.write(arena.ring.acquire(), inputs, live, target.padded)
                if target.plain:
                    self.submit_plain(arena, target, live)
                else:
                    arena.submit(target, live[0])
                views = target.step.views()
        if arena is None:  # memory is made with no lock held; then the step begins anew
            shared.prepare("stage_inputs")
            return self.run(inputs, num_tokens, sizes, program)
        if found != len(inputs):
            for name, value in inputs.items():
                views.setdefault(name, value)
        if program.observer is not None:
            program.observe(live[0])
        return views

    def target(self, arena: Arena, live: tuple[int, ...], program: Program) -> CapturedStep:
        """Return what fills the slots for the bucket that covers `live`: a graph that is made at its first use."""
        layout, shared = arena.layout, self._shared
        sizes, over = layout.round_up(live)
        if over is not None:
            if self._overflow.policy != "eager" or not layout.holds(live):
                program.refuse(live[0])
                raise self._too_large(layout, live, over)
            return shared.plain(arena, sizes)
        fill = self._graphs.exact(sizes)
        if fill is None:
            # Not waiting: the thread that captures may want the lock that this one holds.
            try:
                with shared.capturing.held(wait=False), shared.recording(arena, sizes) as fill:
                    pass
            except BusyError:
                return shared.plain(arena, sizes)
            self._graphs.add([fill])
        return fill

    def _too_large(self, layout: Layout, live: tuple[int, ...], over: int) -> BucketOverflowError:
        if self._overflow.policy != "eager":
            ways = ("eager",) if layout.holds(live) else ()
            return layout.too_large(over, live[over], layout.buckets[over][-1], ways)
        at = next(axis for axis, size in enumerate(live) if size > layout.limits[axis])
        return layout.too_large(at, live[at], layout.buckets[at][-1])

    def submit_plain(self, arena: Arena, target: CapturedStep, live: tuple[int, ...]) -> None:
        """Queue a fill without a graph."""
        if any(size > buckets[-1] for size, buckets in zip(live, arena.layout.buckets, strict=True)):
            self._overflow.submit(arena, self._graphs, target, live)
        else:  # another thread was capturing, so that the bucket could not get its graph yet
            arena.submit(target, live[0])
            self._graphs.retire(target)

    def end_lease(self, arena: Arena, live: tuple[int, ...], lease: Any, program: Program) -> dict[str, Any]:
        """Fill the slots from the block that `lease` wrote."""
        target = self.target(arena, live, program)
        arena.describe(lease.block, lease.written, live, target.padded)
        if target.plain:
            self.submit_plain(arena, target, live)
        else:
            arena.submit(target, live[0])
        return target.step.views()

    def check_device(self, arena: Arena, live: tuple[int, ...]) -> None:
        """Refuse a fill that would need a graph, or a launch, while another device is current."""
        if self._graphs.exact(arena.layout.round_up(live)[0]) is None:
            _cuda.one_device(self._shared.stream.device, self._shared)

    def set_slot(self, slot: InputSlot, data: Any) -> None:
        """`InputSlot.set_data`: a fill in which every other slot has nothing to write."""
        shared = self._shared
        with shared.working("set_data") as arena:
            _cuda.one_device(shared.stream.device, shared)
            layout = arena.layout
            shared.begin_step(arena, 0, dict.fromkeys(layout.axes[1:], 0))
            data = slot.on_host(data)
            rows = len(data) if data.ndim else 1
            padded = slot.capacity
            if slot.axis_index >= 0:
                sizes = [0] * len(layout.axes)
                sizes[slot.axis_index] = rows - slot.extra
                padded = min(slot.capacity, layout.round_up(sizes)[0][slot.axis_index] + slot.extra)
            arena.write_one(slot, data, rows, padded)
            arena.fill(tuple(padded if other is slot else 0 for other in layout.slots))
