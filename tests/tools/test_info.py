"""`numbabuf info` and `numbabuf plan`: what they say, and that they say it without a device."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from numbabuf import _cuda, config
from numbabuf.tools import cli, info

ROOT = Path(__file__).resolve().parents[2]
TRACE = "arrival_ms,prompt,output\n0,70,3\n0,5,4\n100,1,0\n"


def test_what_is_here_is_told(backend):
    found = info.collect()
    assert found["backend"] == _cuda.backend() and found["device"]["name"]
    assert found["versions"]["numba"] == importlib.metadata.version("numba")
    assert list(found["tiers"]) == ["device", "managed", "pinned"]
    assert list(found["switches"]) == [switch.name for switch in config.SWITCHES]
    text = info.render(found)
    assert all(name in text for name in found["switches"])
    if backend == "simulator":
        assert "results, not speed" in text
    else:
        assert "free of" in found["tiers"]["device"] and "compute capability" in text


def test_what_is_missing_comes_with_its_command(monkeypatch):
    monkeypatch.setattr(info.importlib.util, "find_spec", lambda name: None)
    missing = {gap["module"]: gap["command"] for gap in info.collect()["missing"]}
    assert missing["matplotlib"] == "pip install 'numbabuf[plot]'"
    assert missing["numba_cuda"] == "pip install 'numbabuf[cu13]'"
    assert missing["matplotlib"] in info.render(info.collect())


def test_every_extra_named_is_one():
    lines = (ROOT / "setup.cfg").read_text().split("[options.extras_require]")[1].split("\n[")[0].splitlines()
    extras = {line.split("=")[0].strip() for line in lines if line[:1].isalnum()}
    assert {extra for extra, _ in info.EXTRAS.values()} | {"cu12", "cu13"} <= extras


def test_the_readme_lists_every_switch_and_every_extra():
    readme = (ROOT / "README.md").read_text()
    rows = dict(re.findall(r"^\| `(NUMBABUF_\w+)` \| (\w+) \|", readme, re.MULTILINE))
    assert rows == {switch.name: "on" if switch.default else "off" for switch in config.SWITCHES}
    assert all(f"`{extra}`" in readme for extra, _ in info.EXTRAS.values())


def test_a_bad_switch_is_shown_and_not_fatal(monkeypatch):
    monkeypatch.setenv("NUMBABUF_DEBUG", "perhaps")
    assert "neither on nor off, but 'perhaps'" in info.render(info.collect())


def test_without_a_device_everything_else_is_told(monkeypatch):
    monkeypatch.setattr(_cuda, "backend", lambda: "cuda")
    found = info.collect("the driver reports no device")
    assert (found["backend"], found["problem"], found["device"]) == (None, "the driver reports no device", {})
    assert set(found["tiers"].values()) == {"no device"}
    text = info.render(found)
    assert "none: the driver reports no device" in text and "NUMBA_ENABLE_CUDASIM=1" in text


def test_the_command(capsys):
    assert cli.main(["info"]) == 0
    assert "backend" in capsys.readouterr().out
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["numpy"]


def test_as_a_program_without_a_choice_of_backend():
    bare = {name: value for name, value in os.environ.items() if name not in ("NUMBA_ENABLE_CUDASIM", "LD_PRELOAD")}
    done = subprocess.run(
        [sys.executable, "-m", "numbabuf", "info"], capture_output=True, text=True, cwd=ROOT, env=bare
    )
    assert done.returncode == 0, done.stderr
    assert "backend" in done.stdout and "pinned" in done.stdout


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(TRACE)
    return str(path)


@pytest.mark.parametrize(("axis", "top"), [("tokens", 64), ("seqs", 8)])
def test_plan_prints_the_list_and_its_rivals(capsys, trace, axis, top):
    assert cli.main(["plan", trace, "--k", "3", "--axis", axis, "--max-tokens", "64", "--max-seqs", "8"]) == 0
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if line.startswith("buckets: "))
    assert line.endswith(str(top)) and line.count(",") == 2
    assert "vLLM" in out and "SGLang" in out and "TensorRT-LLM" in out and "padding %" in out


def test_plan_draws(capsys, trace, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    out = tmp_path / "plan.png"
    assert cli.main(["plan", trace, "--max-tokens", "64", "--plot", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["plan", trace, "--max-tokens", "64", "--plot", str(tmp_path / "plan.nothing")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_plan_refuses_what_it_cannot_do(capsys, trace, tmp_path, monkeypatch):
    bad = tmp_path / "bad.csv"
    bad.write_text("arrival_ms,prompt,output\n0,x,1\n")
    assert cli.main(["plan", str(bad)]) == 2
    assert f"{bad}:2" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", trace, "--plot", str(tmp_path / "no" / "plan.png")])
    assert stop.value.code == 2
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", trace, "--plot", str(tmp_path / "plan.png")])
    assert stop.value.code == 2 and "numbabuf[plot]" in capsys.readouterr().err
