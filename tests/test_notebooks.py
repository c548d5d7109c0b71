"""The notebooks run: every code cell in order, in this process, without a kernel server.

A notebook has at most 15 cells and no magics, says in its first cell what device it was run on, stores its outputs,
and ends in a cell that asserts and plots. Needs matplotlib; 05 says itself what else it needs.
"""

import importlib.util
import json
import pathlib
import sys
import types

import pytest

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NEEDS = {"05_many_gpus": "distributed"}


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def program(path):
    """The code cells as one program; a marker above each says where a traceback came from."""
    return "\n\n".join(f"# cell {at}\n{source(cell)}" for at, cell in enumerate(cells(path, "code"), 1))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_form(path):
    code, every = cells(path, "code"), json.loads(path.read_text())["cells"]
    assert len(every) <= 15
    first = source(code[0])
    assert "device" in first and "device" in "".join(map(str, code[0]["outputs"])), "the first cell states the device"
    assert "assert " in source(code[-1]) and any("image/png" in out.get("data", {}) for out in code[-1]["outputs"])
    for number, cell in enumerate(code, 1):
        assert not any(line.lstrip().startswith(("%", "!")) for line in source(cell).splitlines()), "a magic"
        assert cell["execution_count"] == number, "run it from its top"
        assert not any(out["output_type"] == "error" for out in cell["outputs"])
    assert sum(bool(cell["outputs"]) for cell in code) >= len(code) / 2, "outputs are not stored"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    need = NEEDS.get(path.stem)
    if need and importlib.util.find_spec(need) is None:
        pytest.skip(f"{need} is not installed")
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    file = tmp_path / f"{path.stem}.py"  # a file, so that kernels find their source
    file.write_text(program(path))
    monkeypatch.chdir(tmp_path)
    # As in a notebook, this `__main__` is no file that the processes which it starts would run in their turn.
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    try:
        exec(compile(file.read_text(), str(file), "exec"), main.__dict__)
    finally:
        plt.close("all")
