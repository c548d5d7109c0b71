"""The order of two streams: one manager's steps behind what is queued elsewhere, without the host's waiting.

Sits above `shared`, below `manager`.
"""

from __future__ import annotations

from .. import _cuda
from ..errors import CaptureError
from ..pool.block import refuse_captured, refuse_foreign
from ..pool.fence import Fences
from .shared import Shared

__all__ = ["put_behind"]

_CAPTURED = "what a graph waits for is fixed when it is captured: call wait_for before the capture or after it"


def put_behind(shared: Shared, stream: _cuda.Stream, fences: Fences) -> None:
    """Put what is queued on the stream of `shared` from now on behind what is queued on `stream`; the lock is held."""
    own = shared.stream
    if _cuda.capturing():
        raise CaptureError(f"wait_for was called inside a capture, and {_CAPTURED}")
    with _cuda.on_device(own.device):
        refuse_foreign(stream, own.device)
        for one in (stream, own):
            refuse_captured(one, _CAPTURED)
        fences.wait_for([stream], own)
