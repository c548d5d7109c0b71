"""The raw accesses of `access`, compiled: LLVM intrinsics in the global address space.

Imports numba-cuda; `access` imports it where that is there. The values are those that LLVM builds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from llvmlite import ir
from numba.cuda import cgutils, types
from numba.cuda.extending import intrinsic

if TYPE_CHECKING:
    from numba.core.base import BaseContext
    from numba.core.types import Type
    from numba.core.typing import Context, Signature

WORD = ir.IntType(64)
PAIR = ir.VectorType(WORD, 2)
INDEX = ir.IntType(32)
GLOBAL_SPACE = 1

Typed = tuple["Signature", Callable[..., ir.Value]]
"""What an intrinsic returns: its signature, and what builds its code."""


def _pointer(context: BaseContext, builder: ir.IRBuilder, value: ir.Value, kind: Type, to: ir.Type) -> ir.Value:
    addr = context.cast(builder, value, kind, types.uint64)
    return builder.inttoptr(addr, ir.PointerType(to, GLOBAL_SPACE))


def _named(function: Callable[..., Typed], name: str) -> Any:
    function.__name__ = function.__qualname__ = name
    return intrinsic(function)


def load(nbytes: int) -> Callable[[int], int]:
    """Return ``load(addr)`` of 1, 2, 4 or 8 bytes, zero-extended to 64 bits."""
    kind = ir.IntType(8 * nbytes)

    def read(typingctx: Context, addr: Type) -> Typed:
        def codegen(context: BaseContext, builder: ir.IRBuilder, sig: Signature, args: Sequence[ir.Value]) -> ir.Value:
            value = builder.load(_pointer(context, builder, args[0], sig.args[0], kind))
            value.align = nbytes
            return value if nbytes == 8 else builder.zext(value, WORD)

        return types.int64(addr), codegen

    return _named(read, f"load{nbytes}")  # type: ignore[no-any-return]


def store(nbytes: int) -> Callable[[int, int], None]:
    """Return ``store(addr, value)`` of the low 1, 2, 4 or 8 bytes."""
    kind = ir.IntType(8 * nbytes)

    def write(typingctx: Context, addr: Type, value: Type) -> Typed:
        def codegen(context: BaseContext, builder: ir.IRBuilder, sig: Signature, args: Sequence[ir.Value]) -> ir.Value:
            wide = context.cast(builder, args[1], sig.args[1], types.int64)
            narrow = wide if nbytes == 8 else builder.trunc(wide, kind)
            done = builder.store(narrow, _pointer(context, builder, args[0], sig.args[0], kind))
            done.align = nbytes
            return context.get_dummy_value()

        return types.void(addr, value), codegen

    return _named(write, f"store{nbytes}")  # type: ignore[no-any-return]


@intrinsic
def load16(typingctx: Context, addr: Type) -> Typed:
    """Two words from a 16-byte aligned address by one access."""

    def codegen(context: BaseContext, builder: ir.IRBuilder, sig: Signature, args: Sequence[ir.Value]) -> ir.Value:
        value = builder.load(_pointer(context, builder, args[0], sig.args[0], PAIR))
        value.align = 16
        halves = [builder.extract_element(value, ir.Constant(INDEX, i)) for i in (0, 1)]
        return cgutils.pack_array(builder, halves)

    return types.UniTuple(types.int64, 2)(addr), codegen


@intrinsic
def store16(typingctx: Context, addr: Type, low: Type, high: Type) -> Typed:
    """Two words to a 16-byte aligned address by one access."""

    def codegen(context: BaseContext, builder: ir.IRBuilder, sig: Signature, args: Sequence[ir.Value]) -> ir.Value:
        value = ir.Constant(PAIR, ir.Undefined)
        for i in (0, 1):
            half = context.cast(builder, args[i + 1], sig.args[i + 1], types.int64)
            value = builder.insert_element(value, half, ir.Constant(INDEX, i))
        done = builder.store(value, _pointer(context, builder, args[0], sig.args[0], PAIR))
        done.align = 16
        return context.get_dummy_value()

    return types.void(addr, low, high), codegen


@intrinsic
def publish8(typingctx: Context, addr: Type, value: Type) -> Typed:
    """A word that the host reads while the kernel runs."""

    def codegen(context: BaseContext, builder: ir.IRBuilder, sig: Signature, args: Sequence[ir.Value]) -> ir.Value:
        wide = context.cast(builder, args[1], sig.args[1], types.int64)
        place = context.cast(builder, args[0], sig.args[0], types.int64)
        # llvmlite cannot spell a volatile store, so PTX does; as it clobbers memory, no other access moves past it
        kind = ir.FunctionType(ir.VoidType(), (WORD, WORD))
        builder.asm(kind, "st.volatile.global.u64 [$0], $1;", "l,l,~{memory}", (place, wide), side_effect=True)
        return context.get_dummy_value()

    return types.void(addr, value), codegen


@intrinsic
def add8(typingctx: Context, addr: Type, value: Type) -> Typed:
    """Add to a word, atomically; the word before it."""

    def codegen(context: BaseContext, builder: ir.IRBuilder, sig: Signature, args: Sequence[ir.Value]) -> ir.Value:
        wide = context.cast(builder, args[1], sig.args[1], types.int64)
        return builder.atomic_rmw("add", _pointer(context, builder, args[0], sig.args[0], WORD), wide, "monotonic")

    return types.int64(addr, value), codegen
