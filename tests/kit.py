"""Kernels that the tests launch, and the few host helpers that several test files share.

No host code here may use `cuda`: the simulator replaces a kernel module's `cuda` during a launch.
"""

import functools
import gc
import os
import pkgutil
import warnings
from collections import Counter

import numpy as np

import numbabuf
from numbabuf import BufferSpec, InputBufferManager, _cuda
from numbabuf._cuda import cuda

SIM = _cuda.SIM
BUCKETS = (4, 16, 32)
WIDTH = 32
"""The buckets of `Log`, and the largest of them."""

LAUNCH = (1, 1) if SIM else (2, 32)
"""Grid and block of the tests' own kernels; the simulator starts an operating system thread per CUDA thread."""


@cuda.jit
def log_row(source, log, row):
    """log[row[0], :source.size] = source"""
    for i in range(cuda.grid(1), source.size, cuda.gridsize(1)):
        log[row[0], i] = source[i]


@cuda.jit
def count_up(counter):
    """counter[0] += 1"""
    if cuda.grid(1) == 0:
        counter[0] += 1


@cuda.jit
def add_up(source, total):
    """total[0] += the sum of source, by one thread."""
    if cuda.grid(1) == 0:
        for i in range(source.size):
            total[0] += source[i]


@cuda.jit
def affine(source, weights, out):
    """out[i] = source[i] * weights[0] + weights[1]"""
    for i in range(cuda.grid(1), source.size, cuda.gridsize(1)):
        out[i] = source[i] * weights[0] + weights[1]


@cuda.jit
def fault_if(flags, out):
    """Write far outside `out` where flags[0] is set."""
    if cuda.grid(1) == 0:
        at = 0
        if flags[0] != 0:
            at = 1 << 40
        out[at] = 1


@cuda.jit
def widen(source, out):
    """out[i] = source[i], of a narrower type."""
    for i in range(cuda.grid(1), source.size, cuda.gridsize(1)):
        out[i] = source[i]


def run(kernel, stream, *args):
    """Launch a kernel on a Numba stream, without Numba's warning that the grid is small."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Grid size .* under-utilization")
        configured = kernel[(*LAUNCH, stream)]
    configured(*args)


def to_device(host, stream=None):
    """A device array of numbabuf's kind with the contents of `host`."""
    host = np.ascontiguousarray(host)
    base = _cuda.empty_device(max(1, host.nbytes))
    view = _cuda.device_view(base, 0, host.shape, host.dtype)
    stream = _cuda.as_stream(stream)
    view.copy_to_device(host, stream=stream.numba)
    stream.synchronize()
    return view


def to_host(array, stream):
    """The contents of a device array after the work queued on a Numba stream."""
    host = array.copy_to_host(stream=stream)
    stream.synchronize()
    return host


@functools.cache
def loads_extend_the_sign():
    """Whether a 32-bit signed load into a 64-bit register extends the sign, as the PTX ISA has it (ld, "Description").

    A stand-in driver was seen that does not; int32 slots staged as int64 are then tested with values >= 0 alone.
    """
    stream = _cuda.as_stream(None)
    out = to_device(np.zeros(1, np.int64), stream)
    run(widen, stream.numba, to_device(np.array([-5], np.int32), stream), out)
    return int(to_host(out, stream.numba)[0]) == -5


def contents(manager):
    """Every static slot's whole contents, after all steps queued so far: name -> NumPy array."""
    return {name: to_host(array, manager.stream) for name, array in manager.get_static_tensors().items()}


def html(thing):
    """What a notebook shows of `thing`."""
    return thing._repr_html_()


def collect():
    """Run the collector until it finds nothing."""
    while gc.collect():
        pass


def lazy_by_environment():
    """Whether the stand-in driver was started in its lazy mode."""
    return os.environ.get("CUDASTUB_ASYNC", "0") not in ("", "0")


class Log:
    """A manager whose captured step copies each of its slots into a log row that a device counter chooses.

    Several threads may step it at once, each under a number of its own, its `writer`.
    """

    def __init__(self, steps, *, ring, slots=("ids", "other"), buckets=BUCKETS, **options):
        self.manager = InputBufferManager(
            max_batch_size=1, max_seq_len=WIDTH, ring=ring, buckets=buckets, default_slots=False, **options
        )
        for slot in slots:
            self.manager.register_slot(slot, BufferSpec(WIDTH, "int64"), pad=-1)
        self.row = to_device(np.zeros(1, np.int64))
        self.logs = {slot: to_device(np.full((steps, WIDTH), -7)) for slot in slots}
        self.wanted = {}  # writer -> the rows of its steps, in its order, as bytes
        self.capture()

    def __call__(self, step):
        for slot, log in self.logs.items():
            run(log_row, step.stream, step[slot], log, self.row)
        run(count_up, step.stream, self.row)

    def capture(self):
        """Capture every bucket, anew where it was; nothing of it runs."""
        self.manager.capture_buckets(self)

    def expect(self, inputs, bucket, writer=0):
        """Say what the next step of `writer` shall leave in the log."""
        rows = [
            np.concatenate([data, np.full(bucket - len(data), -1), np.full(WIDTH - bucket, -7)])
            for data in inputs.values()
        ]
        self.wanted.setdefault(writer, []).append(np.concatenate(rows).tobytes())

    def step(self, random, writer=0):
        """Replay random inputs and overwrite them at once."""
        tokens = int(random.integers(0, WIDTH + 1))
        inputs = {slot: random.integers(0, 1 << 60, tokens) for slot in self.logs}
        staged = {slot: data.copy() for slot, data in inputs.items()}
        self.manager.replay(staged, tokens)
        for data in staged.values():
            data[:] = -99
        self.expect(inputs, bucket_of(tokens), writer)

    def wrong(self):
        """What is not in the log as it was staged; [] where each writer's steps are there, whole and in its order.

        Of each writer its first step that is missing, or out of order, and those behind it, as (writer, number); then
        how many rows nobody staged.
        """
        stream = self.manager.stream
        steps = int(to_host(self.row, stream)[0])
        rows = np.concatenate([to_host(log, stream) for log in self.logs.values()], axis=1)[:steps]
        found = [row.tobytes() for row in rows]
        wrong = []
        for writer, wanted in self.wanted.items():
            later = iter(found)  # each row is looked for behind the one before it
            wrong += [(writer, number) for number, row in enumerate(wanted) if row not in later]
        unknown = Counter(found) - Counter(row for wanted in self.wanted.values() for row in wanted)
        return wrong + [f"{unknown.total()} rows that nobody staged"] * bool(unknown)


def bucket_of(tokens):
    """The bucket of `Log` that a step of `tokens` is padded to."""
    return next(size for size in BUCKETS if size >= tokens)


def modules():
    """Name every module of the package that can be imported with the required packages alone."""
    names = [found.name for found in pkgutil.walk_packages(numbabuf.__path__, "numbabuf.")]
    running = "numbabuf.__main__"  # importing it is running it
    compiled = "numbabuf._cuda.intrinsics"  # needs numba-cuda
    return [name for name in names if name not in (running, compiled)]
