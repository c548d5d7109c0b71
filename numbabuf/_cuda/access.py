"""Loads and stores at raw addresses, for use inside `@cuda.jit` kernels on the GPU and in the simulator alike.

A kernel that takes one table of addresses costs one launch argument instead of one per array, and can move 16 bytes
per access, which no Numba element type allows. Every load returns a signed 64-bit integer (narrow values are
zero-extended), so that mixing it with literals never turns into float64, as uint64 would.
`load16` returns two of them and needs a 16-byte aligned address; the others need their own size.

`publish8` is the store for a word that the host reads while the kernel runs: it is volatile, which the memory model of
PTX counts as a strong access of the whole system's scope. The weak `store8` may be torn or put off by that model.
"""

from __future__ import annotations

from typing import Any

from numba.core import config

__all__ = [
    "add8", "load1", "load2", "load4", "load8", "load16", "publish8", "store1", "store2", "store4", "store8", "store16",
]  # fmt: skip


def _simulated() -> dict[str, Any]:
    """The same operations on host memory, for the simulator."""
    import ctypes
    import threading

    lock = threading.Lock()  # stands in for the atomicity of `add8` between the simulator's threads

    def pair(kind: Any) -> tuple[Any, Any]:
        def load(addr: int) -> int:
            return kind.from_address(int(addr)).value

        def store(addr: int, value: int) -> None:
            kind.from_address(int(addr)).value = int(value)

        return load, store

    def load16(addr: int) -> tuple[int, int]:
        words = (ctypes.c_int64 * 2).from_address(int(addr))
        return words[0], words[1]

    def store16(addr: int, low: int, high: int) -> None:
        words = (ctypes.c_int64 * 2).from_address(int(addr))
        words[0], words[1] = int(low), int(high)

    def add8(addr: int, value: int) -> int:
        with lock:
            word = ctypes.c_int64.from_address(int(addr))
            old = word.value
            word.value = old + int(value)
            return old

    load1, store1 = pair(ctypes.c_uint8)
    load2, store2 = pair(ctypes.c_uint16)
    load4, store4 = pair(ctypes.c_uint32)
    load8, store8 = pair(ctypes.c_int64)
    publish8 = store8
    return {name: value for name, value in locals().items() if name in __all__}


def _compiled() -> dict[str, Any]:
    """LLVM intrinsics in the global address space."""
    from llvmlite import ir
    from numba.cuda import cgutils, types
    from numba.cuda.extending import intrinsic

    word = ir.IntType(64)
    vector = ir.VectorType(word, 2)
    int32 = ir.IntType(32)
    global_space = 1

    def pointer(context: Any, builder: Any, value: Any, kind: Any, to: Any) -> Any:
        addr = context.cast(builder, value, kind, types.uint64)
        return builder.inttoptr(addr, ir.PointerType(to, global_space))

    def named(function: Any, name: str) -> Any:
        function.__name__ = function.__qualname__ = name
        return intrinsic(function)

    def integers(bits: int) -> tuple[Any, Any]:
        kind = ir.IntType(bits)

        def load(typingctx: Any, addr: Any) -> Any:
            def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
                value = builder.load(pointer(context, builder, args[0], sig.args[0], kind))
                value.align = bits // 8
                return value if bits == 64 else builder.zext(value, word)

            return types.int64(addr), codegen

        def store(typingctx: Any, addr: Any, value: Any) -> Any:
            def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
                wide = context.cast(builder, args[1], sig.args[1], types.int64)
                narrow = wide if bits == 64 else builder.trunc(wide, kind)
                done = builder.store(narrow, pointer(context, builder, args[0], sig.args[0], kind))
                done.align = bits // 8
                return context.get_dummy_value()

            return types.void(addr, value), codegen

        return named(load, f"load{bits // 8}"), named(store, f"store{bits // 8}")

    def publish8(typingctx: Any, addr: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            wide = context.cast(builder, args[1], sig.args[1], types.int64)
            place = context.cast(builder, args[0], sig.args[0], types.int64)
            # llvmlite cannot spell a volatile store, so PTX does; as it clobbers memory, no other access moves past it
            kind = ir.FunctionType(ir.VoidType(), (word, word))
            builder.asm(kind, "st.volatile.global.u64 [$0], $1;", "l,l,~{memory}", (place, wide), side_effect=True)
            return context.get_dummy_value()

        return types.void(addr, value), codegen

    def load16(typingctx: Any, addr: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            value = builder.load(pointer(context, builder, args[0], sig.args[0], vector))
            value.align = 16
            halves = [builder.extract_element(value, ir.Constant(int32, i)) for i in (0, 1)]
            return cgutils.pack_array(builder, halves)

        return types.UniTuple(types.int64, 2)(addr), codegen

    def store16(typingctx: Any, addr: Any, low: Any, high: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            value = ir.Constant(vector, ir.Undefined)
            for i in (0, 1):
                half = context.cast(builder, args[i + 1], sig.args[i + 1], types.int64)
                value = builder.insert_element(value, half, ir.Constant(int32, i))
            done = builder.store(value, pointer(context, builder, args[0], sig.args[0], vector))
            done.align = 16
            return context.get_dummy_value()

        return types.void(addr, low, high), codegen

    def add8(typingctx: Any, addr: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            wide = context.cast(builder, args[1], sig.args[1], types.int64)
            return builder.atomic_rmw("add", pointer(context, builder, args[0], sig.args[0], word), wide, "monotonic")

        return types.int64(addr, value), codegen

    made: dict[str, Any] = {}
    for bits in (8, 16, 32, 64):
        made[f"load{bits // 8}"], made[f"store{bits // 8}"] = integers(bits)
    for function in (load16, store16, publish8, add8):
        made[function.__name__] = intrinsic(function)
    return made


def _operations() -> dict[str, Any]:
    if config.ENABLE_CUDASIM:
        return _simulated()
    try:
        return _compiled()
    except ImportError:  # numba without numba-cuda: `_cuda.require` refuses with the remedy at first use
        return _simulated()


_made = _operations()
add8, publish8 = _made["add8"], _made["publish8"]
load1, load2, load4, load8, load16 = (_made[f"load{n}"] for n in (1, 2, 4, 8, 16))
store1, store2, store4, store8, store16 = (_made[f"store{n}"] for n in (1, 2, 4, 8, 16))
