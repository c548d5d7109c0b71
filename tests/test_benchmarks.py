"""The benchmark harness: what it measures, what it prints, and how benchmarks are found and run by name."""

import json
import pkgutil
import sys
import types

import numpy as np
import pytest

import benchmarks
from benchmarks import __main__ as program
from benchmarks import harness


def test_measure_counts_its_calls():
    calls, finishes = [], []
    timing = harness.measure(
        lambda: calls.append(1), repeats=5, warmup=3, inner=2, finish=lambda: finishes.append(1)
    )
    assert len(calls) == 3 + 5 * 2
    assert len(finishes) == 1 + 5
    assert (timing.repeats, timing.ends_in) == (5, "synchronise")
    assert harness.measure(int, repeats=1).ends_in == "return"


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

    works = types.SimpleNamespace(
        __doc__="What works.\n\nMore.", run=run, table=lambda r: harness.render(r["rows"])
    )
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
