"""The benchmark harness: what it measures, what it prints, how benchmarks are found and run by name; their pictures,
their rivals, and the script that runs everything on a GPU."""

import json
import os
import pkgutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import benchmarks
from benchmarks import __main__ as program
from benchmarks import _machine, _plots, _rivals, harness, tuning
from numbabuf import _cuda

RESULTS = Path(benchmarks.__file__).parent / "results"


def test_measure_counts_its_calls():
    calls, finishes = [], []
    timing = harness.measure(lambda: calls.append(1), repeats=5, warmup=3, inner=2, finish=lambda: finishes.append(1))
    assert len(calls) == 3 + 5 * 2
    assert len(finishes) == 1 + 5
    assert (timing.repeats, timing.ends_in) == (5, "synchronise")
    assert harness.measure(int, repeats=1).ends_in == "return"


def test_measure_settles_outside_the_time_and_stops_when_its_time_is_up(monkeypatch):
    now = iter(range(0, 10**6, 1000))
    monkeypatch.setattr(harness.time, "perf_counter_ns", lambda: next(now))
    settled = []

    def settle():
        settled.append(next(now))  # moves the clock, as waiting would

    timing = harness.measure(int, repeats=9, warmup=0, settle=settle, seconds=0)
    assert (timing.repeats, len(settled)) == (5, 5)
    assert timing.median_us == timing.p99_us == 1


def test_measure_device_runs_the_work_of_a_graph():
    stream = _cuda.as_stream(None)
    device, source = _cuda.empty_device(8), _cuda.empty_device(8)
    _cuda.zero(device, stream)
    source.copy_to_device(np.arange(8, dtype=np.uint8), stream=stream.numba)
    timing = harness.measure_device(lambda: _cuda.copy(device, source, stream), stream, repeats=2, inner=3)
    assert timing.repeats == 2 and not _cuda.capturing()
    assert device.copy_to_host().tolist() == list(range(8))
    with pytest.raises(ZeroDivisionError):
        calls = iter([1, 0])
        harness.measure_device(lambda: 1 // next(calls), stream)
    assert not _cuda.capturing()


def test_a_prediction_is_the_slowest_of_bus_and_memory_behind_a_launch():
    machine = _machine.Machine(device_GB_per_s=2000, up_GB_per_s=50, down_GB_per_s=25, launch_us=2)
    assert machine.predict_us() == 2
    assert machine.predict_us(up=50_000, device=50_000) == 2 + 1
    assert machine.predict_us(down=50_000, device=50_000) == 2 + 2
    assert machine.predict_us(device=20_000_000) == 2 + 10


def test_summarise():
    timing = harness.summarise(np.arange(101.0))
    assert (timing.median_us, timing.p99_us, timing.spread_us, timing.repeats) == (50, 99, 50, 101)


def test_render_lines_up_the_fixed_columns_first():
    timing = harness.summarise([1.0])
    rows = [harness.row("one", timing, nbytes=7), {"what": "absent", "note": "not installed"}]
    header, one, absent = harness.render(rows).split("\n")
    assert header.split() == [*harness.COLUMNS, "nbytes", "note"]
    assert one.split() == ["one", "1.00", "1.00", "0.00", "1", "return", "7", "-"]
    assert absent.split("  ")[0] == "absent" and absent.endswith("not installed")


def test_environment_names_backend_and_versions(backend):
    found = harness.environment()
    assert found["backend"] == ("simulator" if backend == "simulator" else "cuda")
    assert found["versions"]["numpy"] == np.__version__
    assert ("stand-in" in str(found["driver"])) == (backend == "stand-in")
    json.dumps(found)
    assert found["device"] in harness.describe(found)


def test_every_module_but_the_harness_is_a_benchmark():
    modules = {name for _, name, _ in pkgutil.iter_modules(benchmarks.__path__)}
    assert set(program.names()) == {name for name in modules if name[0] != "_"} - {"harness"}


@pytest.fixture
def invented(monkeypatch):
    """Two benchmarks, of which the second fails."""

    def run(smoke, factor=1):
        return {"rows": [{"what": f"smoke={smoke}", "factor": factor}]}

    def fail(smoke):
        raise ValueError("broken on purpose")

    works = types.SimpleNamespace(__doc__="What works.\n\nMore.", run=run, table=lambda r: harness.render(r["rows"]))
    fails = types.SimpleNamespace(__doc__="What fails.", run=fail, table=None)
    monkeypatch.setitem(sys.modules, "benchmarks.works", works)
    monkeypatch.setitem(sys.modules, "benchmarks.fails", fails)
    monkeypatch.setattr(program, "names", lambda: ["fails", "works"])


def test_a_benchmark_gets_its_options_and_its_result_is_written(invented, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert program.main(["works", "--smoke", "--set", "factor=3", "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["results"] == {"works": {"rows": [{"what": "smoke=True", "factor": 3}]}}
    assert written["environment"]["versions"]["numpy"] == np.__version__
    assert "works: What works." in capsys.readouterr().out


def test_a_failed_benchmark_fails_the_run_after_the_others(invented, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert program.main(["all", "--json", str(out)]) == 1
    assert list(json.loads(out.read_text())["results"]) == ["works"]
    assert "failed: fails" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["nothing"], ["works", "--set", "factor"], ["all", "--set", "factor=1"]], ids=" ".join
)
def test_wrong_arguments_are_refused(invented, arguments):
    with pytest.raises(SystemExit) as stopped:
        program.main(arguments)
    assert stopped.value.code == 2


def test_results_are_written_after_each_benchmark(invented, tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    seen = []

    def late(smoke):
        seen.append(json.loads(out.read_text())["results"])
        return {"rows": []}

    module = types.SimpleNamespace(__doc__="Comes last.", run=late, table=lambda result: "")
    monkeypatch.setitem(sys.modules, "benchmarks.late", module)
    monkeypatch.setattr(program, "names", lambda: ["works", "fails", "late"])
    assert program.main(["works", "fails", "late", "--json", str(out)]) == 1
    assert [list(results) for results in seen] == [["works"]]
    written = json.loads(out.read_text())
    assert (list(written["results"]), written["failed"]) == (["works", "late"], ["fails"])


# ---------------------------------------------------------------------------------------------------------- rivals


def test_the_graph_of_a_rival_copies_anew_at_each_launch():
    rival = _rivals.Numba()
    pinned, device, out = rival.pinned(5), rival.device(5), rival.device(5)
    back = rival.pinned(5)
    rival.host(pinned)[:] = 1

    def work():
        rival.copy(device, pinned)
        rival.consume(out, device)
        rival.copy(back, out)

    launch = _rivals.warm_graph(rival, work)
    rival.host(pinned)[:] = np.arange(5)
    launch()
    rival.synchronize()
    assert rival.host(back).tolist() == [0, 1, 2, 3, 4]


def test_a_rival_that_cannot_run_or_fails_is_a_row_that_says_why():
    class Absent:
        name = "absent"

        def __init__(self):
            raise ImportError("no module\nand more")

    able, rows = _rivals.found([_rivals.Numba, Absent])
    assert [rival.name for rival in able] == ["Numba"]
    with _rivals.noted(rows, "step", tokens=3):
        raise ValueError("odd")
    assert rows == [
        {"what": "absent", "note": "skipped: ImportError: no module"},
        {"what": "step", "tokens": 3, "note": "failed: ValueError: odd"},
    ]


@pytest.mark.parametrize("width", tuning.WIDTHS)
@pytest.mark.parametrize("unroll", tuning.UNROLLS)
def test_the_kernels_tried_copy_every_word_and_no_more(width, unroll):
    words, threads = 77, 1 if _cuda.SIM else 4
    stream = _cuda.as_stream(None)
    source, target = _cuda.empty_device(80 * width), _cuda.empty_device(80 * width)
    values = np.arange(80 * width).astype(np.uint8)
    source.copy_to_device(values, stream=stream.numba)
    target.copy_to_device(np.full(80 * width, 255, np.uint8), stream=stream.numba)
    ends = _cuda.address(source), _cuda.address(target)
    _cuda.launch(tuning.kernel(width, unroll), 1, threads, stream, *ends, words)
    stream.synchronize()
    found = target.copy_to_host()
    assert np.array_equal(found[: words * width], values[: words * width])
    assert (found[words * width :] == 255).all()


# ---------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("file", "names"), [("host", ["step", "growth", "capture"]), ("pool", ["pool"])], ids=lambda value: str(value)
)
@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_committed_results_are_drawn(file, names, suffix, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    results = RESULTS / f"{file}.json"
    assert program.main(["plot", str(results), "--out", str(tmp_path), "--format", suffix]) == 0
    pictures = sorted(tmp_path.iterdir())
    assert [picture.name for picture in pictures] == sorted(f"{file}-{name}.{suffix}" for name in names)
    assert sorted(capsys.readouterr().out.split()) == [str(picture) for picture in pictures]
    device = json.loads(results.read_text())["environment"]["device"]
    for picture in pictures:
        if suffix == "svg":
            assert device in picture.read_text() and "numbabuf" in picture.read_text()
        else:
            assert picture.read_bytes().startswith(b"\x89PNG")


def test_results_of_a_gpu_benchmark_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out.json"
    assert program.main(["fill", "moves", "tuning", "--smoke", "--json", str(out)]) == 0
    pictures = list(_plots.draw(out, tmp_path / "made"))
    assert [picture.name for picture in pictures] == ["out-fill.svg", "out-moves.svg", "out-tuning.svg"]
    assert "predicted" in pictures[0].read_text()


def test_what_cannot_be_drawn_is_refused_with_what_can(tmp_path, monkeypatch, capsys):
    file = tmp_path / "out.json"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    file.write_text("{}")
    assert program.main(["plot", str(file)]) == 2
    assert "numbabuf[plot]" in capsys.readouterr().err
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    for text, words in (("[]", "--json"), ("{", "--json"), ('{"environment": {}, "results": {"odd": 1}}', "odd")):
        file.write_text(text)
        assert program.main(["plot", str(file)]) == 2
        assert words in capsys.readouterr().err
    assert program.main(["plot", str(tmp_path / "absent.json")]) == 2


# ----------------------------------------------------------------------------------------------- the script for GPUs


@pytest.fixture
def script(tmp_path):
    """gpu.sh with an interpreter and a sanitizer that note how they are called: the suite and racecheck fail."""
    python, sanitizer, calls = tmp_path / "python", tmp_path / "sanitizer", tmp_path / "calls"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = - ] && exec echo a-device\necho "python $*" >>{calls}\n'
        'case "$*" in *"-m pytest"*test_kernels*) ;; *"-m pytest"*) echo "a test failed"; exit 1 ;; esac\n'
    )
    sanitizer.write_text(f'#!/bin/sh\necho "sanitizer $*" >>{calls}\ncase "$*" in *racecheck*) exit 99 ;; esac\n')
    for program_file in (python, sanitizer):
        program_file.chmod(0o755)

    inherited = {name: value for name, value in os.environ.items() if name not in ("SMOKE", "WHEELS")}

    def run(*parts, **environment):
        calls.write_text("")
        out = tmp_path / "out"
        done = subprocess.run(
            [str(RESULTS.parent / "gpu.sh"), *parts],
            env={**inherited, "PYTHON": str(python), "SANITIZER": str(sanitizer), "OUT": str(out), **environment},
            capture_output=True,
            text=True,
        )
        return done, [line.split() for line in calls.read_text().splitlines() if "-m pip" not in line], out

    return run


def test_a_stage_that_fails_stops_no_other(script):
    done, calls, out = script()
    assert done.returncode == 1 and "failed: suite racecheck" in done.stderr
    assert [call[call.index("--tool") + 1] for call in calls if call[0] == "sanitizer"] == [
        "memcheck", "racecheck", "initcheck"
    ]  # fmt: skip
    assert sorted(path.name for path in out.iterdir()) == [
        "bench.txt", "initcheck.txt", "machine.txt", "memcheck.txt", "racecheck.txt", "suite.txt", "summary.txt"
    ]  # fmt: skip
    summary = out.joinpath("summary.txt").read_text().split("\n")
    assert [line.split(",")[0].split() for line in summary[:-1]] == [
        ["suite", "FAILED", "(exit", "code", "1)"], ["memcheck", "ok"], ["racecheck", "FAILED", "(exit", "code", "99)"],
        ["initcheck", "ok"], ["bench", "ok"],
    ]  # fmt: skip
    assert "a test failed" in done.stdout
    assert all("--require-gpu" in call for call in calls if "pytest" in call)


def test_each_part_runs_alone_and_adds_to_the_folder(script):
    done, calls, out = script("bench")
    assert done.returncode == 0, done.stderr
    (call,) = calls
    assert call[:3] == ["python", "-m", "benchmarks"] and call[-2:] == ["--json", str(out / "bench.json")]
    assert set(call[3:-2]) <= set(program.names())
    done, calls, out = script("sanitizer", SANITIZER=str(out / "absent"))
    assert done.returncode == 1 and not calls
    assert "LEFT OUT" in done.stdout
    assert out.joinpath("summary.txt").read_text().count("\n") == 2
    done, calls, _ = script("benchmarks")
    assert done.returncode == 2 and not calls and "choose from suite, sanitizer, bench" in done.stderr


def test_the_script_refuses_to_run_without_a_gpu(script, backend, tmp_path):
    if backend == "gpu":
        pytest.skip("there is a GPU")
    done, _, _ = script("bench", PYTHON=sys.executable)
    assert done.returncode == 2 and "no GPU can be used" in done.stderr
    assert not (tmp_path / "out").exists()
