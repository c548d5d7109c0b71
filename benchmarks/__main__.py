"""Run benchmarks by name, or `plot` what was measured; the names are the modules of this package."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import pkgutil
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __path__ as _path
from . import harness


def names() -> list[str]:
    """Every benchmark there is."""
    return [name for _, name, _ in pkgutil.iter_modules(_path) if name != "harness" and not name.startswith("_")]


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _first_line(name: str) -> str:
    return (importlib.import_module(f"benchmarks.{name}").__doc__ or "").strip().partition("\n")[0]


def _parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:12} {_first_line(name)}" for name in names())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure numbabuf and what it competes with.",
        epilog=f"benchmarks:\n{listing}\n\npictures of results: python -m benchmarks plot RESULTS.json... (see --help)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="+", choices=[*names(), "all"], metavar="NAME", help="or all of them")
    parser.add_argument("--smoke", action="store_true", help="smallest sizes and few repeats: does it run?")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write environment and results to this file")
    parser.add_argument(
        "--set",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the benchmark's own; only with a single benchmark",
    )
    return parser


def _plot(argv: Sequence[str]) -> int:
    """Draw pictures of result files, one for each benchmark that has one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks plot", description="Draw results; needs matplotlib.")
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.json", help="what --json wrote")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to; default: beside each file")
    parser.add_argument("--format", choices=["svg", "png"], default="svg", help="default: svg")
    arguments = parser.parse_args(argv)
    from . import _plots

    try:
        for file in arguments.results:
            for picture in _plots.draw(file, arguments.out or file.parent, arguments.format):
                print(picture)
    except (ImportError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks asked for; returns 1 if one of them failed, after running the others."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["plot"]:
        return _plot(argv[1:])
    parser = _parser()
    arguments = parser.parse_args(argv)
    chosen = names() if "all" in arguments.name else list(dict.fromkeys(arguments.name))
    if arguments.set and len(chosen) > 1:
        parser.error(f"--set belongs to a single benchmark, and {len(chosen)} were asked for")
    found = harness.environment()
    print(harness.describe(found), flush=True)
    results: dict[str, Any] = {}
    failed: list[str] = []
    document = {"environment": found, "smoke": arguments.smoke, "results": results, "failed": failed}
    for name in chosen:
        benchmark = importlib.import_module(f"benchmarks.{name}")
        print(f"\n{name}: {_first_line(name)}", flush=True)
        start = time.perf_counter()
        try:
            results[name] = benchmark.run(arguments.smoke, **dict(arguments.set))
            print(benchmark.table(results[name]))
        except Exception:
            traceback.print_exc()
            failed.append(name)
        print(f"({time.perf_counter() - start:.1f} s)", flush=True)
        if arguments.json:  # after each of them: a run that is ended early keeps what it has
            arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
