"""Arrays of other libraries as kernel arguments, by DLPack: torch, CuPy, JAX and whatever else speaks it.

The other direction needs no function: entries and slots carry `__cuda_array_interface__`, entries `__dlpack__` as well,
and the streams of managers and steps `__cuda_stream__`. Sits above `_cuda` alone.
"""

from __future__ import annotations

from .. import _cuda

__all__ = ["from_dlpack"]


def from_dlpack(tensor: _cuda.SupportsDLPack, *, stream: _cuda.StreamLike | None = None) -> _cuda.DeviceArray:
    """Return a device array over the memory of another library's tensor, without a copy.

    Parameters
    ----------
    tensor
        Anything with ``__dlpack__`` and ``__dlpack_device__`` in memory that a kernel can reach: of the GPU, managed or
        pinned; in the simulator, memory of the CPU.
    stream
        The stream on which kernels will read it: the tensor's library makes that stream wait for its own work. None: it
        orders nothing, and the caller does; in a capture that is the only legal choice.

    Returns
    -------
    array
        A Numba device array, which a kernel takes on any stream. It keeps the tensor alive, and a captured graph keeps
        the array. bfloat16, which Numba cannot type, appears as uint16.

    Raises
    ------
    TypeError
        `tensor` speaks no DLPack.
    BufferError
        Its memory is none that a kernel can reach.

    Examples
    --------
    >>> from numbabuf import BufferSpec, SimpleBufferPool
    >>> pool = SimpleBufferPool()
    >>> entry = pool.allocate(BufferSpec((2, 3), "int64"))
    >>> from_dlpack(entry).shape  # or a torch, CuPy or JAX array
    (2, 3)
    >>> entry.release()
    >>> pool.close()
    """
    if not hasattr(tensor, "__dlpack__") or not hasattr(tensor, "__dlpack_device__"):
        raise TypeError(f"from_dlpack was given {type(tensor).__name__}: give an array with __dlpack__")
    return _cuda.from_dlpack(tensor, None if stream is None else _cuda.as_stream(stream))
