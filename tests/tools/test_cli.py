"""The command line, in process through `main` and once as the program it is."""

import ctypes
import gzip
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from numbabuf import config
from numbabuf.errors import BackendError
from numbabuf.step.manager import InputBufferManager
from numbabuf.tools import cli
from numbabuf.tools.pipeline import Pipeline

# one size on every backend, small enough for the simulator
SIZES = ["--max-tokens", "64", "--max-seqs", "8", "--dim", "4", "--vocab", "100"]
CSV = "arrival_ms,prompt,output\n0,70,3\n0,5,4\n100,1,0\n"
JSONL = "".join(
    f'{{"timestamp": {t}, "input_length": {p}, "output_length": {o}}}\n'
    for t, p, o in ((0, 70, 3), (0, 5, 4), (100, 1, 0))
)
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:17:03.9799600,70,3\n2023-11-16 18:17:03.9799600,5,4\n2023-11-16 18:17:04.0799600,1,0\n"
)


def steps_npz():
    file = io.BytesIO()
    np.savez(file, num_tokens=[5, 70, 8], num_seqs=[2, 3, 8], decode_seqs=[1, 2, 8])
    return file.getvalue()


def replay(capsys, *arguments):
    code = cli.main(["replay", *SIZES, *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_generated_trace_end_to_end(capsys, tmp_path, backend, no_leaks):
    path = tmp_path / "out.json"
    code, out, err = replay(capsys, "--steps", 12, "--seed", 5, "--json", path)
    assert (code, err) == (0, "")
    assert "seed 5" in out and "prompt_median" in out  # the generator states its parameters
    for label in (
        "backend",
        "steps",
        "graphs",
        "padding",
        "overflow",
        "ring waits",
        "host per step",
        "bucket",
    ):
        assert re.search(f"^ *{label} ", out, re.MULTILINE), label
    assert "Only the first 12 steps were run; --steps 0 runs all." in out
    assert ("simulator" in out) == (backend == "simulator")
    report = json.loads(path.read_text())
    assert report["schema"] == 1 and report["command"] == "replay"
    assert report["backend"] == ("simulator" if backend == "simulator" else "cuda")
    assert {"python", "numba", "numpy"} <= set(report["versions"])
    assert report["trace"]["generator"]["seed"] == 5 and report["trace"]["kind"] == "requests"
    assert report["parameters"] == {
        "steps": 12,
        "max_tokens": 64,
        "max_seqs": 8,
        "dim": 4,
        "vocab": 100,
        "buckets": [1, 2, 4, 8, 16, 32, 64],
        "ring": 4,
        "overflow": "raise",
        "seed": 5,
    }
    results = report["results"]
    assert results["steps"] == 12 == sum(results["buckets"].values())
    assert results["complete"] is False and results["mismatch"] is None
    assert results["graphs"] == 7 and results["overflows"] == 0 and results["ring_waits"] >= 0
    padded = sum(int(bucket) * count for bucket, count in results["buckets"].items())
    assert padded == results["padded_tokens"] >= results["live_tokens"] > 0
    assert results["padding_percent"] == pytest.approx(100 * (padded / results["live_tokens"] - 1))
    assert 0 < results["host_us_median"] <= results["host_us_p99"]


@pytest.mark.parametrize(
    ("contents", "rows"),
    [(CSV, 3), (JSONL, 3), (AZURE, 3), (gzip.compress(CSV.encode()), 3), (steps_npz(), 3)],
    ids=["generic", "mooncake", "azure", "gz", "steps"],
)
def test_each_format_is_replayed_to_its_last_token(capsys, tmp_path, contents, rows):
    path = tmp_path / "trace"
    path.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    code, out, err = replay(capsys, path, "--steps", 0, "--json", tmp_path / "out.json")
    assert (code, err) == (0, "")
    assert str(path) in out and "Only the first" not in out
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["trace"]["rows"] == rows and report["trace"]["generator"] is None
    assert report["results"]["complete"] is True
    assert report["results"]["live_tokens"] == 83  # every token of the trace, once


def test_rows_out_of_order_are_reported(capsys, tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("arrival_ms,prompt,output\n10,3,0\n4,3,0\n")
    code, out, _ = replay(capsys, path)
    assert code == 0 and "1 rows arrive earlier than a row before them: sorted by arrival" in out


def test_quiet_says_nothing(capsys):
    assert replay(capsys, "--steps", 2, "--quiet") == (0, "", "")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("arrival_ms,prompt,output\n0,5,1\n0,-5,1\n", ":3: prompt must be from 1 to"),
        (JSONL + "{]\n", ":4: not JSON"),
        (b"\x1f\x8bnothing", ": cannot be decompressed"),
        ("", ": holds no request"),
        (None, ": cannot be read: No such file"),
    ],
)
def test_malformed_trace(capsys, tmp_path, contents, message):
    path = tmp_path / "trace"
    if contents is not None:
        path.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    code, out, err = replay(capsys, path)
    assert code == 2 and out == ""
    assert err.startswith(f"numbabuf: error: {path}{message}") and err.count("\n") == 1


@pytest.mark.parametrize("wrong", [0, 2, 3, 6])
def test_wrong_result_is_shown_and_ends_the_run(capsys, tmp_path, monkeypatch, wrong):
    """While the first steps fill the ring of two, later, and of the steps that are in flight at the end."""
    expected, calls = Pipeline.expected, []

    def off_by_one(self, inputs):
        scores = expected(self, inputs)
        scores[0] += len(calls) == wrong
        calls.append(None)
        return scores

    monkeypatch.setattr(Pipeline, "expected", off_by_one)
    code, out, err = replay(capsys, "--steps", 7, "--ring", 2, "--json", tmp_path / "out.json")
    assert code == 1
    assert err.startswith(f"numbabuf: error: wrong result at step {wrong}, sequence 0: NumPy says ")
    assert err.count("\n") == 1
    assert "WRONG" in out
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert results["mismatch"]["step"] == wrong and results["complete"] is False
    assert results["mismatch"]["expected"] == results["mismatch"]["found"] + 1


@pytest.mark.parametrize("wrong", [0, 2])
def test_a_step_over_other_inputs_is_caught(capsys, monkeypatch, wrong):
    replay_step, calls = InputBufferManager.replay, []

    def swap_one(self, inputs, num_tokens, **sizes):
        calls.append(None)
        if len(calls) == wrong + 1:
            inputs = {**inputs, "input_ids": (inputs["input_ids"] + 1) % 100}
        return replay_step(self, inputs, num_tokens, **sizes)

    monkeypatch.setattr(InputBufferManager, "replay", swap_one)
    code, _, err = replay(capsys, "--steps", 5, "--quiet")
    assert code == 1 and f"wrong result at step {wrong}, sequence 0" in err


def test_inputs_that_are_read_too_late_are_caught(capsys, monkeypatch):
    replay_step = InputBufferManager.replay

    class Late(dict):
        def __missing__(self, name):
            manager, arguments, sizes = self["step"]
            return replay_step(manager, *arguments, **sizes)[name]

    def keep(self, *arguments, **sizes):
        return Late(step=(self, arguments, sizes))

    monkeypatch.setattr(InputBufferManager, "replay", keep)
    code, _, err = replay(capsys, "--steps", 1, "--quiet")
    assert code == 1 and "wrong result at step 0" in err


def test_kernels_that_do_nothing_are_caught(capsys, monkeypatch):
    monkeypatch.setattr(Pipeline, "launch", lambda self, slots, stream: slots["scores"])
    code, _, err = replay(capsys, "--steps", 1, "--quiet")
    assert code == 1 and "wrong result at step 0, sequence 0" in err


def test_overflow_is_counted_and_the_results_stay_right(capsys, tmp_path):
    path = tmp_path / "out.json"
    code, out, err = replay(capsys, "--steps", 4, "--buckets", "16,8", "--overflow", "eager", "--json", path)
    assert (code, err) == (0, "")
    results = json.loads(path.read_text())["results"]
    assert results["overflows"] > 0 and results["graphs"] == 2
    assert f"{results['overflows']} steps beyond the largest bucket (eager)" in out
    assert max(int(bucket) for bucket in results["buckets"]) > 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "-1"], "must be from 0 to"),
        (["--vocab", "99999999999"], "must be from 1 to"),
        (["--dim", "2147483647", "--vocab", "2147483647"], "2**31 elements"),
        (["--dim", "2147483647"], "2**31 elements"),
        (["--vocab", "2147483647"], "2**31 elements"),
        (["--dim", "x"], "invalid number value"),
        (["--buckets", "8,x"], "invalid numbers value"),
        (["--buckets", "8,0"], "must be from 1 to"),
        (["--buckets", "8,65"], "max_size=64"),
        (["--buckets", "8,32"], "the largest bucket holds 32"),
        (["--overflow", "drop"], "invalid choice"),
        (["--json", os.path.join("no", "such", "folder", "out.json")], "no such directory"),
        (["one", "two"], "unrecognized arguments"),
    ],
)
def test_arguments_it_refuses(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        cli.main(["replay", *SIZES, *arguments])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err.splitlines()[-1]


def test_a_command_is_required_and_help_is_there(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        cli.main(["replay", "--help"])
    assert caught.value.code == 0
    assert "--overflow" in capsys.readouterr().out


def test_json_that_cannot_be_written(capsys, tmp_path):
    code, out, err = replay(capsys, "--steps", 1, "--json", tmp_path)
    assert code == 2 and "steps" in out and err.startswith(f"numbabuf: error: {tmp_path}: cannot be written: ")


def test_wrong_results_weigh_more_than_a_file_that_cannot_be_written(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(Pipeline, "launch", lambda self, slots, stream: slots["scores"])
    code, _, err = replay(capsys, "--steps", 1, "--quiet", "--json", tmp_path)
    assert code == 1 and "cannot be written" in err and "wrong result" in err


def test_a_reader_that_leaves_early_gets_no_traceback(monkeypatch, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert cli.main(["replay", *SIZES, "--steps", "1"]) == 2


def test_interrupt_ends_without_a_traceback(capsys, monkeypatch):
    def interrupted(self, inputs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "expected", interrupted)
    code, _, err = replay(capsys, "--steps", 1, "--quiet")
    assert (code, err) == (130, "")


# ------------------------------------------------------------------------------------ choice of the backend


@pytest.fixture
def undecided(monkeypatch):
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "")  # so that what the test sets is put back, set before or not
    monkeypatch.delenv("NUMBA_ENABLE_CUDASIM")
    return monkeypatch


def test_a_choice_that_was_made_stays(undecided):
    undecided.setattr(cli, "device_problem", lambda: pytest.fail("the device was asked for"))
    undecided.setenv("NUMBA_ENABLE_CUDASIM", "1")
    cli.choose_backend(restart=True)
    assert os.environ["NUMBA_ENABLE_CUDASIM"] == "1"


def test_a_choice_of_the_gpu_stays_and_is_refused_where_there_is_none(undecided, capsys):
    undecided.setenv("NUMBA_ENABLE_CUDASIM", "0")
    undecided.setattr(cli, "device_problem", lambda: None)
    cli.choose_backend(restart=True)
    undecided.setattr(cli, "device_problem", lambda: "none here")
    assert cli.main(["replay"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("numbabuf: error: no GPU (none here)") and err.count("\n") == 1
    assert os.environ["NUMBA_ENABLE_CUDASIM"] == "0"


def test_a_device_is_used(undecided, capsys):
    undecided.setattr(cli, "device_problem", lambda: None)
    cli.choose_backend(restart=True)
    assert "NUMBA_ENABLE_CUDASIM" not in os.environ and capsys.readouterr().err == ""


def test_no_device_before_numba_is_imported(undecided, capsys):
    undecided.setattr(cli, "device_problem", lambda: "none here")
    undecided.delitem(sys.modules, "numba")
    cli.choose_backend(restart=False)
    assert os.environ["NUMBA_ENABLE_CUDASIM"] == "1"
    assert "no GPU (none here); using Numba's simulator" in capsys.readouterr().err


def test_no_device_after_numba_was_imported_starts_anew_once(undecided, capsys):
    started = []
    undecided.setattr(cli, "device_problem", lambda: "none here")
    undecided.setattr(sys, "platform", "linux")
    undecided.setattr(sys, "orig_argv", ["python", "-W", "error", "-m", "numbabuf", "replay"])
    undecided.setattr(os, "execv", lambda *arguments: started.append(arguments))
    for _ in range(2):
        cli.choose_backend(restart=True)
    (call,) = started
    assert call == (sys.executable, [sys.executable, "-W", "error", "-m", "numbabuf", "replay"])
    assert os.environ["NUMBA_ENABLE_CUDASIM"] == "1"
    assert capsys.readouterr().err.count("\n") == 1


def test_a_caller_in_process_is_never_replaced(undecided, capsys):
    undecided.setattr(cli, "device_problem", lambda: "none here")
    undecided.setattr(os, "execv", lambda *arguments: pytest.fail("the process was replaced"))
    with pytest.raises(BackendError, match="set NUMBA_ENABLE_CUDASIM=1 before numba is imported"):
        cli.choose_backend(restart=False)
    assert "NUMBA_ENABLE_CUDASIM" not in os.environ
    code = cli.main(["replay"])
    assert code == 2 and "none here" in capsys.readouterr().err


class Driver:
    """Answers as a driver library would."""

    def __init__(self, init=0, count_code=0, count=0):
        self.init, self.count_code, self.count = init, count_code, count

    def cuInit(self, flags):
        return self.init

    def cuDeviceGetCount(self, pointer):
        pointer._obj.value = self.count
        return self.count_code


@pytest.mark.parametrize(
    ("driver", "problem"),
    [
        (Driver(count=1), None),
        (Driver(count=0), "the driver reports no device"),
        (Driver(init=100), "the driver answers with error 100"),
        (Driver(count_code=3), "the driver answers with error 3"),
        (None, "no-driver.so cannot be loaded"),
    ],
)
def test_what_the_driver_answers(monkeypatch, driver, problem):
    def load(name):
        assert name == "no-driver.so"
        if driver is None:
            raise OSError
        return driver

    monkeypatch.setenv("NUMBA_CUDA_DRIVER", "no-driver.so")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "numba_cuda")
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert cli.device_problem() == problem


def test_without_numba_cuda_there_is_no_device(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.device_problem() == "numba-cuda is not installed"


PATH = os.pathsep.join([str(Path(cli.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize(
    ("command", "redirection", "code", "says"),
    [
        ("plan TRACE", ">&-", 0, ""),
        ("plan TRACE", ">/dev/full", 2, "numbabuf: error: [Errno 28] No space left on device"),
        ("replay TRACE", ">&- 2>&-", 0, ""),
        ("replay nothing.csv", ">/dev/full 2>/dev/full", 2, ""),
        ("replay nothing.csv", "2>&- >&-", 2, ""),
    ],
)
def test_output_that_goes_nowhere(tmp_path, command, redirection, code, says):
    """One line or none; and the code, which the interpreter's own end does not spoil."""
    (tmp_path / "trace.csv").write_text(CSV)
    command = command.replace("TRACE", "trace.csv")
    sizes = " ".join(SIZES) if command.startswith("replay") else ""
    done = subprocess.run(
        ["/bin/sh", "-c", f'"{sys.executable}" -m numbabuf {command} {sizes} {redirection}'],
        env=os.environ | {"PYTHONPATH": PATH}, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr.strip()) == (code, says)


@pytest.mark.parametrize("switch", [switch.name for switch in config.SWITCHES])
def test_a_bad_switch_is_one_line_and_stops_no_other_command(tmp_path, switch):
    (tmp_path / "trace.csv").write_text(CSV)
    env = os.environ | {"PYTHONPATH": PATH, switch: "maybe", "PYTHONWARNINGS": "ignore"}
    codes = []
    for words in (["replay", *SIZES], ["plan", "trace.csv"], ["info"]):
        done = subprocess.run([sys.executable, "-m", "numbabuf", *words], env=env, cwd=tmp_path, capture_output=True,
                              text=True, check=False)  # fmt: skip
        codes.append(done.returncode)
        if done.returncode:
            assert done.stdout == "" and done.stderr.count("\n") == 1
            assert done.stderr.startswith(f"numbabuf: error: {switch} is 'maybe'; set it to one of")
    assert codes == [2, 0, 0]


def test_a_trace_may_have_any_name(tmp_path):
    name = b"trace\xff.csv"
    try:
        (tmp_path / os.fsdecode(name)).write_text(CSV)
    except OSError:
        pytest.skip("a file system of Unicode names")
    done = subprocess.run(
        [sys.executable, "-m", "numbabuf", "replay", name, *SIZES, "--report", "out.html"],
        env=os.environ | {"PYTHONPATH": PATH, "PYTHONIOENCODING": "utf-8:strict"}, cwd=tmp_path, capture_output=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"trace: trace\\udcff.csv" in done.stdout
    assert "trace\\udcff.csv" in (tmp_path / "out.html").read_text(encoding="utf-8")


def test_a_trace_that_never_ends_is_no_plan(capsys, tmp_path, monkeypatch):
    (tmp_path / "trace.csv").write_text("arrival_ms,prompt,output\n0,1,100000000\n")
    monkeypatch.setattr(cli, "MOST_STEPS", 1000)
    assert cli.main(["plan", str(tmp_path / "trace.csv")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "trace.csv: more than 1,000 steps" in line


def test_as_a_program(tmp_path, backend):
    """`python -m numbabuf` chooses its backend by itself, in whatever folder it is started."""
    env = {name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}
    env["PYTHONPATH"] = PATH
    if backend == "simulator":
        env["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that may be there is not what this run is about
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "numbabuf", "replay", *SIZES, "--steps", "3"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "bit for bit" in done.stdout
    if backend == "simulator":
        assert "using Numba's simulator" in done.stderr and "simulator" in done.stdout
    else:
        assert done.stderr == "" and "simulator" not in done.stdout
