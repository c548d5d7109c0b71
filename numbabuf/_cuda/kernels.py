"""Every `@cuda.jit` kernel of numbabuf, and the layout of the tables they read.

Kernels take the address of a table instead of arrays: one launch argument, whatever the number of buffers. All are
grid-stride, so any launch shape is right, and all arithmetic on values is done on their bits, so that a conversion
gives the same bits on every backend. No host code here may use `cuda`: the simulator replaces it during a launch.
"""

from __future__ import annotations

from numba import types

from . import cuda
from .access import add8, load1, load2, load4, load8, load16, publish8, store1, store2, store4, store8, store16

__all__ = ["KERNELS", "copy_many", "fill_slots", "send_slots"]

WORD = 8
"""Bytes of one table entry (int64)."""

# The table, in device memory: HEAD words, ROW words per slot, the words of the step, SEND_ROW words per output.
STEP, DONE, RING_ADDRESS, BLOCK_BYTES, RING_DEPTH, RETIRED_ADDRESS = 0, 1, 2, 3, 4, 5
STEP_ADDRESS, STEP_WORDS, RETURN_ADDRESS, RETURN_BYTES, RETURNED_ADDRESS, SENT, HEAD = 6, 7, 8, 9, 10, 11, 12
"""Words of the head: fills completed, thread blocks that have finished this fill, where the staging ring lies, bytes
of one of its blocks, number of blocks, where the host reads how many fills are completed; where the words of the step
lie and how many there are, where the return ring lies, bytes of one of its blocks, where the host reads the number of
the last step that was sent, thread blocks that have finished this send. The third and fourth are read by one access, as
are the fifth and sixth, the seventh and eighth, and the ninth and tenth."""
SOURCE, TARGET, OPERATION, SOURCE_ITEM, TARGET_ITEM = 0, 1, 2, 3, 4
PITCH, PAD_MODE, PAD_LOW, PAD_HIGH, ROW = 5, 6, 7, 8, 9
"""Words of a row: offset of the staged values in a block, address of the slot, conversion, bytes of a staged and of a
slot's element, elements from one row of the slot to the next, how to pad, the pad's 16 bytes."""

# The live part of a step, at the start of its staging block: LIVE words per slot.
ROWS, COLUMNS, PADDED_ROWS, PADDED_COLUMNS, LIVE = 0, 1, 2, 3, 4
"""Words: staged rows and columns, and the rows and columns that are valid after the fill. A one-dimensional slot, and
rows that lie end to end, are one row."""

# The words of a step, in its staging block behind the live part, and from the fill on in the table: NUMBER, PLACE, then
# the live size of each axis, the tokens last.
NUMBER, PLACE, SIZES = 0, 1, 2
"""Words: under which number the step is sent, and into which block of the return ring."""

SEND_SOURCE, SEND_TARGET, SEND_SIZE, SEND_EXTRA = 0, 1, 2, 3
SEND_WIDTH, SEND_OPERATION, SEND_SOURCE_ITEM, SEND_TARGET_ITEM, SEND_ROW = 4, 5, 6, 7, 8
"""Words of an output's row: address of the output, offset in a return block, which word of the step is its size (-1:
none), rows added to that, elements of a row, conversion, bytes of an element there and in the block."""

PAD_VALUE, PAD_REPEAT, PAD_KEEP = 0, 1, 2
"""How the part past the staged values is filled: with a value, with the last one (`numpy.pad`'s "edge"), not at all."""

RAW, I64_I32, I32_I64, F64_F32, F32_F16, F16_F32, F32_BF16, BF16_F32 = 0, 1, 2, 3, 4, 5, 6, 7
"""Conversions between the staged and the slot's element type."""

COPY_SOURCE, COPY_TARGET, COPY_BYTES, COPY_ROW = 0, 1, 2, 3
"""Words of a row of the copy table: address to read, address to write, number of bytes."""

_LANES = 32  # threads that share one row of a two-dimensional slot: a warp


@cuda.jit(device=True)
def _narrow(bits: int, mantissa: int, bias: int, to_mantissa: int, to_bias: int, quiet: int) -> int:
    """Round a float's bits to a narrower format: to nearest, ties to even, as IEEE 754 and NumPy do.

    `mantissa` and `bias` describe the source format, `to_mantissa` and `to_bias` the target. Overflow gives infinity,
    underflow a subnormal or zero. A NaN keeps its sign; `quiet` says what else: 0 keeps the leading payload (NumPy's
    float16), 1 also sets the quiet bit (the processor's float32), 2 drops the payload (ml_dtypes' bfloat16).
    """
    exponent_max = 2 * bias + 1
    to_max = 2 * to_bias + 1
    exponent = (bits >> mantissa) & exponent_max
    fraction = bits & ((1 << mantissa) - 1)
    drop = mantissa - to_mantissa
    if exponent == exponent_max:
        result = to_max << to_mantissa
        if fraction != 0:
            payload = fraction >> drop
            if quiet == 2:
                payload = 0
            if quiet != 0:
                payload |= 1 << (to_mantissa - 1)
            if payload == 0:
                payload = 1
            result |= payload
    else:
        if exponent == 0:
            exponent = 1
        else:
            fraction |= 1 << mantissa
        exponent += to_bias - bias
        if exponent < 1:
            drop += 1 - exponent
            exponent = 1
            if drop > mantissa + 2:
                drop = mantissa + 2  # everything is below half of the least subnormal
        result = fraction >> drop
        rest = fraction & ((1 << drop) - 1)
        half = 1 << (drop - 1)
        if rest > half or (rest == half and (result & 1) == 1):
            result += 1
        result += (exponent - 1) << to_mantissa  # the leading bit carries into the exponent by itself
        if result > to_max << to_mantissa:
            result = to_max << to_mantissa
    return result


@cuda.jit(device=True)
def _widen_f16(bits: int) -> int:
    """float16 bits to float32 bits, exactly."""
    sign = (bits & 0x8000) << 16
    exponent = (bits >> 10) & 0x1F
    fraction = bits & 0x3FF
    if exponent == 0x1F:
        result = 0x7F800000 | (fraction << 13)
    elif exponent != 0:
        result = ((exponent + 112) << 23) | (fraction << 13)
    elif fraction == 0:
        result = 0
    else:
        exponent = 113
        while (fraction & 0x400) == 0:
            fraction <<= 1
            exponent -= 1
        result = (exponent << 23) | ((fraction & 0x3FF) << 13)
    return sign | result


@cuda.jit(device=True)
def _converted(operation: int, addr: int) -> int:
    """The converted bits of the staged value at `addr`; not for RAW."""
    if operation == I64_I32:
        return load8(addr) & 0xFFFFFFFF
    if operation == I32_I64:
        return (load4(addr) ^ 0x80000000) - 0x80000000
    if operation == F64_F32:
        bits = load8(addr)
        return _narrow(bits & 0x7FFFFFFFFFFFFFFF, 52, 1023, 23, 127, 1) | (((bits >> 63) & 1) << 31)
    if operation == F32_F16:
        bits = load4(addr)
        return _narrow(bits & 0x7FFFFFFF, 23, 127, 10, 15, 0) | ((bits >> 31) << 15)
    if operation == F16_F32:
        return _widen_f16(load2(addr))
    if operation == F32_BF16:
        bits = load4(addr)
        return _narrow(bits & 0x7FFFFFFF, 23, 127, 7, 127, 2) | ((bits >> 31) << 15)
    return load2(addr) << 16


@cuda.jit(device=True)
def _store(addr: int, itemsize: int, bits: int) -> None:
    """The low `itemsize` bytes of `bits`, one of 1, 2, 4, 8."""
    if itemsize == 4:
        store4(addr, bits)
    elif itemsize == 8:
        store8(addr, bits)
    elif itemsize == 2:
        store2(addr, bits)
    else:
        store1(addr, bits)


@cuda.jit(device=True)
def _load(addr: int, itemsize: int) -> int:
    """`itemsize` bytes, one of 1, 2, 4, 8."""
    if itemsize == 4:
        return load4(addr)
    if itemsize == 8:
        return load8(addr)
    if itemsize == 2:
        return load2(addr)
    return load1(addr)


@cuda.jit(device=True)
def _copy_bytes(source: int, target: int, nbytes: int, thread: int, threads: int) -> None:
    """Copy by `threads` cooperating threads, with 16-byte accesses where both ends share their alignment.

    Four loads are in flight before the first store: a read of host memory takes about a microsecond to come back.
    """
    if ((source ^ target) & 15) == 0:
        head = min((16 - (source & 15)) & 15, nbytes)
        i = thread
        while i < head:
            store1(target + i, load1(source + i))
            i += threads
        words = (nbytes - head) >> 4
        s = source + head
        d = target + head
        i = thread
        while i + 3 * threads < words:
            a0, a1 = load16(s + i * 16)
            b0, b1 = load16(s + (i + threads) * 16)
            c0, c1 = load16(s + (i + 2 * threads) * 16)
            d0, d1 = load16(s + (i + 3 * threads) * 16)
            store16(d + i * 16, a0, a1)
            store16(d + (i + threads) * 16, b0, b1)
            store16(d + (i + 2 * threads) * 16, c0, c1)
            store16(d + (i + 3 * threads) * 16, d0, d1)
            i += 4 * threads
        while i < words:
            a0, a1 = load16(s + i * 16)
            store16(d + i * 16, a0, a1)
            i += threads
        done = head + words * 16
    elif ((source ^ target) & 3) == 0:
        head = min((4 - (source & 3)) & 3, nbytes)
        i = thread
        while i < head:
            store1(target + i, load1(source + i))
            i += threads
        words = (nbytes - head) >> 2
        i = thread
        while i < words:
            store4(target + head + i * 4, load4(source + head + i * 4))
            i += threads
        done = head + words * 4
    else:
        done = 0
    i = done + thread
    while i < nbytes:
        store1(target + i, load1(source + i))
        i += threads


@cuda.jit(device=True)
def _pattern_byte(low: int, high: int, addr: int) -> int:
    """The byte of a 16-byte pattern that falls on `addr`."""
    word = high if (addr & 8) != 0 else low
    return word >> ((addr & 7) * 8)


@cuda.jit(device=True)
def _pad_bytes(begin: int, end: int, low: int, high: int, thread: int, threads: int) -> None:
    """Fill addresses [begin, end) with a 16-byte pattern whose phase is the address modulo 16."""
    first = min((begin + 15) & ~15, end)
    i = begin + thread
    while i < first:
        store1(i, _pattern_byte(low, high, i))
        i += threads
    words = (end - first) >> 4
    i = thread
    while i < words:
        store16(first + i * 16, low, high)
        i += threads
    i = first + words * 16 + thread
    while i < end:
        store1(i, _pattern_byte(low, high, i))
        i += threads


@cuda.jit(device=True)
def _splat(bits: int, itemsize: int) -> int:
    """Repeat a value of 1, 2, 4 or 8 bytes over 8 bytes."""
    if itemsize == 1:
        return (bits & 0xFF) * 0x0101010101010101
    if itemsize == 2:
        return (bits & 0xFFFF) * 0x0001000100010001
    if itemsize == 4:
        return (bits & 0xFFFFFFFF) | (bits << 32)
    return bits


@cuda.jit
def fill_slots(table: int) -> None:
    """Move one staging block into all slots: convert, pad to the bucket, and tell the host that the block is read.

    Launch shape: (any, number of slots) thread blocks. `table` is the address of the fill table.

    The block to read is the fill's own count modulo the ring's depth: a replayed graph has frozen arguments, so the
    count lives in device memory and this kernel advances it. Every thread block reads the count before it reports
    itself done, and only the last one to report advances it, so none can see the next count. The same last block
    then publishes the count to the host, behind a system-wide fence: from then on the host may write the block again.

    Traffic: the staged bytes once over the bus, the padded bytes once into device memory.
    """
    step = load8(table + STEP * WORD)
    depth, retired = load16(table + RING_DEPTH * WORD)
    ring, block_bytes = load16(table + RING_ADDRESS * WORD)
    block = ring + (step % depth) * block_bytes
    if cuda.blockIdx.x + cuda.blockIdx.y == 0:
        words, count = load16(table + STEP_ADDRESS * WORD)
        given = block + cuda.gridDim.y * LIVE * WORD
        i = cuda.threadIdx.x
        while i < count:
            store8(words + i * WORD, load8(given + i * WORD))
            i += cuda.blockDim.x
    row = table + (HEAD + cuda.blockIdx.y * ROW) * WORD
    live = block + cuda.blockIdx.y * LIVE * WORD
    rows = load8(live + ROWS * WORD)
    columns = load8(live + COLUMNS * WORD)
    padded_rows = load8(live + PADDED_ROWS * WORD)
    padded_columns = load8(live + PADDED_COLUMNS * WORD)
    source = block + load8(row + SOURCE * WORD)
    target = load8(row + TARGET * WORD)
    operation = load8(row + OPERATION * WORD)
    source_item = load8(row + SOURCE_ITEM * WORD)
    target_item = load8(row + TARGET_ITEM * WORD)
    pitch = load8(row + PITCH * WORD)
    mode = load8(row + PAD_MODE * WORD)

    threads = cuda.blockDim.x * cuda.gridDim.x
    thread = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    groups = 1
    group = 0
    if padded_rows > 1 and threads > _LANES:
        # Whole warps only: the threads of a launch that is not a multiple of one have no row to share.
        groups = threads // _LANES
        group = thread // _LANES
        thread = thread % _LANES
        threads = _LANES
        if group >= groups:
            group = padded_rows

    r = group
    while r < padded_rows:
        from_row = r
        if r >= rows:
            from_row = rows - 1 if mode == PAD_REPEAT else -1
        count = columns if from_row >= 0 else 0
        s = source + from_row * columns * source_item
        d = target + r * pitch * target_item
        if operation == RAW:
            _copy_bytes(s, d, count * target_item, thread, threads)
        else:
            i = thread
            while i < count:
                _store(d + i * target_item, target_item, _converted(operation, s + i * source_item))
                i += threads
        if mode != PAD_KEEP and count < padded_columns:
            low = load8(row + PAD_LOW * WORD)
            high = load8(row + PAD_HIGH * WORD)
            if mode == PAD_REPEAT and count > 0:
                last = s + (count - 1) * source_item
                if operation != RAW:
                    low = _splat(_converted(operation, last), target_item)
                    high = low
                elif target_item == 16:
                    low = load8(last)
                    high = load8(last + 8)
                else:
                    low = _splat(_load(last, target_item), target_item)
                    high = low
            _pad_bytes(d + count * target_item, d + padded_columns * target_item, low, high, thread, threads)
        r += groups

    if cuda.blockDim.x > 1:  # the simulator takes milliseconds for a barrier, and runs this with one thread
        cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        cuda.threadfence()
        if add8(table + DONE * WORD, 1) == cuda.gridDim.x * cuda.gridDim.y - 1:
            # Two races that this fence ends; an atomic by itself orders nothing behind it. Another block reads its
            # staged values and adds to DONE; this one sees the sum and publishes; the host writes the staging block
            # again; the other block has read that. Or it has read the next count: STEP, stored below. The publication
            # is strong because a weak store is not ordered towards the host. Proof: tests/_cuda/test_memory_model.py.
            cuda.threadfence_system()
            store8(table + DONE * WORD, 0)
            store8(table + STEP * WORD, step + 1)
            publish8(retired, step + 1)


@cuda.jit
def send_slots(table: int, rows: int, chosen: int) -> None:
    """Move the live rows of the chosen outputs into the step's block of the return ring, and publish its number.

    Launch shape: (any, number of outputs) thread blocks. `table` is the address of the table, `rows` that of the rows
    of the outputs, `chosen` has a bit for each output that is sent.

    Number and block are read from the words that the fill of the same step copied: they differ from step to step, and
    a replayed graph has frozen arguments. Only this step's fill can have written them, as one step runs at a time.

    Traffic: the live bytes of the outputs once from device memory, once over the bus.
    """
    words = load8(table + STEP_ADDRESS * WORD)
    number = load8(words + NUMBER * WORD)
    if ((chosen >> cuda.blockIdx.y) & 1) != 0:
        row = rows + cuda.blockIdx.y * SEND_ROW * WORD
        ring, block_bytes = load16(table + RETURN_ADDRESS * WORD)
        size = load8(row + SEND_SIZE * WORD)
        count = load8(row + SEND_EXTRA * WORD)
        if size >= 0:
            count += load8(words + size * WORD)
        count *= load8(row + SEND_WIDTH * WORD)
        s = load8(row + SEND_SOURCE * WORD)
        d = ring + load8(words + PLACE * WORD) * block_bytes + load8(row + SEND_TARGET * WORD)
        operation = load8(row + SEND_OPERATION * WORD)
        source_item = load8(row + SEND_SOURCE_ITEM * WORD)
        target_item = load8(row + SEND_TARGET_ITEM * WORD)
        threads = cuda.blockDim.x * cuda.gridDim.x
        thread = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        if operation == RAW:
            _copy_bytes(s, d, count * target_item, thread, threads)
        else:
            i = thread
            while i < count:
                _store(d + i * target_item, target_item, _converted(operation, s + i * source_item))
                i += threads

    if cuda.blockDim.x > 1:
        cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        # System-wide, as what this block wrote is the host's: another block writes its part of the return block and
        # adds to SENT; this one sees the sum and publishes; the host reads the part before it has arrived. The second
        # fence orders what is behind the sum, which the atomic by itself does not. Proof as of `fill_slots`.
        cuda.threadfence_system()
        if add8(table + SENT * WORD, 1) == cuda.gridDim.x * cuda.gridDim.y - 1:
            cuda.threadfence_system()
            store8(table + SENT * WORD, 0)
            publish8(load8(table + RETURNED_ADDRESS * WORD), number)


@cuda.jit
def copy_many(table: int, rows: int) -> None:
    """Copy `rows` pieces of memory, each from any address to any other; no two of them may overlap in a target.

    Launch shape: any. `table` is the address of COPY_ROW words per piece, read in place; a thread block takes every
    gridDim-th piece and shares it among its threads, so pieces should not be much larger than the others.

    Traffic: the bytes of the pieces, once each way, and 24 bytes of table per piece and warp.
    """
    row = cuda.blockIdx.x
    while row < rows:
        piece = table + row * COPY_ROW * WORD
        nbytes = load8(piece + COPY_BYTES * WORD)
        source = load8(piece + COPY_SOURCE * WORD)
        target = load8(piece + COPY_TARGET * WORD)
        _copy_bytes(source, target, nbytes, cuda.threadIdx.x, cuda.blockDim.x)
        row += cuda.gridDim.x


KERNELS = (
    (fill_slots, (types.int64,)),
    (copy_many, (types.int64, types.int64)),
    (send_slots, (types.int64, types.int64, types.int64)),
)
"""Each kernel with the signature it is compiled for; the tests compile them all to machine code."""
