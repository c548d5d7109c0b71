"""Whole programs as users write them: live sizes read in the kernels, results read from `Outputs`, no second n."""

import queue
import threading

import kit
import numpy as np

from numbabuf import BufferSpec, InputBufferManager
from numbabuf._cuda import cuda

ROUNDS = 6 if kit.SIM else 40


@cuda.jit
def mean_of(x, live, mean):
    """mean[()] of the live values, by one thread; nan of none."""
    if cuda.grid(1) == 0:
        total = 0.0
        for i in range(live[0]):
            total += x[i]
        mean[()] = total / live[0] if live[0] > 0 else np.nan


@cuda.jit
def scan_of(x, live, sums):
    """sums[i] = x[0] + ... + x[i], by one thread."""
    if cuda.grid(1) == 0:
        total = 0
        for i in range(live[0]):
            total += x[i]
            sums[i] = total


@cuda.jit
def compact(x, live, least, kept, count):
    """The live values of at least least[()] to the front of kept, and how many they are."""
    if cuda.grid(1) == 0:
        n = 0
        for i in range(live[0]):
            if x[i] >= least[()]:
                kept[n] = x[i]
                n += 1
        count[()] = n


@cuda.jit
def smooth(x, live, state, alpha, out):
    """out[i] = state = state + alpha * (x[i] - state): the state stays on the device from chunk to chunk."""
    if cuda.grid(1) == 0:
        value = state[0]
        for i in range(live[0]):
            value += alpha[()] * (x[i] - value)
            out[i] = value
        state[0] = value


@cuda.jit
def hits(seeds, live, out):
    """out[i]: points of 32 in the quarter circle, by a small generator of each walker's own."""
    for i in range(cuda.grid(1), live[0], cuda.gridsize(1)):
        state = seeds[i]
        count = 0
        for _ in range(32):
            state = (state * 1103515245 + 12345) % 2147483648
            x = state / 2147483648.0
            state = (state * 1103515245 + 12345) % 2147483648
            y = state / 2147483648.0
            if x * x + y * y <= 1.0:
                count += 1
        out[i] = count


@cuda.jit
def score_rows(values, starts, live, weight, scores):
    """scores[s] = weight[()] * the sum of the values of sequence s."""
    for s in range(cuda.grid(1), live[0], cuda.gridsize(1)):
        total = 0.0
        for t in range(starts[s], starts[s + 1]):
            total += values[t]
        scores[s] = weight[()] * total


def manager(**options):
    return InputBufferManager(max_batch_size=1, max_seq_len=64, buckets=[8, 64], default_slots=False, **options)


def test_means_scans_and_compaction():
    with manager() as m:
        m.register_slot("x", BufferSpec(64, "int64"))
        m.register_slot("least", BufferSpec((), "int64"), axis=None)
        m.register_output("mean", BufferSpec((), "float64"), axis=None)
        m.register_output("sums", BufferSpec(64, "int64"))
        m.register_output("kept", BufferSpec(64, "int64"))
        m.register_output("count", BufferSpec((), "int64"), axis=None)

        def fn(step):
            live = step.live["tokens"]
            kit.run(mean_of, step.stream, step["x"], live, step["mean"])
            kit.run(scan_of, step.stream, step["x"], live, step["sums"])
            kit.run(compact, step.stream, step["x"], live, step["least"], step["kept"], step["count"])

        m.capture_buckets(fn)
        random = np.random.default_rng(0)
        for n in [0, 1, 8, 9, 64, *random.integers(0, 65, ROUNDS)]:
            x = random.integers(-9, 9, n)
            found = m.replay({"x": x, "least": 3}, int(n))
            np.testing.assert_equal(found["mean"], x.mean() if n else np.nan)
            assert found["sums"].tolist() == x.cumsum().tolist()
            assert found["kept"][: found["count"]].tolist() == x[x >= 3].tolist()


def test_a_producer_and_a_consumer():
    """One thread replays as data comes, another reads the results, several steps behind."""
    work, done = queue.Queue(maxsize=6), []
    with manager(ring=2, returns=2) as m:
        m.register_slot("x", BufferSpec(64, "int64"))
        m.register_output("sums", BufferSpec(64, "int64"))
        m.capture_buckets(lambda step: kit.run(scan_of, step.stream, step["x"], step.live["tokens"], step["sums"]))

        def produce():
            random = np.random.default_rng(1)
            for _ in range(ROUNDS):
                x = random.integers(0, 99, random.integers(1, 65))
                work.put((x.copy(), m.replay({"x": x}, len(x))))
                x[:] = -1  # ours again
            work.put(None)

        producer = threading.Thread(target=produce)
        producer.start()
        while (item := work.get(timeout=60)) is not None:
            x, outputs = item
            done.append(outputs["sums"].tolist() == x.cumsum().tolist())
        producer.join()
    assert done == [True] * ROUNDS


def test_a_streaming_filter_keeps_its_state_on_the_device():
    random = np.random.default_rng(2)
    signal = random.normal(size=20 * ROUNDS)
    cuts = np.sort(random.choice(np.arange(1, signal.size), ROUNDS * 2, replace=False))
    found = []
    with manager() as m:
        m.register_slot("x", BufferSpec(64, "float64"))
        m.register_slot("alpha", BufferSpec((), "float64"), axis=None)
        m.register_output("out", BufferSpec(64, "float64"))
        state = kit.to_device(np.zeros(1))
        m.capture_buckets(
            lambda step: kit.run(smooth, step.stream, step["x"], step.live["tokens"], state, step["alpha"], step["out"])
        )  # which changes no state
        for number, chunk in enumerate(np.split(signal, cuts)):
            for part in np.split(chunk, range(64, chunk.size, 64)):
                inputs = {"x": part, "alpha": 0.25} if not number else {"x": part}  # a parameter stays
                found.append(m.replay(inputs, len(part)))
        values = np.concatenate([outputs["out"] for outputs in found])
    value, expected = 0.0, []
    for x in signal:
        value += 0.25 * (x - value)
        expected.append(value)
    np.testing.assert_allclose(values, expected, rtol=1e-12)


def test_monte_carlo_batches_of_any_size():
    def expected(seed):
        count = 0
        for _ in range(32):
            seed = (seed * 1103515245 + 12345) % 2**31
            x = seed / 2**31
            seed = (seed * 1103515245 + 12345) % 2**31
            y = seed / 2**31
            count += x * x + y * y <= 1
        return count

    with manager() as m:
        m.register_slot("seeds", BufferSpec(64, "int64"))
        m.register_output("hits", BufferSpec(64, "int64"), result_dtype="int32")
        m.capture_buckets(lambda step: kit.run(hits, step.stream, step["seeds"], step.live["tokens"], step["hits"]))
        random = np.random.default_rng(3)
        batches = [random.integers(0, 2**31, n) for n in random.integers(1, 65, ROUNDS)]
        results = [m.replay({"seeds": seeds}, len(seeds)) for seeds in batches]
        for seeds, outputs in zip(batches, results, strict=True):
            assert outputs["hits"].dtype == np.int32
            assert outputs["hits"].tolist() == [expected(int(seed)) for seed in seeds]


def test_a_ragged_scorer_and_a_sweep_over_its_parameter():
    with InputBufferManager(
        max_batch_size=1, max_seq_len=64, buckets={"tokens": [64], "seqs": [2, 8]}, default_slots=False
    ) as m:
        m.register_slot("values", BufferSpec(64, "float64"))
        m.register_slot("starts", BufferSpec(9, "int64"), axis="seqs+1", pad="repeat_last", index=True)
        m.register_slot("weight", BufferSpec((), "float64"), axis=None)
        m.register_output("scores", BufferSpec(8, "float64"), axis="seqs")

        def fn(step):
            inputs = step["values"], step["starts"], step.live["seqs"], step["weight"]
            kit.run(score_rows, step.stream, *inputs, step["scores"])

        m.capture_buckets(fn, [{"tokens": 64, "seqs": seqs} for seqs in (2, 8)])
        random = np.random.default_rng(4)
        for _ in range(ROUNDS):
            starts = np.concatenate([[0], np.cumsum(random.integers(0, 8, random.integers(1, 9)))])
            values = random.integers(-9, 9, starts[-1]).astype(float)
            sums = np.array([values[a:b].sum() for a, b in zip(starts[:-1], starts[1:], strict=True)])
            sizes = {"num_tokens": len(values), "seqs": len(sums)}
            sweep = [m.replay({"values": values, "starts": starts, "weight": w}, **sizes) for w in (0.5, 1, 2)]
            assert [outputs["scores"].tolist() for outputs in sweep] == [(w * sums).tolist() for w in (0.5, 1, 2)]
