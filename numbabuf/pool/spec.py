"""What a buffer is asked to be: its shape, element type and memory tier, and the states of its life.

Values only: nothing here allocates, and no device is needed. A `BufferSpec` is a dictionary key on the pools' hot
path, so its hash and size are computed once.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..checks import whole_number

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

__all__ = [
    "EXACT_ABOVE", "BufferSpec", "BufferState", "Tier", "as_code", "is_bfloat16", "line_key", "resolve_dtype",
    "size_class",
]  # fmt: skip


class BufferState(enum.Enum):
    """Where a buffer is in its life."""

    FREE = "free"
    """Idle in a pool; must not be touched."""
    ALLOCATED = "allocated"
    """Leased; its contents are undefined."""
    STAGED = "staged"
    """Inputs are written and not yet consumed."""
    IN_USE = "in_use"
    """Queued GPU work reads or writes it."""


class Tier(enum.Enum):
    """The kind of memory a buffer lives in."""

    DEVICE = "device"
    """Memory of the GPU (`numba.cuda.device_array`)."""
    MANAGED = "managed"
    """Memory that the driver migrates on access (`numba.cuda.managed_array`)."""
    PINNED = "pinned"
    """Page-locked host memory (`numba.cuda.pinned_array`); kernels can read it in place."""


def is_bfloat16(dtype: np.dtype) -> bool:
    """Return whether `dtype` is the bfloat16 that ml_dtypes registers with NumPy."""
    return dtype.kind == "V" and dtype.name == "bfloat16"


def resolve_dtype(dtype: DTypeLike) -> np.dtype:
    """Turn what a user gives for an element type into a NumPy dtype.

    Parameters
    ----------
    dtype
        Anything `numpy.dtype` takes, or the string "bfloat16" (with the package ml_dtypes).

    Raises
    ------
    TypeError
        NumPy knows no such type, or it holds Python objects or has no size, or ml_dtypes is not installed.
    """
    if isinstance(dtype, str) and dtype == "bfloat16":
        try:
            import ml_dtypes
        except ImportError:
            raise TypeError('dtype "bfloat16" needs the package ml_dtypes: pip install numbabuf[bfloat16]') from None
        return np.dtype(ml_dtypes.bfloat16)
    if dtype is None:
        raise TypeError("dtype is None: give an element type, for instance 'float32'")
    try:
        resolved = np.dtype(dtype)
    except Exception as error:  # NumPy's parser of type strings raises SyntaxError and ValueError, too
        raise TypeError(f"dtype {dtype!r} is not an element type that NumPy knows: {error}") from None
    if resolved.hasobject or resolved.itemsize == 0 or resolved.subdtype is not None:
        raise TypeError(f"dtype {dtype!r} cannot live in GPU memory: use a plain type of fixed size")
    if not resolved.isnative:
        raise TypeError(f"dtype {dtype!r} has foreign byte order: use {resolved.newbyteorder('=')!r}")
    return resolved


EXACT_ABOVE = 16 << 20
"""Requests above this many bytes are not rounded up."""


def size_class(nbytes: int) -> int:
    """Return `nbytes` rounded up to its size class: eight classes per power of two, exact above 16 MiB.

    The waste stays below an eighth of the request: the step between classes is an eighth of the power of two below it.

    Examples
    --------
    >>> size_class(1000), size_class(1025), size_class(16 << 20), size_class((16 << 20) + 1)
    (1024, 1152, 16777216, 16777217)
    """
    if nbytes > EXACT_ABOVE:
        return nbytes
    step = 1 << max(0, (nbytes - 1).bit_length() - 4)
    return -(-nbytes // step) * step


_TIERS = {tier: at for at, tier in enumerate(Tier)}


def line_key(tier: Tier, nbytes: int) -> int:
    """Return the key of the free list of a capacity in a tier; of one tier, larger keys are larger capacities."""
    return nbytes * len(_TIERS) + _TIERS[tier]


class BufferSpec:
    """Shape, element type and tier of a buffer: a frozen, hashable value.

    Parameters
    ----------
    shape
        Number of elements, or a tuple of numbers of elements, each >= 0.
    dtype
        Anything `numpy.dtype` takes, or "bfloat16".
    tier
        The memory tier, a `Tier` or its value ("device", "managed", "pinned").

    Raises
    ------
    TypeError
        A shape entry is not an integer, or the dtype is unknown.
    ValueError
        A shape entry is negative, the buffer is larger than an address space, or the tier is unknown.

    Examples
    --------
    >>> spec = BufferSpec((256, 16), "int32")
    >>> spec.size_bytes
    16384
    >>> spec == BufferSpec([256, 16], np.int32)
    True
    """

    __slots__ = ("_hash", "dtype", "line", "shape", "size_bytes", "tier")

    shape: tuple[int, ...]
    dtype: np.dtype
    tier: Tier
    size_bytes: int
    line: int
    """The key of the free list that serves it first."""

    def __init__(
        self, shape: int | Sequence[int], dtype: DTypeLike = "float32", tier: Tier | str = Tier.DEVICE
    ) -> None:
        shape = _resolve_shape(shape)
        resolved = resolve_dtype(dtype)
        try:
            tier = Tier(tier)
        except ValueError:
            raise ValueError(f"tier {tier!r} is unknown; use one of {', '.join(t.value for t in Tier)}") from None
        nbytes = math.prod(shape) * resolved.itemsize
        # An array without elements has strides all the same, and NumPy and Numba compute them as if it had some.
        span = math.prod(max(1, extent) for extent in shape) * resolved.itemsize
        if span >= 1 << 62:
            raise ValueError(f"shape {shape} of {resolved} spans {span} bytes, beyond any address space")
        put = object.__setattr__
        put(self, "shape", shape)
        put(self, "dtype", resolved)
        put(self, "tier", tier)
        put(self, "size_bytes", nbytes)
        put(self, "line", line_key(tier, size_class(max(1, nbytes))))
        put(self, "_hash", hash((shape, resolved, tier)))

    def __setattr__(self, name: str, value: object = None) -> None:
        raise AttributeError(f"BufferSpec is frozen: make a new one instead of setting {name}")

    __delattr__ = __setattr__  # type: ignore[assignment]

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined, no-any-return]

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, BufferSpec):
            return NotImplemented
        return self.shape == other.shape and self.dtype == other.dtype and self.tier is other.tier

    def __reduce__(self) -> tuple:
        return BufferSpec, (self.shape, self.dtype, self.tier)

    def __repr__(self) -> str:
        shape = self.shape[0] if len(self.shape) == 1 else self.shape
        tier = "" if self.tier is Tier.DEVICE else f", {self.tier.value}"
        return f"BufferSpec({shape}, {self.dtype.name}{tier})"


def as_code(spec: BufferSpec) -> str:
    """Return the call that makes `spec`, for errors that tell a program's author what to write.

    Examples
    --------
    >>> print(as_code(BufferSpec((2, 3), "int64", Tier.PINNED)))
    BufferSpec((2, 3), 'int64', Tier.PINNED)
    """
    dtype = spec.dtype.name if spec.dtype.names is None else spec.dtype.descr
    tier = "" if spec.tier is Tier.DEVICE else f", {spec.tier}"
    return f"BufferSpec({spec.shape}, {dtype!r}{tier})"


def _resolve_shape(shape: object) -> tuple[int, ...]:
    if not isinstance(shape, (tuple, list)):
        return (whole_number("shape", shape),)
    return tuple(whole_number(f"shape[{i}]", entry) for i, entry in enumerate(shape))
