"""Raw blocks of memory, one driver allocation each, and the right to use one.

A block is plain bytes; typed arrays are views over it, made once per spec. It also carries what the pool must know to
hand it on: which streams may still use it, and whether a live graph does. Knows no pool. Sits above `pins`, below
`entry`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import _cuda
from ..errors import BackendError, CaptureError, ClosedError
from .pins import Pin, register
from .spec import BufferSpec, Tier, line_key

__all__ = [
    "Alarm", "Block", "Handle", "Memory", "line_of", "refuse_captured", "refuse_foreign", "same_stream",
]  # fmt: skip

_ADVICE = (
    "nothing tells a pool when that graph is done with a buffer: allocate it before that capture without naming this "
    "stream, and keep it, unreleased"
)
_MAX_VIEWS = 16
"""Typed views remembered per allocation; one that serves more specs than this forgets them all and begins anew."""


class Memory:
    """One raw allocation in one tier, and the typed views over it.

    Attributes
    ----------
    base
        The raw uint8 array.
    device : int
        Ordinal of the device that the memory is on, or that pinned memory was made for.
    life : Lifetime
        That of the context that the memory is in.
    line : int
        The key of the free list of its capacity.
    """

    __slots__ = ("__weakref__", "base", "device", "life", "line", "_device_views", "_views")

    def __init__(self, tier: Tier, nbytes: int) -> None:
        # One driver allocation, by the door's own functions: looked up here, so that a test may replace them.
        make: Callable[[int], Any] = {
            Tier.DEVICE: _cuda.empty_device,
            Tier.MANAGED: _cuda.empty_managed,
            Tier.PINNED: _cuda.empty_pinned,
        }[tier]
        self.base: Any = make(nbytes)
        self.device = _cuda.device_id()
        self.life = _cuda.lifetime()
        self.line = line_key(tier, nbytes)
        self._views: dict[BufferSpec, Any] = {}
        self._device_views: dict[BufferSpec, Any] = {}

    def view(self, spec: BufferSpec) -> Any:
        """Return the view for `spec`, whose bytes fit; one that the host can use where it can use the memory."""
        return self._known(self._views, spec, _cuda.device_view if spec.tier is Tier.DEVICE else _cuda.host_view)

    def device_view(self, spec: BufferSpec) -> _cuda.DeviceArray:
        """Return the view for `spec` that kernels take."""
        return self._known(self._device_views, spec, _cuda.device_view)

    def _known(self, views: dict[BufferSpec, Any], spec: BufferSpec, make: Callable[..., Any]) -> Any:
        view = views.get(spec)
        if view is None:
            if len(views) >= _MAX_VIEWS:
                views.clear()
            view = views[spec] = make(self.base, 0, spec.shape, spec.dtype)
        return view


class Block:
    """Memory of a pool, and what is known of its use.

    Attributes
    ----------
    memory : Memory
    tier : Tier
    nbytes : int
        Capacity. A block made for a zero-byte spec has one byte.
    address : int
        The address of its first byte.
    spec : BufferSpec
        What the block is, or was last, leased as.
    array
        The typed view for `spec`.
    home
        Puts the block's handle on the free list of its capacity: the append method of its ready line.
    plain : bool
        Whether a release may put the block straight back: nothing is known but "leased by one owner, no queued work".
    generation : int
        Number of leases so far. Only the leaseholder writes it.
    captured : stream or None
        The stream of the capture that the current lease began in, and in which it ended if the block is put aside.
    clean_at : int
        The generation after which the block was last known to have no queued work; see `clean`.
    users : tuple of streams
        Streams with queued work on the block, besides the releasing one.
    recasts : int
        Number of leases that found the block with another spec than theirs.
    fence : Fence or None
        Behind the work of the last lease, of an idle or deferred block that other streams may still use.
    pins : dict of int to weakref of Pin
        By thread, as two that capture at once would overwrite each other's.
    store
        A function that returns the store of the block's pool, or None when that is gone.
    site : str
        Where it was leased last, in debug mode.
    """

    __slots__ = (
        "__weakref__", "address", "array", "captured", "clean_at", "fence", "generation", "home", "memory", "nbytes",
        "pins", "plain", "recasts", "site", "spec", "store", "tier", "users",
    )  # fmt: skip

    home: Any

    def __init__(self, spec: BufferSpec, nbytes: int) -> None:
        self.memory = Memory(spec.tier, nbytes)
        self.tier = spec.tier
        self.nbytes = nbytes
        self.address = _cuda.address(self.memory.base)
        self.generation = self.recasts = 0
        self.clean_at = 0
        self.captured: Any = None
        self.users: tuple[Any, ...] = ()
        self.fence: Any = None
        self.pins: dict[int, weakref.ref[Pin]] = {}
        self.plain = True
        self.store: Any = None
        self.site = ""
        self.become(spec)
        register(self)

    @property
    def line(self) -> int:
        """The key of the free list of its capacity."""
        return self.memory.line

    def become(self, spec: BufferSpec) -> None:
        """Take the shape and type of `spec`, whose bytes fit."""
        array = self.memory.view(spec)
        self.spec = spec
        self.array = array

    def device_view(self) -> _cuda.DeviceArray:
        """Return the typed view that kernels take."""
        return self.array if self.tier is Tier.DEVICE else self.memory.device_view(self.spec)

    def add_user(self, stream: _cuda.Stream) -> None:
        """Count `stream` among those with queued work on the block.

        Device memory that was leased without a stream is used on the default stream already, which then needs a mark
        of its own, too.
        """
        self.plain = False
        users = self.users
        if not users and self.tier is Tier.DEVICE:
            users = (_cuda.as_stream(0),)
        if not any(same_stream(stream, user) for user in users):
            users = (*users, stream)
        self.users = users

    def refuse_ended(self) -> None:
        """Raise ClosedError if the context of the memory was closed or reset, and the memory is gone with it."""
        if self.memory.life.ended:
            raise ClosedError(
                f"the memory of {self.spec} went when its CUDA context was closed (cuda.close(), or a reset of the "
                "context or device): make a new pool, and allocate there"
            )

    def refuse_stream(self, stream: _cuda.Stream) -> None:
        """Raise for a `_cuda.Stream` on which nothing can be ordered after the work on the block.

        Raises
        ------
        BackendError
            It is another device's.
        CaptureError
            It is being captured, but not by this thread through numbabuf.
        """
        refuse_foreign(stream, self.memory.device)
        refuse_captured(stream)

    @property
    def clean(self) -> bool:
        """Whether an idle block has no queued work, so that any stream may have it without a wait."""
        return self.clean_at == self.generation

    @property
    def pinned_by_graph(self) -> bool:
        """Whether a graph that is alive, or a capture that is open, reads or writes the block."""
        return any(pin() is not None for pin in list(self.pins.values()))

    def __repr__(self) -> str:
        return f"<Block {self.nbytes} bytes {self.tier.value} at {self.address:#x}, {self.spec}>"


def same_stream(one: Any, other: Any) -> bool:
    """Return whether two `_cuda.Stream` are one stream.

    A handle alone proves nothing: the driver gives a destroyed stream's handle to the next one, and that of the
    per-thread default stream means another stream in every thread. The legacy default stream is never destroyed.
    """
    if one is other:
        return True
    if one.handle != other.handle:
        return False
    if one.thread is not None or other.thread is not None:
        return one.thread is other.thread
    if one.handle == 0 or one.core is other.core:
        return True
    return one.owner is not None and one.owner is other.owner


def refuse_foreign(stream: _cuda.Stream, device: int) -> None:
    """Raise BackendError for a stream of another device than `device`; a default stream is every device's own."""
    if _cuda.device_count() == 1 or stream.handle == 0 or stream.thread is not None:
        return
    try:
        its = stream.device
    except Exception as error:
        raise TypeError(f"the driver knows no stream {stream.handle:#x}: give one that is open") from error
    if its != device:
        raise BackendError(
            f"a stream of device {its} was given for memory of a pool on device {device}: use a stream of device "
            f"{device}, or a pool for each device"
        )


def refuse_captured(stream: _cuda.Stream, advice: str = _ADVICE) -> None:
    """Raise CaptureError for a stream that is being captured, but not by this thread through numbabuf.

    The error ends with `advice`: why the caller cannot go on, and what to do.
    """
    if _cuda.is_capturing(stream) and not _cuda.capturing():
        raise CaptureError(
            f"the stream {stream.handle:#x} is being captured into a graph that this thread did not begin with "
            f"numbabuf, and {advice}, as long as the graph lives"
        )


def line_of(stream: _cuda.Stream) -> object:
    """Return what the released buffers of a stream are kept under: its work is done in order, theirs with it."""
    return stream.handle if stream.thread is None else stream.thread


class Handle:
    """The right to a block; there is one per block, held by a free list of the pool or by a lease.

    The pool keeps no other reference to a handle that is leased, so a handle that dies there was lost.
    """

    __slots__ = ("token", "block")

    def __init__(self, block: Block) -> None:
        self.block = block
        self.token = np.empty(0, np.uint8)  # what `Alarm` watches


class Alarm(weakref.ref):  # type: ignore[type-arg]
    """Goes off when a handle dies: its owner was dropped without a release.

    All it does is to append itself to a deque, in C. That takes no lock, as it must not: the collector may come in the
    middle of any call, one that holds the pool's lock included, in the same thread.

    A finaliser of the handle would not do. In a dead cycle the collector runs all finalisers before it drops anything:
    the handle's, too, where another finaliser of that cycle is about to release the entry, or has just released it, so
    that the handle is on its free list, or leased anew. A NumPy array is none of the collector's business; it dies with
    the last reference to it, and only then.
    """

    __slots__ = ("block",)

    block: Block

    @classmethod
    def watch(cls, handle: Handle, off: Any) -> Alarm:
        """Have `off` called with the alarm when `handle` dies, as long as the alarm is kept."""
        alarm = cls(handle.token, off)
        alarm.block = handle.block
        return alarm
