"""Memory that is reused: specs, blocks, leases and `SimpleBufferPool`. Knows the door to CUDA and no slot."""

from .pool import BufferPool, SimpleBufferPool

__all__ = ["BufferPool", "SimpleBufferPool"]
