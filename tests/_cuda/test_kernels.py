"""`fill_slots` against its NumPy twin: every conversion, pad, length, alignment and launch shape, bit for bit.

The kernel is driven through tables made here, so that it meets alignments that no manager makes. The memory round the
slots is filled with noise and compared too: a kernel that writes past a slot changes it.
"""

import kit
import ml_dtypes
import numpy as np
import pytest
import twins
from hypothesis import given, settings
from hypothesis import strategies as st

from numbabuf import _cuda
from numbabuf._cuda import kernels
from numbabuf.step.conversion import CONVERSIONS

SIM = _cuda.SIM
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
RAW_TYPES = ("uint8", "int16", "float16", "float32", "int32", "int64", "float64", "complex128")
PAIRS = [(np.dtype(name), np.dtype(name), kernels.RAW) for name in RAW_TYPES]
PAIRS += [
    (*(BFLOAT16 if name == "bfloat16" else np.dtype(name) for name in names), operation)
    for names, operation in CONVERSIONS.items()
]
MODES = {"repeat_last": kernels.PAD_REPEAT, "keep": kernels.PAD_KEEP}
SPACE = 256  # every slot begins somewhere in the first bytes of a stretch of its own


class Job:
    """One slot of a fill: what is staged for it, where it lies, and what it should become."""

    def __init__(self, source, target, operation, data, slot, padded, pad=0, source_shift=0, target_shift=0):
        self.source, self.target, self.operation = source, target, operation
        self.data = np.ascontiguousarray(data, source)  # [live rows, live columns]
        self.slot = slot  # [rows, pitch] of the whole slot
        self.padded = padded  # rows and columns that are valid afterwards
        self.pad = pad
        self.source_shift, self.target_shift = source_shift, target_shift  # elements past a 256-byte boundary

    def row(self, source, target):
        row = [0] * kernels.ROW
        row[kernels.SOURCE], row[kernels.TARGET] = source, target
        row[kernels.OPERATION] = self.operation
        row[kernels.SOURCE_ITEM], row[kernels.TARGET_ITEM] = self.source.itemsize, self.target.itemsize
        row[kernels.PITCH] = self.slot[1]
        if isinstance(self.pad, str):
            row[kernels.PAD_MODE] = MODES[self.pad]
        else:
            value = twins.convert(self.pad, self.target).tobytes()
            pattern = np.frombuffer(value * (16 // len(value)), np.int64)
            row[kernels.PAD_LOW], row[kernels.PAD_HIGH] = pattern.tolist()
        return row

    def expect(self, memory, offset):
        """Apply the twin to the slot's bytes in `memory`."""
        rows, pitch = self.slot
        nbytes = rows * pitch * self.target.itemsize
        slot = memory[offset : offset + nbytes].view(self.target).reshape(rows, pitch)
        valid = slot[:, : self.padded[1]]
        valid[...] = twins.fill_slot(valid, self.data, self.padded[0], self.pad)


def fill(jobs, *, grid=1, threads=1, depth=1, step=0, seed=0):
    """Run one fill of `jobs` and compare all of device memory, not only the slots, with the twin."""
    random = np.random.default_rng(seed)
    stream = _cuda.as_stream(None)
    words = kernels.HEAD + kernels.ROW * len(jobs)
    offset = -(-words * kernels.WORD // SPACE) * SPACE
    source = -(-len(jobs) * kernels.LIVE * kernels.WORD // SPACE) * SPACE
    targets, sources = [], []
    for job in jobs:
        targets.append(offset + SPACE + job.target_shift * job.target.itemsize)
        nbytes = job.slot[0] * job.slot[1] * job.target.itemsize
        offset = -(-(targets[-1] + nbytes + SPACE) // SPACE) * SPACE
        sources.append(source + job.source_shift * job.source.itemsize)
        source = -(-(sources[-1] + job.data.nbytes) // SPACE) * SPACE

    memory = _cuda.empty_device(offset)
    before = random.integers(0, 256, offset, np.uint8)
    ring = _cuda.empty_pinned(SPACE + depth * source)
    ring[:] = random.integers(0, 256, ring.size, np.uint8)
    ring[:8].view(np.int64)[0] = step
    block = ring[SPACE + step % depth * source :][:source]
    live = block[: len(jobs) * kernels.LIVE * kernels.WORD].view(np.int64).reshape(-1, kernels.LIVE)
    head = [0] * kernels.HEAD
    head[kernels.STEP] = step
    head[kernels.RING_ADDRESS] = _cuda.address(ring) + SPACE
    head[kernels.BLOCK_BYTES], head[kernels.RING_DEPTH] = source, depth
    head[kernels.RETIRED_ADDRESS] = _cuda.address(ring)
    for job, at, target, sizes in zip(jobs, sources, targets, live, strict=True):
        block[at : at + job.data.nbytes] = job.data.reshape(-1).view(np.uint8)
        sizes[[kernels.ROWS, kernels.COLUMNS]] = job.data.shape
        sizes[[kernels.PADDED_ROWS, kernels.PADDED_COLUMNS]] = job.padded
        head += job.row(at, _cuda.address(memory) + target)
    before[: words * kernels.WORD].view(np.int64)[:] = head

    memory.copy_to_device(before, stream=stream.numba)
    _cuda.launch(kernels.fill_slots, (grid, len(jobs)), threads, stream, _cuda.address(memory))
    after = memory.copy_to_host(stream=stream.numba)
    stream.synchronize()

    wanted = before.copy()
    for job, target in zip(jobs, targets, strict=True):
        job.expect(wanted, target)
    wanted[: words * kernels.WORD].view(np.int64)[kernels.STEP] = step + 1
    wrong = np.flatnonzero(after != wanted)
    assert not wrong.size, (
        f"bytes {wrong[:8].tolist()} are {after[wrong[:8]].tolist()}, wanted {wanted[wrong[:8]].tolist()}; "
        f"slots begin at {targets}"
    )
    assert ring[:8].view(np.int64)[0] == step + 1, "the host was not told that the block is read"
    return [
        after[t : t + job.slot[0] * job.slot[1] * job.target.itemsize] for job, t in zip(jobs, targets, strict=True)
    ]


def values(source, operation, shape, seed):
    """Staged values: any bits at all, but integers that fit where the target is narrower (the host sees to that)."""
    random = np.random.default_rng(seed)
    if operation == kernels.I64_I32:
        return random.integers(-(1 << 31), 1 << 31, shape, np.int64)
    if operation == kernels.I32_I64 and not kit.loads_extend_the_sign():
        return random.integers(0, 1 << 31, shape, np.int32)
    raw = random.integers(0, 256, (*shape, source.itemsize), np.uint8)
    return raw.reshape(-1).view(source).reshape(shape)


@st.composite
def jobs(draw):
    source, target, operation = draw(st.sampled_from(PAIRS))
    if draw(st.booleans()):
        rows, width = 1, draw(st.sampled_from((1, 2, 7, 64, 129, 300)))  # one-dimensional
        padded_rows, live_rows = 1, 1
    else:
        rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 20))
        padded_rows = draw(st.integers(0, rows))
        live_rows = draw(st.integers(0, padded_rows))
    padded_columns = draw(st.integers(0, width))
    live_columns = draw(st.one_of(st.just(padded_columns), st.just(0), st.integers(0, padded_columns)))
    data = values(source, operation, (live_rows, live_columns), draw(st.integers(0, 99)))
    pad = draw(st.sampled_from(("repeat_last", "keep", 0, 1, 77)))
    shifts = st.integers(0, max(1, 16 // target.itemsize))  # past 16 bytes nothing new happens
    return Job(
        source, target, operation, data, (rows, width), (padded_rows, padded_columns), pad, draw(shifts), draw(shifts)
    )


# On the stand-in driver 33 threads and more take the path that gives each row to a warp; see also below.
GRIDS = st.integers(1, 2 if SIM else 3)
THREADS = st.integers(1, 4) if SIM else st.one_of(st.integers(1, 40), st.sampled_from((32, 64, 96)))


@settings(max_examples=60 if SIM else 400)
@given(st.lists(jobs(), min_size=1, max_size=2 if SIM else 4), GRIDS, THREADS, st.integers(1, 4), st.integers(0, 9))
def test_any_fill_equals_the_twin(work, grid, threads, depth, step):
    fill(work, grid=grid, threads=threads, depth=depth, step=step)


@pytest.mark.parametrize("pad", ["repeat_last", "keep", 7])
@pytest.mark.parametrize("grid, threads", [(1, 33), (1, 40), (2, 17), (1, 64)][: 2 if SIM else 4])
def test_rows_shared_out_to_warps(grid, threads, pad):
    """More than a warp of threads: 40 leaves eight threads that have no row and must keep out of the way."""
    source, target, operation = PAIRS[-3]
    data = values(source, operation, (3, 5), 0)
    raw = Job(
        np.dtype("int64"),
        np.dtype("int64"),
        kernels.RAW,
        values(np.dtype("int64"), 0, (4, 9), 1),
        (7, 11),
        (6, 11),
        pad,
    )
    fill([Job(source, target, operation, data, (6, 9), (5, 8), pad), raw], grid=grid, threads=threads)


@pytest.mark.parametrize("shift", range(0, 17, 1 if not SIM else 3))
@pytest.mark.parametrize("name", ["uint8", "int16", "float32", "int64", "complex128"])
def test_each_alignment_of_source_and_target(name, shift):
    """Long enough for 16-byte words with four in flight, from each misalignment of one end against the other."""
    dtype = np.dtype(name)
    work = [
        Job(
            dtype,
            dtype,
            kernels.RAW,
            values(dtype, 0, (1, n), n),
            (1, n + 9),
            (1, n + 7),
            pad,
            shift,
            (shift * other) % 16,
        )
        for n, other, pad in ((301, 1, 3), (47, 3, "repeat_last"), (5, 0, "repeat_last"))
    ]
    fill(work, grid=2, threads=2)


def test_successive_fills_read_successive_blocks():
    """The kernel's own count chooses the block: with noise in all others, a wrong choice shows."""
    dtype = np.dtype("int32")
    for step in range(8):
        fill(
            [Job(dtype, dtype, kernels.RAW, values(dtype, 0, (1, 10), step), (1, 16), (1, 16))],
            depth=3,
            step=step,
            grid=2,
        )


# --------------------------------------------------------------------------------------------- conversions, bit for bit


def patterns(unsigned, count, seed):
    return np.random.default_rng(seed).integers(0, np.iinfo(unsigned).max, count, unsigned, endpoint=True)


def near_boundaries(source, target, count, seed):
    """Bit patterns of `source` at and beside each kind of place where rounding to `target` decides.

    Values that `target` holds exactly, and ties between two of them, each with the next `source` value on both sides;
    results that are subnormal, that overflow, and that vanish; NaNs of all payloads; infinities and zeros.
    """
    fields = {"float64": (52, 11), "float32": (23, 8), "float16": (10, 5), "bfloat16": (7, 8)}
    (mantissa, exponent), (to_mantissa, to_exponent) = fields[source.name], fields[target.name]
    unsigned = np.dtype(f"u{source.itemsize}")
    random = np.random.default_rng(seed)
    bias, to_bias = (1 << (exponent - 1)) - 1, (1 << (to_exponent - 1)) - 1
    # Exponents from below the least subnormal of the target to beyond its largest value, all of them equally often.
    low = max(0, bias - to_bias - to_mantissa - 3)
    high = min((1 << exponent) - 1, bias + to_bias + 3)
    powers = random.integers(low, high, count, endpoint=True).astype(np.int64)
    fractions = random.integers(0, 1 << mantissa, count, np.int64)
    kept = random.integers(0, to_mantissa + 3, count)  # fractions with few leading bits: exact values and ties
    fractions = fractions >> (mantissa - kept) << (mantissa - kept)
    exact = (powers << mantissa | fractions) + random.integers(-1, 2, count)
    exact = np.concatenate([exact, (powers << mantissa) | random.integers(0, 1 << mantissa, count, np.int64)])
    nans = (
        ((1 << exponent) - 1 << mantissa)
        | (1 << random.integers(0, mantissa, 200))
        | random.integers(0, 1 << mantissa, 200)
    )
    special = np.array(
        [0, 1, (1 << exponent) - 1 << mantissa, ((1 << exponent) - 1 << mantissa) + 1, (1 << mantissa) - 1]
    )
    found = np.concatenate([np.abs(exact), nans, special]).astype(unsigned)
    sign = unsigned.type(1 << (8 * source.itemsize - 1))
    return np.concatenate([found, found | sign]).view(source)


def check_conversion(source, target, staged):
    operation = next(op for s, t, op in PAIRS if (s, t) == (source, target) and op != kernels.RAW)
    job = Job(source, target, operation, staged.reshape(1, -1), (1, staged.size), (1, staged.size))
    fill([job], grid=1 if SIM else 3, threads=1 if SIM else 64)


@pytest.mark.parametrize("source", [np.dtype("float16"), BFLOAT16], ids=str)
def test_every_value_widens_exactly(source):
    check_conversion(source, np.dtype("float32"), np.arange(1 << 16, dtype=np.uint16).view(source))


@pytest.mark.parametrize("target", [np.dtype("float16"), BFLOAT16], ids=str)
def test_every_short_value_survives_the_way_back(target):
    wide = twins.convert(np.arange(1 << 16, dtype=np.uint16).view(target), np.float32)
    check_conversion(np.dtype("float32"), target, wide)


@pytest.mark.parametrize(
    "source, target",
    [
        (np.dtype("float64"), np.dtype("float32")),
        (np.dtype("float32"), np.dtype("float16")),
        (np.dtype("float32"), BFLOAT16),
    ],
    ids=str,
)
def test_rounding_near_the_boundaries(source, target):
    check_conversion(source, target, near_boundaries(source, target, 4_000 if SIM else 60_000, seed=1))


@pytest.mark.parametrize("source, target", [(s, t) for s, t, op in PAIRS if op != kernels.RAW], ids=str)
def test_random_bits_convert_as_in_numpy(source, target):
    staged = patterns(np.dtype(f"u{source.itemsize}"), 2_000 if SIM else 20_000, seed=2).view(source)
    if target == np.dtype("int32"):
        staged = staged >> 32
    if source == np.dtype("int32") and not kit.loads_extend_the_sign():
        pytest.skip("this driver does not extend the sign of a 32-bit load; the simulator and a GPU do")
    check_conversion(source, target, staged)


def test_the_boundary_sample_reaches_every_case():
    """The sample itself: without ties, subnormals, overflow and NaNs the test above would prove little."""
    for source, target in (("float64", "float32"), ("float32", "float16")):
        staged = near_boundaries(np.dtype(source), np.dtype(target), 4_000, seed=1)
        out = twins.convert(staged, target)
        info = np.finfo(target)
        assert np.isnan(out).sum() > 300 and np.isinf(out[np.isfinite(staged)]).sum() > 50
        assert ((np.abs(out) < info.tiny) & (out != 0)).sum() > 50 and ((out == 0) & (staged != 0)).sum() > 50
        with np.errstate(all="ignore"):
            spacing = np.abs(np.spacing(out[np.isfinite(out)])).astype(source)
            off = np.abs(staged[np.isfinite(out)] - out[np.isfinite(out)].astype(source))
        assert (off * 2 == spacing).sum() > 50, "ties"
