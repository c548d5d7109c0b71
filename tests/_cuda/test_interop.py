"""Interchange with other array libraries: the array interface, DLPack both ways, and streams.

What needs no GPU runs against the real packages: NumPy and, where it is installed, torch on the CPU. In the simulator
every tier is memory of the CPU; on numba-cuda's own host path cuda.core reads what numbabuf offers.
"""

import gc

import numpy as np
import pytest
from kit import LAUNCH, SIM, affine, to_host

from numbabuf import _cuda
from numbabuf._cuda.dlpack import from_dlpack
from numbabuf.errors import BusyError, StaleBufferError
from numbabuf.pool.pool import SimpleBufferPool
from numbabuf.pool.spec import BufferSpec, Tier
from numbabuf.step.manager import InputBufferManager
from numbabuf.tiers.pool import HierarchicalBufferPool

CPU, CUDA, MANAGED = 1, 2, 13
KIND = dict.fromkeys(Tier, CPU) if SIM else {Tier.DEVICE: CUDA, Tier.MANAGED: MANAGED, Tier.PINNED: CPU}
READABLE = [tier for tier in Tier if KIND[tier] != CUDA]  # by NumPy
# NumPy before 2.1: from_dlpack has no copy= and makes read-only arrays, which it does not export again
OLD_NUMPY = np.lib.NumpyVersion(np.__version__) < "2.1.0"
NUMPY_2_1 = pytest.mark.skipif(OLD_NUMPY, reason="DLPack with copy= and dl_device= needs NumPy 2.1")
WRITABLE = pytest.mark.skipif(SIM and OLD_NUMPY, reason="the simulator's tensors are writable from NumPy 2.1 on")
DTYPES = ["bool", "int8", "int64", "uint16", "float16", "float32", "float64", "complex64"]


@pytest.fixture
def pool():
    with SimpleBufferPool() as pool:
        yield pool


class Exchange:
    """Nothing but DLPack of `array`, and what it was asked."""

    def __init__(self, array):
        self.array, self.asked = array, []

    def __dlpack__(self, **options):
        self.asked.append(options)
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


# -------------------------------------------------------------------------------------------------- the array interface


@pytest.mark.parametrize("tier", Tier)
@pytest.mark.parametrize("dtype", [*DTYPES, "bfloat16"])
def test_the_array_interface_is_version_3_and_names_no_stream(pool, tier, dtype):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    with pool.allocate(BufferSpec((3, 5), dtype, tier)) as entry:
        assert entry.__cuda_array_interface__ == {
            "shape": (3, 5),
            "typestr": "<u2" if dtype == "bfloat16" else np.dtype(dtype).str,
            "data": (entry.address, False),
            "strides": None,
            "stream": None,
            "version": 3,
        }


@pytest.mark.real
def test_slots_and_views_of_a_step_name_no_stream():
    """Static buffers: whoever reads them in a graph must not be made to wait for a stream outside it."""
    with InputBufferManager(max_batch_size=1, max_seq_len=8, buckets=[4, 8]) as manager:
        views = manager.stage_inputs({"input_ids": np.arange(3)}, 3)
        for array in (*views.values(), *manager.get_static_tensors().values()):
            interface = array.__cuda_array_interface__
            assert interface["version"] == 3
            assert interface["stream"] is None


# ----------------------------------------------------------------------------------------------------- DLPack, outwards


@pytest.mark.parametrize("tier", Tier)
@pytest.mark.parametrize("shape", [(), 0, 1, (3, 5), (2, 0, 4)])
def test_the_device_of_a_tier(pool, tier, shape):
    with pool.allocate(BufferSpec(shape, "float32", tier)) as entry:
        assert entry.__dlpack_device__() == (KIND[tier], 0)


@pytest.mark.parametrize("tier", READABLE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_shares_the_memory(pool, tier, dtype):
    with pool.allocate(BufferSpec((3, 5), dtype, tier)) as entry:
        seen = np.from_dlpack(entry)
        assert (seen.shape, seen.dtype, seen.ctypes.data) == ((3, 5), np.dtype(dtype), entry.address)
        if tier is not Tier.DEVICE:
            entry.array[...] = 1
            assert (seen == 1).all()


@pytest.mark.parametrize("tier", READABLE)
def test_bfloat16_goes_as_uint16(pool, tier):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    with pool.allocate(BufferSpec(4, "bfloat16", tier)) as entry:
        seen = np.from_dlpack(entry)
        assert seen.dtype == np.uint16
        if tier is not Tier.DEVICE:
            entry.array[:] = 1.5
            assert (seen.view(ml_dtypes.bfloat16) == 1.5).all()


def test_a_released_entry_exports_nothing(pool):
    entry = pool.allocate(BufferSpec(4, "float32", Tier.PINNED))
    entry.release()
    with pytest.raises(StaleBufferError):
        entry.__dlpack__()
    with pytest.raises(StaleBufferError):
        entry.__dlpack_device__()


def test_a_tensor_keeps_its_entry(pool, caplog):
    """An entry that nobody but a tensor holds is not lost; it is when the tensor goes."""
    seen = np.from_dlpack(pool.allocate(BufferSpec(4, "float32", Tier.PINNED)))
    gc.collect()
    assert pool.stats().in_use_count == 1
    assert pool.stats().lost == 0
    del seen
    gc.collect()
    assert pool.stats().lost == 1
    assert "dropped without release" in caplog.text


@pytest.mark.parametrize("tier", Tier)
def test_a_capsule_keeps_its_entry(pool, tier):
    """The capsule is what a consumer holds on to; it names no Python object of its own accord."""
    capsule = pool.allocate(BufferSpec(4, "float32", tier)).__dlpack__()
    gc.collect()
    assert pool.stats().in_use_count == 1
    del capsule
    gc.collect()
    assert pool.stats().lost == 1


@NUMPY_2_1
def test_a_copy_is_one(pool):
    with pool.allocate(BufferSpec(4, "float32", Tier.PINNED)) as entry:
        entry.array[:] = 7
        copied = np.from_dlpack(entry, copy=True)
        entry.array[:] = 8
        assert copied.tolist() == [7] * 4


@NUMPY_2_1
def test_memory_of_the_cpu_is_not_passed_off_as_a_gpus(pool):
    with pool.allocate(BufferSpec(4, "float32", Tier.PINNED)) as entry, pytest.raises((BufferError, ValueError)):
        entry.__dlpack__(dl_device=(CUDA, 0), copy=False)


def test_an_entry_that_may_move_is_a_tensor_within_a_use():
    with HierarchicalBufferPool(device_bytes=1 << 16, pinned_bytes=1 << 16) as pool:
        with pool.allocate(BufferSpec(4), movable=True) as entry:
            with pytest.raises(BusyError, match="inside a use"):
                entry.__dlpack_device__()
            with pool.use([entry]):
                assert entry.__dlpack_device__() == (KIND[Tier.DEVICE], 0)


# ------------------------------------------------------------------------------------------------------ DLPack, inwards


def test_what_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match="give an array with __dlpack__"):
        from_dlpack([1, 2])


@pytest.fixture
def shared(pool):
    """Makes entries whose memory the CPU writes and a kernel reaches: function of the values."""
    entries = []

    def share(values):
        values = np.asarray(values, np.float32)
        entries.append(pool.allocate(BufferSpec(values.shape, "float32", Tier.PINNED if SIM else Tier.MANAGED)))
        entries[-1].array[...] = values
        return entries[-1]

    yield share
    for entry in entries:
        entry.release()


@WRITABLE
def test_a_kernel_reads_another_librarys_memory(pool, shared):
    """Through DLPack and nothing else, strides included."""
    source, weights = shared(np.arange(8).reshape(4, 2)), shared([2, 1])
    with pool.allocate(BufferSpec(4)) as out:
        column = from_dlpack(Exchange(np.from_dlpack(source)[:, 1] if SIM else source))
        stream = _cuda.as_stream(None)
        column = column if SIM else column[:, 1]
        _cuda.launch(affine, *LAUNCH, stream, column, from_dlpack(Exchange(weights)), out.array)
        assert to_host(out.array, stream.numba).tolist() == [3, 7, 11, 15]


@WRITABLE
def test_a_captured_graph_keeps_a_foreign_tensor(no_leaks, pool):
    """The tensor's last name goes before the replay; the entry that it keeps must not."""
    out = pool.allocate(BufferSpec(8))
    with InputBufferManager(max_batch_size=1, max_seq_len=8, default_slots=False) as manager:
        manager.register_slot("x", BufferSpec(8))
        foreign = from_dlpack(pool.allocate(BufferSpec(2, "float32", Tier.PINNED if SIM else Tier.MANAGED)))
        foreign.copy_to_device(np.array([3, 1], np.float32))

        affine[(*LAUNCH, manager.stream)](out.array, foreign, out.array)  # compiled before the capture
        manager.synchronize()
        with manager.capture(8) as step:
            affine[(*LAUNCH, step.stream)](step["x"], foreign, out.array)
        del foreign
        gc.collect()
        assert pool.stats().lost == 0
        manager.replay({"x": np.arange(8, dtype=np.float32)}, 8)
        manager.synchronize()
        assert to_host(out.array, manager.stream).tolist() == [3 * i + 1 for i in range(8)]
    gc.collect()
    assert pool.stats().lost == 1
    out.release()


@pytest.mark.skipif(not SIM, reason="of the simulator's own refusal")
def test_the_simulator_reaches_the_cpu_alone():
    class OnGpu:
        def __dlpack__(self, **options):
            raise AssertionError("not asked")

        def __dlpack_device__(self):
            return (CUDA, 0)

    with pytest.raises(BufferError, match="the simulator's device is the CPU"):
        from_dlpack(OnGpu())


@pytest.mark.real
def test_memory_of_the_cpu_is_refused_on_a_gpu():
    with pytest.raises(BufferError, match="copy it to the GPU first"):
        from_dlpack(np.zeros(3))


@pytest.mark.real
@pytest.mark.parametrize("dtype", DTYPES)
def test_device_memory_goes_out_and_comes_back(pool, dtype):
    from cuda.core.utils import StridedMemoryView

    with pool.allocate(BufferSpec((3, 5), dtype)) as entry:
        view = StridedMemoryView.from_dlpack(entry, -1)
        assert (view.ptr, view.shape, np.dtype(view.dtype), view.device_id) == (
            entry.address, (3, 5), np.dtype(dtype), 0,
        )  # fmt: skip
        assert not view.readonly
        by_interface = StridedMemoryView.from_cuda_array_interface(entry, -1)
        assert (by_interface.ptr, by_interface.shape) == (view.ptr, view.shape)
        back = from_dlpack(view)
        assert (back.shape, back.dtype, _cuda.address(back)) == ((3, 5), np.dtype(dtype), entry.address)
        del view, by_interface, back


@pytest.mark.real
def test_the_consumers_stream_is_passed_on(pool):
    """DLPack's words for streams: -1 asks for no order, 1 is the default stream, others are handles."""
    stream = _cuda.as_stream(None)
    with pool.allocate(BufferSpec(4)) as entry:
        exchange = Exchange(entry)
        from_dlpack(exchange)
        from_dlpack(exchange, stream=0)
        from_dlpack(exchange, stream=stream.numba)
        assert [options["stream"] for options in exchange.asked] == [-1, 1, stream.handle]


# -------------------------------------------------------------------------------------------------------------- streams


@pytest.mark.real
def test_cuda_core_takes_the_librarys_streams():
    from cuda.core import Device

    with InputBufferManager(max_batch_size=1, max_seq_len=8) as manager:
        ours = manager.stream
        handle = ours.__cuda_stream__()[1]
        for stream in (ours, _cuda.as_stream(ours)):
            assert stream.__cuda_stream__() == (0, handle)
            assert int(Device().create_stream(stream).handle) == handle
        with manager.capture(3) as step:
            assert step.stream.__cuda_stream__()[1] not in (0, handle)


@pytest.mark.real
def test_whatever_names_its_stream_is_one(pool):
    """A torch or CuPy stream is an object with __cuda_stream__; cuda.core's own is one too."""
    from cuda.core import Device

    core = Device().create_stream()

    class Foreign:
        def __cuda_stream__(self):
            return 0, int(core.handle)

    for stream in (core, Foreign()):
        assert _cuda.as_stream(stream).handle == int(core.handle)
        with InputBufferManager(pool, max_batch_size=1, max_seq_len=8, stream=stream) as manager:
            assert manager.stage_inputs({"input_ids": np.arange(3)}, 3)["input_ids"].size >= 3
            manager.synchronize()
        pool.allocate(BufferSpec(4), stream=stream).release(stream=stream)


# ----------------------------------------------------------------------------------------------------------- torch, CPU


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.mark.parametrize("tier", [tier for tier in Tier if KIND[tier] == CPU])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_shares_the_memory(torch, pool, tier, dtype):
    with pool.allocate(BufferSpec((3, 5), dtype, tier)) as entry:
        seen = torch.from_dlpack(entry)
        assert (tuple(seen.shape), str(seen.dtype), seen.data_ptr()) == ((3, 5), f"torch.{dtype}", entry.address)
        seen.fill_(1)
        if tier is not Tier.DEVICE:
            assert (entry.array == 1).all()
        del seen


def test_torch_reads_bfloat16(torch, pool):
    pytest.importorskip("ml_dtypes")
    with pool.allocate(BufferSpec(4, "bfloat16", Tier.PINNED)) as entry:
        entry.array[:] = 1.5
        assert torch.from_dlpack(entry).view(torch.bfloat16).tolist() == [1.5] * 4


def test_torch_tensors_are_inputs(torch):
    with InputBufferManager(max_batch_size=1, max_seq_len=8, buckets=[4, 8]) as manager:
        views = manager.stage_inputs({"input_ids": torch.arange(3), "positions": torch.arange(3) * 2}, 3)
        assert to_host(views["input_ids"], manager.stream).tolist() == [0, 1, 2, 0]
        assert to_host(views["positions"], manager.stream).tolist() == [0, 2, 4, 0]


@pytest.mark.skipif(not SIM, reason="torch's memory of the CPU is the simulator's device memory, and no GPU's")
def test_a_kernel_reads_a_torch_tensor(torch, pool):
    weights = torch.tensor([2.0, 1.0])
    with pool.allocate(BufferSpec(4)) as out:
        stream = _cuda.as_stream(None)
        _cuda.launch(affine, *LAUNCH, stream, from_dlpack(torch.arange(4.0)), from_dlpack(weights), out.array)
        assert torch.from_dlpack(out).tolist() == [1, 3, 5, 7]


# ---------------------------------------------------------------------------------------------- one graph of three, GPU


@pytest.mark.gpu
def test_numba_torch_and_cupy_in_one_graph(torch):
    """A step of three libraries over one slot, each on the step's stream; none of them allocates in the capture."""
    cupy = pytest.importorskip("cupy")
    weights = torch.linspace(0, 1, 8, device="cuda")
    scaled, doubled = torch.empty(8, device="cuda"), cupy.empty(8, np.float32)
    scaled_of_cupy = cupy.from_dlpack(scaled)  # here: in a capture torch would have one stream wait for another
    out = from_dlpack(torch.empty(8, device="cuda"))
    pair = from_dlpack(torch.tensor([1.0, 5.0], device="cuda"))
    torch.cuda.synchronize()

    def step(s):
        _, handle = s.stream.__cuda_stream__()
        with torch.cuda.stream(torch.cuda.ExternalStream(handle)):
            torch.mul(torch.as_tensor(s["x"], device="cuda"), weights, out=scaled)
        with cupy.cuda.ExternalStream(handle):
            cupy.multiply(scaled_of_cupy, np.float32(2), out=doubled)
        affine[(*LAUNCH, s.stream)](doubled, pair, out)

    with InputBufferManager(max_batch_size=1, max_seq_len=8, default_slots=False) as manager:
        manager.register_slot("x", BufferSpec(8))
        manager.capture_buckets(step, [8])
        for scale in (1, 3):
            x = scale * np.arange(8, dtype=np.float32)
            manager.replay({"x": x}, 8)
            manager.synchronize()
            wanted = x * np.linspace(0, 1, 8, dtype=np.float32) * 2 + 5
            np.testing.assert_allclose(to_host(out, manager.stream), wanted, rtol=1e-6)
