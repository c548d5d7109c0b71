"""BufferEntry: one lease of one buffer, from `allocate` to `release`, and dead for ever after; FixedEntry never moves.

A new object for each lease, so that a reference kept beyond its release can never come to life again. Makes no memory
and decides nothing: the pool does. Sits above `memory`, below `pool`.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from typing import Any, NoReturn, TypeVar

from .. import _cuda
from ..errors import StaleBufferError
from ..resource import Shown
from .block import Block, Handle
from .spec import BufferSpec, BufferState, Tier, is_bfloat16

__all__ = ["BufferEntry", "FixedEntry"]

E = TypeVar("E", bound="BufferEntry")

_open_captures = _cuda.captures


class BufferEntry(Shown, ABC):
    """One leased buffer. End the lease once: by `release`, or by leaving a ``with``.

    Made by a pool's `allocate`; not to be made by hand. Abstract: whether the buffer stays at one address is for the
    pool to say.

    Attributes
    ----------
    spec : BufferSpec
    array
        The buffer with the spec's shape and dtype: a NumPy array for the tiers that the CPU reads (pinned, managed), a
        Numba device array in device memory (there bfloat16, which Numba cannot type, appears as uint16). New contents
        are undefined. After the release the attribute raises StaleBufferError; an array taken from it before stays
        valid memory as long as it is referenced, but may be another lease's.
    use_count : int
        Number of `mark_in_use` calls in this lease.
    last_used : float or None
        `time.monotonic()` of the last of them, in seconds.

    Raises
    ------
    StaleBufferError
        From every use but `spec`, `state` and ``repr`` after the release; it names the spec, and with NUMBABUF_DEBUG=1
        where the buffer was released.
    ClosedError
        From the same uses after the context of the memory was closed or reset; a release is quiet.

    Notes
    -----
    Threads: exactly one of several threads that release an entry succeeds. Dropped without a release, the buffer goes
    back to its pool, which counts and reports it.

    Examples
    --------
    >>> from numbabuf.pool import SimpleBufferPool
    >>> with SimpleBufferPool() as pool:
    ...     with pool.allocate(BufferSpec(4, "int32", Tier.PINNED)) as entry:
    ...         entry.array[:] = 7
    ...         print(entry.array, entry.state)
    ...     print(entry.state)
    [7 7 7 7] BufferState.ALLOCATED
    BufferState.FREE
    """

    __slots__ = ("__weakref__", "_held", "_site", "_state", "last_used", "spec", "use_count")

    spec: BufferSpec
    last_used: float | None
    use_count: int
    _state: BufferState
    _site: str

    def __init__(self, handle: Handle) -> None:
        # Hot path, guarded by benchmarks/pool.py: what has a default is left unset, see __getattr__.
        self._held = [handle]
        self.spec = handle.block.spec

    def release(self, *, stream: _cuda.StreamLike | None = None) -> None:
        """End the lease.

        Parameters
        ----------
        stream
            A further stream with queued work that uses the buffer. The pool hands the memory on in the order of the
            work on it, on the stream given to `allocate`, and on those named by `mark_in_use` and `record_stream`.
            Where `allocate` was given none, device memory counts as used on the default stream, and memory that the
            CPU reads as used by the CPU alone.

        Raises
        ------
        StaleBufferError
            The entry was released before.
        TypeError
            `stream` is no stream; the lease goes on.

        Notes
        -----
        Cost: no lock and no driver call where no stream was named. Capture: in a thread that captures a graph the
        buffer is put aside until the end of the capture.
        """
        # Hot path, guarded by benchmarks/pool.py. Popping the list is what makes a release happen exactly once: it is
        # atomic, with the interpreter's lock and without it. A pair of threads that release the same entry:
        #   A: pops the handle
        #   B: finds the list empty, raises StaleBufferError
        #   A: puts the handle on its free list; C may lease it there at once, with an entry and a list of its own.
        try:
            handle = self._held.pop()
        except IndexError:
            self._refuse("released")
        block = handle.block
        if block.plain and stream is None and not (_open_captures and _cuda.capturing()):
            block.home(handle)
            # A close makes all blocks not plain, then frees what is idle. Where it comes between the look above and
            # the way home, it misses this one, and the look here finds that out; one that comes later frees it.
            if not block.plain:
                self._arrive_late(block)  # type: ignore[unreachable]  # by another thread
        else:
            self._release_slowly(handle, block, stream)

    def _release_slowly(self, handle: Handle, block: Block, stream: _cuda.StreamLike | None) -> None:
        try:
            store = block.store()
            if store is not None:  # if it is gone, the memory goes with the handle
                self._site = store.take_back(handle, stream)
        except Exception:
            self._held.append(handle)
            raise  # an interrupt ends the lease: the pool may have the handle already, and may have leased it anew

    def _arrive_late(self, block: Block) -> None:
        store = block.store()
        if store is not None:
            store.look_again()

    def belongs_to(self, pool: object) -> bool:
        """Return whether `pool` made this lease; StaleBufferError after its end."""
        store = self._block("released").store()
        return store is not None and store.owner() is pool

    def mark_in_use(self, *, stream: _cuda.StreamLike | None = None) -> None:
        """Say that work queued on `stream` reads or writes the buffer: it is IN_USE, and its release waits for it.

        Parameters
        ----------
        stream
            The stream of that work; None: the one given to `allocate`, else the default stream.
        """
        block = self._block("used")
        if stream is not None:
            self.record_stream(stream)
        elif not block.users and self.spec.tier is not Tier.DEVICE:  # device memory counts as used there anyway
            block.add_user(_cuda.as_stream(0))
        self._state = BufferState.IN_USE
        self.last_used = time.monotonic()
        self.use_count += 1

    def record_stream(self, stream: _cuda.StreamLike) -> None:
        """Name a further stream whose queued work uses the buffer; the release covers what is queued there by then.

        Parameters
        ----------
        stream
            A Numba or cuda.core stream, anything with ``__cuda_stream__``, or 0 for the default stream.

        Raises
        ------
        CaptureError
            Another library, or another thread, captures the stream: keep the entry as long as that graph lives.
        BackendError
            The stream is another device's.
        """
        block = self._block("used")
        wrapped = _cuda.as_stream(stream)
        block.refuse_stream(wrapped)
        block.add_user(wrapped)

    def mark_staged(self) -> None:
        """Say that inputs were written and are not yet consumed: the entry is STAGED."""
        self._block("staged")
        self._state = BufferState.STAGED

    @property
    def state(self) -> BufferState:
        """Where the buffer is in its life, as seen by this lease; FREE after its end."""
        return self._state if self._held else BufferState.FREE

    @property
    @abstractmethod
    def tier(self) -> Tier:
        """The memory tier the buffer is in."""

    @property
    def nbytes(self) -> int:
        """Size of `array` in bytes; the memory behind it may be up to an eighth larger."""
        return self.spec.size_bytes

    @property
    def array(self) -> Any:
        """The buffer with the spec's shape and dtype; StaleBufferError after the release."""
        return self._block("used").array

    @property
    def address(self) -> int:
        """Address of the first byte, as kernels see it."""
        return self._block("used").address

    @property
    def device_array(self) -> _cuda.DeviceArray:
        """The buffer as a kernel argument, on any stream: made at first use (about 30 us), then remembered."""
        return self._block("used").device_view()

    @property
    def generation(self) -> int:
        """Number of leases that this memory has had, this one included."""
        return self._block("used").generation

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3 of the interface; the stream is None, as the buffer carries no order of its own."""
        block = self._block("used")
        dtype = self.spec.dtype
        interface: dict[str, Any] = {
            "shape": self.spec.shape,
            "typestr": "<u2" if is_bfloat16(dtype) else dtype.str,
            "data": (block.address, False),
            "strides": None,
            "stream": None,
            "version": 3,
        }
        if dtype.names is not None:  # the typestr of a record is that of plain bytes
            with contextlib.suppress(ValueError):  # NumPy describes no fields that overlap
                interface["descr"] = dtype.descr
        return interface

    def __dlpack__(self, **options: Any) -> object:
        """Offer the buffer as a DLPack tensor: ``torch.from_dlpack(entry)``, ``numpy.from_dlpack(entry)``.

        Pinned memory is offered as memory of the CPU, and so is every tier in the simulator; device and managed memory
        as their GPU's. The tensor keeps the entry alive, but a release ends the right to it all the same. It carries no
        order, as the interface above: a consumer's stream waits for nothing, which is what a capture needs. bfloat16
        goes as uint16, to be viewed as what it is on the other side:
        ``torch.from_dlpack(entry).view(torch.bfloat16)``.
        """
        return self._exporter().__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        """DLPack's device type and number: (1, 0) for the CPU, (2, n) for GPU n, (13, n) for its managed memory."""
        kind, number = self._exporter().__dlpack_device__()
        return int(kind), int(number)

    def _exporter(self) -> _cuda.SupportsDLPack:
        start = self.address  # first: where a pool moves entries, this holds the entry where it is
        return _cuda.dlpack_exporter(self.device_array if self.tier is Tier.MANAGED else self.array, start, self)

    def __enter__(self: E) -> E:
        self._block("used")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._held:
            self.release()

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a lease cannot be copied or pickled ({self.spec}): copy its array")

    def __getattr__(self, name: str) -> Any:
        """Give what `__init__` left unset its default."""
        try:
            return _DEFAULTS[name]
        except KeyError:
            raise AttributeError(f"a BufferEntry has no attribute {name!r}") from None

    def _block(self, what: str) -> Block:
        try:
            block = self._held[0].block
        except IndexError:
            self._refuse(what)
        if block.memory.life.ended and what != "released":
            block.refuse_ended()
        return block

    def _refuse(self, what: str) -> NoReturn:
        where = f", at {self._site}" if self._site else ""
        if what == "released":
            text = f"{self.spec} was released before{where}: release each lease once"
        else:
            text = f"{self.spec} was {what} after its release{where}: allocate a new buffer"
        raise StaleBufferError(text + ("" if where else " (NUMBABUF_DEBUG=1 says where it was released)"))

    def __repr__(self) -> str:
        return f"<BufferEntry {self.spec} {self.state.value}>"


class FixedEntry(BufferEntry):
    """A leased buffer at one address, in the tier of its spec, until its release."""

    __slots__ = ()

    @property
    def tier(self) -> Tier:
        """The memory tier the buffer is in."""
        return self.spec.tier


_DEFAULTS = {"_site": "", "_state": BufferState.ALLOCATED, "last_used": None, "use_count": 0}
