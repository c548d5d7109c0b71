"""A tiered pool that is called in the middle of its own call, in the same thread: BusyError, and nothing has changed.

The call comes from a signal handler, after every line of the outer call in turn; from `on_oom`; and from `__array__`.
"""

import functools
import os
import pathlib
import sys
import threading

import numpy as np
import pytest

import numbabuf
from numbabuf import BufferSpec, BusyError, HierarchicalBufferPool, Tier, TierFullError, _cuda

ROOMS = tuple(str(pathlib.Path(numbabuf.__file__).parent / room) for room in ("pool", "tiers"))
STRIDE = 23
"""Lines from one sweep to the next; 1 finds no more, and takes as many times longer."""


def spec(size=1024):
    return BufferSpec(size, "uint8")


class Setting:
    """A device full of what may go, and one buffer below; each holds a value of its own."""

    def __init__(self):
        self.pool = HierarchicalBufferPool(device_bytes=3072, pinned_bytes=1 << 16, policy="lru")
        self.entries = [self.pool.allocate(spec(), movable=True) for _ in range(4)]
        self.more = []
        for value, entry in enumerate(self.entries):
            with self.pool.use([entry], stream=0, in_place=False) as (array,):
                array.copy_to_device(np.full(1024, value, np.uint8))
        _cuda.synchronize()

    def below(self):
        return next(entry for entry in self.entries if entry.tier is not Tier.DEVICE)

    def above(self):
        return next(entry for entry in self.entries if entry.tier is Tier.DEVICE)

    def good(self):
        """Contents are what was written, and the books agree."""
        for value, entry in enumerate(self.entries):
            with self.pool.use([entry], stream=0, in_place=False, write=False) as (array,):
                assert (array.copy_to_host() == value).all(), value
        self.pool.check()
        for entry in (*self.entries, *self.more):
            entry.release()
        self.pool.close()
        assert self.pool.stats().reserved_bytes == 0


def enter(setting, entries, **options):
    with setting.pool.use(entries, stream=0, **options):
        pass


STEPS = {
    "use": lambda s: enter(s, [s.below()], in_place=False),
    "use where it is": lambda s: enter(s, [s.above()], write=False),
    "promote": lambda s: s.pool.promote([s.below()]),
    "demote": lambda s: s.pool.demote([s.above()]),
    "prefetch": lambda s: s.pool.prefetch([s.below()]),
    "allocate": lambda s: s.more.append(s.pool.allocate(spec())),
    "allocate movable": lambda s: s.more.append(s.pool.allocate(spec(512), movable=True)),
    "trim": lambda s: s.pool.trim(0),
    "reserve": lambda s: s.pool.reserve([spec(2048)]),
    "limits": lambda s: s.pool.limits.update({Tier.DEVICE: 1024}),
    "stats": lambda s: s.pool.stats(),
}


class Sweep:
    """Calls a function after line number `at` of the rooms, as a signal handler would, and notes how it ended."""

    def __init__(self, at, call):
        self.left, self.call, self.outcome = at, call, None
        self.lines = 0

    def __call__(self, frame, event, argument):
        return self if frame.f_code.co_filename.startswith(ROOMS) and self._line(event) else self._off(frame)

    def _off(self, frame):
        return self if frame.f_code.co_filename.startswith(ROOMS) else None

    def _line(self, event):
        if event == "line":
            self.lines += 1
            if self.lines == self.left and self.outcome is None:
                sys.settrace(None)
                try:
                    self.call()
                    self.outcome = "served"
                except Exception as error:
                    self.outcome = error
        return True


@pytest.mark.parametrize("inner", ["use", "demote", "promote", "allocate", "trim"])
@pytest.mark.parametrize("outer", STEPS)
def test_at_every_place_a_call_is_refused_or_served_whole(outer, inner):
    """Where the lock is not held yet, or no more, it is served: then it came before or after the outer call."""
    at, refused = 1, 0
    while True:
        setting = Setting()
        sweep = Sweep(at, functools.partial(STEPS[inner], setting))
        before = sys.gettrace()
        sys.settrace(sweep)
        try:
            STEPS[outer](setting)
        except (TierFullError, BusyError, StopIteration):
            pass  # what was served in between took the room, or moved what the outer call meant to move
        finally:
            sys.settrace(before)
        assert (
            sweep.outcome is None
            or sweep.outcome == "served"
            or isinstance(sweep.outcome, (BusyError, TierFullError, StopIteration))
        ), f"line {at}: {sweep.outcome!r}"
        refused += isinstance(sweep.outcome, BusyError)
        setting.pool.limits[Tier.DEVICE] = 3072
        setting.good()
        if sweep.outcome is None:
            break
        at += STRIDE
    assert refused > 0, "no place within the call was met: this shows nothing"


def test_on_oom_may_call_the_pool():
    """It runs without a lock, so that what it calls is served."""
    found = []

    def on_oom(nbytes):
        found.append(pool.stats().in_use_count)
        pool.trim(0)
        held.pop().release()

    pool = HierarchicalBufferPool(device_bytes=2048, pinned_bytes=0, on_oom=on_oom)
    held = [pool.allocate(spec()) for _ in range(2)]
    entry = pool.allocate(spec())
    assert found == [2] and entry.tier is Tier.DEVICE
    entry.release()
    held.pop().release()
    pool.close()


class Curious:
    """An array that calls the pool while it is copied to a buffer inside a use."""

    def __init__(self, call):
        self.call = call

    def __array__(self, dtype=None, copy=None):
        self.call()
        return np.full(1024, 9, np.uint8)


def test_an_array_that_calls_the_pool_while_it_is_copied_moves_nothing_in_use():
    setting = Setting()
    entry = setting.above()
    with setting.pool.use([entry], stream=0, in_place=False) as (array,):
        address = entry.address

        def call():
            with pytest.raises(BusyError, match="use of it is open"):
                setting.pool.demote([entry])
            setting.more.append(setting.pool.allocate(spec(), movable=True))

        array.copy_to_device(np.asarray(Curious(call)))
        assert entry.address == address
        array.copy_to_device(np.full(1024, setting.entries.index(entry), np.uint8))
    setting.good()


@pytest.mark.skipif(not hasattr(os, "kill") or not hasattr(__import__("signal"), "setitimer"), reason="POSIX alone")
def test_a_signal_handler_that_demotes_loses_nothing():
    import signal

    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals come to the main thread")
    setting, met = Setting(), []

    def handler(*_):
        try:
            setting.pool.demote([entry for entry in setting.entries if entry.tier is Tier.DEVICE])
            met.append("served")
        except (BusyError, TierFullError) as error:
            met.append(type(error))

    previous = signal.signal(signal.SIGUSR1, handler)
    try:
        for turn in range(40):
            os.kill(os.getpid(), signal.SIGUSR1)
            enter(setting, [setting.entries[turn % 4]], in_place=False, write=False)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert met
    setting.good()
