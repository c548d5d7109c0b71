"""Traces: every format, every kind of damage, and the batcher's promises."""

import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numbabuf.errors import TraceError
from numbabuf.traces import MAX_REQUEST_TOKENS, RequestTrace, Step, StepTrace, Workload, read_trace, token_inputs

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:05,110,27
"""
MOONCAKE = """{"timestamp": 100, "input_length": 4808, "output_length": 10, "hash_ids": [1, 2]}
{"timestamp": 152, "input_length": 3180, "output_length": 8}

{"timestamp": 1120.04, "input_length": 110, "output_length": 27}
"""
GENERIC = """output,arrival_ms,prompt,model
10,100,4808,a
8,152.0,3180,"b,c"
27,1120.04,110,d
"""


def npz(**arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


NPZ = npz(
    arrival_ms=np.array([100, 152, 1120.04]),
    prompt=np.array([4808, 3180, 110], np.int32),
    output=np.array([10, 8, 27], np.uint8),
    model=np.array(["a", "b", "d"]),
)
STEPS = npz(
    prefill=np.arange(9),
    step_ms=np.array([0, 20, 41]),
    num_seqs=np.array([1, 3, 2], np.int32),
    num_tokens=np.array([5, 10, 2], np.int32),
    decode_seqs=np.array([0, 1, 2], np.int32),
)


def write(tmp_path, contents, name="trace"):
    path = tmp_path / name
    path.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    return path


# ------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(
    "contents",
    [AZURE, MOONCAKE, GENERIC, NPZ, AZURE.replace("\n", "\r\n"), "\ufeff" + AZURE, AZURE.rstrip("\n")],
    ids=["azure", "mooncake", "generic", "npz", "crlf", "byte-order-mark", "no-last-newline"],
)
def test_each_format_reads_the_same(tmp_path, contents, compressed):
    contents = contents.encode() if isinstance(contents, str) else contents
    path = write(tmp_path, gzip.compress(contents) if compressed else contents, "t.gz" if compressed else "t")
    trace = read_trace(path)
    assert isinstance(trace, RequestTrace) and trace.name == str(path) and trace.reordered == 0
    assert trace.prompt.tolist() == [4808, 3180, 110] and trace.prompt.dtype == np.int64
    assert trace.output.tolist() == [10, 8, 27] and trace.output.dtype == np.int64
    np.testing.assert_allclose(trace.arrival_ms, [0, 52, 1020.04], atol=1e-3)


def test_time_zones_and_a_new_year(tmp_path):
    rows = "2023-12-31T23:59:59.5Z,1,1\n2024-01-01 02:00:00.25+02:00,1,1\n"
    trace = read_trace(write(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows))
    assert trace.arrival_ms.tolist() == [0, 750]


def test_rows_out_of_order_are_sorted_stably_and_counted(tmp_path):
    rows = [(5, 1), (9, 2), (7, 3), (9, 4), (6, 5), *((9, prompt) for prompt in range(6, 60)), (7, 60)]
    text = "arrival_ms,prompt,output\n" + "".join(f"{arrival},{prompt},1\n" for arrival, prompt in rows)
    trace = read_trace(write(tmp_path, text))
    assert trace.arrival_ms.tolist() == [0, 1, 2, 2] + [4] * 56
    assert trace.prompt.tolist() == [1, 5, 3, 60, 2, 4, *range(6, 60)]
    assert trace.reordered == 3


def test_step_trace(tmp_path):
    trace = read_trace(write(tmp_path, STEPS))
    assert isinstance(trace, StepTrace) and len(trace) == 3
    steps = list(trace.steps(max_tokens=16, max_seqs=4))
    assert [step.counts.tolist() for step in steps] == [[5], [1, 5, 4], [1, 1]]
    assert all(not step.first.any() for step in steps)
    requests = np.concatenate([step.requests for step in steps])
    assert requests.tolist() == list(range(6))


def test_step_trace_without_decode_seqs_shares_evenly(tmp_path):
    trace = read_trace(write(tmp_path, npz(num_seqs=np.array([3]), num_tokens=np.array([7]))))
    (step,) = trace.steps(max_tokens=7, max_seqs=3)
    assert step.counts.tolist() == [3, 2, 2]


HEADER = "arrival_ms,prompt,output\n"
AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
GOOD = '{"timestamp": 0, "input_length": 1, "output_length": 1}\n'


DAMAGE = [  # contents, line, reason
    ("arrival_ms,prompt,output\n1,1_0,3\n", 2, "prompt must be a whole number; found '1_0'"),
    ("arrival_ms,prompt,output\n1_0,1,3\n", 2, "arrival_ms must be a number of milliseconds; found '1_0'"),
    ("", None, "holds no request"),
    ("\n \n", None, "holds no request"),
    (HEADER, None, "holds no request"),
    ("prompt,output\n", 1, "no column arrival_ms; found 'prompt', 'output'"),
    ("\nTIMESTAMP,ContextTokens\n", 2, "no column GeneratedTokens; found"),
    ("a,b\n1,2\n", 1, "columns TIMESTAMP, ContextTokens, GeneratedTokens or timestamp"),
    ("arrival_ms,prompt,output,prompt\n1,2,3,4\n", 1, "a column is named twice"),
    (HEADER + "1,2\n", 2, "3 fields expected; found 2"),
    (HEADER + "1,2,3\n1,2,3,4\n", 3, "3 fields expected; found 4"),
    (HEADER + '1,"2\n', 2, "not CSV"),
    (HEADER + '1,"2"x,3\n', 2, "not CSV"),
    (HEADER + "1,-2,3\n", 2, "prompt must be from 1 to"),
    (HEADER + "1,0,3\n", 2, "prompt must be from 1 to"),
    (HEADER + "1,2,-1\n", 2, "output must be from 0 to"),
    (HEADER + f"1,2,{MAX_REQUEST_TOKENS + 1}\n", 2, "output must be from 0 to"),
    (HEADER + f"1,{'9' * 5000},3\n", 2, "prompt must be"),
    (HEADER + "1,1.5,3\n", 2, "prompt must be a whole number; found '1.5'"),
    (HEADER + "1,,3\n", 2, "prompt must be a whole number; found ''"),
    (HEADER + "1,nan,3\n", 2, "prompt must be a whole number; found 'nan'"),
    (HEADER + "1,inf,3\n", 2, "prompt must be a whole number; found 'inf'"),
    (HEADER + "x,2,3\n", 2, "arrival_ms must be a number of milliseconds; found 'x'"),
    (HEADER + "nan,2,3\n", 2, "arrival_ms must be from 0 to"),
    (HEADER + "-1,2,3\n", 2, "arrival_ms must be from 0 to"),
    (HEADER + "1e14,2,3\n", 2, "arrival_ms must be from 0 to"),
    (AZURE_HEADER + "now,2,3\n", 2, "TIMESTAMP must be a date and time"),
    (AZURE_HEADER + "2023-13-16 18:17:03,2,3\n", 2, "TIMESTAMP must be a date and time"),
    (AZURE_HEADER + "12345,2,3\n", 2, "TIMESTAMP must be a date and time"),
    (AZURE_HEADER + "1969-01-01 00:00:00,2,3\n", 2, "TIMESTAMP must be from 0 to"),
    (GOOD + "{\n", 2, "not JSON"),
    (GOOD + "\n[1, 2]\n", 3, "a JSON object expected; found '[1, 2]'"),
    (GOOD + "{" + '"a":{' * 100_000, 2, "not"),
    (GOOD + '{"timestamp": 0, "input_length": 1}\n', 2, "no output_length"),
    ('{"timestamp": 0, "input_length": 1}\n', 1, "no column output_length"),
    (
        GOOD + '{"timestamp": 0, "input_length": true, "output_length": 1}',
        2,
        "input_length must be a whole",
    ),
    (
        GOOD + '{"timestamp": 0, "input_length": null, "output_length": 1}',
        2,
        "input_length must be a whole",
    ),
    (
        GOOD + '{"timestamp": 0, "input_length": [1], "output_length": 1}',
        2,
        "input_length must be a whole",
    ),
    (
        GOOD + '{"timestamp": 0, "input_length": NaN, "output_length": 1}',
        2,
        "input_length must be a whole",
    ),
    (
        GOOD + '{"timestamp": 0, "input_length": 1e999, "output_length": 1}',
        2,
        "input_length must be a whole",
    ),
    (
        GOOD + '{"timestamp": true, "input_length": 1, "output_length": 1}',
        2,
        "timestamp must be a number",
    ),
    (GOOD + '{"timestamp": "x", "input_length": 1, "output_length": 1}', 2, "timestamp must be a number"),
    (HEADER.encode() + b"1,2,3\n1,\xff,3\n", 3, "not text in UTF-8"),
    (b"PK\x03\x04 and nothing more", None, "cannot be read as NPZ"),
    (NPZ[: len(NPZ) // 2], None, "cannot be read as NPZ"),
    (b"\x1f\x8b\x08 and nothing more", None, "cannot be decompressed"),
    (gzip.compress(AZURE.encode())[:-12], None, "cannot be decompressed"),
    (npz(prompt=np.array([1])), None, "no column arrival_ms and no output; found 'prompt'"),
    (npz(), None, "columns TIMESTAMP"),
    (npz(arrival_ms=np.array([]), prompt=np.array([]), output=np.array([])), None, "holds no request"),
    (npz(arrival_ms=[1, 2], prompt=[1], output=[1, 2]), None, "prompt: 2 rows expected"),
    (npz(arrival_ms=[1, 2], prompt=[1, -1], output=[1, 2]), None, "prompt[1]: whole numbers from 1"),
    (npz(arrival_ms=[1, 2], prompt=[1, 1.5], output=[1, 2]), None, "prompt[1]: whole numbers from 1"),
    (npz(arrival_ms=[1, np.nan], prompt=[1, 1], output=[1, 2]), None, "arrival_ms[1]: numbers from 0"),
    (npz(arrival_ms=[[1, 2]], prompt=[1, 1], output=[1, 2]), None, "arrival_ms: a row of numbers"),
    (npz(arrival_ms=["1"], prompt=[1], output=[1]), None, "arrival_ms: a row of numbers"),
    (npz(arrival_ms=np.array([None]), prompt=[1], output=[1]), None, "cannot be read as NPZ"),
    (npz(TIMESTAMP=[1], ContextTokens=[1], GeneratedTokens=[1]), None, "arrays TIMESTAMP are not read"),
    (npz(num_tokens=[], num_seqs=[]), None, "holds no step"),
    (npz(num_tokens=[4], num_seqs=[4, 4]), None, "num_seqs: 1 rows expected"),
    (npz(num_tokens=[4, 4], num_seqs=[2, 5]), None, "row 1: more sequences than tokens"),
    (npz(num_tokens=[4], num_seqs=[2], decode_seqs=[3]), None, "row 0: more decoding sequences"),
    (npz(num_tokens=[4], num_seqs=[2], decode_seqs=[2]), None, "row 0: every sequence decodes"),
    (npz(num_tokens=[0], num_seqs=[0]), None, "num_tokens[0]: whole numbers from 1"),
]


@pytest.mark.parametrize(("contents", "line", "reason"), DAMAGE, ids=[case[2] for case in DAMAGE])
def test_damage_is_named_with_its_line(tmp_path, contents, line, reason):
    path = write(tmp_path, contents)
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    place = f"{path}: " if line is None else f"{path}:{line}: "
    message = str(caught.value)
    assert message.startswith(place + reason)
    assert "\n" not in message and len(message) < 400


@pytest.mark.parametrize(
    ("name", "contents", "reason"),
    [("absent", None, "cannot be read: No such file"), ("t.csv.gz", AZURE, "not a gzip file")],
)
def test_file_that_cannot_be_opened(tmp_path, name, contents, reason):
    path = tmp_path / name
    if contents is not None:
        path.write_text(contents)
    with pytest.raises(TraceError, match=reason):
        read_trace(path)
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path)  # a folder
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace("nul\0byte")


@given(data=st.data())
def test_no_damage_escapes_as_another_error(data, tmp_path_factory):
    contents = bytearray(data.draw(st.sampled_from([AZURE.encode(), MOONCAKE.encode(), NPZ, STEPS])))
    for _ in range(data.draw(st.integers(1, 4))):
        contents[data.draw(st.integers(0, len(contents) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(bytes(contents))
    try:
        trace = read_trace(path)
    except TraceError as error:
        assert str(error).startswith(str(path))
    else:
        assert len(trace) > 0


# ------------------------------------------------------------------------------------------------ batching

lengths = st.lists(st.tuples(st.floats(0, 500), st.integers(1, 40), st.integers(0, 12)), min_size=1, max_size=25).map(
    lambda rows: sorted(rows, key=lambda row: row[0])
)


def request_trace(rows):
    arrival, prompt, output = zip(*rows, strict=True)
    return RequestTrace("test", np.array(arrival, float), np.array(prompt), np.array(output))


def check_steps(steps, total, max_tokens, max_seqs):
    """Limits hold in each step; over all steps, each request's tokens come once and in order."""
    done = np.zeros(len(total), np.int64)
    for step in steps:
        assert 1 <= step.num_tokens <= max_tokens and 1 <= step.num_seqs <= max_seqs
        assert (step.counts >= 1).all() and len(set(step.requests.tolist())) == step.num_seqs
        assert (step.first == done[step.requests]).all()  # the next token: none skipped, none twice
        done[step.requests] += step.counts
    assert (done == total).all()


@given(rows=lengths, max_tokens=st.integers(1, 50), max_seqs=st.integers(1, 12))
def test_every_token_is_processed_exactly_once_within_the_limits(rows, max_tokens, max_seqs):
    trace = request_trace(rows)
    steps = list(trace.steps(max_tokens=max_tokens, max_seqs=max_seqs))
    check_steps(steps, trace.prompt + trace.output, max_tokens, max_seqs)


@given(rows=lengths, max_tokens=st.integers(1, 50), max_seqs=st.integers(1, 12))
def test_decoding_comes_first_and_takes_one_token(rows, max_tokens, max_seqs):
    trace = request_trace(rows)
    decoding = set()
    begun = -1
    for step in trace.steps(max_tokens=max_tokens, max_seqs=max_seqs):
        assert set(step.requests[: len(decoding)].tolist()) == decoding  # nobody who decodes is left out
        assert (step.counts[: len(decoding)] == 1).all()
        prefill = step.requests[len(decoding) :].tolist()
        assert prefill == sorted(prefill) and (not prefill or prefill[0] >= begun)  # first come, first served
        begun = max([begun, *prefill])
        after = step.first + step.counts
        left = (after >= trace.prompt[step.requests]) & (after < (trace.prompt + trace.output)[step.requests])
        decoding = set(step.requests[left].tolist())


def test_chunks_by_hand():
    trace = request_trace([(0, 5, 2), (0, 4, 1), (500, 1, 0)])
    steps = [
        list(zip(step.requests.tolist(), step.first.tolist(), step.counts.tolist(), strict=True))
        for step in trace.steps(max_tokens=4, max_seqs=2)
    ]
    assert steps == [
        [(0, 0, 4)],
        [(0, 4, 1), (1, 0, 3)],
        [(0, 5, 1), (1, 3, 1)],
        [(0, 6, 1), (1, 4, 1)],
        [(2, 0, 1)],
    ]


def test_requests_wait_for_their_arrival():
    trace = request_trace([(0, 1, 3), (30, 1, 0)])
    sizes = [s.num_seqs for s in trace.steps(max_tokens=8, max_seqs=8, step_ms=10, token_ms=0)]
    assert sizes == [1, 1, 1, 2]
    sizes = [s.num_seqs for s in trace.steps(max_tokens=8, max_seqs=8, step_ms=10, token_ms=5)]
    assert sizes == [1, 1, 2, 1]


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(0, 40)).filter(lambda r: r[0] + r[1]),
        min_size=1,
        max_size=12,
    ),
    max_tokens=st.integers(1, 50),
    max_seqs=st.integers(1, 12),
)
def test_step_traces_keep_every_token_within_the_limits(rows, max_tokens, max_seqs):
    decode = np.array([row[0] for row in rows])
    seqs = decode + np.array([row[1] for row in rows])
    tokens = seqs + np.array([row[2] if row[1] else 0 for row in rows])
    trace = StepTrace("test", tokens, seqs, decode)
    steps = list(trace.steps(max_tokens=max_tokens, max_seqs=max_seqs))
    total = np.zeros(seqs.sum(), np.int64)
    for step in steps:
        total[step.requests] += step.counts
    assert total.sum() == tokens.sum()
    check_steps(steps, total, max_tokens, max_seqs)
    if max_tokens >= tokens.max() and max_seqs >= seqs.max():
        assert [(s.num_tokens, s.num_seqs) for s in steps] == list(zip(tokens, seqs, strict=True))
        assert [np.count_nonzero(s.counts == 1) >= d for s, d in zip(steps, decode, strict=True)]


@pytest.mark.parametrize("limits", [{"max_tokens": 0, "max_seqs": 1}, {"max_tokens": 1, "max_seqs": -1}])
def test_limits_are_checked_at_the_call(limits):
    with pytest.raises(ValueError, match="must be at least 1"):
        request_trace([(0, 1, 1)]).steps(**limits)
    with pytest.raises(ValueError, match="must be at least 1"):
        StepTrace("test", *np.ones((3, 1), np.int64)).steps(**limits)
    with pytest.raises(ValueError, match="step_ms"):
        request_trace([(0, 1, 1)]).steps(max_tokens=1, max_seqs=1, step_ms=-1)


# ------------------------------------------------------------------------------------ generator and inputs


def test_generator_is_seeded_and_stays_in_range():
    workload = Workload(requests=2000, rate_per_s=50, prompt_median=100, max_tokens=400, seed=3)
    trace = workload.generate()
    assert len(trace) == 2000 and trace.arrival_ms[0] == 0 and (np.diff(trace.arrival_ms) >= 0).all()
    for values in (trace.prompt, trace.output):
        assert values.dtype == np.int64 and values.min() >= 1 and values.max() <= 400
    assert trace.prompt.max() == 400  # the cut was met
    assert abs(np.median(trace.prompt) - 100) < 15 and abs(np.median(trace.output) - 16) < 3
    assert abs(trace.arrival_ms[-1] / 2000 - 20) < 2
    again = workload.generate()
    assert (again.prompt == trace.prompt).all() and (again.arrival_ms == trace.arrival_ms).all()
    other = Workload(requests=2000, rate_per_s=50, prompt_median=100, max_tokens=400, seed=4).generate()
    assert (other.prompt != trace.prompt).any()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("requests", 0),
        ("rate_per_s", 0),
        ("prompt_median", -1),
        ("output_sigma", float("nan")),
        ("rate_per_s", float("inf")),
        ("max_tokens", 0),
        ("seed", -1),
    ],
)
def test_generator_refuses_parameters_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        Workload(**{name: value}).generate()


def test_token_inputs_by_hand():
    step = Step(np.array([4, 2]), np.array([7, 0]), np.array([1, 3]))
    inputs = token_inputs(step, vocab=50, seed=1)
    assert inputs["positions"].tolist() == [7, 0, 1, 2]
    assert inputs["seq_starts"].tolist() == [0, 1, 4]
    assert inputs["token_index"].tolist() == [0, 1, 2, 3]
    assert all(array.dtype == np.int64 for array in inputs.values())


def test_a_token_is_the_same_however_its_request_was_cut():
    trace = request_trace([(0, 30, 9), (0, 25, 9), (3, 20, 5)])
    seen = {}
    for max_tokens, max_seqs in ((4, 2), (64, 8), (7, 3)):
        for step in trace.steps(max_tokens=max_tokens, max_seqs=max_seqs):
            inputs = token_inputs(step, vocab=1000)
            requests = np.repeat(step.requests, step.counts)
            keys = zip(requests.tolist(), inputs["positions"].tolist(), strict=True)
            for key, token in zip(keys, inputs["input_ids"].tolist(), strict=True):
                assert seen.setdefault(key, token) == token
    assert len(seen) == 98
    assert len(set(seen.values())) > 80  # a hash, no constant


def test_token_ids_cover_the_vocabulary():
    step = Step(np.arange(4), np.zeros(4, np.int64), np.full(4, 1000))
    ids = token_inputs(step, vocab=16)["input_ids"]
    counts = np.bincount(ids, minlength=16)
    assert counts.size == 16 and counts.min() > 150  # 250 each on average
    assert (ids != token_inputs(step, vocab=16, seed=1)["input_ids"]).mean() > 0.8


# ------------------------------------------------------------------------------------------- public traces

PUBLIC = Path(__file__).resolve().parents[3] / "shared" / "traces"


@pytest.mark.skipif(not PUBLIC.is_dir(), reason="the public traces are not on this machine")
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("AzureLLMInferenceTrace_code.csv", 8819),
        ("AzureLLMInferenceTrace_conv.csv", 19366),
        ("mooncake_synthetic_trace.jsonl", 3993),
        ("sharegpt_poisson.npz", 20000),
        ("stream_azure_code_2023.npz", 44426),
    ],
)
def test_public_traces(name, rows):
    trace = read_trace(PUBLIC / name)
    assert len(trace) == rows
    for _, step in zip(range(200), trace.steps(max_tokens=512, max_seqs=32), strict=False):
        assert step.num_tokens <= 512 and step.num_seqs <= 32


@pytest.mark.skipif(not PUBLIC.is_dir(), reason="the public traces are not on this machine")
def test_two_public_copies_of_one_trace_agree():
    lines = (PUBLIC / "mooncake_synthetic_trace.jsonl").read_text().splitlines()
    trace = read_trace(PUBLIC / "mooncake_synthetic_trace.jsonl")
    assert trace.prompt.tolist() == [json.loads(line)["input_length"] for line in lines]
