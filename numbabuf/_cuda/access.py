"""Loads and stores at raw addresses, for use inside `@cuda.jit` kernels on the GPU and in the simulator alike.

A kernel that takes one table of addresses costs one launch argument instead of one per array, and can move 16 bytes
per access, which no Numba element type allows. Every load returns a signed 64-bit integer (narrow values are
zero-extended), so that mixing it with literals never turns into float64, as uint64 would.
`load16` returns two of them and needs a 16-byte aligned address; the others need their own size.

`publish8` is the store for a word that the host reads while the kernel runs: it is volatile, which the memory model of
PTX counts as a strong access of the whole system's scope. The weak `store8` may be torn or put off by that model.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

from numba.core import config

__all__ = [
    "add8", "load1", "load2", "load4", "load8", "load16", "publish8", "store1", "store2", "store4", "store8", "store16",
]  # fmt: skip

_KINDS = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_int64}
_adding = threading.Lock()  # stands in for the atomicity of `add8` between the simulator's threads


def _host_load(nbytes: int) -> Callable[[int], int]:
    kind = _KINDS[nbytes]

    def load(addr: int) -> int:
        return kind.from_address(int(addr)).value

    return load


def _host_store(nbytes: int) -> Callable[[int, int], None]:
    kind = _KINDS[nbytes]

    def store(addr: int, value: int) -> None:
        kind.from_address(int(addr)).value = int(value)

    return store


def _host_load16(addr: int) -> tuple[int, int]:
    words = (ctypes.c_int64 * 2).from_address(int(addr))
    return words[0], words[1]


def _host_store16(addr: int, low: int, high: int) -> None:
    words = (ctypes.c_int64 * 2).from_address(int(addr))
    words[0], words[1] = int(low), int(high)


def _host_add8(addr: int, value: int) -> int:
    with _adding:
        word = ctypes.c_int64.from_address(int(addr))
        old = word.value
        word.value = old + int(value)
        return old


def on_host() -> dict[str, Callable[..., Any]]:
    """Return the operations, by name, on host memory: what the simulator runs."""
    made: dict[str, Callable[..., Any]] = {"load16": _host_load16, "store16": _host_store16, "add8": _host_add8}
    made["publish8"] = _host_store(8)
    for nbytes in _KINDS:
        made |= {f"load{nbytes}": _host_load(nbytes), f"store{nbytes}": _host_store(nbytes)}
    return made


def _compiled() -> dict[str, Callable[..., Any]]:
    from . import intrinsics

    made = {name: getattr(intrinsics, name) for name in ("load16", "store16", "publish8", "add8")}
    for nbytes in _KINDS:
        made |= {f"load{nbytes}": intrinsics.load(nbytes), f"store{nbytes}": intrinsics.store(nbytes)}
    return made


def _operations() -> dict[str, Callable[..., Any]]:
    if config.ENABLE_CUDASIM:
        return on_host()
    try:
        return _compiled()
    except ImportError:  # numba without numba-cuda: `_cuda.require` refuses with the remedy at first use
        return on_host()


_made = _operations()
add8, publish8 = _made["add8"], _made["publish8"]
load1, load2, load4, load8, load16 = (_made[f"load{n}"] for n in (1, 2, 4, 8, 16))
store1, store2, store4, store8, store16 = (_made[f"store{n}"] for n in (1, 2, 4, 8, 16))
