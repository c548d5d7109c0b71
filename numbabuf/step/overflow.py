"""What becomes of a step that is larger than every captured one: the policies, and how "split" cuts a step.

Cutting is pure: all pieces are checked before the first of them is queued, and none is made before its turn. Sits
above `shared`, below `program` and `fill`, whose lock its callers hold.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..checks import outside
from ..errors import BucketOverflowError, GraphMissingError
from .arena import Arena
from .choice import Choice
from .graph import CapturedStep
from .graphs import Graphs
from .layout import Layout
from .output import OutputSlot
from .returns import SplitOutputs
from .shared import Shared
from .slot import InputSlot

if TYPE_CHECKING:
    from .lease import Each
    from .program import Program

__all__ = ["POLICIES", "Overflow", "cut", "uncut", "warn"]

POLICIES = ("raise", "eager", "split")
"""Refuse the step; run fill and function without a graph; replay it in pieces along the tokens."""


def uncut(slots: Sequence[InputSlot], outputs: Sequence[OutputSlot] = ()) -> InputSlot | OutputSlot | None:
    """Return a slot that no cut along the tokens divides rightly, so that no step over `slots` may be split.

    Offsets on "seqs+1", say, point into all tokens of the step; a piece that gets them all reads out of its bounds. Of
    an output that does not follow the tokens, every piece would make another whole.
    """
    for slot in slots:
        if slot.axis not in ("tokens", None) or slot.extra:
            return slot
    for output in outputs:
        if output.axis != "tokens" or output.extra:
            return output
    return None


def cut(
    inputs: Mapping[str, Any], tokens: int, width: int, slots: Sequence[InputSlot]
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Check the inputs of a step and return its pieces of `width` tokens, each made when it is asked for.

    Parameters
    ----------
    inputs
        Every name is that of one of `slots`.
    tokens
        Live tokens of the step.
    slots
        Each follows the tokens or nothing (see `uncut`).

    Returns
    -------
    pieces : iterator of (start, stop, inputs)
        The tokens of each piece, and its inputs: slices where a slot follows the tokens, else the whole.

    Raises
    ------
    TypeError, ValueError, OverflowError
        An input does not fit its slot, in any piece.
    """
    cuts, wholes = {}, {}
    for slot in slots:
        data = inputs.get(slot.name)
        if data is None:
            continue
        if slot.axis is None:
            wholes[slot.name] = slot.coerce(data, slot.capacity)
            continue
        data = slot.on_host(data)
        if data.ndim == 0 or len(data) != tokens:
            raise ValueError(f"input {slot.name!r} has shape {data.shape}; this step has {tokens} tokens")
        slot.coerce(data[:width], min(width, tokens))  # no piece is longer, and all are alike but for their values
        if slot.checked and data.size:
            slot.check_range(data)
        cuts[slot.name] = data
    return _pieces(cuts, wholes, tokens, width)


def _pieces(
    cuts: dict[str, Any], wholes: dict[str, Any], tokens: int, width: int
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    for start in range(0, tokens, width):
        stop = min(start + width, tokens)
        yield start, stop, {**{name: data[start:stop] for name, data in cuts.items()}, **wholes}


def warn(axes: Sequence[str], live: Sequence[int]) -> None:
    """Say that a step runs without a graph, at the line that asked for it; the caller says it once."""
    _, depth = outside()
    size = ", ".join(f"{axis}={value}" for axis, value in zip(axes, live, strict=True))
    warnings.warn(
        f"a step with {size} fits no bucket and runs without a graph, which is slower: "
        "capture a bucket for it (further such steps are only counted, in stats().overflows)",
        RuntimeWarning,
        stacklevel=depth,
    )


class Overflow:
    """What becomes of a step that no graph covers, after one of `POLICIES`.

    Attributes
    ----------
    policy : str
    count : int
        Such steps that ran all the same.
    """

    def __init__(self, policy: str) -> None:
        if policy not in POLICIES:
            raise ValueError(f"overflow is {policy!r}; use one of {', '.join(POLICIES)}")
        self.policy = policy
        self.count = 0
        self._warned = False

    def run(
        self,
        shared: Shared,
        arena: Arena,
        program: Program,
        inputs: Any,
        live: tuple[int, ...],
        each: Each | None,
        choice: Choice,
    ) -> Any:
        """Run a step of `program` that none of its graphs covers as `choice` asks, or raise."""
        if not program.graphs:
            raise GraphMissingError("no graph is captured: call capture_buckets(fn), or use `with capture(n)`, first")
        if self.policy != "raise":
            arena.refuse_others(inputs)
        wanted = choice.wanted(arena.layout, live)
        if self.policy == "split" and _can_split(arena.layout, program.graphs, inputs, live, choice):
            return self._split(arena, program.graphs, inputs, live, each, choice)
        if self.policy == "eager":
            return self._eager(shared, arena, program, inputs, live, wanted)
        raise self._uncovered(arena.layout, program, inputs, live, choice)

    def submit(self, arena: Arena, graphs: Graphs, target: CapturedStep, live: tuple[int, ...]) -> None:
        """Queue and count a step without a graph, and say so once. Its inputs are written, so they are good."""
        if not self._warned:
            self._warned = True
            warn(arena.layout.axes, live)
        arena.submit(target, live[0])
        self.count += 1
        graphs.retire(target)

    def _eager(
        self,
        shared: Shared,
        arena: Arena,
        program: Program,
        inputs: Any,
        live: tuple[int, ...],
        wanted: tuple[int, ...],
    ) -> Any:
        """Run fill and function without a graph, padded to the sizes `wanted`."""
        if program.function is None:
            raise GraphMissingError("overflow='eager' runs the function given to capture_buckets; none was given")
        arena.layout.check(wanted)
        target = shared.plain(arena, wanted)
        block = arena.write_all(inputs, live, target.padded)
        # Number and place go in with the inputs, before the function says which outputs it writes.
        outputs = None if arena.returns is None else arena.claim(program.graphs.sends, block, live, skip=True)
        self.submit(arena, program.graphs, target, live)
        result, asked = program.function(target.step), target.step.asked
        if outputs is None or not asked:
            return result
        arena.launch_send(shared.stream, asked, wanted)
        outputs.chosen = asked
        return arena.own(outputs, result)

    def _split(
        self, arena: Arena, graphs: Graphs, inputs: Any, live: tuple[int, ...], each: Each | None, choice: Choice
    ) -> Any:
        """Replay a step in pieces that fill the largest graph they can; its slots follow tokens or nothing."""
        pieces = cut(inputs, live[0], graphs.filled(live[0]), arena.layout.slots)
        self.count += 1
        result, sent = None, []
        for start, stop, piece in pieces:
            sizes = (stop - start,)
            target = graphs.covering(choice.wanted(arena.layout, sizes))
            assert target is not None
            block = arena.ring.acquire()
            arena.write(block, piece, sizes, target.padded)
            if target.sends:
                # A piece that is queued cannot be taken back, so that one behind it does not wait for a reader.
                result = arena.send(target, block, sizes, skip=True)
                sent.append(result)
            else:
                result = arena.submit(target, stop - start)
            if each is not None:
                each(result, start, stop)
        return SplitOutputs(sent) if sent else result

    def _uncovered(
        self, layout: Layout, program: Program, inputs: Any, live: tuple[int, ...], choice: Choice
    ) -> Exception:
        """The error for a step that no captured graph covers; the policies that it names would run this very step."""
        graphs, wanted = program.graphs, choice.wanted(layout, live)
        largest = [graphs.largest(axis) for axis in range(len(wanted))]
        over = [axis for axis, size in enumerate(wanted) if size > largest[axis]]
        ways = ["eager"] if layout.holds(wanted) and program.function is not None else []
        if self.policy != "split" and _can_split(layout, graphs, inputs, live, choice):
            ways.append("split")
        why = f" (at_least asks for {dict(choice.at_least)})" if wanted != live else ""
        whole = uncut(layout.slots, layout.outputs)
        if self.policy == "split" and whole is not None:
            follows = f"{whole.axis}+{whole.extra}" if whole.extra else whole.axis or "nothing"
            why += (
                f"; overflow='split' cuts along the tokens alone, and of slot {whole.name!r}, which follows {follows}, "
                "every piece would get the whole"
            )
        if over:  # first what the slots cannot hold, for which no bucket helps
            axis = max(over, key=lambda axis: (wanted[axis] > layout.limits[axis], axis))
            return layout.too_large(axis, wanted[axis], largest[axis], ways, why)
        offer = f", or make the manager with overflow={' or '.join(map(repr, ways))}" if ways else ""
        graph = graphs.covering(wanted)
        if graph is not None:
            return BucketOverflowError(
                f"this step has {layout.named(wanted)}: its smallest graph has {graph.sizes[0]} tokens, more than "
                f"max_padding={choice.max_padding:g} times as many; capture a size between{offer}{why}"
            )
        return BucketOverflowError(
            f"this step has {layout.named(wanted)}: there is a graph for each of these sizes, and none for all of "
            f"them; capture this one, or a larger, as well{offer}{why}"
        )


def _can_split(layout: Layout, graphs: Graphs, inputs: Any, live: tuple[int, ...], choice: Choice) -> bool:
    """Whether "split" runs a step: no slot is left uncut, and the slots or an input bound its length.

    A piece fills its graph, but for the last. Nor is there a piece of a size that only the whole step could have.
    """
    if uncut(layout.slots, layout.outputs) is not None:
        return False
    width = graphs.filled(live[0])
    if width < max(1, *choice.wanted(layout, layout.nothing)):
        return False
    if live[0] <= layout.limits[0]:
        return True
    return isinstance(inputs, Mapping) and any(
        slot.axis is not None and inputs.get(slot.name) is not None for slot in layout.slots
    )
