"""Ctrl-C anywhere in a manager's own code: it stays usable, nothing stays leased or locked, nothing is half in service.

Python looks for signals where a function begins, where a loop goes round and where a built-in returns. A trace function
raises the interrupt at each of these places of an operation in turn.
"""

import dis
import os
import pathlib
import sys

import kit
import pytest
from test_fault_sweep import OPERATIONS, World, quietly

import numbabuf
from numbabuf import _cuda

FILES = {str(path) for path in (pathlib.Path(numbabuf.__file__).parent / "step").glob("*.py")}
NOT_THE_MANAGERS = ("statistics", "entry", "reserve", "demote, use", "hierarchy", "prewarm")
OPERATIONS = {name: made for name, made in OPERATIONS.items() if not any(word in name for word in NOT_THE_MANAGERS)}
CHECKED = {code for name, code in dis.opmap.items() if name.startswith(("CALL", "JUMP_BACKWARD"))}


class Tracer:
    """Raises KeyboardInterrupt at the place number `left`."""

    def __init__(self, left):
        self.left = left
        self.where = None
        self._after = set()  # frames whose last instruction looks for signals when it is done

    def __call__(self, frame, event, argument):
        if event == "call":
            self._after.discard(frame.f_back)  # it called Python code, whose return does not look
        if frame.f_code.co_filename not in FILES:
            return None
        frame.f_trace_opcodes = True
        place = event == "call"
        if event == "opcode":
            place = frame in self._after
            self._after.discard(frame)
            if frame.f_code.co_code[frame.f_lasti] in CHECKED:
                self._after.add(frame)
        if place and frame.f_code.co_name != "<genexpr>":  # a generator's end is none
            self.left -= 1
            if self.left < 0:
                sys.settrace(None)
                self.where = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} {frame.f_code.co_name}"
                raise KeyboardInterrupt
        return self


def interrupt(act, at):
    """Run `act`, interrupted at the place number `at`: where that was, None if it has no such place."""
    tracer, before = Tracer(at), sys.gettrace()
    sys.settrace(tracer)
    try:
        act()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return tracer.where


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_interrupt_anywhere(name):
    make, act = OPERATIONS[name]
    at = 0
    while True:
        world = make()
        act(world)
        leased = world.pool.stats().in_use_count
        where = interrupt(lambda world=world: quietly(act, world), at)
        m = world.m
        assert m._shared.capturing.thread is None and not _cuda.captures, where
        lease = m._shared.lease
        if lease is not None and lease.open:  # it was on its way to the with block that would have ended it
            lease.discard()
        try:
            m.check()  # which a lock left taken would refuse
            for step in (world.good, lambda world=world: act(world), world.good):
                quietly(step)
        except Exception as error:
            raise AssertionError(f"after an interrupt at {where}") from error
        if world.pool.stats().in_use_count != leased:
            kit.collect()
        assert world.pool.stats().in_use_count == leased, where
        m = None
        if where is None:
            break
        at += 1
    world.close()


@pytest.mark.parametrize("end", ["close", "release_all", "close_graphs"])
def test_an_end_that_is_interrupted_can_be_asked_for_again(end):
    at = 0
    while True:
        world = World()
        where = interrupt(getattr(world.m, end), at)
        getattr(world.m, end)()
        assert not world.m.captured, where
        if not world.m.closed:
            quietly(world.good)
        if where is None:
            break
        at += 1
    world.close()
    assert at > 5
